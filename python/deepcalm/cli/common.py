"""What the commands share: options, exit codes, output, opening a model with the checks that come first.

Text that was asked for goes to stdout, everything else to stderr. Heavy imports happen inside functions: ``--help``
needs none of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import CheckpointError, Error, one_line, utf8
from ..names import DEVICES, ISAS, KV_TYPES, TEMPLATE_PARAMETERS

if TYPE_CHECKING:
    from ..model import Model
    from ..session import Session

F = TypeVar("F", bound=Callable[..., Any])
FAILED, INTERRUPTED = 1, 130

POSITIVE = click.IntRange(min=1)
FILE = click.Path(path_type=Path)


def _stop(_ctx: click.Context, _param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    if not all(value):
        raise click.BadParameter("must not be empty")
    escapes = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}
    return tuple(re.sub(r"\\([nrt\\])", lambda m: escapes[m[1]], s) for s in value)


def _json_object(_ctx: click.Context, _param: click.Parameter, value: str | None) -> dict[str, Any]:
    try:
        found = json.loads(value or "{}")
    except (ValueError, RecursionError) as e:
        raise click.BadParameter(f"not JSON: {e}") from None
    if not isinstance(found, dict) or not found.keys().isdisjoint(TEMPLATE_PARAMETERS):
        raise click.BadParameter('expected a JSON object without "messages", as in {"enable_thinking": false}')
    return found


def _draft(_ctx: click.Context, _param: click.Parameter, value: str) -> str | int:
    if value in ("off", "auto"):
        return value
    if not re.fullmatch(r"[0-7]", value):
        raise click.BadParameter(f"{value!r}, expected off, auto or a number 0..7")
    return int(value)


def _drafter(_ctx: click.Context, _param: click.Parameter, value: str) -> str:
    if value != "auto":
        from ..drafters import check_drafter

        try:
            check_drafter(value)
        except ValueError as e:
            raise click.BadParameter(str(e).removeprefix("drafter: ")) from None
    return value


# fmt: off
_OPTIONS: dict[str, dict[str, Any]] = {
    "--model": {"type": FILE, "metavar": "FILE", "help": "Packed file (default: the demo model)."},
    "--max-tokens": {"type": POSITIVE, "metavar": "N", "help": "New tokens at most (default: 256, in chat no limit)."},
    "--temp": {"type": click.FloatRange(min=0), "metavar": "T",
               "help": "Temperature; 0 always takes the most probable token. This and the next three default to the "
               "checkpoint's generation_config, else to 0 and no limits."},
    "--top-p": {"type": click.FloatRange(0, 1, min_open=True), "metavar": "P",
                "help": "Only the best tokens that make up this probability."},
    "--top-k": {"type": click.IntRange(0, 2**31 - 1), "metavar": "K", "help": "Only the K best tokens."},
    "--min-p": {"type": click.FloatRange(0, 1), "metavar": "P",
                "help": "Only tokens at least P times as probable as the best one."},
    "--seed": {"type": click.IntRange(0, 2**64 - 1), "metavar": "S",
               "help": "Same seed, same text (default: a random one, which is reported)."},
    "--stop": {"multiple": True, "metavar": "STR", "callback": _stop,
               "help": "End before this text or special token; \\n, \\r, \\t, \\\\ are understood; repeatable."},
    "--draft": {"default": "auto", "show_default": True, "metavar": "off|auto|K", "callback": _draft,
                "help": "Drafts per pass, auto: as many as pay. The text is the same with any."},
    "--drafter": {"default": "auto", "show_default": True, "metavar": "NAME,...", "callback": _drafter,
                  "help": "Who drafts: mtp (the MTP layer), ngram (the text itself, where it repeats itself) or "
                  "model:FILE (another model with the same tokens); auto: the first two."},
    "--system": {"metavar": "TEXT", "help": "System message of the chat template."},
    "--chat-template-kwargs": {"metavar": "JSON", "callback": _json_object,
                               "help": 'Switches of the chat template, as in \'{"enable_thinking": false}\'.'},
    "--device": {"type": click.Choice(DEVICES[:3]), "default": "cpu", "show_default": True,
                 "help": "Where to compute."},
    "--threads": {"type": click.IntRange(1, 1024), "metavar": "N", "help": "Threads (default: as many as pay)."},
    "--isa": {"type": click.Choice(ISAS), "help": "Instruction set (default: the best that this processor has)."},
    "--ctx": {"type": POSITIVE, "metavar": "N",
              "help": "Positions in the cache (default: the model's maximum, at most 4096)."},
    "--kv": {"type": click.Choice(KV_TYPES), "default": "auto", "show_default": True,
             "help": "Type of the cache; auto: bf16 with the instruction set amx, else f16."},
    "--max-sequences": {"type": click.IntRange(1, 64), "default": 8, "show_default": True, "metavar": "N",
                        "help": "Sequences that share a pass, at most."},
    "--cache-bytes": {"type": POSITIVE, "metavar": "N",
                      "help": "Memory for all caches together (default: what --max-sequences of --ctx need)."},
    "--lock": {"is_flag": True, "help": "Keep the weights in memory (mlock)."},
    "--json": {"is_flag": True, "help": "One JSON object on stdout."},
    "--quiet": {"is_flag": True, "help": "Nothing on stderr but errors."},
}
# The first long name is the argument's; the others are llama.cpp's.
_NAMES = {"--model": ("-m", "--model", "path"), "--max-tokens": ("-n", "--max-tokens", "--n-predict"),
          "--temp": ("--temp", "--temperature"), "--seed": ("-s", "--seed"), "--threads": ("-t", "--threads"),
          "--ctx": ("-c", "--ctx", "--ctx-size"), "--system": ("--system", "--system-prompt"),
          "--chat-template-kwargs": ("--chat-template-kwargs", "template_options"),
          "--json": ("--json", "as_json"), "--quiet": ("-q", "--quiet")}
# fmt: on
SAMPLING = ("--temp", "--top-p", "--top-k", "--min-p", "--seed", "--stop", "--draft", "--drafter")
RUNTIME = ("--device", "--threads", "--isa", "--ctx", "--kv")


def options(*names: str) -> Callable[[F], F]:
    """Decorator: these shared options, listed by --help in this order."""

    def add(command: F) -> F:
        for name in reversed(names):
            command = click.option(*_NAMES.get(name, (name,)), **_OPTIONS[name])(command)
        return command

    return add


def say(message: str, quiet: bool = False) -> None:
    """A line on stderr, unless ``quiet``."""
    if not quiet:
        click.echo(utf8(message), err=True)


def write(text: str) -> None:
    """Text on stdout at once, UTF-8 whatever the locale; a file name's other bytes as \\udcNN, which JSON has too."""
    sys.stdout.buffer.write(text.encode("utf-8", "backslashreplace"))
    sys.stdout.buffer.flush()


