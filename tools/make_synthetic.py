#!/usr/bin/env python3
"""Write a Hugging Face checkpoint of a real model's exact geometry with seeded random weights.

    tools/make_synthetic.py v2-lite OUT            31.4 GB in bf16; only the bytes are big, memory stays below 100 MB
    tools/make_synthetic.py v2-lite:8 OUT          the first 8 layers
    tools/make_synthetic.py v3:2 OUT --dtype f8 --no-mtp --set first_k_dense_replace=1
    tools/make_synthetic.py moonlight OUT --dry-run

For packing, memory and file-format work on shapes that cannot be shipped (`deepcalm bench --synthetic` writes the
packed form at once): the text that such a model writes is noise, but activations stay in range (logit standard
deviation about 2), and tokens spread over the experts. The same name, seed and options give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from deepcalm import _core
from deepcalm.files.checkpoint import SOURCE_DTYPES, source_names
from deepcalm.files.config import PLAIN, normalise
from deepcalm.files.pack import slabs, write_at
from deepcalm.files.safetensors import DTYPE_BYTES, build_header
from deepcalm.measure import synthetic

Config = dict[str, Any]

SCALE_BLOCK = 128  # rows and columns of one weight_scale_inv entry
SHARD_BYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor to write. `seed_name` differs from `name` for the MTP layer's copies of embedding and head."""

    name: str
    shape: tuple[int, ...]
    format: str  # bf16, f32, f8
    spread: tuple[float, float]  # mean, standard deviation
    seed_name: str = ""

    @property
    def dtype(self) -> str:
        return SOURCE_DTYPES[self.format]

    @property
    def n_elems(self) -> int:
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        return self.n_elems * DTYPE_BYTES[self.dtype]


def make_config(spec: str, overrides: list[str], dtype: str, mtp: bool) -> tuple[Config, int]:
    """Resolve NAME[:layers], KEY=JSON overrides and the weight dtype. Returns (config.json, tokenizer entries)."""
    try:
        config, n_tokens = synthetic.make_config(spec, overrides, mtp)
    except ValueError as e:
        raise SystemExit(str(e)) from None
    if dtype == "f8":
        config["quantization_config"] = {
            "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [SCALE_BLOCK] * 2,
            "activation_scheme": "dynamic",
        }  # fmt: skip
    return config, n_tokens


def tensors(c: Config, dtype: str) -> Iterator[Tensor]:
    """Every tensor of the checkpoint in file order, with Hugging Face names."""
    cfg = normalise(c, {}, min(c.get("num_nextn_predict_layers", 0), 1), c["model_type"])
    mtp = f"model.layers.{cfg['num_hidden_layers']}."
    prefix, lm_head = PLAIN[0]
    names: Any = SimpleNamespace(
        config=cfg, prefix=prefix, lm_head=lm_head, mtp_prefix=mtp, has_weight=lambda _: True
    )  # fmt: skip
    copies = {"embed": mtp + "embed_tokens.weight", "head": mtp + "shared_head.head.weight"}
    for spec in _core.expected_tensors(cfg):
        name, parts, spread = spec["name"], spec["parts"] or [spec["rows"]], synthetic.spread(spec, cfg)
        if name.endswith("w_uv"):  # kv_b_proj holds the rows of both, as w_uk
            continue
        if name == "embed" and cfg["tie_word_embeddings"]:  # it comes as the head
            continue
        sources = list(dict.fromkeys(source_names(name, spec["n_slices"], names)))
        for i, source in enumerate(sources):
            shape = (parts[i % len(parts)], *([spec["cols"]] if spec["cols"] else []))
            if name.endswith("w_uk"):
                shape = (spec["n_slices"] * (spec["cols"] + cfg["v_head_dim"]), spec["rows"])
            if dtype != "f8" or spec["role"] == "head" or "f8" not in spec["formats"]:
                yield Tensor(source, shape, "f32" if spec["role"] == "bias" else "bf16", spread)
                continue
            yield Tensor(source, shape, "f8", (0.0, synthetic.F8_DEVIATION))
            scale, grid = spread[1] / synthetic.F8_DEVIATION, tuple(-(-n // SCALE_BLOCK) for n in shape)
            yield Tensor(source + "_scale_inv", grid, "f32", (scale, 0.05 * scale))
        if name in copies and cfg["num_nextn_predict_layers"]:
            yield Tensor(copies[name], shape, "bf16", spread, sources[0])


def write_shard(path: Path, shard: list[Tensor], values: synthetic.Values) -> None:
    layout = {t.name: (t.dtype, t.shape, t.n_bytes) for t in shard}
    with path.open("wb", buffering=0) as out:
        at = out.write(build_header({"format": "pt"}, layout))
        for t in shard:
            for slab in slabs(values.pieces(t.seed_name or t.name, t.format, 1, t.spread, t.n_bytes), at):
                write_at(out.fileno(), slab.data, at)
                at += len(slab)


def write_checkpoint(out: Path, config: Config, n_tokens: int, dtype: str, seed: int, quiet: bool = False) -> int:
    """Write the checkpoint folder `out` (created if needed). Returns the bytes of all weights."""
    shards: list[list[Tensor]] = [[]]
    size = 0
    for t in tensors(config, dtype):
        if shards[-1] and size + t.n_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(t)
        size += t.n_bytes
    out.mkdir(parents=True, exist_ok=True)
    values, total, weight_map = synthetic.Values(seed), 0, {}
    for i, shard in enumerate(shards):
        name = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_shard(out / name, shard, values)
        total += sum(t.n_bytes for t in shard)
        weight_map.update({t.name: name for t in shard})
        if not quiet:
            print(f"{name}  {total / 1e9:.2f} GB", file=sys.stderr)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (out / "config.json").write_text(json.dumps(config, indent=2))
    keys = ("bos_token_id", "eos_token_id")
    (out / "generation_config.json").write_text(json.dumps({k: config[k] for k in keys if k in config}, indent=2))
    tokenizer, tokenizer_config = synthetic.make_tokenizer(config, n_tokens)
    (out / "tokenizer.json").write_text(tokenizer)
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2))
    return total


def main() -> int:
    parser = argparse.ArgumentParser(
        description="\n".join((__doc__ or "").splitlines()), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="NAME[:layers]", help=", ".join(synthetic.PRESETS))
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--dtype", choices=("bf16", "f8"), default="bf16", help="f8: e4m3 with 128x128 block scales")
    parser.add_argument("--no-mtp", action="store_true", help="leave the MTP layer out")
    parser.add_argument("--set", metavar="KEY=JSON", action="append", default=[], help="override a config value")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry-run", action="store_true", help="print the sizes, write nothing")
    args = parser.parse_args()
    config, n_tokens = make_config(args.model, args.set, args.dtype, not args.no_mtp)
    plan = list(tensors(config, args.dtype))
    params = sum(t.n_elems for t in plan if not t.name.endswith("_scale_inv") and not t.seed_name)
    n_bytes = sum(t.n_bytes for t in plan)
    print(f"{len(plan)} tensors, {params / 1e9:.3f} B parameters, {n_bytes / 1e9:.2f} GB", file=sys.stderr)
    if not args.dry_run:
        write_checkpoint(args.out, config, n_tokens, args.dtype, args.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
