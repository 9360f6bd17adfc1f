"""Reads a Hugging Face checkpoint folder into float32 arrays, written from the format descriptions alone.

Independent of deepcalm's packer on purpose: the tests compare the two. Understands F32, F16, BF16, F8_E4M3 with
``weight_scale_inv`` blocks and compressed-tensors int4 (``pack-quantized``, symmetric). Everything is dequantised.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_SCALES = (".weight_scale_inv", "_proj_scale_inv", ".weight_scale", ".activation_scale")
_PLAIN = {"F32": "<f4", "F16": "<f2", "I32": "<i4", "I64": "<i8", "U8": "u1"}


def e4m3_value(code: Array) -> Array:
    """uint8 e4m3fn -> f32: sign, 4 exponent bits (bias 7), 3 mantissa bits; 0x7F and 0xFF are NaN, no infinities."""
    sign = np.where(code & 0x80, -1.0, 1.0)
    exponent = ((code >> 3) & 0x0F).astype(np.int64)
    mantissa = (code & 0x07).astype(np.float64)
    value = np.where(exponent > 0, (8 + mantissa) * np.exp2(exponent - 10.0), mantissa * np.exp2(-9.0))
    return np.where((code & 0x7F) == 0x7F, np.nan, sign * value).astype(np.float32)


def raw_tensors(folder: Path) -> dict[str, Array]:
    """Every tensor of every *.safetensors file as stored: BF16 widened to f32, F8_E4M3 left as uint8 codes."""
    out: dict[str, Array] = {}
    for path in sorted(folder.glob("*.safetensors")):
        blob = path.read_bytes()
        n = int.from_bytes(blob[:8], "little")
        for name, entry in json.loads(blob[8 : 8 + n]).items():
            if name == "__metadata__":
                continue
            begin, end = (8 + n + o for o in entry["data_offsets"])
            shape, dtype, count = entry["shape"], entry["dtype"], math.prod(entry["shape"])
            if dtype == "BF16":
                bits = np.frombuffer(blob, "<u2", count, begin).astype(np.uint32) << np.uint32(16)
                out[name] = bits.view(np.float32).reshape(shape)
            else:
                kind = "u1" if dtype == "F8_E4M3" else _PLAIN[dtype]
                out[name] = np.frombuffer(blob, kind, count, begin).reshape(shape)
            assert begin + count * (2 if dtype == "BF16" else out[name].itemsize) == end, name
    return out


def dequantise(raw: dict[str, Array]) -> dict[str, Array]:
    """Stored tensors -> float32 tensors under their plain names (``X.weight``); scales and shapes are consumed."""
    out: dict[str, Array] = {}
    for name, t in raw.items():
        if name.endswith((*_SCALES, ".weight_shape", "rotary_emb.inv_freq")):
            continue
        if name.endswith(".weight_packed"):
            base = name.removesuffix("_packed")
            rows, cols = (int(v) for v in raw[base + "_shape"])
            words = t.view(np.uint32)
            column = np.arange(cols)
            nibble = (words[:, column // 8] >> (4 * (column % 8)).astype(np.uint32)) & np.uint32(15)
            out[base] = ((nibble.astype(np.float32) - 8) * raw[base + "_scale"][:, column // 32]).reshape(rows, cols)
        elif t.dtype == np.uint8:
            rows, cols = t.shape[-2:]
            scale = raw[name + "_scale_inv"]
            if scale.ndim != 2:  # of the whole tensor, or of gate and up of each expert
                out[name] = e4m3_value(t) * (np.repeat(scale, rows // scale.shape[1], axis=1) if scale.ndim else scale)
                continue
            size = 128  # the block edge; both directions alike in every shipped checkpoint
            out[name] = e4m3_value(t) * scale[np.arange(rows)[:, None] // size, np.arange(cols)[None, :] // size]
        else:
            out[name] = t.astype(np.float32)
    return dict(_split_experts(out))


def _split_experts(tensors: dict[str, Array]) -> Iterator[tuple[str, Array]]:
    """Experts that are stored in one tensor, gate rows before up rows, one by one."""
    for name, t in tensors.items():
        prefix, found, parts = name.partition(".mlp.experts.")
        if t.ndim != 3 or not found:
            yield name, t
            continue
        for e, expert in enumerate(t):
            names = ("down_proj",) if parts == "down_proj" else ("gate_proj", "up_proj")
            for part, rows in zip(names, np.split(expert, len(names)), strict=True):
                yield f"{prefix}.mlp.experts.{e}.{part}.weight", rows


def config(folder: Path) -> dict[str, Any]:
    """config.json, sarvam's own names of keys as DeepSeek's."""
    names = {"num_experts": "n_routed_experts", "num_shared_experts": "n_shared_experts"}
    return {names.get(key, key): value for key, value in json.loads((folder / "config.json").read_text()).items()}


def load(folder: Path | str) -> tuple[dict[str, Any], dict[str, Array]]:
    """(config.json as a dict, {tensor name: float32 array}) of a checkpoint folder."""
    return config(Path(folder)), dequantise(raw_tensors(Path(folder)))
