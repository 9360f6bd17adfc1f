"""The command ``batch``: a file of prompts in, a file of answers out."""

from __future__ import annotations

import contextlib
import hashlib
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from ..errors import Error, ResourceError, UnsupportedError, utf8
from .common import INTERRUPTED, SAMPLING, note_memory, open_model, options, progress, say

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..batch_file import Output
    from ..batch_lines import Line, Result, Settings

    Answer = Callable[[Settings, Iterator[Line]], Iterator[Result]]  # results in the order of the lines
    Work = tuple[dict[str, Any], Answer]  # all that results depend on but lines and settings; who makes them

HERE = "here"  # --ray without an address


def _address(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    if value is not None and Path(value).is_file():
        raise click.BadParameter(f"{value} is a file, not HOST:PORT of a cluster; --ray without one goes to the end")
    return value


@click.command(
    epilog="""\b
Examples:
  deepcalm batch -m v2-lite.dcalm prompts.jsonl answers.jsonl
  deepcalm batch -m v2-lite.dcalm --max-sequences 32 --temp 0.7 -n 500 prompts.jsonl answers.jsonl
  echo '{"prompt": "Once upon a time"}' | deepcalm batch - -
  deepcalm batch -m /models/v3.dcalm prompts.jsonl answers.jsonl --ray 10.0.0.1:6379
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
@click.option(
    "--ray", is_flag=False, flag_value=HERE, metavar="[ADDRESS]", callback=_address,
    help="Work on every node of the Ray cluster whose head is at HOST:PORT (default: the one that runs here).",
)  # fmt: skip
@options("--device", "--threads", "--isa", "--ctx", "--kv", "--lock", "--quiet")
def batch(source: str, target: str, overwrite: bool, quiet: bool, path: Path | None, **given: Any) -> int:
    """Answer every line of IN.jsonl in OUT.jsonl, in the order of the lines.

    Started again after an end of any kind, the same command goes on behind the lines that OUT has; OUT gets the same
    bytes however often that was, and with any --max-sequences, --threads and --draft. "-": standard input, output,
    which cannot be gone on with. OUT.jsonl.run has what OUT was made from.
    """
    from ..batch_lines import Settings
    from ..model import demo_path

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is written stays, as with Ctrl-C
    try:
        sampling = {k: given[k] for k in ("temp", "top_p", "top_k", "min_p") if given[k] is not None}
        date = datetime.now().isoformat(timespec="seconds")
        values = (given["seed"], given["max_tokens"] or 256, given["stop"], sampling)
        settings = Settings(utf8((path or demo_path()).stem), date, *values)
        shape = {k: given[k] for k in ("max_sequences", "ctx", "kv", "cache_bytes", "draft", "drafter")}
        with (_here if given["ray"] is None else _on_cluster)(path, shape, given, quiet) as (record, answer):
            return _Run(record, answer, settings, quiet).files(source, target, overwrite)
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _here(path: Path | None, shape: dict[str, Any], given: dict[str, Any], quiet: bool) -> Iterator[Work]:
    """One model of this process."""
    from ..batch_file import record
    from ..batch_lines import AHEAD, Lines

    model = open_model(path, given["device"], given["threads"], given["isa"], quiet, given["lock"])
    with model.batch(**shape) as work:
        note_memory(model, work.cache_bytes, quiet)
        yield record(work), lambda settings, lines: Lines(work, settings).run(lines, AHEAD * work.max_sequences)


@contextlib.contextmanager
def _on_cluster(path: Path | None, shape: dict[str, Any], given: dict[str, Any], quiet: bool) -> Iterator[Work]:
    """A model on every node of a Ray cluster."""
    from ..cluster import Crew, Setup

    if given["device"] != "cpu":
        raise UnsupportedError(f"--ray works on processors so far, not with --device {given['device']}")
    setup = Setup.of(path, given["threads"], shape, given["lock"])
    address = None if given["ray"] == HERE else given["ray"]
    with Crew(address, setup, given["isa"], lambda text: say(text, quiet)) as crew:
        yield crew.record, crew.run


class _Run:
    """One start of the command: what was done so far, and the bar that shows it."""

    def __init__(self, record: dict[str, Any], answer: Answer, settings: Settings, quiet: bool) -> None:
        self.record, self.answer, self.settings, self.quiet = record, answer, settings, quiet
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
            run = self.record | asdict(self.settings) | {"input_bytes": size, "input_sha256": sha256}
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

    def _answer(self, lines: Iterator[Line], output: Output, again: str) -> int:
        """Writes the results of ``lines`` that OUT does not have; exit code. again: what is said of starting anew."""
        try:
            with progress(f"{self.settings.model} lines", self.quiet, "tok/s") as update:
                for error in output.keep(lines):
                    self.kept += 1
                    self.errors += error
                    if update is not None and self.kept % 1024 == 0:
                        update(self.kept, self.total)
                self.start = time.monotonic()
                for result in self.answer(replace(self.settings, date=output.run["date"]), lines):
                    output.append(result.data)
                    self.done += 1
                    self.errors += result.error
                    self.tokens += result.tokens
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
