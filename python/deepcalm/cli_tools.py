"""The commands around a model: ``pack``, ``inspect``, ``verify``, ``perplexity``, ``bench``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cli_common import FILE, POSITIVE, RUNTIME, open_model, options, progress, read_text, say, write, write_json
from .container import check_output, whole_file
from .errors import CheckpointError, Error, PackedFileError
from .text import decode_utf8, one_line

if TYPE_CHECKING:
    from .bench import DraftBench
    from .pack import Plan
    from .perplexity import Perplexity
    from .verify import Report

DTYPES = ("source", "bf16", "f16", "f8", "q8", "q4", "f32")
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "tiktoken.model")


def size(n_bytes: int) -> str:
    """1234567 -> "1.23 MB" (powers of 1000)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.2f} {unit}"
    return f"{n_bytes} B"


# ---- pack


@click.command(
    epilog="""\b
Examples:
  deepcalm pack ~/models/DeepSeek-V2-Lite v2-lite.dcalm --dtype q8
  deepcalm pack ~/models/DeepSeek-V3 v3.dcalm --dtype q4 --dry-run
  deepcalm pack deepseek-ai/DeepSeek-V2-Lite v2-lite.dcalm --revision main     (downloaded from the Hugging Face Hub)
A packing that was interrupted goes on where it stopped when the same command is given again (from DST.partial)."""
)
@click.argument("src")
@click.argument("dst", type=FILE, required=False)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="source",
    show_default=True,
    help="Format of the weights; q4: experts and feed-forward q4, attention and head q8.",
)
@click.option("--attn-dtype", type=click.Choice(DTYPES), help="Another format for attention.")
@click.option("--head-dtype", type=click.Choice(DTYPES), help="Another format for the head.")
@click.option("--draft-head", type=click.Choice([*DTYPES, "none"]),
              help="A copy of the head for drafts only (default: q4 with --dtype q8 and q4, else none).")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Only print the plan: every tensor, from, to, bytes.")
