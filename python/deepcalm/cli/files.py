"""The commands ``pack`` and ``inspect``: what is in files."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import CheckpointError, Error, PackedFileError, one_line
from ..files.safetensors import whole_file
from ..names import DTYPES
from ..tables import columns, wrapped
from .common import FILE, is_hub_id, model_file, one_file, options, progress, say, size, write, write_json

if TYPE_CHECKING:
    from ..files.plan import Plan

CACHED = 64 << 20  # bytes a token below which weights may stay in a processor's caches
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "tiktoken.model")


@click.command(
    short_help="Pack a checkpoint into the file that runs.",
    epilog="""\b
Examples:
  deepcalm pack ~/models/DeepSeek-V2-Lite v2-lite.dcalm --dtype q8
  deepcalm pack ~/models/DeepSeek-V3 v3.dcalm --dtype q4 --dry-run
  deepcalm pack deepseek-ai/DeepSeek-V2-Lite v2-lite.dcalm --revision main     # downloaded from the Hugging Face Hub
A packing that was interrupted goes on where it stopped when the same command is given again (from DST.partial).""",
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
    from ..files.pack import check_target
    from ..files.pack import pack as pack_checkpoint
    from ..files.pack import plan as plan_packing

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
    path, is_id = Path(src), is_hub_id(src)
    if revision is not None and not is_id:
        raise click.UsageError(f"--revision goes with a model of the Hub, ORG/NAME; {src!r} is a path")
    if not is_id:
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


@click.command(
    short_help="Show what a packed file or a checkpoint costs.",
    epilog="""\b
Examples:
  deepcalm inspect v2-lite.dcalm
  deepcalm inspect ~/models/DeepSeek-V2-Lite     # a checkpoint, before it is packed
  deepcalm inspect v2-lite.dcalm --tensors --check
  deepcalm inspect v2-lite.dcalm --json | jq .config
  deepcalm inspect v2-lite.dcalm --dump layers.0.wo wo.npy""",
)
@click.argument("file", type=FILE, required=False)
@click.option("--tensors", is_flag=True, help="Also the configuration, every tensor and everything that was dropped.")
@click.option("--check", is_flag=True, help="Compare every checksum, look for NaN in f8; exit code 1 if one is wrong.")
@click.option(
    "--dump", nargs=2, metavar="TENSOR OUT.npy", help="Write a tensor as f32 in its natural shape (numpy file)."
)
@options("--model", "--json", "--quiet")
def inspect(
    path: Path | None, file: Path | None, tensors: bool, check: bool, dump: tuple[str, str] | None, as_json: bool,
    quiet: bool,
) -> int:  # fmt: skip
    """Show on one screen what the packed FILE holds, what a token of it reads, and how fast it can be here.

    FILE may be a checkpoint folder: then what packing it would make. Default: the demo model.
    """
    from ..files.inspect import describe
    from ..files.packed import PackedFile

    file = one_file(path, file)
    if dump is not None and (check or as_json or tensors):
        raise click.UsageError("--dump goes with none of --tensors, --check, --json")
    file = file if file is not None and file.is_dir() else model_file(file)
    if (check or dump is not None) and file.is_dir():
        raise PackedFileError(f"{file} is a directory, and --check and --dump read a packed file (.dcalm)")
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
    if as_json:
        write_json(info)
    else:
        write((tensor_list(info) if tensors else "") + screen(info, shutil.get_terminal_size().columns))
    if bad:
        raise PackedFileError(f"{file}: wrong checksum or padding, or NaN in f8: {', '.join(bad[:5])}"
                              + (f" and {len(bad) - 5} more" if len(bad) > 5 else ""))  # fmt: skip
    return 0


def tensor_list(info: dict[str, Any]) -> str:
    """The configuration, every tensor and what was dropped; a stranger's names without control characters."""
    text = columns((k, json.dumps(v)) for k, v in info["config"].items()) + "\n"
    rows = [(t["name"], t["format"], "x".join(map(str, t["shape"])), size(t["bytes"]), f"from {t['source_dtype']}")
            for t in info["tensors"]]  # fmt: skip
    text += columns(rows) + "\n"
    dropped = [("dropped", one_line(f"{d['name']}: {d['why']}", 1000)) for d in info["dropped"]]
    return text + (columns(dropped) + "\n" if dropped else "")


