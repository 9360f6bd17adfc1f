"""Quantises tiny checkpoints as others do: compressed-tensors' schemes and modelopt's NVFP4 and FP8, in numpy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import tiny

Array = np.ndarray[Any, Any]
# Widths that groups of 128 columns divide, and rows that they do not.
WIDTHS: dict[str, Any] = {
    "hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 256, "q_lora_rank": 128, "kv_lora_rank": 128,
    "num_attention_heads": 4, "v_head_dim": 32, "qk_nope_head_dim": 40, "n_routed_experts": 8, "num_experts_per_tok": 3,
    "num_hidden_layers": 2,
}  # fmt: skip


def _words(codes: Array, bits: int) -> tiny.Stored:
    """Codes -2^(bits-1) .. as int32 words, the lowest bits first."""
    fields = (codes + 2 ** (bits - 1)).astype(np.uint32).reshape(len(codes), -1, 32 // bits)
    words = np.bitwise_or.reduce(fields << (bits * np.arange(32 // bits, dtype=np.uint32)), axis=-1)
    return "I32", words.shape, words.astype("<u4").tobytes()


def _groups(w: Array, size: int) -> Array:
    return w.reshape(len(w), -1, size or w.shape[1])


def _store(x: Array, dtype: str) -> tuple[tiny.Stored, Array]:
    """Stored scales, and the values that they have then."""
    if dtype == "bf16":
        bits = tiny.bf16_bits(x.astype(np.float32))
        return ("BF16", x.shape, bits.astype("<u2").tobytes()), tiny.bf16_value(bits).astype(np.float64)
    kept = x.astype({"f16": "<f2", "f32": "<f4"}[dtype])
    return (dtype.upper(), x.shape, kept.tobytes()), kept.astype(np.float64)


def integer(bits: int, size: int, dtype: str, packed: bool = True) -> Callable[[Array], dict[str, tiny.Stored]]:
    """Symmetric codes that reach -2^(bits-1); size 0: one scale a row."""

    def encode(w: Array) -> dict[str, tiny.Stored]:
        groups, most = _groups(w, size), 2 ** (bits - 1)
        stored, scale = _store(np.abs(groups).max(-1) / (most - 0.5), dtype)
        codes = np.clip(np.rint(groups / scale[..., None]), -most, most - 1).astype(np.int64).reshape(w.shape)
        out = {"weight_scale": stored}
        if not packed:
            return out | {"weight": ("I8", w.shape, codes.astype(np.int8).tobytes())}
        return out | {
            "weight_packed": _words(codes, bits),
            "weight_shape": ("I64", (2,), np.array(w.shape, "<i8").tobytes()),
        }

    return encode


def fp8(strategy: str, dtype: str, shape: tuple[int, ...] = (1,)) -> Callable[[Array], dict[str, tiny.Stored]]:
    """e4m3 with a scale for the tensor (stored in ``shape``), for a row, or for 128 x 128."""

    def encode(w: Array) -> dict[str, tiny.Stored]:
        if strategy == "block":
            codes, scale = tiny.quantise_fp8(w, (128, 128))
            return {"weight": ("F8_E4M3", w.shape, codes.tobytes()), "weight_scale": _store(scale, dtype)[0]}
        amax = np.abs(w).max() if strategy == "tensor" else np.abs(w).max(1, keepdims=True)
        stored, scale = _store(np.reshape(amax / 448, shape if strategy == "tensor" else (-1, 1)), dtype)
        codes = tiny.e4m3_bits(w / (scale.reshape(1, 1) if scale.size == 1 else scale))
        return {"weight": ("F8_E4M3", w.shape, codes.tobytes()), "weight_scale": stored}

    return encode


def fp4(group: int, modelopt: bool = False) -> Callable[[Array], dict[str, tiny.Stored]]:
    """e2m1: MXFP4 (groups of 32, exponents) or NVFP4 (groups of 16, e4m3 under a scale of the tensor)."""

    def encode(w: Array) -> dict[str, tiny.Stored]:
        groups = _groups(w, group)
        amax = np.abs(groups).max(-1)
        if group == 32:
            exponent = np.floor(np.log2(amax)).astype(np.int64) - 2
            scale = np.exp2(exponent.astype(np.float64))
            out = {"weight_scale": ("U8", scale.shape, (exponent + 127).astype(np.uint8).tobytes())}
        else:
            whole = np.float32(448 * 6 / amax.max())  # as compressed-tensors has it; modelopt's is 1 / whole
            bits = tiny.e4m3_bits(amax / 6 * float(whole))
            if modelopt:
                whole = np.float32(1) / whole
            scale = tiny.e4m3_table()[bits] * float(whole) ** (1 if modelopt else -1)
            key = ("weight_scale_2", ()) if modelopt else ("weight_global_scale", (1,))
            out = {"weight_scale": ("F8_E4M3", scale.shape, bits.tobytes()), key[0]: ("F32", key[1], whole.tobytes())}
        values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        x = groups / np.where(scale == 0, 1, scale)[..., None]
        codes = np.abs(np.abs(x)[..., None] - values).argmin(-1) | np.where(np.signbit(x), 8, 0)
        codes = codes.reshape(w.shape).astype(np.uint8)
        data = ("U8", (len(w), w.shape[1] // 2), (codes[:, ::2] | codes[:, 1::2] << 4).tobytes())
        return out | {"weight" if modelopt else "weight_packed": data}

    return encode


def _config(fmt: str, **weights: Any) -> dict[str, Any]:
    weights = {"symmetric": True, "dynamic": False, "actorder": None, "group_size": None, **weights}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "format": fmt}
    rest = {"ignore": ["lm_head"], "kv_cache_scheme": None, "sparsity_config": {}, "quantization_status": "compressed"}
    return {"quant_method": "compressed-tensors", "format": fmt, "config_groups": {"group_0": group}, **rest}


def _ints(fmt: str, bits: int, size: int) -> dict[str, Any]:
    return _config(fmt, type="int", num_bits=bits, strategy="group" if size else "channel", group_size=size or None)


def _floats(fmt: str, bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    return _config(fmt, type="float", num_bits=bits, strategy=strategy, **more)


# scheme -> (quantization_config, encoder of one weight, format of an expert under dtype "source")
SCHEMES: dict[str, tuple[dict[str, Any], Callable[[Array], dict[str, tiny.Stored]], str]] = {
    "fp8 tensor": (_floats("float-quantized", 8, "tensor"), fp8("tensor", "bf16"), "f8"),
    "fp8 channel": (_floats("float-quantized", 8, "channel"), fp8("channel", "bf16"), "f32"),
    "fp8 block": (_floats("float-quantized", 8, "block", block_structure=[128, 128]), fp8("block", "f32"), "f8"),
    "int8 channel": (_ints("int-quantized", 8, 0), integer(8, 0, "bf16", packed=False), "q8"),
    "int8 channel, f32 scales": (_ints("int-quantized", 8, 0), integer(8, 0, "f32", packed=False), "f32"),
    "int8 group 32": (_ints("pack-quantized", 8, 32), integer(8, 32, "f16"), "q8"),
    "int8 group 128": (_ints("pack-quantized", 8, 128), integer(8, 128, "bf16"), "q8"),
    "int4 group 64": (_ints("pack-quantized", 4, 64), integer(4, 64, "bf16"), "q4"),
    "int4 group 128": (_ints("pack-quantized", 4, 128), integer(4, 128, "f16"), "q4"),
    "int4 channel": (_ints("pack-quantized", 4, 0), integer(4, 0, "bf16"), "q4"),
    "mxfp4": (_floats("mxfp4-pack-quantized", 4, "group", group_size=32), fp4(32), "q8"),
    "nvfp4": (_floats("nvfp4-pack-quantized", 4, "tensor_group", group_size=16), fp4(16), "q8"),
    "modelopt nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, fp4(16, modelopt=True), "q8"),
    "modelopt fp8": ({"quant_method": "modelopt", "quant_algo": "FP8"}, fp8("tensor", "f32", ()), "f8"),
    "fp8, null block": ({"quant_method": "fp8", "weight_block_size": None}, fp8("tensor", "f32", ()), "f8"),
}  # fmt: skip


def write(directory: Path, scheme: str, preset: str = "v3", seed: int = 0) -> Path:
    """A tiny checkpoint whose linear layers are quantised, the MTP layer's too."""
    quantisation, encode, _ = SCHEMES[scheme]
    folder = tiny.write(directory, preset, dtype="f32", seed=seed, n_shards=1, mtp_copies=False, **WIDTHS)
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantisation}
    (folder / "config.json").write_text(json.dumps(config))

    def change(tensors: dict[str, tiny.Stored]) -> None:
        for name in [n for n in tensors if "_proj" in n and not n.endswith("eh_proj.weight")]:
            _, shape, data = tensors.pop(name)
            stored = encode(np.frombuffer(data, "<f4").reshape(shape).astype(np.float64))
            if quantisation["quant_method"] == "fp8":
                stored["weight_scale_inv"] = stored.pop("weight_scale")
            tensors |= {name.removesuffix("weight") + part: t for part, t in stored.items()}
            tensors[name.removesuffix("weight") + "input_scale"] = ("F32", (), np.float32(1).tobytes())

    return tiny.rewrite(folder, change)