@click.option("--force", is_flag=True, help="Replace DST if it exists.")
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a model on the Hub (default: main).")
@options("--json", "--quiet")
def pack(
    src: str, dst: Path | None, dtype: str, attn_dtype: str | None, head_dtype: str | None, draft_head: str | None,
    dry_run: bool, force: bool, revision: str | None, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Pack the checkpoint folder SRC (or a model of the Hub) into the file DST, in the layout in which it runs.

    SRC is a model of the Hub if it reads ORG/NAME and neither it nor a folder ORG is here, or with --revision.
    """
    from .pack import check_target
    from .pack import pack as pack_checkpoint
    from .pack import plan as plan_packing

    if dst is None and not dry_run:
        raise click.UsageError("Missing argument 'DST'.")
    if dst is not None and dst.is_dir():
        raise Error(f"{dst} is a directory, expected the name of the packed file")
    if dst is not None and not dry_run and not os.path.lexists(src):
        check_target(dst, force)  # before a download of hours
    folder = checkpoint_folder(src, revision, quiet)
    if dry_run:
        plan = plan_packing(folder, dtype, attn_dtype, head_dtype, draft_head)
        write_json(plan_dict(plan)) if as_json else write(plan_table(plan))
    else:
        assert dst is not None
        with progress(f"packing {dst.name}", quiet, "bytes") as update:
            plan = pack_checkpoint(folder, dst, dtype, attn_dtype, head_dtype, draft_head, update, force)
        if as_json:
            write_json(plan_dict(plan) | {"file": str(dst), "file_bytes": dst.stat().st_size})
    for line in plan_notes(plan):
        say(line, quiet)
    if dst is not None and not dry_run:
        say(f"{dst}: {size(dst.stat().st_size)} from {size(plan.source_bytes)}, "
            f"{size(plan.active_bytes_per_token)} of weights per token", quiet)  # fmt: skip


def checkpoint_folder(src: str, revision: str | None, quiet: bool) -> Path:
    """SRC as a local folder, downloaded if it is a model of the Hub.

    What can be meant as a path is not sent there: nothing called ORG may exist here, unless a revision is given.
    """
    path, is_id = Path(src), re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", src, re.ASCII) is not None
    if revision is not None and (not is_id or os.path.lexists(path)):
        raise click.UsageError(f"--revision goes with a model of the Hub, ORG/NAME; {src!r} is a path")
    if not is_id or os.path.lexists(path) or path.suffix in (".dcalm", ".gguf", ".safetensors"):
        return path
    if revision is None and os.path.lexists(path.parent):
        raise CheckpointError(f"{src}: no such folder in {path.parent}; a model of the Hub? Then add --revision main")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(f"{src}: no such folder (to download it: pip install huggingface_hub)") from None
    say(f"downloading {src} from the Hugging Face Hub", quiet)
    try:
        return Path(snapshot_download(src, revision=revision, allow_patterns=list(HUB_FILES)))
    except Exception as e:  # the package's own family and that of its HTTP client
        raise CheckpointError(f"{src}: no such folder, and downloading failed: {one_line(e)}") from None


def plan_dict(plan: Plan) -> dict[str, Any]:
    """The plan for --json."""
    keys = ("name", "role", "kind", "format", "scale", "shape", "source_dtype", "bytes", "note")
    return {
        "config": plan.config,
        "tensors": [{k: getattr(t, k) for k in keys} for t in plan.tensors],
        "dropped": [dataclasses.asdict(d) for d in plan.dropped],
        "notes": plan.notes,
        "source_bytes": plan.source_bytes,
        "data_bytes": plan.data_bytes,
        "active_bytes_per_token": plan.active_bytes_per_token,
    }


def plan_table(plan: Plan) -> str:
    """One line per tensor: name, from, to, shape, bytes, note; then the total."""
    rows = [
        (t.name, f"{t.source_dtype} -> {t.format}", "x".join(map(str, t.shape)), size(t.bytes), t.note)
        for t in plan.tensors
    ]
    return columns(rows) + f"total {size(plan.data_bytes)}, {size(plan.active_bytes_per_token)} of weights per token\n"


def columns(rows: Iterable[tuple[str, ...]]) -> str:
    """Left-aligned columns, two spaces between them."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "".join("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() + "\n" for r in rows)


def plan_notes(plan: Plan) -> list[str]:
    """What was converted and dropped, summed up, and the packer's own notes."""
    kinds = Counter({(t.source_dtype, t.format): 0 for t in plan.tensors})
    for t in plan.tensors:
        kinds[t.source_dtype, t.format] += t.bytes
    lines = [f"{source} -> {to}: {size(n)}" for (source, to), n in kinds.most_common()]
    dropped: dict[str, list[Any]] = {}
    for d in plan.dropped:
        dropped.setdefault(d.why, []).append(d)
    for why, group in dropped.items():
        names = group[0].name if len(group) == 1 else f"{len(group)} tensors ({group[0].name}, ...)"
        lines.append(f"dropped {names}, {size(sum(d.bytes for d in group))}: {why}")
    return lines + [f"note: {note}" for note in plan.notes]


# ---- inspect


