"""The command line, ``deepcalm`` and ``python -m deepcalm``: nothing is imported before Ctrl-C is provided for."""

from __future__ import annotations

import signal
import sys


def main() -> int:
    """Entry point of the console script; returns the exit code."""
    try:
        from . import cli

        code = cli.main()
    except KeyboardInterrupt:  # while that was imported
        print("\ninterrupted", file=sys.stderr)
        code = 130
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while the interpreter ends
    return code


if __name__ == "__main__":
    sys.exit(main())
