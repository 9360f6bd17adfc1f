"""Reads a Hugging Face checkpoint folder into float32 arrays, written from the format descriptions alone.

Independent of deepcalm's packer on purpose: the tests compare the two. Understands F32, F16, BF16, F8_E4M3 with one
scale, one a row or blocks of 128, symmetric int4 and int8, MXFP4 and NVFP4. Everything is dequantised.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_PLAIN = {"F32": "<f4", "F16": "<f2", "I32": "<i4", "I64": "<i8", "U8": "u1", "I8": "i1"}
_BESIDE = ("_scale_inv", "weight_scale", "_shape", "global_scale", "weight_scale_2", "activation_scale", "inv_freq")
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


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


def integers(words: Array, cols: int, bits: int) -> Array:
    """Codes [o, cols] of int32 words [o, *]: the lowest bits first, without their offset."""
    column, n = np.arange(cols), 32 // bits
    field = (words.view(np.uint32)[:, column // n] >> (bits * (column % n)).astype(np.uint32)) & np.uint32(2**bits - 1)
    return field.astype(np.float32) - np.float32(2 ** (bits - 1))


def fp4(codes: Array) -> Array:
    """e2m1 values [o, i] of bytes [o, i/2], the even column in the low nibble."""
    nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)
    return np.array([*_E2M1, *(-v for v in _E2M1)], np.float32)[nibbles]


def grouped(codes: Array, scale: Array) -> Array:
    """codes [o, i] times scale [o, groups]: as many columns a group as there are groups for."""
    cols = codes.shape[1]
    size = cols if scale.shape[1] == 1 else next(g for g in (16, 32, 64, 128) if -(-cols // g) == scale.shape[1])
    return (codes * scale.astype(np.float32)[:, np.arange(cols) // size]).astype(np.float32)


def dequantise(raw: dict[str, Array]) -> dict[str, Array]:
    """Stored tensors -> float32 tensors under their plain names (``X.weight``); scales and shapes are consumed."""
    out: dict[str, Array] = {}
    for name, t in raw.items():
        if name.endswith(_BESIDE):
            continue
        base = name.removesuffix("_packed")
        scale = raw.get(base + "_scale")
        if base + "_scale_2" in raw or base + "_global_scale" in raw:  # NVFP4, of modelopt and of compressed-tensors
            assert scale is not None
            one = np.float32(1)
            whole = e4m3_value(scale) * raw.get(base + "_scale_2", one) / raw.get(base + "_global_scale", one)
            out[base] = grouped(fp4(t), whole)
        elif name.endswith("_packed") and t.dtype == np.uint8:  # MXFP4: exponents
            assert scale is not None
            out[base] = grouped(fp4(t), np.exp2(scale.astype(np.float64) - 127).astype(np.float32))
        elif name.endswith("_packed"):
            assert scale is not None
            rows, cols = (int(v) for v in raw[base + "_shape"])
            assert t.shape[0] == rows
            out[base] = grouped(integers(t, cols, 4 if t.shape[1] == -(-cols // 8) else 8), scale)
        elif t.dtype == np.int8:
            assert scale is not None
            out[base] = grouped(t.astype(np.float32), scale)
        elif t.dtype == np.uint8:
            rows, cols = t.shape[-2:]
            scale = raw[name + "_scale_inv"] if scale is None else scale
            if scale.ndim == 3:  # of gate and up of each expert
                scale = np.repeat(scale, rows // scale.shape[1], axis=1)
            elif scale.size == 1:  # of the whole tensor
                scale = scale.reshape(1, 1)
            elif scale.shape != (rows, 1):
                size = 128  # the block edge; both directions alike in every shipped checkpoint
                scale = scale[np.arange(rows)[:, None] // size, np.arange(cols)[None, :] // size]
            out[name] = e4m3_value(t) * scale.astype(np.float32)
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
