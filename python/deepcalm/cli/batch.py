"""The command ``batch``: a file of prompts in, a file of answers out."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import platform
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from ..errors import Error, ResourceError, utf8
from .common import INTERRUPTED, SAMPLING, note_memory, open_model, options, progress, say

if TYPE_CHECKING:
    from ..batch import Batch
    from ..batch_file import Output
    from ..batch_lines import Line, Settings

AHEAD = 4  # lines read before the first one is done, for each of --max-sequences


@click.command(
    epilog="""\b
Examples:
  deepcalm batch -m v2-lite.dcalm prompts.jsonl answers.jsonl
  deepcalm batch -m v2-lite.dcalm --max-sequences 32 --temp 0.7 -n 500 prompts.jsonl answers.jsonl
  echo '{"prompt": "Once upon a time"}' | deepcalm batch - -
A line of IN: {"id": "a", "prompt": "Once"}, or "messages" in its place, with temperature, top_p, top_k, min_p, seed,
stop, max_tokens, logprobs as the line likes; or a line of OpenAI's batches (custom_id, body)."""
)
@click.argument("source", metavar="IN.jsonl", type=click.Path())
@click.argument("target", metavar="OUT.jsonl", type=click.Path())
@options("--model")
@click.option("--overwrite", is_flag=True, help="Start anew: forget the lines that OUT has, if batch wrote them.")
@options("--max-sequences", "--cache-bytes", "--max-tokens", *(name for name in SAMPLING if name != "--seed"))
@click.option(
    "-s", "--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True, metavar="S",
    help="From it and its id each line gets a seed of its own, unless it has one.",
)  # fmt: skip
@options("--device", "--threads", "--isa", "--ctx", "--kv", "--lock", "--quiet")
def batch(source: str, target: str, overwrite: bool, quiet: bool, path: Path | None, **given: Any) -> int:
    """Answer every line of IN.jsonl in OUT.jsonl, in the order of the lines.

    Started again after an end of any kind, the same command goes on behind the lines that OUT has; OUT gets the same
    bytes however often that was, and with any --max-sequences, --threads and --draft. "-": standard input, output,
    which cannot be gone on with. OUT.jsonl.run has what OUT was made from.
    """
    from ..batch_lines import Settings

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is written stays, as with Ctrl-C
    try:
        model = open_model(path, given["device"], given["threads"], given["isa"], quiet, given["lock"])
        sampling = {k: given[k] for k in ("temp", "top_p", "top_k", "min_p") if given[k] is not None}
        date = datetime.now().isoformat(timespec="seconds")
        values = (given["seed"], given["max_tokens"] or 256, given["stop"], sampling)
        settings = Settings(utf8(model.path.stem), date, *values)
        shape = {k: given[k] for k in ("max_sequences", "ctx", "kv", "cache_bytes", "draft")}
        with model.batch(**shape) as work:
            note_memory(model, work.cache_bytes, quiet)
            return _Run(work, settings, quiet).files(source, target, overwrite)
    finally:
        signal.signal(signal.SIGTERM, before)


class _Run:
    """One start of the command: what was done so far, and the bar that shows it."""

    def __init__(self, batch: Batch, settings: Settings, quiet: bool) -> None:
        self.batch, self.settings, self.quiet = batch, settings, quiet
        self.total: int | None = None  # lines of the input
        self.done = self.kept = self.errors = self.tokens = 0
        self.start = time.monotonic()

    def files(self, source: str, target: str, overwrite: bool) -> int:
        """From file to file; exit code."""
        from ..batch_file import Output
        from ..batch_lines import Line, read_lines, unique

        with contextlib.ExitStack() as stack:
            whole = source != "-" and Path(source).is_file()
            file: BinaryIO = sys.stdin.buffer if source == "-" else stack.enter_context(Path(source).open("rb"))
            size, sha256 = self._survey(file, source) if whole else (None, None)
            run = self._record() | {"input_bytes": size, "input_sha256": sha256}
            output = stack.enter_context(Output(target, run, overwrite))
            for name in (source,) * (not whole) + (target,) * output.stream:
                say(f"note: {name} is a stream: this run cannot be gone on with", self.quiet)
            digest = hashlib.sha256()
            lines = unique(Line.parse(data, number) for number, data in read_lines(file, digest))
            again = "; the same command goes on from there" if whole and not output.stream else ""
            code = self._answer(lines, output, again)
            if code == 0 and whole and digest.hexdigest() != sha256:
                raise Error(f"{source}: changed while it was read; what {target} has is of both states")
        if code == 0:
            there = f" ({self.kept} were there)" if self.kept else ""
            rate = f"; {self.tokens} tokens, {self._rate():.1f} tok/s" if self.done else ""
            say(f"{self.kept + self.done} lines{there}, {self.errors} of them in error, complete{rate}", self.quiet)
        return code

    def _survey(self, file: BinaryIO, name: str) -> tuple[int, str]:
        """Size and hash of the input, which is counted and then at its beginning again."""
        from ..batch_lines import read_lines

        digest, self.total, size = hashlib.sha256(), 0, Path(name).stat().st_size
        with progress(f"reading {name}", self.quiet, "bytes", delay=1) as update:
            for _ in read_lines(file, digest):
                self.total += 1
                if update is not None and self.total % 1024 == 0:
                    update(file.tell(), size)
        size = file.tell()
        file.seek(0)
        return size, digest.hexdigest()

    def _record(self) -> dict[str, Any]:
        """All that OUT's bytes depend on but the input."""
        from .. import _core

        model = self.batch.model
        others = {name: importlib.metadata.version(name) for name in ("tokenizers", "jinja2")}
        return {
            "deepcalm": _core.__version__, "python": ".".join(platform.python_version_tuple()[:2]), **others,
            "model_sha256": model.header_sha256, "device": model.device, "isa": model.isa, "kv": self.batch.kv,
            "ctx": self.batch.ctx, **asdict(self.settings),
        }  # fmt: skip

    def _answer(self, lines: Iterator[Line], output: Output, again: str) -> int:
        """Writes the results of ``lines`` that OUT does not have; exit code. again: what is said of starting anew."""
        from ..batch_lines import Lines

        try:
            with progress(f"{self.settings.model} lines", self.quiet, "tok/s") as update:
                for error in output.keep(lines):
                    self.kept += 1
                    self.errors += error
                    if update is not None and self.kept % 1024 == 0:
                        update(self.kept, self.total)
                self.start = time.monotonic()
                work = Lines(self.batch, replace(self.settings, date=output.run["date"]))
                for started, result in work.run(lines, AHEAD * self.batch.max_sequences):
                    output.append(result)
                    self.done += 1
                    self.errors += started.line.error is not None
                    self.tokens += started.tokens
                    if update is not None:
                        update(self.kept + self.done, self.total, self._rate())
        except KeyboardInterrupt:
            say(f"\ninterrupted after {self.kept + self.done} lines{again}")
            return INTERRUPTED
        except (ResourceError, MemoryError) as e:
            why = str(e) or "out of memory"
            raise ResourceError(f"{why}; {self.kept + self.done} lines are done{again}") from None
        return 0

    def _rate(self) -> float:
        return self.tokens / max(time.monotonic() - self.start, 1e-9)


COMMANDS = (batch,)
