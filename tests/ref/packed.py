"""Reads a packed file (.dcalm) with code of its own, written from the format description alone.

The values are exactly those that the runtime multiplies with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import formats

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

    def matrix(self, name: str, only: int | None = None) -> Array:
        """A tiled tensor [n_slices?, rows, cols] f64, or one slice; rows of stacked parts are padded to 16 each."""
        e = self.entries[name]
        fmt = "q4b" if (e.format, e.scale) == ("q4", "bf16") else e.format
        slices, (rows, cols) = math.prod(e.shape[:-2]), e.shape[-2:]
        data = self.raw(name).reshape(slices, -1)
        scales: list[Any] = [None] * slices
        if fmt == "f8":
            scales = list(self.plain(name + ".scale").astype(np.float32).reshape(slices, *self._grid(e)))
        chosen = range(slices) if only is None else [only]
        values = [formats.decode_tiles(fmt, data[i], rows, cols, scales[i], e.scale_block) for i in chosen]
        return np.stack(values).reshape(e.shape if only is None else e.shape[-2:])

    @staticmethod
    def _grid(e: Entry) -> tuple[int, int]:
        return -(-e.shape[-2] // e.scale_block[0]), -(-e.shape[-1] // e.scale_block[1])

    def part_rows(self, name: str) -> list[Array]:
        """The packed rows of each natural part: gate and up alternate tile by tile, others stand one on the other."""
        e = self.entries[name]
        if not e.parts:
            return [np.arange(e.shape[-2])]
        if name.endswith("w_gate_up"):
            rows = np.arange(e.parts[0])
            return [rows // 16 * 32 + 16 * i + rows % 16 for i in range(2)]
        starts = np.cumsum([0, *(-(-n // 16) * 16 for n in e.parts)])
        return [start + np.arange(n) for start, n in zip(starts, e.parts, strict=False)]


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