def screen(info: dict[str, Any], width: int) -> str:
    """What decides about size and speed, in 24 lines of 80 columns; where there are fewer, values wrap."""
    from .. import _core
    from ..geometry import GROUPS
    from ..session import cache_type

    best = next(isa["name"] for isa in _core.isas() if isa["supported"])
    isa = os.environ.get("DEEPCALM_ISA") or best
    kv = cache_type("auto", isa)
    c, p, cache, longest = info["config"], info["parameters"], info["cache"], info["config"]["max_position_embeddings"]
    n, heads = c["n_routed_experts"], c["num_attention_heads"]
    experts = f"{c['num_experts_per_tok']} of {n} experts a token, {c['n_shared_experts']} shared" if n else "dense"
    mtp = f"{size(p['mtp'], '')} more in the MTP layer" if c["num_nextn_predict_layers"] else "no MTP layer"
    rows = [
        ("model", f"{c['model_type']}, {c['num_hidden_layers']} layers, {heads} heads, {experts}"),
        ("parameters", f"{size(p['total'], '')}, {size(p['active'], '')} of them for a token; {mtp}"),
        ("weights", f"{size(info['weight_bytes'])}, {size(info['active_bytes_per_token'])} read a token"),
        ("formats", ", ".join(f"{name} {size(b)}" for name, b in info["formats"].items())),
        ("", ""),
        (f"cache, {kv}", f"{'a token':>9} {longest:>9,} tokens; instruction set {isa}"),
    ]
    names = {"MLA": "MLA, its own", "MHA": "as MHA", "GQA": f"as GQA of {min(GROUPS, heads)}", "MQA": "as MQA"}
    rows += [(label, f"{size(cache[a]):>9} {size(cache[a] * longest):>9} {cache[a] / cache['MLA']:5.2f}x")
             for a, label in names.items()]  # fmt: skip
    source = " ".join(str(info["source"][key]) for key in ("name", "revision") if key in info["source"])
    what = f"{size(info['file_bytes'])}, header sha256 {str(info['header_sha256'])[:16]}"
    what = what if info["packed"] else f"a checkpoint; packed as it is (--dtype source) {size(info['file_bytes'])}"
    files = ", ".join(f"{name} {size(b)}" for name, b in info["files"].items())
    rows += [("", ""), ("speed", possible_speed(info)), ("", "")]
    rows += [("file", what), ("source", one_line(source, 200) or "unknown")]
    rows += [("with it", one_line(files, 500) or "none")]
    why = Counter(d["why"] for d in info["dropped"]).most_common()
    rows += [("dropped", f"{times} tensor{'s' if times > 1 else ''}: {one_line(text, 200)}") for text, times in why[:2]]
    rows += [("", f"{len(info['dropped'])} in all, for {len(why)} reasons (--tensors)")] if len(why) > 2 else []
    rows += [("checksums", "all right")] if info.get("bad_checksums") == [] else []
    return f"{one_line(info['file'], 1000)}\n" + wrapped(rows, width)


def possible_speed(info: dict[str, Any]) -> str:
    """What a plain read of this machine's memory leaves possible: an upper bound of decoding without drafts."""
    from .. import _core
    from ..limits import available_memory, default_threads

    available = available_memory()
    if available is not None and info["weight_bytes"] > available:
        return f"that of the disk: the weights do not fit into the {size(available)} of memory available"
    threads, step = default_threads(), info["active_bytes_per_token"]
    read = 1e9 * _core.read_bandwidth(threads)
    full = step + info["cache"]["MLA"] * info["config"]["max_position_embeddings"]
    rates = [f"{read / n:,.0f}" if read / n >= 100 else f"{read / n:.3g}" for n in (step, full)]
    return (f"at most {rates[0]} tok/s, {rates[1]} with a full cache, without drafts: an upper bound, "
            f"{read / 1e9:.1f} GB/s that {threads} thread{'s' if threads > 1 else ''} read of memory here just now"
            + ("; more where weights stay in the processor's caches" if step < CACHED else ""))  # fmt: skip


COMMANDS = (pack, inspect)
