"""The output of ``deepcalm batch``: OUT grows by whole lines, OUT.run beside it says what they were made from."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import platform
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from . import _core
from .batch_lines import Line
from .closing import Closing
from .errors import Error, ResourceError, one_line
from .files.safetensors import check_output, parse_json, whole_file

if TYPE_CHECKING:
    from .batch import Batch


def record(batch: Batch) -> dict[str, Any]:
    """All that the bytes of results depend on but lines and ``Settings``."""
    model = batch.model
    others = {name: importlib.metadata.version(name) for name in ("tokenizers", "jinja2")}
    return {
        "deepcalm": _core.__version__, "python": ".".join(platform.python_version_tuple()[:2]), **others,
        "model_sha256": model.header_sha256, "device": model.device, "isa": model.isa, "kv": batch.kv,
        "ctx": batch.ctx,
    }  # fmt: skip


class Output(Closing):
    """OUT, open and locked, or a stream ("-": standard output; a pipe, a device), which keeps nothing.

    Args:
        run: all that its bytes depend on, with the date of this start; all but the date must be what OUT.run says.
        overwrite: start anew, if there is an OUT.run.

    Attributes:
        run: the same, with the date of the first start.

    Raises:
        Error: an OUT that has no OUT.run, another process that writes it, or a difference.
        ResourceError: it cannot be written.
    """

    def __init__(self, name: str, run: Mapping[str, Any], overwrite: bool) -> None:
        self.path = path = Path(name)
        self._standard = name == "-"
        self.stream = self._standard or (path.exists() and not path.is_file() and not path.is_dir())
        self._file: BinaryIO
        if self.stream:
            self._file, self.run = sys.stdout.buffer if self._standard else path.open("wb", buffering=0), dict(run)
            return
        check_output(path)
        self._file = path.open("a+b")
        try:
            self.run = self._open(run, overwrite)
        except BaseException:
            self.close()
            raise

    def _open(self, run: Mapping[str, Any], overwrite: bool) -> dict[str, Any]:
        path, file = self.path, self.path.with_name(self.path.name + ".run")
        run = json.loads(json.dumps(run))  # as it is read again
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Error(f"{path}: another deepcalm batch is writing it") from None
        begun = file.is_file()
        if not begun and path.stat().st_size:
            raise Error(f"{path}: exists and is left as it is, as no {file.name} says that deepcalm batch wrote it; "
                        "name another OUT")  # fmt: skip
        found = parse_json(file.read_bytes(), str(file), Error) if begun else {}
        if begun and (not isinstance(found, dict) or "deepcalm" not in found):  # another's, or IN itself
            raise Error(f"{file}: is there, and no record of deepcalm batch; name another OUT")
        if begun and not overwrite:
            for key, now in run.items():
                before = found.get(key)
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
        if self.stream:
            return
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
            response = value.get("response")
            yield bool(value.get("error")) or (isinstance(response, dict) and response.get("status_code") != 200)
        self._file.truncate(end)

    def append(self, line: bytes) -> None:
        """Writes a line at once.

        Raises:
            ResourceError: it cannot be written; what was written of it will be cut off.
            OSError: the same of standard output.
        """
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as e:
            if self._standard:
                raise
            raise ResourceError(f"{self.path}: {e.strerror or e}") from None

    def close(self) -> None:
        """Closes OUT and gives up its lock."""
        if not self._standard:
            with contextlib.suppress(OSError):  # what could not be written was said
                self._file.close()


def _show(value: object) -> str:
    return one_line("nothing" if value is None else value, 40)
