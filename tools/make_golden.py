"""Makes tests/golden/*.npz: logits of the tiny checkpoints by transformers in float32, the truth of every test.

    python tools/make_golden.py [PRESET ...]     # needs the `reference` extra; rewrites these files, else all

Each file describes itself: preset, dtype and seed regenerate the checkpoint (tests/tiny.py), `digest` proves it, `ids`
[n] are the tokens, `logits` [n, V] and `mtp_logits` [n - 1, V] the float32 results. 72 tokens cross the original
context of every YaRN preset and the border between two attention chunks (64). A seed is refused when any router
decision or argmax is close to a tie: transformers breaks ties by no rule, a comparison would be meaningless.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import tiny  # noqa: E402
from deepcalm.check import reference  # noqa: E402
from ref import hf, model  # noqa: E402

Array = np.ndarray[Any, Any]

N_TOKENS = 72
MIN_ROUTER_MARGIN = 1e-4  # between the last chosen and the first rejected score (experts, and groups)
MIN_ARGMAX_MARGIN = 1e-3  # between the two largest logits; twice the tolerance of 1e-4 and to spare
CASES = {  # preset -> dtype of the checkpoint; every source dtype occurs
    "v2_lite": "f32",
    "v2_grouped": "bf16",
    "v3": "f32",
    "moonlight": "f16",
    "gigachat3": "fp8",
    "kimi_k2": "int4",
    "glm4_moe_lite": "bf16",
    "kanana2": "bf16",
    "sarvam": "bf16",
    "mistral4": "fp8",
    "axk1": "bf16",
    "youtu": "bf16",
    "minicpm3": "bf16",
}


def gap(values: Array, k: int) -> float:
    """Smallest difference between the k-th and the next largest of values [n, m] over all rows."""
    ordered = -np.sort(-values, axis=-1)
    return float((ordered[:, k - 1] - ordered[:, k]).min()) if k < values.shape[1] else np.inf


def router_margin(m: model.Model) -> float:
    """Distance to the nearest tie in any group or expert choice of the last pass (see `reference.scores`)."""
    worst, s = np.inf, m.ref.s
    for name, z in m.taps.items():
        if not name.endswith("gate_logits"):
            continue
        bias = m.ref.w.plain(name.replace("gate_logits", "router_bias")) if s.bias else None
        p, u = reference.scores(s, z, bias)
        if s.grouping and s.groups > 1:
            worst = min(worst, gap(reference.group_scores(s, p if bias is None else p + bias), s.top_groups))
        worst = min(worst, gap(u, s.top_k))
    return worst


def make(preset: str, dtype: str, seed: int) -> str | None:
    """Writes one golden file; returns why the seed was refused, or None."""
    with tempfile.TemporaryDirectory() as tmp:
        folder = tiny.write(tmp, preset, dtype=dtype, seed=seed)
        s, weights = model.load(folder)
        ids = tiny.token_ids(s.vocab, N_TOKENS, seed)
        m = model.Model(s, weights)
        ref_logits, hidden = m.forward(ids)
        margin = router_margin(m)
        ref_mtp = None
        if any("eh_proj" in name for name in weights.tensors):
            ref_mtp, _ = m.mtp_forward(ids[1:], hidden[:-1])
            margin = min(margin, router_margin(m))
        if margin < MIN_ROUTER_MARGIN:
            return f"router margin {margin:.1e}"
        logits, _, mtp_logits = hf.logits(folder, ids)
        for name, ours, theirs in (("logits", ref_logits, logits), ("MTP logits", ref_mtp, mtp_logits)):
            if theirs is None or ours is None:
                continue
            if gap(theirs, 1) < MIN_ARGMAX_MARGIN:
                return f"{name}: argmax margin {gap(theirs, 1):.1e}"
            print(f"{preset} {dtype} seed {seed} {name}: std {theirs.std():.3f}, router margin {margin:.1e}, "
                  f"numpy reference differs by {np.abs(ours - theirs).max():.1e}")  # fmt: skip
        fields: dict[str, Any] = {"mtp_logits": mtp_logits} if mtp_logits is not None else {}
        np.savez_compressed(
            ROOT / "tests" / "golden" / f"{preset}.npz",
            preset=preset,
            dtype=dtype,
            seed=seed,
            digest=tiny.digest(folder),
            ids=ids,
            logits=logits,
            **fields,
        )
    return None


def main() -> None:
    for preset in sys.argv[1:] or CASES:
        dtype = CASES[preset]
        for seed in range(1, 100):
            refused = make(preset, dtype, seed)
            if refused is None:
                break
            print(f"{preset} seed {seed} refused: {refused}")
        else:
            raise SystemExit(f"{preset}: no seed without a near-tie")


if __name__ == "__main__":
    main()