@click.command(
    epilog="""\b
Examples:
  deepcalm inspect v2-lite.dcalm
  deepcalm inspect v2-lite.dcalm --check
  deepcalm inspect v2-lite.dcalm --json | jq .config
  deepcalm inspect v2-lite.dcalm --dump layers.0.wo wo.npy"""
)
@click.argument("file", type=FILE)
@click.option("--check", is_flag=True, help="Compare every checksum, look for NaN in f8; exit code 1 if one is wrong.")
@click.option(
    "--dump", nargs=2, metavar="TENSOR OUT.npy", help="Write a tensor as f32 in its natural shape (numpy file)."
)
@options("--json", "--quiet")
def inspect(file: Path, check: bool, dump: tuple[str, str] | None, as_json: bool, quiet: bool) -> int:
    """Show what the packed FILE holds: configuration, tensors, formats, bytes, what was dropped."""
    from .inspect import describe
    from .packed import PackedFile

    if dump is not None and (check or as_json):
        raise click.UsageError("--dump goes with neither --check nor --json")
    if dump is not None:
        import numpy as np

        with PackedFile(file) as packed:
            values = packed.unpack(dump[0])
        with whole_file(Path(dump[1])) as name, name.open("wb") as out:
            np.save(out, values)
        return 0
    info = describe(file)
    bad: list[str] = []
    if check:
        with PackedFile(file) as packed, progress(f"checking {file.name}", quiet, "bytes") as update:
            bad = packed.check(update)
        info["bad_checksums"] = bad
    write_json(info) if as_json else write(description(info))
    if bad:
        raise PackedFileError(f"{file}: wrong checksum or padding, or NaN in f8: {', '.join(bad[:5])}"
                              + (f" and {len(bad) - 5} more" if len(bad) > 5 else ""))  # fmt: skip
    return 0


def description(info: dict[str, Any]) -> str:
    """Everything but the checksums, as lines; a stranger's names without control characters."""
    text = columns((k, json.dumps(v)) for k, v in info["config"].items()) + "\n"
    rows = [(t["name"], t["format"], "x".join(map(str, t["shape"])), size(t["bytes"]), f"from {t['source_dtype']}")
            for t in info["tensors"]]  # fmt: skip
    text += columns(rows) + "\n"
    lines = [("file", f"{size(info['file_bytes'])}, header sha256 {info['header_sha256']}")]
    source = info["source"]
    lines += [("source", " ".join(str(source[k]) for k in ("name", "revision") if k in source) or "unknown")]
    lines += [("formats", ", ".join(f"{k} {size(n)}" for k, n in info["formats"].items()))]
    lines += [("files", ", ".join(f"{k} {size(n)}" for k, n in info["files"].items()) or "none")]
    lines += [("weights", f"{size(info['weight_bytes'])}, {size(info['active_bytes_per_token'])} read per token")]
    lines += [("dropped", f"{d['name']}: {d['why']}") for d in info["dropped"]]
    lines += [("checksums", "all right")] if info.get("bad_checksums") == [] else []
    return text + columns((k, one_line(v, 1000)) for k, v in lines)


# ---- verify


def _layers(_ctx: click.Context, _param: click.Parameter, value: str | None) -> list[int] | None:
    """ "0-2,5" -> [0, 1, 2, 5]"""
    out: set[int] = set()
    for part in (value or "").split(",") if value is not None else ():
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part, re.ASCII)
        if match is None or int(match[1]) > int(match[2] or match[1]):
            raise click.BadParameter(f"{part!r}, expected numbers and ranges as in 0-2,5")
        out |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return None if value is None else sorted(out)


@click.command(
    epilog="""\b
Examples:
  deepcalm verify v2-lite.dcalm --against ~/models/DeepSeek-V2-Lite
  deepcalm verify v3.dcalm --against ~/models/DeepSeek-V3 --layers 0-4,61
  deepcalm verify v2-lite.dcalm --against ~/models/DeepSeek-V2-Lite --json | jq .first_divergence
Exit code 0: everything that was compared agrees; 1: something does not, and the first place is named."""
)
@click.argument("file", type=FILE)
@click.option("--against", type=FILE, required=True, metavar="DIR", help="The checkpoint that FILE was packed from.")
@click.option(
    "--layers", metavar="A-B,...", callback=_layers, help="Only these layers; the MTP layer is the last plus one."
)
@click.option("--prompt", metavar="TEXT", help="The text to run (default: a built-in one).")
@click.option("--tokens", type=click.IntRange(8, 4096), default=32, show_default=True, metavar="N",
              help="Tokens of it, at least 8.")  # fmt: skip
