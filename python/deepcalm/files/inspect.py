"""What ``deepcalm inspect`` shows of a packed file, as plain data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .packed import PackedFile


def describe(path: str | Path) -> dict[str, Any]:
    """Everything a packed file says about itself, ready for JSON.

    Keys: file, file_bytes, header_sha256, config, source, dropped, files (name -> bytes), tensors (list of {name, role,
    kind, format, scale, shape, source_dtype, bytes, active_bytes, sha256}), formats (format -> bytes), roles
    (role -> bytes), weight_bytes, active_bytes_per_token (weights that decoding one token reads: chosen experts only,
    one embedding row, no MTP layer). Raises PackedFileError.
    """
    with PackedFile(path) as f:
        k = f.config["num_experts_per_tok"]
        out: dict[str, Any] = {"file": str(path), "file_bytes": f.header.file_size, "header_sha256": f.header_sha256}
        out |= {"config": f.config, "source": f.source, "dropped": f.dropped, "files": {}, "tensors": []}
        out |= {"formats": {}, "roles": {}, "weight_bytes": 0, "active_bytes_per_token": 0}
        for name, e in f.entries.items():
            if e.kind == "file":
                out["files"][name.removeprefix("file.")] = e.nbytes
                continue
            active = e.active_bytes(k)
            label = f"{e.format} ({e.scale} scales)" if e.kind == "tiled" and e.scale else e.format
            row: dict[str, Any] = {"name": name, "role": e.role, "kind": e.kind, "format": e.format, "scale": e.scale}
            row |= {"shape": list(e.shape), "source_dtype": e.source_dtype, "bytes": e.nbytes}
            out["tensors"].append(row | {"active_bytes": active, "sha256": e.sha256})
            out["formats"][label] = out["formats"].get(label, 0) + e.nbytes
            out["roles"][e.role] = out["roles"].get(e.role, 0) + e.nbytes
            out["weight_bytes"] += e.nbytes
            out["active_bytes_per_token"] += active
        return out