def write_json(value: object) -> None:
    """One JSON object on stdout; a number that JSON has no word for is null."""
    text = json.dumps(json.loads(json.dumps(value), parse_constant=lambda _: None), ensure_ascii=False, indent=2)
    # control characters that JSON may hold as they are, and a terminal would obey
    write(re.sub(r"[\x7f-\x9f]", lambda m: f"\\u{ord(m[0]):04x}", text) + "\n")


def abandon_stdout() -> None:
    """After a failed write: nothing more goes out, not even at interpreter exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Ctrl-C inside the block takes effect behind it; a second one at once (the output may be blocked)."""
    pending = False

    def handler(_signal: int, _frame: object) -> None:
        nonlocal pending
        if pending:
            raise KeyboardInterrupt
        pending = True

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pending:
        raise KeyboardInterrupt


class Cli(click.Group):
    """The command group; turns exceptions into exit codes and one line on stderr."""

    def invoke(self, ctx: click.Context) -> Any:
        """Exit code of the command (None: 0)."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            say("\ninterrupted")
            return INTERRUPTED
        except BrokenPipeError:  # the reader has what it wanted
            abandon_stdout()
            return 0
        except Error as e:
            say(f"deepcalm: error: {e}")
        except MemoryError as e:
            say(f"deepcalm: error: out of memory: {e}")
        except RuntimeError as e:
            if "new thread" not in str(e):
                raise
            say(f"deepcalm: error: {e}: a limit of address space (ulimit -v) or of processes is reached")
        except OSError as e:
            if e.filename is None:  # not a file that was named, so it was the output
                abandon_stdout()
            say(f"deepcalm: error: {e.filename or 'standard output'}: {e.strerror or e}")
        return FAILED


def one_file(path: Path | None, file: Path | None) -> Path | None:
    """What a command line calls FILE, or names with -m."""
    if path is not None and file is not None:
        raise click.UsageError("either FILE or --model")
    return file if path is None else path


def is_hub_id(name: str) -> bool:
    """Whether it reads ORG/NAME, as models of the Hugging Face Hub are called, and is nothing here."""
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name, re.ASCII) is None or os.path.lexists(name):
        return False
    return Path(name).suffix not in (".dcalm", ".gguf", ".safetensors")


def model_file(path: Path | None) -> Path:
    """The packed file that a command line means: ``path``, or the demo model's.

    Raises:
        Error: it is none, but something that one can be made from, or nothing at all: the message has the command.
    """
    from ..files.config import quantisation
    from ..files.safetensors import parse_json
    from ..model import demo_path

    if path is None:
        return demo_path()
    here, name = os.path.lexists(path), path.resolve().name.removesuffix(".dcalm") or "model"
    folder = path.parent if path.is_file() and path.suffix in (".safetensors", ".json") else path
    if folder.is_dir():
        if (config := folder / "config.json").is_file():
            raw = parse_json(config.read_bytes(), str(config), CheckpointError)
            quantisation(raw if isinstance(raw, dict) else {}, str(config))
            what = "a checkpoint" if folder == path else "a file of a checkpoint"
            target = shlex.quote((folder.resolve().name or "model") + ".dcalm")
            raise Error(f"{path} is {what}, not a packed file; pack it first: "
                        f"deepcalm pack {shlex.quote(str(folder))} {target}")  # fmt: skip
        if folder == path:
            raise Error(f"{path} is a directory, expected a packed file (.dcalm){packed_files(path)}")
    if not here and is_hub_id(str(path)):
        raise Error(f"{path}: no such file; a model of the Hugging Face Hub? Then download and pack it: "
                    f"deepcalm pack {path} {name}.dcalm")  # fmt: skip
    if not here:
        raise Error(f"{path}: no such file{packed_files(path.parent)}; to make it from a checkpoint: "
                    f"deepcalm pack FOLDER {shlex.quote(str(path))}")  # fmt: skip
    return path


def packed_files(folder: Path) -> str:
    """The first packed files of a folder, as the end of a message."""
    names = sorted(p.name for p in folder.glob("*.dcalm"))[:3]
    return f"; in {folder} there is {one_line(', '.join(names), 100)}" if names else ""


def open_model(
    path: Path | None, device: str, threads: int | None, isa: str | None, quiet: bool, lock: bool | None = None
) -> Model:
    """The model of a command line. lock: True or False also read a cold file into memory; True keeps it there.

    Raises:
        Error: it is no packed file (``model_file``).
    """
    from ..model import Model

    model = Model(model_file(path), device=device, threads=threads, isa=isa)
    for note in model.notes:
        say(note, quiet)
    if lock is not None:
        read_cold(model, quiet)
    if lock:
        model.lock()
    return model


def read_cold(model: Model, quiet: bool) -> None:
    """Reads a file that is not in memory from end to end, many times faster than pages in the order of their use.

    Not if it does not fit: then pages must come as they are needed.
    """
    from ..limits import available_memory

    share, available = model.cold_share(), available_memory()
    if share < 0.05 or available is None or share * model.file_bytes > available:
        return
    buffer, done = bytearray(8 << 20), 0
    with model.path.open("rb", buffering=0) as f, progress(f"reading {model.path.name}", quiet, "bytes") as update:
        while n := f.readinto(buffer):
            done += n
            if update is not None:
                update(done, model.file_bytes)


def open_session(
    model: Model, ctx: int | None, kv: str, how: Mapping[str, Any], quiet: bool, saved: bool = False
) -> Session:
    """A session for ``how`` "draft" and "drafter" say; one that is ``saved`` can draft otherwise later.

    Says before anything runs when weights and cache exceed the memory available.
    """
    from ..drafters import Drafters, keeps_mtp

    draft, drafter = how["draft"], how["drafter"]
    mtp = keeps_mtp(draft, drafter)
    session = model.session(ctx, kv, mtp=None if saved and not mtp else mtp)
    Drafters(model, drafter, draft, session.keeps_mtp)
    note_memory(model, session.cache_bytes, quiet)
    return session


def note_memory(model: Model, cache_bytes: int, quiet: bool) -> None:
    """Says when weights and caches exceed the memory available."""
    from ..limits import available_memory

    available = available_memory() if model.device == "cpu" else None
    weights = sum(m.file_bytes for m in (model, *(s.model for s in model.seconds.values())))
    if available is not None and weights + cache_bytes > available:
        numbers = f"weights {weights / 1e9:.1f} GB and cache {cache_bytes / 1e9:.1f} GB"
        say(f"note: {numbers} exceed the {available / 1e9:.1f} GB of memory available: weights will be read from "
            "disk again and again", quiet)  # fmt: skip


def read_text(source: str) -> bytes:
    """The bytes of a file, or of stdin for "-"."""
    return read_stdin(sys.stdin.buffer.read) if source == "-" else Path(source).read_bytes()


def read_stdin(read: Callable[[], bytes]) -> bytes:
    """What ``read`` gets from stdin; an Error that names it if it is closed or a folder."""
    try:
        return read()
    except OSError as e:
        raise Error(f"standard input: {e.strerror or e}") from None


def check_streams() -> None:
    """Gives closed standard streams a descriptor, so that no file that is opened takes its place.

    Reading from it and writing to it fail ("Bad file descriptor"): each is opened for the other direction. What would
    go to stderr is lost.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.close(fd)
        os.open(os.devnull, (os.O_WRONLY, os.O_RDONLY, os.O_WRONLY)[fd])
    os.close(fd)
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(fd, mode, encoding="utf-8", closefd=False))


