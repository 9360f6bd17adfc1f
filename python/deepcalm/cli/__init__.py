"""The command line: one module for each group of commands."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

import click

from . import batch, bench, chat, check, files, run, serve
from .common import FAILED, INTERRUPTED, Cli, abandon_stdout, check_streams, on_terminate, say


def _version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from .. import _core

        built = Path(_core.__file__).with_name("build.txt")
        how = {(True, False): "", (True, True): " (emulated)", (False, False): " (not here)"}
        isas = (isa["name"] + how[isa["supported"], isa["emulated"]] for isa in _core.isas())
        click.echo(f"deepcalm {_core.__version__}")
        click.echo(built.read_text().rstrip() if built.is_file() else "commit and compiler unknown (not installed)")
        click.echo("instruction sets " + ", ".join(isas))
        ctx.exit()


@click.group(
    cls=Cli,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
Examples:
  deepcalm generate "Once upon a time"
  deepcalm pack ~/models/DeepSeek-V2-Lite v2-lite.dcalm --dtype q8
  deepcalm chat -m v2-lite.dcalm
Completion of commands, options and files, here for bash (zsh, fish): eval "$(_DEEPCALM_COMPLETE=bash_source deepcalm)"
Exit codes: 0 done, 1 failed (one line says why), 2 wrong usage (the command line alone shows it), 130 interrupted.""",
)
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_version,
              help="Print the version, its commit and compiler, and the instruction sets.")  # fmt: skip
def cli() -> None:
    """Run DeepSeek-type models (MLA, mixture of experts) on this machine, exactly."""


for _module in (run, chat, serve, batch, files, check, bench):
    for _command in _module.COMMANDS:
        cli.add_command(_command)


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command line (None: the process's own); returns the exit code."""
    if args is None:
        check_streams()
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:  # not what nohup ignores
                signal.signal(number, on_terminate)
    try:
        code = cli.main(args=args, prog_name="deepcalm", standalone_mode=False)
    except click.ClickException as e:
        e.show()
        return e.exit_code
    except click.Abort:
        return INTERRUPTED
    except OSError as e:  # the help could not be written
        abandon_stdout()
        say(f"deepcalm: error: standard output: {e.strerror or e}")
        return FAILED
    return code if isinstance(code, int) else 0
