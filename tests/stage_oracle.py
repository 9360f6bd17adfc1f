"""A runtime's taps against the reference, stage by stage, with the same rounding.

The oracle reads the packed weights with its own decoders, rounds activations and cache rows as docs/model.md 7.1 says
(ref/rounding.py) and is fed the runtime's own taps, expert choices included, so each tap is one stage's result from
the runtime's own input: 1e-4 relative RMS. Rows in which an activation that no tap shows (between W_UV and W_O, between
up and down, before eh_proj) lies too close to a rounding boundary for f32 sums to decide are left out; there are few.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import runtime_cases as rc
import tiny
from ref import model, rounding

TOLERANCE = 3e-5  # relative RMS over the decided rows; the goal is 1e-4, measured 1e-7 (int8) to 1e-5 (bf16)
UNDECIDED_TOLERANCE = 2e-3  # the same over all rows: a few roundings to the other side, never a wrong value
N_TOKENS = 80
NUDGE = 3e-7  # share of a row's largest value that an f32 sum may be off by; a rounding closer to a tie is undecided
AMBIGUOUS = 5e-5  # relative difference between opposite nudges that makes a row undecided
INPUTS_UNSEEN = ("mtp.embed", "attn_out", "ffn_out", "routed_out", "shared_out", "attn_latent")


def check_stages(
    file: rc.packed.PackedFile,
    core: Any,
    kv: str,
    n_tokens: int = N_TOKENS,
    sizes: tuple[int, ...] = (50, 30),
    tolerance: float = TOLERANCE,
) -> None:
    """Every tap of a runtime (`core`) and its MTP layer against the oracle fed that runtime's own taps."""
    cfg, weights = rc.weights(file)
    ids = tiny.token_ids(cfg.vocab_size, n_tokens, 7)  # few of their roundings are undecided: 0.72 decided at least
    run = rc.Run(core, ids, kv, sizes, taps=["*"])
    low, high = (model.Model(cfg, weights, arithmetic=rounding.RuntimeArithmetic(kv, sign * NUDGE)) for sign in (-1, 1))
    for part, taps in zip(run.parts, run.taps, strict=True):
        for m in (low, high):
            m.forced = taps
            m.forward(ids[part])
        _compare(taps, low.taps, high.taps, cfg, weights, tolerance)
    if cfg.num_nextn_predict_layers:
        run.mtp(sizes[0], taps=["*"])
        for part, taps in zip(run.mtp_parts, run.mtp_taps, strict=True):
            for m in (low, high):
                m.forced = taps
                m.mtp_forward(ids[1:][part], run.hidden[part])
            _compare(taps, low.taps, high.taps, cfg, weights, tolerance)


def _compare(
    taps: dict[str, rc.Array],
    low: dict[str, rc.Array],
    high: dict[str, rc.Array],
    cfg: model.Config,
    weights: model.Weights,
    tolerance: float,
) -> None:
    assert set(taps) == set(low)
    for name, value in taps.items():
        if name.endswith("topk_idx"):
            _check_routing(value, taps[name.replace("topk_idx", "gate_logits")], name, cfg, weights)
            continue
        ours = value.reshape(-1, value.shape[-1])  # [n, ...] or [n * H, ...]
        a, b = (t[name].reshape(ours.shape) for t in (low, high))
        scale = np.sqrt(np.mean(a**2)) or 1.0
        decided = np.sqrt(np.mean((a - b) ** 2, axis=1)) <= AMBIGUOUS * scale
        unseen = name.endswith(INPUTS_UNSEEN)
        assert decided.all() or (unseen and decided.mean() >= 0.6), f"{name}: {decided.mean():.2f} of the rows decided"
        middle = (a + b) / 2
        error, overall = rc.rel_rms(ours[decided], middle[decided]), rc.rel_rms(ours, middle)
        assert error <= tolerance, f"{name}: relative RMS {error:.1e}"
        assert overall <= UNDECIDED_TOLERANCE, f"{name}: relative RMS {overall:.1e}, undecided rows included"


def _check_routing(ours: rc.Array, z: rc.Array, name: str, cfg: model.Config, weights: model.Weights) -> None:
    """The reference's router on the runtime's own gate logits: the same experts, ascending."""
    layer = weights.mtp.layer if name.startswith("mtp.") and weights.mtp else weights.layers[int(name.split(".")[1])]
    experts, _ = model.route(z.astype(np.float64), layer.router_bias, cfg)
    np.testing.assert_array_equal(ours, experts, err_msg=name)