@options("--threads", "--isa", "--kv", "--json", "--quiet")
def verify(
    file: Path, against: Path, layers: list[int] | None, prompt: str | None, tokens: int, threads: int | None,
    isa: str | None, kv: str, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Tell whether the packed FILE computes what its checkpoint says.

    Compares the configuration, every weight, and every stage of every layer with a second implementation in numpy;
    then the logits with themselves over threads, passes and drafts, to the bit, and with the checkpoint's: what
    packing costs must be what the file's weights explain, and less than ignoring the text would cost. With the extra
    `reference` transformers is asked on the same prompt, too. The last line is the verdict.
    """
    from .verify import verify as compare

    try:
        with progress(f"verifying {file.name}", quiet) as update:
            report = compare(file, against, layers=layers, prompt=prompt, tokens=tokens, isa=isa, kv=kv,
                             progress=update, threads=threads)  # fmt: skip
    except ValueError as e:  # layers or tokens that this model does not have
        raise Error(str(e)) from None
    write_json(report.as_dict()) if as_json else write(verify_text(report))
    for note in report.notes:
        say(f"note: {one_line(note, 200)}", quiet)
    if (first := report.first_divergence) is not None:
        more = len(report.divergences) - 1
        raise Error(one_line(str(first), 400) + (f"; and {more} more" if more else ""))


def verify_text(r: Report) -> str:
    """One line per comparison, then the effect."""
    rows = [("", "compared", "", "worst", "allowed", "")]
    for c in r.checks:
        unit = {"weights": " half steps", "arithmetic": " rel. RMS"}.get(c.leg, " differ")
        items = {"weights": "tensors", "arithmetic": "taps", "exactness": "runs"}.get(c.leg, "")
        items = items[:-1] if c.items == 1 else items
        worst = f"{c.error:.2f}" if c.leg == "weights" else f"{c.error:.2g}"
        where = f" ({c.at})" if c.at and c.error else ""
        rows.append((c.leg, c.what, f"{c.items} {items}", worst + unit + where, f"{c.allowed:g}",
                     "ok" if c.ok else "DIFFERS"))  # fmt: skip
    lines = [f"{key:<32}{value:.6g}" for key, value in r.effect.items()]
    effect = f"\neffect of packing, {r.tokens} tokens, {r.kv} cache, against the checkpoint in f64\n" if lines else ""
    return columns(rows) + effect + "".join(line + "\n" for line in lines) + f"\nverdict: {r.verdict}\n"


# ---- perplexity


@click.command(
    epilog="""\b
Examples:
  deepcalm perplexity v2-lite.dcalm book.txt --ctx 2048
  deepcalm perplexity v2-lite-q4.dcalm book.txt --kl-against v2-lite-bf16.dcalm --json"""
)
@click.argument("file", type=FILE)
@click.argument("text")
@click.option(
    "--kl-against",
    type=FILE,
    metavar="FILE",
    help="Also the divergence from another packed file of the same model.",
)
@options(*RUNTIME, "--json", "--quiet")
def perplexity(
    file: Path, text: str, kl_against: Path | None, device: str, threads: int | None, isa: str | None, ctx: int | None,
    kv: str, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Score the text file TEXT ("-": stdin) with the packed model FILE.

    The text is cut into windows of --ctx positions; every token with a position before it in its window is scored.
    """
    from .perplexity import perplexity as score

    content = decode_utf8(read_text(text), "standard input" if text == "-" else text)
    model = open_model(file, device, threads, isa, quiet)
    other = open_model(kl_against, device, threads, isa, quiet) if kl_against is not None else None
    with progress("scoring", quiet) as update:
        result = score(model, content, ctx, kv, other, update)
    if as_json:
        values = dataclasses.asdict(result)
        write_json(values | {"perplexity": result.perplexity, "standard_error": result.standard_error})
    else:
        write(perplexity_text(result))


def perplexity_text(r: Perplexity) -> str:
    """The result as lines."""
    start = "each starting with bos" if r.bos else "without bos"
    lines = [
        f"perplexity {r.perplexity:.4f} +- {r.standard_error:.4f}",
        f"nll {r.nll_mean:.5f} +- {r.nll_standard_error:.5f} nats per token",
        f"{r.n_scored} of {r.n_tokens} tokens scored, {r.n_windows} windows of {r.ctx} positions, {start}",
    ]
    if (d := r.divergence) is not None:
        lines.append(f"KL({d.against} || this) {d.kl_mean:.6f} +- {d.kl_standard_error:.6f} nats per token, "
                     f"same best token at {100 * d.argmax_agreement:.2f} % of positions")  # fmt: skip
    return "\n".join(lines) + "\n"


# ---- bench


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
    epilog="""\b
Examples:
  deepcalm bench
  deepcalm bench v2-lite.dcalm --contexts 0,1024,4096,16384 --threads 1,2 --plot v2-lite.png
  deepcalm bench v2-lite.dcalm --kv bf16 --repeats 9 --json
  deepcalm bench --synthetic v2-lite:8 --dtype q8
  deepcalm bench --synthetic v3:2 --dtype q4 --set first_k_dense_replace=1 --set vocab_size=16384
  deepcalm bench v3.dcalm --draft 2 --accept 0.8       (drafts right with this probability, for models not trained)"""
)
@click.argument("file", type=FILE, required=False)
@click.option("--prompt", type=POSITIVE, metavar="N", help="Tokens of the timed prefill (default: 512 if it can).")
@click.option("--contexts", "--context", metavar="N,...", callback=_numbers(0),
              help="Tokens cached when decoding starts (default: 0,1024,4096, as far as the model goes).")
