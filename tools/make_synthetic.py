#!/usr/bin/env python3
"""Write a Hugging Face checkpoint of a real model's exact geometry with seeded random weights.

    tools/make_synthetic.py v2-lite OUT            31.4 GB in bf16; only the bytes are big, memory stays below 100 MB
    tools/make_synthetic.py v2-lite:8 OUT          the first 8 layers
    tools/make_synthetic.py v3:2 OUT --dtype f8 --no-mtp --set first_k_dense_replace=1
    tools/make_synthetic.py moonlight OUT --dry-run

For packing, memory and file-format work on shapes that cannot be shipped (`deepcalm bench --synthetic` writes the
packed form at once): the text that such a model writes is noise, but activations stay in range (logit standard
deviation about 2), and tokens spread over the experts. The same name, seed and options give the same bytes.

Values are not drawn one by one. One block of 2^21 - 9 normal values (a prime, so that rows never line up) is rounded
once per standard deviation and repeated, each tensor from its own hashed offset: writing runs at the disk's speed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from deepcalm.measure import synthetic

Config = dict[str, Any]
U8 = npt.NDArray[np.uint8]

BLOCK = 2**21 - 9  # values; the largest prime below 2^21
F8_GAIN = 96.0  # standard deviation of the e4m3 codes: 448 is 4.7 of them, so that nothing saturates
SCALE_BLOCK = 128  # rows and columns of one weight_scale_inv entry
SHARD_BYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor to write. `seed_name` differs from `name` for the MTP layer's copies of embedding and head."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # safetensors name: BF16, F32, F8_E4M3
    std: float
    mean: float = 0.0
    seed_name: str = ""

    @property
    def n_elems(self) -> int:
        n = 1
        for s in self.shape:
            n *= s
        return n

    @property
    def n_bytes(self) -> int:
        return self.n_elems * {"F8_E4M3": 1, "BF16": 2, "F32": 4}[self.dtype]


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
    """Every tensor of the checkpoint in file order, with Hugging Face names.

    Standard deviations: 1/sqrt(inputs) keeps a normed vector at 1; what is added to the residual stream is divided by
    sqrt(2 * layers), so that the stream grows by about sqrt(2) over the whole depth.
    """
    d, heads, r = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"]
    dn, dr, dv = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    residual = (2 * c["num_hidden_layers"]) ** -0.5

    def plain(name: str, rows: int, cols: int, gain: float = 1.0, seed_name: str = "") -> Tensor:
        return Tensor(name + ".weight", (rows, cols), "BF16", gain * cols**-0.5, 0.0, seed_name)

    def norm(name: str, n: int) -> Tensor:
        return Tensor(name + ".weight", (n,), "BF16", 0.1, 1.0)

    def linear(name: str, rows: int, cols: int, gain: float = 1.0) -> Iterator[Tensor]:
        weight = plain(name, rows, cols, gain)
        if dtype != "f8":
            yield weight
            return
        yield Tensor(weight.name, weight.shape, "F8_E4M3", F8_GAIN)
        grid = (-(-rows // SCALE_BLOCK), -(-cols // SCALE_BLOCK))
        scale = weight.std / F8_GAIN
        yield Tensor(name + ".weight_scale_inv", grid, "F32", 0.05 * scale, scale)

    def mlp(name: str, width: int) -> Iterator[Tensor]:
        yield from linear(name + ".gate_proj", width, d)
        yield from linear(name + ".up_proj", width, d)
        yield from linear(name + ".down_proj", d, width, residual)

    def layer(p: str, moe: bool) -> Iterator[Tensor]:
        yield norm(p + "input_layernorm", d)
        rq, a = c["q_lora_rank"], p + "self_attn."
        if rq:
            yield from linear(a + "q_a_proj", rq, d)
            yield norm(a + "q_a_layernorm", rq)
            yield from linear(a + "q_b_proj", heads * (dn + dr), rq)
        else:
            yield from linear(a + "q_proj", heads * (dn + dr), d)
        yield from linear(a + "kv_a_proj_with_mqa", r + dr, d)
        yield norm(a + "kv_a_layernorm", r)
        yield from linear(a + "kv_b_proj", heads * (dn + dv), r)
        yield from linear(a + "o_proj", d, heads * dv, residual)
        yield norm(p + "post_attention_layernorm", d)
        if not moe:
            yield from mlp(p + "mlp", c["intermediate_size"])
            return
        yield plain(p + "mlp.gate", c["n_routed_experts"], d)
        if c["topk_method"] == "noaux_tc":
            yield Tensor(p + "mlp.gate.e_score_correction_bias", (c["n_routed_experts"],), "F32", 0.02)
        for e in range(c["n_routed_experts"]):
            yield from mlp(f"{p}mlp.experts.{e}", c["moe_intermediate_size"])
        if c["n_shared_experts"]:
            yield from mlp(p + "mlp.shared_experts", c["n_shared_experts"] * c["moe_intermediate_size"])

    embed = Tensor("model.embed_tokens.weight", (c["vocab_size"], d), "BF16", 1.0)
    head = plain("lm_head", c["vocab_size"], d, 2.0)
    yield embed
    for i in range(c["num_hidden_layers"]):
        yield from layer(f"model.layers.{i}.", i >= c["first_k_dense_replace"])
    if c.get("num_nextn_predict_layers"):
        p = f"model.layers.{c['num_hidden_layers']}."
        yield Tensor(p + "embed_tokens.weight", embed.shape, "BF16", embed.std, 0.0, embed.name)
        yield norm(p + "enorm", d)
        yield norm(p + "hnorm", d)
        yield plain(p + "eh_proj", d, 2 * d)
        yield from layer(p, True)
        yield norm(p + "shared_head.norm", d)
        yield Tensor(p + "shared_head.head.weight", head.shape, "BF16", head.std, 0.0, head.name)
    yield norm("model.norm", d)
    yield head


class Values:
    """The repeated block of normal values, in the bytes of each (dtype, mean, std) that was asked for."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.normal = np.random.default_rng(seed).standard_normal(BLOCK, dtype=np.float32)  # [BLOCK]
        self.cache: dict[tuple[str, float, float], U8] = {}

    def block(self, t: Tensor) -> U8:
        """[BLOCK, item size] u8; few distinct standard deviations exist in a model, so all are kept."""
        key = (t.dtype, t.mean, t.std)
        if key not in self.cache:
            numpy_dtype = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn}[t.dtype]
            x = (t.mean + np.float32(t.std) * np.clip(self.normal, -4.5, 4.5)).astype(numpy_dtype)
            self.cache[key] = x.view(np.uint8).reshape(BLOCK, -1)
        return self.cache[key]

    def write(self, fd: int, t: Tensor) -> None:
        block, left = self.block(t), t.n_elems
        digest = hashlib.blake2b(f"{self.seed}/{t.seed_name or t.name}".encode(), digest_size=8).digest()
        start = int.from_bytes(digest, "little") % BLOCK
        while left:
            part = block[start : start + left].data.cast("B")
            left -= len(part) // block.shape[1]
            start = 0
            while part:
                part = part[os.write(fd, part) :]


def write_shard(path: Path, shard: list[Tensor], values: Values) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for t in shard:
        header[t.name] = {"dtype": t.dtype, "shape": t.shape, "data_offsets": [offset, offset + t.n_bytes]}
        offset += t.n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.write(fd, len(text).to_bytes(8, "little") + text)
        for t in shard:
            values.write(fd, t)
    finally:
        os.close(fd)


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
    values, total, weight_map = Values(seed), 0, {}
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