def on_terminate(number: int, _frame: object) -> None:
    """SIGTERM and SIGHUP end the command like an exception, so that temporary files are removed."""
    raise SystemExit(128 + number)


@contextlib.contextmanager
def progress(label: str, quiet: bool, unit: str = "", delay: float = 0) -> Iterator[Callable[..., None] | None]:
    """A progress bar on stderr as a function of (done, total); None when stderr is no terminal or with ``quiet``.

    unit "bytes" shows sizes and speed, any other the third argument of the function as a speed in it; every bar shows
    the time left. What ends within ``delay`` seconds shows none.
    """
    if quiet or not sys.stderr.isatty():
        yield None
        return
    bars, at = list[Any](), dict[str, Any](completed=0, total=None, speed="")

    def start() -> None:
        bars.append(progress_bar(unit))
        bars[0].add_task(label, **at)
        bars[0].start()

    def update(done: int, total: int | None, speed: float | None = None) -> None:
        at.update(completed=done, total=total, speed="" if speed is None else f"{speed:.0f} {unit}")
        for bar in bars:
            if bar.tasks:
                bar.update(bar.tasks[0].id, **at)

    timer = threading.Timer(delay, start)
    timer.start() if delay else start()
    try:
        yield update
    finally:
        timer.cancel()
        if timer.ident is not None:
            timer.join()
        for bar in bars:
            bar.stop()


def progress_bar(unit: str) -> Any:
    """A bar of rich, which takes a tenth of a second to import."""
    from rich import progress as rp
    from rich.console import Console

    amount = (rp.DownloadColumn(), rp.TransferSpeedColumn()) if unit == "bytes" else (rp.MofNCompleteColumn(),)
    if unit not in ("", "bytes"):
        amount = (*amount, rp.TextColumn("{task.fields[speed]}", markup=False))
    columns = (rp.TextColumn("{task.description}", markup=False), rp.BarColumn(), *amount, rp.TimeRemainingColumn())
    return rp.Progress(*columns, console=Console(stderr=True), transient=True)


def size(n: int, unit: str = "B") -> str:
    """1234567 -> "1.23 MB" (powers of 1000)."""
    for prefix, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= scale:
            return f"{n / scale:.2f} {prefix}{unit}"
    return f"{n} {unit}"
