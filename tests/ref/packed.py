"""Reads a packed file (.dcalm) back into the reference model's weights, written from the format description alone.

The values are exactly those that the runtime multiplies with, each matrix labelled with the activation rounding that
its format implies, so that `model.Model` becomes an oracle for quantised models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from . import formats, model

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: its row in the table of ``__metadata__`` and its place."""

    name: str
    kind: str  # tiled | plain | scale | file
    format: str
    scale: str  # dtype of the scales, or ""
    shape: tuple[int, ...]  # natural shape; stacked parts: padded rows
    parts: tuple[int, ...]  # natural rows of stacked parts
    scale_block: tuple[int, int]
    offset: int  # absolute in the file
    n_bytes: int  # true bytes, without padding


class PackedFile:
    """The header of a packed file and its bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.blob = np.fromfile(path, np.uint8)
        n = int.from_bytes(self.blob[:8].tobytes(), "little")
        header = json.loads(self.blob[8 : 8 + n].tobytes())
        self.metadata: dict[str, str] = header.pop("__metadata__")
        self.config: dict[str, Any] = json.loads(self.metadata["config"])
        self.entries: dict[str, Entry] = {}
        for name, e in json.loads(self.metadata["tensors"]).items():
            self.entries[name] = Entry(
                name=name,
                kind=e["kind"],
                format=e["format"],
                scale=e.get("scale", ""),
                shape=tuple(e["shape"]),
                parts=tuple(e.get("parts") or ()),
                scale_block=tuple(e.get("scale_block") or (128, 128)),
                offset=8 + n + header[name]["data_offsets"][0],
                n_bytes=e["bytes"],
            )

    def raw(self, name: str) -> Array:
        """[n_bytes] uint8"""
        e = self.entries[name]
        return self.blob[e.offset : e.offset + e.n_bytes]

    def plain(self, name: str) -> Array:
        """A plain or scale tensor in its natural shape, f64."""
        e, raw = self.entries[name], self.raw(name)
        if e.format == "f32":
            values = raw.view("<f4").astype(np.float64)
        elif e.format == "bf16":
            values = formats.bf16_value(raw.view("<u2")).astype(np.float64)
        else:
            assert e.format == "f16", e
            values = raw.view("<f2").astype(np.float64)
        return values.reshape(e.shape)

    def matrix(self, name: str) -> model.Matrix:
        """A tiled tensor [n_slices?, rows, cols] f64 with the rounding of its activations."""
        e = self.entries[name]
        fmt = "q4b" if (e.format, e.scale) == ("q4", "bf16") else e.format
        slices, (rows, cols) = math.prod(e.shape[:-2]), e.shape[-2:]
        data = self.raw(name).reshape(slices, -1)
        scales: list[Any] = [None] * slices
        if fmt == "f8":
            scales = list(self.plain(name + ".scale").astype(np.float32).reshape(slices, *self._grid(e)))
        values = [formats.decode_tiles(fmt, data[i], rows, cols, scales[i], e.scale_block) for i in range(slices)]
        return model.Matrix(np.stack(values).reshape(e.shape), formats.ACT_KIND[fmt])

    @staticmethod
    def _grid(e: Entry) -> tuple[int, int]:
        return -(-e.shape[-2] // e.scale_block[0]), -(-e.shape[-1] // e.scale_block[1])

    def parts(self, name: str) -> list[model.Matrix]:
        """A stacked matrix [pad16(a) + pad16(b), cols] taken apart: [[a, cols], [b, cols]]."""
        m, e = self.matrix(name), self.entries[name]
        a, b = e.parts
        start = -(-a // 16) * 16
        return [model.Matrix(m.w[:a], m.act), model.Matrix(m.w[start : start + b], m.act)]

    def gate_up(self, name: str) -> tuple[model.Matrix, model.Matrix]:
        """Gate and up [n_slices?, width, cols], which alternate tile by tile in the file."""
        m, e = self.matrix(name), self.entries[name]
        tiles = m.w.reshape(*m.w.shape[:-2], -1, 2, 16, m.w.shape[-1])
        gate, up = (tiles[..., i, :, :].reshape(*m.w.shape[:-2], -1, m.w.shape[-1]) for i in (0, 1))
        return model.Matrix(gate[..., : e.parts[0], :], m.act), model.Matrix(up[..., : e.parts[1], :], m.act)


def config(packed: PackedFile) -> model.Config:
    """The reference's configuration from the normalised one in the file."""
    return model.Config(**{f.name: packed.config[f.name] for f in fields(model.Config)})


