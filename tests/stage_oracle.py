"""A runtime's taps against the reference, stage by stage, with the same rounding.

The oracle reads the packed weights with its own decoders, rounds activations and cache rows as docs/model.md 7.1 says
and is fed the runtime's own taps, expert choices included, so each tap is one stage's result from
the runtime's own input: 1e-4 relative RMS. Rows in which an activation that no tap shows (between W_UV and W_O, between
up and down, before eh_proj) lies too close to a rounding boundary for f32 sums to decide are left out; there are few.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import models
import tiny
from deepcalm.check import reference
from ref import model

TOLERANCE = 3e-5  # relative RMS over the decided rows; the goal is 1e-4, measured 1e-7 (int8) to 1e-5 (bf16)
UNDECIDED_TOLERANCE = 2e-3  # the same over all rows: a few roundings to the other side, never a wrong value
N_TOKENS = 80
AMBIGUOUS = 5e-5  # spread of undecided roundings, relative to the tap, that leaves a row out
INPUTS_UNSEEN = ("mtp.embed", "attn_out", "ffn_out", "routed_out", "shared_out", "attn_latent")


def check_stages(
    file: models.PackedFile,
    core: Any,
    kv: str,
    n_tokens: int = N_TOKENS,
    sizes: tuple[int, ...] = (50, 30),
    tolerance: float = TOLERANCE,
) -> None:
    """Every tap of a runtime (`core`) and its MTP layer against the oracle fed that runtime's own taps."""
    s, weights = models.weights(file)
    ids = tiny.token_ids(s.vocab, n_tokens, 7)  # few of their roundings are undecided: 0.72 decided at least
    run = models.Run(core, ids, kv, sizes, taps=["*"])
    oracle = model.Model(s, weights, kv)
    oracle.forced = _joined(run.taps)
    oracle.forward(ids)
    _compare(run.parts, run.taps, oracle, tolerance)
    if file.config["num_nextn_predict_layers"]:
        run.mtp(sizes[0], taps=["*"])
        oracle.forced = _joined(run.mtp_taps)
        oracle.mtp_forward(ids[1:], run.hidden[:-1])
        _compare(run.mtp_parts, run.mtp_taps, oracle, tolerance)


def _joined(parts: list[dict[str, models.Array]]) -> dict[str, models.Array]:
    return {name: np.concatenate([taps[name] for taps in parts]) for name in parts[0]}


def _compare(
    parts: list[slice], run_taps: list[dict[str, models.Array]], oracle: model.Model, tolerance: float
) -> None:
    for part, taps in zip(parts, run_taps, strict=True):
        assert set(taps) == set(oracle.taps)
        for name, value in taps.items():
            if name.endswith("topk_idx"):
                _check_routing(value, taps[name.replace("topk_idx", "gate_logits")], name, oracle.ref)
                continue
            want, spread = oracle.taps[name][part], oracle.spread[name]
            spread = np.asarray(spread[part] if np.ndim(spread) else np.zeros(len(want)))  # [n] or [n, H]
            ours, middle = (v.reshape(spread.size, -1) for v in (value, want))
            scale = np.sqrt(np.mean(middle**2)) or 1.0
            decided = spread.reshape(-1) / np.sqrt(ours.shape[1]) <= AMBIGUOUS * scale
            unseen, share = name.endswith(INPUTS_UNSEEN), decided.mean()
            assert decided.all() or (unseen and share >= 0.6), f"{name}: {share:.2f} of the rows decided"
            error, overall = models.rel_rms(ours[decided], middle[decided]), models.rel_rms(ours, middle)
            assert error <= tolerance, f"{name}: relative RMS {error:.1e}"
            assert overall <= UNDECIDED_TOLERANCE, f"{name}: relative RMS {overall:.1e}, undecided rows included"


def _check_routing(ours: models.Array, z: models.Array, name: str, ref: reference.Reference) -> None:
    """The reference's router on the runtime's own gate logits: the same experts, ascending."""
    bias = ref.w.plain(name.replace("topk_idx", "router_bias")) if ref.s.bias else None
    _, u = reference.scores(ref.s, z.astype(np.float64), bias)
    np.testing.assert_array_equal(ours, reference.choose(ref.s, u), err_msg=name)
