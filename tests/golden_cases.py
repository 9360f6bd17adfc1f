"""The committed golden vectors and the checkpoints they belong to (made by tools/make_golden.py)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import tiny

FOLDER = Path(__file__).parent / "golden"
NAMES = sorted(p.stem for p in FOLDER.glob("*.npz"))


@dataclass(frozen=True)
class Golden:
    """Logits of transformers in float32: logits [n, V]; mtp_logits [n - 1, V], row i for (hidden i, token i + 1)."""

    preset: str
    dtype: str
    seed: int
    digest: str
    ids: np.ndarray[Any, Any]  # [n] int32
    logits: np.ndarray[Any, Any]
    mtp_logits: np.ndarray[Any, Any] | None

    def write_checkpoint(self, directory: Path) -> Path:
        """Regenerates the checkpoint; fails if it is not bit for bit the one that the logits were made from."""
        folder = tiny.write(directory, self.preset, dtype=self.dtype, seed=self.seed)
        assert tiny.digest(folder) == self.digest, f"{self.preset}: tiny.py no longer writes the golden checkpoint"
        return folder


def load(name: str) -> Golden:
    with np.load(FOLDER / f"{name}.npz") as z:
        return Golden(
            preset=str(z["preset"]),
            dtype=str(z["dtype"]),
            seed=int(z["seed"]),
            digest=str(z["digest"]),
            ids=z["ids"],
            logits=z["logits"],
            mtp_logits=z["mtp_logits"] if "mtp_logits" in z.files else None,
        )