def weights(packed: PackedFile) -> model.Weights:
    """All weights of a packed file, f64."""
    cfg = config(packed)

    def mlp(gate_up: str, down: str) -> list[model.Mlp]:
        (gate, up), out = packed.gate_up(gate_up), packed.matrix(down)
        if gate.w.ndim == 2:
            return [model.Mlp(gate, up, out)]
        return [model.Mlp(gate[i], up[i], out[i]) for i in range(len(gate.w))]

    def layer(p: str, moe: bool) -> model.Layer:
        q, kv_a = packed.parts(p + "wqkv_a")
        out = model.Layer(
            attn_norm=packed.plain(p + "attn_norm"),
            q=packed.matrix(p + "wq_b") if cfg.q_lora_rank else q,
            kv_a=kv_a,
            kv_a_norm=packed.plain(p + "kv_a_norm"),
            w_uk=packed.matrix(p + "w_uk"),
            w_uv=packed.matrix(p + "w_uv"),
            o=packed.matrix(p + "wo"),
            ffn_norm=packed.plain(p + "ffn_norm"),
        )
        if cfg.q_lora_rank:
            out.q_a, out.q_a_norm = q, packed.plain(p + "q_a_norm")
        if not moe:
            out.dense = mlp(p + "w_gate_up", p + "w_down")[0]
            return out
        out.router = packed.matrix(p + "router").w
        if cfg.topk_method == "noaux_tc":
            out.router_bias = packed.plain(p + "router_bias")
        out.experts = mlp(p + "experts.w_gate_up", p + "experts.w_down")
        if cfg.n_shared_experts:
            out.shared = mlp(p + "shared.w_gate_up", p + "shared.w_down")[0]
        return out

    mtp = None
    if cfg.num_nextn_predict_layers:
        mtp = model.Mtp(
            enorm=packed.plain("mtp.enorm"),
            hnorm=packed.plain("mtp.hnorm"),
            eh_proj=packed.matrix("mtp.eh_proj"),
            layer=layer("mtp.", cfg.is_moe(cfg.num_hidden_layers)),
            norm=packed.plain("mtp.final_norm"),
            head=packed.matrix("mtp.head") if "mtp.head" in packed.entries else None,
        )
    return model.Weights(
        embed=packed.plain("embed"),
        layers=[layer(f"layers.{i}.", cfg.is_moe(i)) for i in range(cfg.num_hidden_layers)],
        norm=packed.plain("final_norm"),
        head=packed.matrix("head"),
        mtp=mtp,
    )


def core_tensors(packed: PackedFile, expected: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The table of tensors that ``_core.Model`` takes, for the names in ``_core.expected_tensors`` and their scales."""
    out = []
    for spec in expected:
        e = packed.entries[spec["name"]]
        for entry in [e, packed.entries[e.name + ".scale"]] if e.format == "f8" else [e]:
            shape = entry.shape if entry.kind != "scale" else e.shape
            slices, rows, cols = (1, shape[0], 0) if len(shape) == 1 else (math.prod(shape[:-2]), *shape[-2:])
            out.append(
                {
                    "name": entry.name,
                    "kind": entry.kind,
                    "format": entry.format,
                    "scale": entry.scale,
                    "n_slices": slices,
                    "rows": rows,
                    "cols": cols,
                    "scale_rows": e.scale_block[0],
                    "scale_cols": e.scale_block[1],
                    "offset": entry.offset,
                    "bytes": entry.n_bytes,
                }
            )
    return out
