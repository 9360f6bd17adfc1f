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

from ..errors import Error
from ..files.safetensors import check_output, whole_file
from ..names import DTYPES
from ..tables import columns
from .common import FILE, POSITIVE, one_file, open_model, options, progress, say, size, write, write_json

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


@click.command(
    short_help="Measure prefill and decode, beside the bounds of this machine.",
    epilog="""\b
Examples:
  deepcalm bench
  deepcalm bench v2-lite.dcalm --contexts 0,1024,4096,16384 --threads 1,2
  deepcalm bench v2-lite.dcalm --kv bf16 --repeats 9 --json
  deepcalm bench --synthetic v2-lite:8 --dtype q8
  deepcalm bench --synthetic v3:2 --dtype q4 --set first_k_dense_replace=1 --set vocab_size=16384
  deepcalm bench v3.dcalm --draft 2 --accept 0.8       # drafts right with this probability, for models not trained""",
)
@click.argument("file", type=FILE, required=False)
@click.option("--prompt", type=POSITIVE, metavar="N", help="Tokens of the timed prefill (default: 512 if it can).")
@click.option("--contexts", "--context", metavar="N,...", callback=_numbers(0),
              help="Tokens cached when decoding starts (default: 0,1024,4096, as far as the model goes).")  # fmt: skip
@click.option("--tokens", type=POSITIVE, default=32, metavar="N", help="Timed decode steps (32).")
@click.option("--repeats", type=POSITIVE, default=5, metavar="N", help="Repeats (5).")
@click.option("--draft", type=click.IntRange(1, 7), metavar="K", help="K drafts a round against plain decoding.")
@click.option("--accept", type=click.FloatRange(0, 1), metavar="A", help="Make drafts right with this probability.")
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
@options("--model", "--kv", "--isa", "--json", "--quiet")
def bench(
    path: Path | None, file: Path | None, prompt: int | None, contexts: list[int] | None, tokens: int, repeats: int,
    draft: int | None, accept: float | None, synthetic: str | None, dtype: str | None, attn_dtype: str | None,
    head_dtype: str | None, overrides: tuple[str, ...], keep: Path | None, json_file: Path | None,
    threads: list[int] | None, kv: str, isa: str | None, as_json: bool, quiet: bool,
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
    if accept is not None and draft is None:
        raise click.UsageError("--accept goes with --draft K")
    if draft is not None and (json_file or len(contexts or ()) > 1 or len(threads or ()) > 1):
        raise click.UsageError("--draft takes one context and one number of threads, and no --json-file")
    if draft is not None and contexts == [0]:
        raise click.UsageError("--draft needs a context of at least 1")
    if draft is not None and prompt is not None:
        raise click.UsageError("--prompt does not go with --draft: --context N is the length of its prompt")
    if draft is not None and tokens < draft + 3:
        raise click.UsageError(f"--tokens {tokens}: with --draft {draft} expected at least {draft + 3}")
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
                    drafted = bench_draft(model, draft, accept, contexts[0] if contexts else None, tokens, repeats, kv,
                                          progress=update)  # fmt: skip
                ends = {"command": command, "conclusion": report.draft_conclusion(drafted)}
                drafted = dataclasses.replace(drafted, file=str(keep or synthetic or drafted.file))
                values = dataclasses.asdict(drafted) | ends
                write_json(values) if as_json else write(draft_text(drafted, command))
                return
            with progress(f"measuring, {model.threads} threads", quiet) as update:
                results.append(measure(model, prompt, contexts, tokens, repeats, kv,
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

    right = "the MTP layer's own" if r.accept is None else f"made right with probability {r.accept:g}"
    return columns([
        ("command", command),
        ("model", f"{r.file}, {r.isa}, threads {r.threads}, cache {r.kv}; median (lowest - highest) of {r.repeats}"),
        ("drafts", f"{r.k} a round, {right}; {100 * r.acceptance:.1f} % accepted"),
        ("passes", f"{r.tokens_per_pass:.2f} tokens and {r.experts_per_pass:.1f} distinct experts a pass, "
                   f"plain {r.plain_experts:.1f}"),
        ("bytes", f"{size(round(r.drafted_bytes_per_token))} a token, {100 * r.draft_bytes_share:.1f} % by the MTP "
                  f"layer; plain {size(round(r.plain_bytes_per_token))}"),
        ("plain", f"{spread(r.plain_rate, '.1f')} tok/s, {r.decode_tokens} tokens after {r.context}"),
        ("drafted", f"{spread(r.drafted_rate, '.1f')} tok/s, the same text"),
        ("speedup", f"{spread(r.speedup, '.3f')}; predicted {r.predicted:.3f}, from bytes {r.predicted_bytes:.3f}"),
        ("machine", f"{spread(r.read_bandwidth, '.2f')} GB/s plain read with as many threads, between the repeats"),
        *draft_conclusion(r).items(),
    ])  # fmt: skip


COMMANDS = (bench,)
