"""The command ``bench``: is it fast?"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..drafting import MAX_DRAFT
from ..errors import Error
from ..files.safetensors import check_output, whole_file
from ..names import DTYPES
from ..tables import columns
from ..text import decode_utf8
from .common import FILE, POSITIVE, one_file, open_model, options, progress, read_text, say, size, write, write_json

if TYPE_CHECKING:
    from ..measure.drafts import DraftBench


def _numbers(
    low: int, high: int = 10**9 - 1
) -> Callable[[click.Context, click.Parameter, str | None], list[int] | None]:
    """A callback for "0,1024,4096": numbers in ``low``..``high``."""

    def parse(_ctx: click.Context, _param: click.Parameter, value: str | None) -> list[int] | None:
        parts = [] if value is None else value.split(",")
        if not all(re.fullmatch(r"\d{1,9}", p, re.ASCII) and low <= int(p) <= high for p in parts):
            raise click.BadParameter(f"{value!r}, expected numbers {low}..{high} with commas between")
        return None if value is None else sorted({int(p) for p in parts})

    return parse


def _drafts(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | int | None:
    if value is not None and value != "auto" and not re.fullmatch(f"[1-{MAX_DRAFT}]", value):
        raise click.BadParameter(f"{value!r}, expected auto or a number 1..{MAX_DRAFT}")
    return value if value in (None, "auto") else int(value)


@click.command(
    short_help="Measure prefill and decode, beside the bounds of this machine.",
    epilog="""\b
Examples:
  deepcalm bench
  deepcalm bench v2-lite.dcalm --contexts 0,1024,4096,16384 --threads 1,2
  deepcalm bench v2-lite.dcalm --kv bf16 --repeats 9 --json
  deepcalm bench --synthetic v2-lite:8 --dtype q8
  deepcalm bench --synthetic v3:2 --dtype q4 --set first_k_dense_replace=1 --set vocab_size=16384
  deepcalm bench v3.dcalm --draft 2 --accept 0.8       # drafts right with this probability, for models not trained
  deepcalm bench --draft auto --drafter ngram --text book.txt           # as if the model wrote this""",
)
@click.argument("file", type=FILE, required=False)
@click.option("--prompt", type=POSITIVE, metavar="N", help="Tokens of the timed prefill (default: 512 if it can).")
@click.option("--contexts", "--context", metavar="N,...", callback=_numbers(0),
              help="Tokens cached when decoding starts (default: 0,1024,4096, as far as the model goes).")  # fmt: skip
@click.option("--tokens", type=POSITIVE, metavar="N", help="Timed decode steps (32), or of a --text (all).")
@click.option("--repeats", type=POSITIVE, default=5, metavar="N", help="Repeats (5).")
@click.option("--draft", metavar="auto|K", callback=_drafts,
              help="K drafts a round, or as many as pay, against plain decoding.")  # fmt: skip
@click.option("--accept", type=click.FloatRange(0, 1), metavar="A", help="Make drafts right with this probability.")
@click.option("--text", metavar="FILE",
              help="Draft as if the model wrote this text, in windows that begin with a --context.")  # fmt: skip
@click.option("--synthetic", metavar="NAME[:LAYERS]",
              help="Random weights in the geometry of v2-lite, v3, moonlight, glm-4.7-flash, mistral-small-4, a.x-k1, "
                   "youtu-2b or minicpm3-4b.")  # fmt: skip
@click.option("--dtype", type=click.Choice(DTYPES), help="Format of synthetic weights, as for pack (default: q8).")
@click.option("--attn-dtype", type=click.Choice(DTYPES), help="Another format for attention.")
@click.option("--head-dtype", type=click.Choice(DTYPES), help="Another format for the head.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=JSON", help="Override a value of its config.json.")
@click.option("--keep", type=FILE, metavar="FILE", help="Write synthetic weights here and keep them.")
@click.option("--json-file", type=FILE, metavar="FILE", help="Write the JSON object here too.")
@click.option("-t", "--threads", metavar="N,...", callback=_numbers(1, 1024),
              help="Threads, each in turn (default: as many as pay).")  # fmt: skip
