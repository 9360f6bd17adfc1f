#!/usr/bin/env python3
"""Write a GGUF file with random weights in a real model's geometry, every matrix in one type: for llama-bench.

    tools/gguf_synthetic.py v2-lite:14 OUT.gguf --type Q8_0

Architecture deepseek2 with latent attention (MLA); router and norms in f32, embedding and output in the type of the
rest, no tokenizer. Rotary scaling is left out: it costs nothing at run time.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deepcalm.files.pack import slabs, write_at
from deepcalm.measure import synthetic

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
Keys = dict[str, "int | float | bool | str"]
# name -> (number in the file, elements of a block, bytes of a block)
TYPES = {"F32": (0, 1, 4), "Q4_0": (2, 32, 18), "Q8_0": (8, 32, 34), "BF16": (30, 1, 2)}
Part = tuple[str, int, tuple[int, ...]]  # name, rows or columns, experts
ALIGN = 32


@dataclass(frozen=True, slots=True)
class Tensor:
    """``shape`` as the format wants it: columns first."""

    name: str
    shape: tuple[int, ...]
    type: str
    deviation: float
    mean: float = 0.0

    @property
    def n_bytes(self) -> int:
        _, elems, size = TYPES[self.type]
        return math.prod(self.shape) // elems * size


def tensors(c: dict[str, Any], kind: str) -> Iterator[Tensor]:
    """Every tensor of the model; standard deviations as in deepcalm.measure.synthetic."""
    d, heads, r = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"]
    dn, dr, dv = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    residual = (2 * c["num_hidden_layers"]) ** -0.5
    rq, experts, width = c["q_lora_rank"], c["n_routed_experts"], c["moe_intermediate_size"]

    def matrix(name: str, cols: int, rows: int, *stack: int, gain: float = 1.0, of: int = 0) -> Tensor:
        return Tensor(name + ".weight", (cols, rows, *stack), kind, gain * (of or cols) ** -0.5)

    def norm(name: str, n: int) -> Tensor:
        return Tensor(name + ".weight", (n,), "F32", 0.1, 1.0)

    yield Tensor("token_embd.weight", (d, c["vocab_size"]), kind, 1.0)
    yield norm("output_norm", d)
    yield matrix("output", d, c["vocab_size"], gain=2.0)
    for i in range(c["num_hidden_layers"]):
        p = f"blk.{i}."
        yield norm(p + "attn_norm", d)
        if rq:
            yield matrix(p + "attn_q_a", d, rq)
            yield norm(p + "attn_q_a_norm", rq)
            yield matrix(p + "attn_q_b", rq, heads * (dn + dr))
        else:
            yield matrix(p + "attn_q", d, heads * (dn + dr))
        yield matrix(p + "attn_kv_a_mqa", d, r + dr)
        yield norm(p + "attn_kv_a_norm", r)
        yield matrix(p + "attn_k_b", dn, r, heads, of=r)
        yield matrix(p + "attn_v_b", r, dv, heads)
        yield matrix(p + "attn_output", heads * dv, d, gain=residual)
        yield norm(p + "ffn_norm", d)
        if i < c["first_k_dense_replace"]:
            parts: list[Part] = [("ffn_gate", c["intermediate_size"], ()), ("ffn_up", c["intermediate_size"], ())]
            down: list[Part] = [("ffn_down", c["intermediate_size"], ())]
        else:
            yield Tensor(p + "ffn_gate_inp.weight", (d, experts), "F32", d**-0.5)
            if c["topk_method"] == "noaux_tc":
                yield Tensor(p + "exp_probs_b.bias", (experts,), "F32", 0.02)
            shared = c["n_shared_experts"] * width
            parts = [(f"ffn_{n}_exps", width, (experts,)) for n in ("gate", "up")]
            parts += [(f"ffn_{n}_shexp", shared, ()) for n in ("gate", "up")]
            down = [("ffn_down_exps", width, (experts,)), ("ffn_down_shexp", shared, ())]
        for name, rows, stack in parts:
            yield matrix(p + name, d, rows, *stack)
        for name, cols, stack in down:
            yield matrix(p + name, cols, d, *stack, gain=residual)


def metadata(c: dict[str, Any]) -> Keys:
    """The keys that the architecture needs."""
    r, dr = c["kv_lora_rank"], c["qk_rope_head_dim"]
    keys: Keys = {
        "block_count": c["num_hidden_layers"], "context_length": c["max_position_embeddings"],
        "embedding_length": c["hidden_size"], "feed_forward_length": c["intermediate_size"],
        "attention.head_count": c["num_attention_heads"], "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": float(c["rms_norm_eps"]), "rope.freq_base": float(c["rope_theta"]),
        "rope.dimension_count": dr, "attention.q_lora_rank": c["q_lora_rank"] or 0, "attention.kv_lora_rank": r,
        "attention.key_length": r + dr, "attention.value_length": r,
        "attention.key_length_mla": c["qk_nope_head_dim"] + dr, "attention.value_length_mla": c["v_head_dim"],
        "leading_dense_block_count": c["first_k_dense_replace"], "expert_count": c["n_routed_experts"],
        "expert_used_count": c["num_experts_per_tok"], "expert_feed_forward_length": c["moe_intermediate_size"],
        "expert_shared_count": c["n_shared_experts"], "expert_weights_scale": float(c["routed_scaling_factor"]),
        "expert_weights_norm": bool(c["norm_topk_prob"]), "vocab_size": c["vocab_size"],
        "expert_gating_func": 2 if c["scoring_func"] == "sigmoid" else 1,
    }  # fmt: skip
    if c["q_lora_rank"] is None and c["num_hidden_layers"] in (26, 27):
        del keys["attention.q_lora_rank"]
    general: Keys = {"general.architecture": "deepseek2", "general.name": "random weights", "general.alignment": ALIGN}
    return general | {"deepseek2." + k: v for k, v in keys.items()} | {"tokenizer.ggml.model": "no_vocab"}


def header(keys: Keys, plan: list[Tensor]) -> bytes:
    """Everything before the tensors' bytes, padded to ALIGN."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    out = b"GGUF" + struct.pack("<IQQ", 3, len(plan), len(keys))
    for name, value in keys.items():
        if isinstance(value, bool):
            out += text(name) + struct.pack("<I?", 7, value)
        elif isinstance(value, int):
            out += text(name) + struct.pack("<II", 4, value)
        elif isinstance(value, float):
            out += text(name) + struct.pack("<If", 6, value)
        else:
            out += text(name) + struct.pack("<I", 8) + text(value)
    offset = 0
    for t in plan:
        out += text(t.name) + struct.pack(f"<I{len(t.shape)}QIQ", len(t.shape), *t.shape, TYPES[t.type][0], offset)
        offset += -(-t.n_bytes // ALIGN) * ALIGN
    return out + b"\0" * (-len(out) % ALIGN)


class Values(synthetic.Values):
    """Blocks of 32 values as this format has them: the scale before the codes, those of Q8_0 signed."""

    def encoded(self, fmt: str, x: F32, mean: float, deviation: float) -> U8:
        if fmt not in ("Q8_0", "Q4_0"):
            return super().encoded(fmt.lower(), x, mean, deviation)
        block = super().encoded(fmt[:2].lower(), x, mean, deviation)
        return np.concatenate([block[:, -2:], block[:, :-2] ^ (0x80 if fmt == "Q8_0" else 0)], 1)

    def padded(self, t: Tensor) -> Iterator[U8]:
        """A tensor's bytes and what pads them."""
        yield from self.pieces(t.name, t.type, 32, (t.mean, t.deviation), t.n_bytes)
        yield np.zeros(-t.n_bytes % ALIGN, np.uint8)


def write(path: Path, spec: str, kind: str, overrides: tuple[str, ...] = (), seed: int = 0) -> int:
    """Writes ``path`` for NAME[:layers]; returns its size in bytes. The file appears complete or not at all."""
    config, _ = synthetic.make_config(spec, overrides, mtp=False)
    if config["model_type"] not in ("deepseek_v2", "deepseek_v3", "glm4_moe_lite"):
        raise ValueError(f"{spec}: {config['model_type']} is no deepseek2 model of llama.cpp's")
    plan = list(tensors(config, kind))
    values, temporary = Values(seed), path.with_name(f".{path.name}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        head = np.frombuffer(header(metadata(config), plan), np.uint8)
        at = 0
        for slab in slabs(itertools.chain([head], *map(values.padded, plan)), 0):
            write_at(fd, slab.data, at)
            at += len(slab)
        os.fsync(fd)
        temporary.replace(path)
    finally:
        os.close(fd)
        temporary.unlink(missing_ok=True)
    return path.stat().st_size


def main() -> int:
    parser = argparse.ArgumentParser(
        description="\n".join((__doc__ or "").splitlines()), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="NAME[:layers]", help=", ".join(synthetic.PRESETS))
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", choices=("Q8_0", "Q4_0", "BF16"), default="Q8_0")
    parser.add_argument("--set", metavar="KEY=JSON", action="append", default=[], help="override a config value")
    args = parser.parse_args()
    print(f"{write(args.out, args.model, args.type, tuple(args.set)) / 1e9:.2f} GB", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