@click.option("--tokens", type=POSITIVE, default=32, metavar="N", help="Timed decode steps (32).")
@click.option("--repeats", type=POSITIVE, default=5, metavar="N", help="Repeats (5).")
@click.option("--draft", type=click.IntRange(1, 7), metavar="K", help="K drafts a round against plain decoding.")
@click.option("--accept", type=click.FloatRange(0, 1), metavar="A", help="Make drafts right with this probability.")
@click.option("--synthetic", metavar="NAME[:LAYERS]",
              help="Random weights in the geometry of v2-lite, v3, moonlight or glm-4.7-flash.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Format of synthetic weights, as for pack (default: q8).")
@click.option("--attn-dtype", type=click.Choice(DTYPES), help="Another format for attention.")
@click.option("--head-dtype", type=click.Choice(DTYPES), help="Another format for the head.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=JSON", help="Override a value of its config.json.")
@click.option("--keep", type=FILE, metavar="FILE", help="Write synthetic weights here and keep them.")
@click.option("--plot", type=FILE, metavar="FILE.png", help="Draw achieved and bound, and cost against context.")
@click.option("--json-file", type=FILE, metavar="FILE", help="Write the JSON object here too.")
@click.option("--threads", metavar="N,...", callback=_numbers(1, 1024),
              help="Threads, each in turn (default: as many as pay).")
