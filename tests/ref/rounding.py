"""The runtime's rounding in numpy: activations by weight format, cache rows by cache type, the bf16 attention path.

With this `Arithmetic`, forced taps and the weights of a packed file (`packed.weights`), the reference model computes
what the runtime must compute up to the rounding of its f32 sums. Values of dtype float32 are the runtime's own (forced
taps) and are rounded as they are; float64 values are the oracle's, and `nudge` shifts them by that share of the row's
largest value first: where two opposite nudges give different results, a rounding was too close to a tie to compare.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import formats, model

Array = np.ndarray[Any, Any]
CHUNK = 64  # cache positions that share one running maximum


def cache_round(kind: str, c: Array, k_rope: Array) -> tuple[Array, Array]:
    """c [n, r], k_rope [n, dr] as read back from a cache of type f32, f16, bf16 or q8, f64.

    q8: int8 codes with one f16 scale (max |c| / 127, codes follow the rounded scale) per 32 channels; k_rope in f16.
    """
    c, k_rope = c.astype(np.float32), k_rope.astype(np.float32)
    if kind == "f16":
        c, k_rope = c.astype(np.float16), k_rope.astype(np.float16)
    elif kind == "bf16":
        c, k_rope = formats.bf16_round(c), formats.bf16_round(k_rope)
    elif kind == "q8":
        groups = np.pad(c, [(0, 0), (0, -c.shape[1] % 32)]).reshape(len(c), -1, 32)
        scale = (np.abs(groups).max(-1, keepdims=True) / np.float32(127)).astype(np.float16).astype(np.float32)
        inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
        codes = np.clip(np.rint(groups * inverse), -127, 127)
        c = (codes * scale).reshape(len(c), -1)[:, : c.shape[1]]
        k_rope = k_rope.astype(np.float16)
    return c.astype(np.float64), k_rope.astype(np.float64)


class RuntimeArithmetic(model.Arithmetic):
    def __init__(self, kv: str, nudge: float = 0.0) -> None:
        self.kv, self.nudge = kv, nudge

    def activation(self, x: Array, kind: str) -> Array:
        rows = x.reshape(-1, x.shape[-1])
        if rows.dtype == np.float64 and kind != "f32":
            rows = rows + self.nudge * np.abs(rows).max(-1, keepdims=True)
        return formats.round_activations(kind, rows).reshape(x.shape)

    def cached(self, c: Array, k_rope: Array) -> tuple[Array, Array]:
        return cache_round(self.kv, c, k_rope)

    def attend(self, q: Array, key: Array, c: Array, mask: Array, scale: float) -> Array:
        """Chunk by chunk with a running maximum, because a bf16 probability is rounded relative to that maximum."""
        bf16 = self.kv == "bf16"
        q = (formats.bf16_round(q) if bf16 else q).astype(np.float64)
        n, heads, _ = q.shape
        top, total, out = np.full((n, heads), -np.inf), np.zeros((n, heads)), np.zeros((n, heads, c.shape[1]))
        for begin in range(0, len(key), CHUNK):
            chunk = slice(begin, begin + CHUNK)
            live = mask[:, begin]  # rows that see at least the first position of the chunk
            score = np.where(mask[live, None, chunk], scale * np.einsum("nhk,tk->nht", q[live], key[chunk]), -np.inf)
            new_top = np.maximum(top[live], score.max(-1))
            shrink = np.exp(top[live] - new_top)
            p = np.exp(score - new_top[..., None])
            if bf16:
                p = formats.bf16_round(p * (1 + 4 * self.nudge)).astype(np.float64)  # exp() of a sum
            total[live] = total[live] * shrink + p.sum(-1)
            out[live] = out[live] * shrink[..., None] + np.einsum("nht,tr->nhr", p, c[chunk])
            top[live] = new_top
        return out / total[..., None]