@options("--model", "--drafter", "--kv", "--isa", "--json", "--quiet")
def bench(
    path: Path | None, file: Path | None, prompt: int | None, contexts: list[int] | None, tokens: int | None,
    repeats: int, draft: str | int | None, accept: float | None, text: str | None, synthetic: str | None,
    dtype: str | None, attn_dtype: str | None, head_dtype: str | None, overrides: tuple[str, ...], keep: Path | None,
    json_file: Path | None, threads: list[int] | None, drafter: str, kv: str, isa: str | None, as_json: bool,
    quiet: bool,
) -> None:  # fmt: skip
    """Measure prefill and decode of FILE (default: the demo model), beside the bounds of this machine.

    Says stage by stage where bytes and time went, and at the end what binds and what to try. Tokens are random, with a
    fixed seed. Bytes are counted by the passes from the weights and cache rows they touch; the read bandwidth is
    measured before every run.
    """
    from ..measure import report
    from ..measure.bench import bench as measure
    from ..measure.drafts import bench_draft

    file = one_file(path, file)
    if draft is None and (accept is not None or text is not None or drafter != "auto"):
        raise click.UsageError("--accept, --drafter and --text go with --draft K")
    if draft is not None and (json_file or len(contexts or ()) > 1 or len(threads or ()) > 1):
        raise click.UsageError("--draft takes one context and one number of threads, and no --json-file")
    if draft is not None and contexts == [0]:
        raise click.UsageError("--draft needs a context of at least 1")
    if draft is not None and prompt is not None:
        raise click.UsageError("--prompt does not go with --draft: --context N is the length of its prompt")
    least = 1 if draft is None else 3 + (MAX_DRAFT if draft == "auto" else int(draft))
    tokens = tokens or (32 if text is None else None)
    if tokens is not None and tokens < least:
        raise click.UsageError(f"--tokens {tokens}: with --draft {draft} expected at least {least}")
    told = None if text is None else decode_utf8(read_text(text), "standard input" if text == "-" else text)
    if json_file is not None:
        check_output(json_file)
    if synthetic is None and (dtype or attn_dtype or head_dtype or overrides or keep):
        raise click.UsageError("--dtype, --attn-dtype, --head-dtype, --set and --keep go with --synthetic NAME")
    if synthetic is not None and file is not None:
        raise click.UsageError("either FILE or --synthetic NAME")
    command = shlex.join(["deepcalm", *sys.argv[1:]])
    with contextlib.ExitStack() as stack:
        if synthetic is not None:
            if keep is not None and keep.exists():
                raise Error(f"{keep} exists; measure it with: deepcalm bench {shlex.quote(str(keep))}")
            # without a name the gigabytes go with the process, whatever ends it
            file = keep or Path(f"/proc/self/fd/{stack.enter_context(tempfile.TemporaryFile()).fileno()}")
            write_synthetic(file, synthetic, dtype or "q8", attn_dtype, head_dtype, overrides, quiet)
        results = []
        counts: list[int | None] = [*threads] if threads else [None]
        for n in counts:
            model = open_model(file, "cpu", n, isa, quiet)
            if draft is not None:
                with progress("measuring", quiet) as update:
                    ids = None if told is None else model.encode(told, bos=True)
                    drafted = bench_draft(model, draft, accept, contexts[0] if contexts else None, tokens, repeats,
                                          update, kv=kv, drafter=drafter, text=ids)  # fmt: skip
                ends = {"command": command, "conclusion": report.draft_conclusion(drafted)}
                drafted = dataclasses.replace(drafted, file=str(keep or synthetic or drafted.file))
                values = dataclasses.asdict(drafted) | ends
                write_json(values) if as_json else write(draft_text(drafted, command))
                return
            with progress(f"measuring, {model.threads} threads", quiet) as update:
                results.append(measure(model, prompt, contexts, tokens or 32, repeats, kv,
                                       random_weights=synthetic is not None, progress=update))  # fmt: skip
    results = [dataclasses.replace(r, file=str(keep or synthetic or r.file)) for r in results]
    runs = [dataclasses.asdict(r) | {"conclusion": report.conclusion(r)} for r in results]
    value = {"command": command, "runs": runs}
    if as_json:
        write_json(value)
    else:
        write("\n".join(report.text(r, command) for r in results))
    if json_file is not None:
        with whole_file(json_file) as name:
            name.write_text(json.dumps(value, indent=2) + "\n")


def write_synthetic(
    path: Path, name: str, dtype: str, attn_dtype: str | None, head_dtype: str | None, overrides: tuple[str, ...],
    quiet: bool,
) -> None:  # fmt: skip
    """A synthetic model in the file ``path``; says how large it is beside the memory."""
    from ..limits import available_memory
    from ..measure.synthetic import write_model

    try:
        with progress(f"writing {name}", quiet, "bytes") as update:
            n_bytes = write_model(path, name, dtype, attn_dtype=attn_dtype, head_dtype=head_dtype,
                                  overrides=overrides, progress=update)  # fmt: skip
    except ValueError as e:
        raise click.UsageError(f"--synthetic: {e}") from None
    available = available_memory() or 0
    note = f"{name}: {size(n_bytes)}, {size(available)} of memory available"
    say(note + ("; the disk will be measured, not the memory" if n_bytes > available else ""), quiet)


def draft_text(r: DraftBench, command: str) -> str:
    """The comparison as lines."""
    from ..measure.report import draft_conclusion, spread

    made = "; ".join(f"{name} {taken} of {offered}" for name, (offered, taken) in r.drafters.items()) or "none"
    count = "as many as pay" if r.k == "auto" else f"{r.k} a round"
    right = "" if r.accept is None else f", made right with probability {r.accept:g}"
    text = f" in {r.windows} windows of a text" if r.windows else ""
    return columns([
        ("command", command),
        ("model", f"{r.file}, {r.isa}, threads {r.threads}, cache {r.kv}; median (lowest - highest) of {r.repeats}"),
        ("drafts", f"{count}{right}; accepted: {made}, {100 * r.acceptance:.1f} %"),
        ("passes", f"{r.tokens_per_pass:.2f} tokens and {r.experts_per_pass:.1f} distinct experts a pass, "
                   f"plain {r.plain_experts:.1f}"),
        ("bytes", f"{size(round(r.drafted_bytes_per_token))} a token, {100 * r.draft_bytes_share:.1f} % by the "
                  f"drafter; plain {size(round(r.plain_bytes_per_token))}"),
        ("plain", f"{spread(r.plain_rate, '.1f')} tok/s, {r.decode_tokens} tokens after {r.context}{text}"),
        ("drafted", f"{spread(r.drafted_rate, '.1f')} tok/s, the same text"),
        ("gain", f"{r.gain_bytes:.3f} by the bytes counted, predicted {r.predicted_bytes:.3f}"
                 + f"; {r.worst_bytes:.3f} in the worst window" * (r.windows > 1)),
        ("speedup", f"{spread(r.speedup, '.3f')}; predicted {r.predicted:.3f}"),
        ("machine", f"{spread(r.read_bandwidth, '.2f')} GB/s plain read with as many threads, between the repeats"),
        *draft_conclusion(r).items(),
    ])  # fmt: skip


COMMANDS = (bench,)
