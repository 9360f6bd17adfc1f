"""What ``deepcalm inspect`` shows of a packed file, or of a checkpoint that would be packed, as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..geometry import attentions, parameters
from .pack import plan
from .packed import NO_SHA256, PackedFile, Tensor


def describe(path: str | Path) -> dict[str, Any]:
    """Everything that a packed file says about itself, or that packing a checkpoint folder would make it say.

    Keys, ready for JSON: file, packed (false: a folder, as ``deepcalm.pack`` would store it by default), file_bytes
    (of a folder: without the header), header_sha256 (null of a folder), config, source, dropped (list of {name, why,
    bytes}), files (name -> bytes), tensors (list of {name, role, kind, format, scale, shape, source_dtype, bytes,
    active_bytes, sha256}), formats (format -> bytes), roles (role -> bytes), weight_bytes, active_bytes_per_token
    (weights that decoding one token reads: chosen experts only, one embedding row, no MTP layer), parameters ({total,
    active, routed, mtp, mtp_active}), cache (what the main layers keep of a token in 16 bits a number, by kind of
    attention: MHA, GQA, MQA, MLA -> bytes; the model's own is MLA). Raises CheckpointError, PackedFileError.
    """
    if Path(path).is_dir():
        p = plan(path)
        stored = [s for t in [*p.tensors, *p.file_tensors()] for s in t.stored]
        out = {"file": str(path), "packed": False, "file_bytes": p.data_bytes, "header_sha256": None}
        out |= {"config": p.config, "source": p.source, "dropped": [dataclasses.asdict(d) for d in p.dropped]}
        return out | _contents(p.config, stored)
    with PackedFile(path) as f:
        out = {"file": str(path), "packed": True, "file_bytes": f.header.file_size, "header_sha256": f.header_sha256}
        out |= {"config": f.config, "source": f.source, "dropped": f.dropped}
        return out | _contents(f.config, f.entries.values())


def _contents(config: dict[str, Any], stored: Iterable[Tensor]) -> dict[str, Any]:
    out: dict[str, Any] = {"files": {}, "tensors": [], "formats": {}, "roles": {}, "weight_bytes": 0}
    out |= {"active_bytes_per_token": 0, "parameters": dataclasses.asdict(parameters(config))}
    out["cache"] = {a.name: 2 * a.values * config["num_hidden_layers"] for a in attentions(config)}
    for s in stored:
        if s.kind == "file":
            out["files"][s.name.removeprefix("file.")] = s.nbytes
            continue
        active = s.active_bytes(config["num_experts_per_tok"])
        label = f"{s.format} ({s.scale} scales)" if s.kind == "tiled" and s.scale else s.format
        row: dict[str, Any] = {"name": s.name, "role": s.role, "kind": s.kind, "format": s.format, "scale": s.scale}
        row |= {"shape": list(s.shape), "source_dtype": s.source_dtype, "bytes": s.nbytes}
        out["tensors"].append(row | {"active_bytes": active, "sha256": None if s.sha256 == NO_SHA256 else s.sha256})
        out["formats"][label] = out["formats"].get(label, 0) + s.nbytes
        out["roles"][s.role] = out["roles"].get(s.role, 0) + s.nbytes
        out["weight_bytes"] += s.nbytes
        out["active_bytes_per_token"] += active
    return out
