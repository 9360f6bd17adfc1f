"""The output of ``deepcalm batch``: OUT grows by whole lines, OUT.run beside it says what they were made from."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from .batch_lines import Line
from .closing import Closing
from .errors import Error, ResourceError, one_line
from .files.safetensors import check_output, parse_json, whole_file


class Output(Closing):
    """OUT, open and locked. ``run``: all that its bytes depend on, with the date of its first start.

    Args:
        run: of this start; all but its date must be what OUT.run says.
        overwrite: start anew, if there is an OUT.run.

    Raises:
        Error: an OUT that has no OUT.run, another process that writes it, or a difference.
        ResourceError: it cannot be written.
    """

    def __init__(self, path: Path, run: Mapping[str, Any], overwrite: bool) -> None:
        self.path, self._run_path = path, path.with_name(path.name + ".run")
        check_output(path)
        self._file = path.open("a+b")
        try:
            self.run = self._open(run, overwrite)
        except BaseException:
            self.close()
            raise

    def _open(self, run: Mapping[str, Any], overwrite: bool) -> dict[str, Any]:
        path, file = self.path, self._run_path
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Error(f"{path}: another deepcalm batch is writing it") from None
        begun = file.is_file()
        if not begun and path.stat().st_size:
            raise Error(f"{path}: exists and is left as it is, as no {file.name} says that deepcalm batch wrote it; "
                        "name another OUT")  # fmt: skip
        if begun and not overwrite:
            found = parse_json(file.read_bytes(), str(file), Error)
            for key, now in run.items():
                before = found.get(key) if isinstance(found, dict) else None
                stream = key == "input_sha256" and now is None
                if key != "date" and (before != now or stream):
                    what = f"was begun with {key} {_show(before)}, this is {_show(now)}"
                    what = "was made from a stream" if before == now else what
                    raise Error(f"{path}: {what}; --overwrite starts it anew")
            return dict(found)
        self._file.truncate(0)  # first, so that OUT.run is never about another run's lines
        with whole_file(file) as name:
            name.write_text(json.dumps(run, indent=2) + "\n")
        return dict(run)

    def keep(self, lines: Iterator[Line]) -> Iterator[bool]:
        """Goes past ``lines`` whose results OUT has: for each, whether it is an error. A part of a line is cut off.

        Raises:
            Error: something that is not the result of its line.
        """
        end = 0
        self._file.seek(0)
        for number, data in enumerate(self._file, 1):
            if not data.endswith(b"\n"):
                break
            where = f"{self.path}: line {number}"
            value, line = parse_json(data, where, Error), next(lines, None)
            if line is None or not line.has(value):
                of = "no line of the input" if line is None else f"not line {line.number} of the input"
                raise Error(f"{where} is the result of {of}: it was changed; --overwrite starts it anew")
            end += len(data)
            yield bool(value.get("error") or (value.get("response") or {}).get("status_code", 200) != 200)
        self._file.truncate(end)

    def append(self, line: bytes) -> None:
        """Raises ResourceError if it cannot be written; what was written of it will be cut off."""
        append(self._file, self.path, line)

    def close(self) -> None:
        """Closes OUT and gives up its lock."""
        with contextlib.suppress(OSError):  # what could not be written was said
            self._file.close()


def append(file: BinaryIO, path: Path, line: bytes) -> None:
    """Writes a line at once. Raises ResourceError, but a reader that has left is a BrokenPipeError."""
    try:
        file.write(line)
        file.flush()
    except BrokenPipeError:
        raise
    except OSError as e:
        raise ResourceError(f"{path}: {e.strerror or e}") from None


def _show(value: object) -> str:
    return one_line("nothing" if value is None else value, 40)