@options("--kv", "--isa", "--json", "--quiet")
def bench(
    file: Path | None, prompt: int | None, contexts: list[int] | None, tokens: int, repeats: int, draft: int | None,
    accept: float | None, synthetic: str | None, dtype: str | None, attn_dtype: str | None, head_dtype: str | None,
    overrides: tuple[str, ...], keep: Path | None, plot: Path | None, json_file: Path | None,
    threads: list[int] | None, kv: str, isa: str | None, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Measure prefill and decode of FILE (default: the demo model), beside the bounds of this machine.

    Says stage by stage where bytes and time went. Tokens are random, with a fixed seed. Bytes are counted by the passes
    from the weights and cache rows they touch; the read bandwidth is measured before every run.
    """
    from . import report
    from .bench import bench as measure
    from .bench import bench_draft

    if accept is not None and draft is None:
        raise click.UsageError("--accept goes with --draft K")
    if draft is not None and (plot or json_file or len(contexts or ()) > 1 or len(threads or ()) > 1):
        raise click.UsageError("--draft takes one context and one number of threads, no --plot and no --json-file")
    if draft is not None and contexts == [0]:
        raise click.UsageError("--draft needs a context of at least 1")
    if draft is not None and prompt is not None:
        raise click.UsageError("--prompt does not go with --draft: --context N is the length of its prompt")
    if draft is not None and tokens < draft + 3:
        raise click.UsageError(f"--tokens {tokens}: with --draft {draft} expected at least {draft + 3}")
    if plot is not None:
        report.check_plot(plot)
    for out in (plot, json_file):
        if out is not None:
            check_output(out)
    if synthetic is None and (dtype or attn_dtype or head_dtype or overrides or keep):
        raise click.UsageError("--dtype, --attn-dtype, --head-dtype, --set and --keep go with --synthetic NAME")
    if synthetic is not None and file is not None:
        raise click.UsageError("either FILE or --synthetic NAME")
    command = shlex.join(["deepcalm", *sys.argv[1:]])
    with contextlib.ExitStack() as stack:
        if synthetic is not None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="deepcalm-")) if keep is None else ""
            file = keep or Path(folder) / f"{synthetic.replace(':', '-')}.dcalm"
            write_synthetic(file, synthetic, dtype or "q8", attn_dtype, head_dtype, overrides, quiet)
        results = []
        counts: list[int | None] = [*threads] if threads else [None]
        for n in counts:
            model = open_model(file, "cpu", n, isa, quiet)
            if draft is not None:
                with progress("measuring", quiet) as update:
                    drafted = bench_draft(model, draft, accept, contexts[0] if contexts else None, tokens, repeats, kv,
                                          progress=update)  # fmt: skip
                values = dataclasses.asdict(drafted) | {"command": command}
                write_json(values) if as_json else write(draft_text(drafted, command))
                return
            with progress(f"measuring, {model.threads} threads", quiet) as update:
                results.append(measure(model, prompt, contexts, tokens, repeats, kv,
                                       random_weights=synthetic is not None, progress=update))  # fmt: skip
    value = {"command": command, "runs": [dataclasses.asdict(r) for r in results]}
    if as_json:
        write_json(value)
    else:
        write("\n".join(report.text(r, command) for r in results))
    if json_file is not None:
        with whole_file(json_file) as name:
            name.write_text(json.dumps(value, indent=2) + "\n")
    if plot is not None:
        with whole_file(plot) as name:
            report.plot(results, name, report.check_plot(plot))


def write_synthetic(
    path: Path, name: str, dtype: str, attn_dtype: str | None, head_dtype: str | None, overrides: tuple[str, ...],
    quiet: bool,
) -> None:  # fmt: skip
    """A synthetic model in the file ``path``, which must not exist; says how large it is beside the memory."""
    from .limits import available_memory
    from .synthetic import write_model

    if path.exists():
        raise Error(f"{path} exists; measure it with: deepcalm bench {shlex.quote(str(path))}")
    try:
        with progress(f"writing {name}", quiet, "bytes") as update:
            n_bytes = write_model(path, name, dtype, attn_dtype, head_dtype, overrides, progress=update)
    except ValueError as e:
        raise click.UsageError(f"--synthetic: {e}") from None
    available = available_memory() or 0
    note = f"{path}: {size(n_bytes)}, {size(available)} of memory available"
    say(note + ("; the disk will be measured, not the memory" if n_bytes > available else ""), quiet)


def draft_text(r: DraftBench, command: str) -> str:
    """The comparison as lines."""
    from .report import spread

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
    ])  # fmt: skip


COMMANDS = (pack, inspect, verify, perplexity, bench)
