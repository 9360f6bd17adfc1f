"""The package's numpy specification (deepcalm/check/reference.py) as the tests' oracle.

What is added here: weights from the tests' own readers (`checkpoint`, `packed`), attention as the papers write it,
which proves the absorbed form, and passes over a sequence whose taps stay. ``xp`` is the array module: numpy, or cupy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from deepcalm.check import reference
from deepcalm.check.reference import Settings

from . import checkpoint, packed

Array = Any  # np.ndarray or cupy.ndarray


def settings_of(config: Mapping[str, Any]) -> Settings:
    """From a normalised configuration, as packed files have it."""
    names = {
        "d": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads", "rq": "q_lora_rank",
        "r": "kv_lora_rank", "dn": "qk_nope_head_dim", "dr": "qk_rope_head_dim", "dv": "v_head_dim",
        "width": "intermediate_size", "expert_width": "moe_intermediate_size", "experts": "n_routed_experts",
        "top_k": "num_experts_per_tok", "shared": "n_shared_experts", "groups": "n_group", "top_groups": "topk_group",
        "factor": "routed_scaling_factor", "eps": "rms_norm_eps", "theta": "rope_theta", "tied": "tie_word_embeddings",
        "vocab": "vocab_size",
    }  # fmt: skip
    yarn = {
        "factor": config["rope_factor"], "truncate": config["rope_truncate"],
        **{k: config[k] for k in ("original_max_position_embeddings", "beta_fast", "beta_slow", "mscale",
                                  "mscale_all_dim", "attention_factor")},
    }  # fmt: skip
    method = config["topk_method"]
    return Settings(
        **{name: config[key] for name, key in names.items()},
        dense=config["first_k_dense_replace"] if config["n_routed_experts"] else 1 << 30,
        grouping={"greedy": "", "group_limited_greedy": "max", "noaux_tc": "top2"}[method],
        softmax=config["scoring_func"] == "softmax",
        bias=method == "noaux_tc",
        normed=config["norm_topk_prob"],
        yarn=yarn if config["rope_type"] == "yarn" else None,
        pairs=True,
        beta=config.get("llama_4_scaling_beta", 0.0),
        original=config["original_max_position_embeddings"] or 1,
        factors=tuple(config.get("short_factor", ())),
        stretch=config["attention_factor"] if config["rope_type"] == "longrope" else 1.0,
        on_embedding=config.get("embed_scale", 1.0),
        on_residual=config.get("residual_scale", 1.0),
        on_logits=config.get("logit_scale", 1.0),
        post_norm=bool(config.get("post_moe_norm", 0)),
    )


def meaning(s: Settings) -> dict[str, Any]:
    """What settings say, however they say it: the rope by its numbers, and nothing of the checkpoint's row order."""
    out = {f.name: getattr(s, f.name) for f in fields(s) if f.name not in ("yarn", "theta", "pairs")}
    rope = {"frequencies": reference.inv_freq(s).tolist(), "scale": reference.softmax_scale(s)}
    return out | rope | {"amplitude": reference.amplitude(s)}


class SourceWeights(reference.SourceWeights):
    """A checkpoint's values as `checkpoint.load` dequantises them, where a packed file must have them."""

    prefix, lm_head = "model.", "lm_head.weight"

    def __init__(self, s: Settings, tensors: Mapping[str, Array], xp: Any = np) -> None:
        self.s, self.tensors, self.xp = s, tensors, xp
        self.ckpt = self  # type: ignore[assignment]  # which tensors there are

    def has_weight(self, name: str) -> bool:
        return name in self.tensors

    def read(self, name: str, shape: tuple[int, ...], begin: int, end: int) -> Array:
        w = self.tensors.get(name, np.zeros(shape)) if name.endswith("correction_bias") else self.tensors[name]
        assert w.shape == shape, name
        return w.reshape(-1, shape[-1])[begin:end].astype(np.float64)

    def slabs(self, name: str, slice_: int = 0) -> Iterator[tuple[int, Array, Array | None]]:
        for row, values, scales in super().slabs(name, slice_):
            yield row, self.xp.asarray(values), scales

    def plain(self, name: str, rows: Array | None = None) -> Array:
        return self.xp.asarray(super().plain(name, rows))


def load(folder: Path, xp: Any = np) -> tuple[Settings, SourceWeights]:
    """A checkpoint, read by the tests' own code."""
    raw, tensors = checkpoint.load(folder)
    s = Settings.of(raw)
    return s, SourceWeights(s, tensors, xp)


class PackedWeights(reference.PackedWeights):
    """The weights of a packed file, its header read and its tiles decoded by the tests' own code."""

    file: packed.PackedFile  # type: ignore[assignment]

    def __init__(self, file: packed.PackedFile) -> None:
        self.file = file

    def plain(self, name: str, rows: Array | None = None) -> Array:
        values = self.file.plain(name)
        return values if rows is None else values[rows]

    def slabs(self, name: str, slice_: int = 0) -> Iterator[tuple[int, Array, Array | None]]:
        """The whole matrix at once, its last tile of rows filled with zeros."""
        w = self.file.matrix(name, slice_) if self.file.entries[name].kind == "tiled" else self.file.plain(name)
        yield 0, np.pad(w, [(0, -len(w) % 16), (0, 0)]), None


def matrix(w: reference.Weights, name: str, shape: tuple[int, ...]) -> Array:
    """A tensor of the manifest in its natural ``shape`` [n_slices?, rows, cols] or [n], f64."""
    if len(shape) == 1:
        return w.plain(name)
    slices = [np.concatenate([v for _, v, _ in w.slabs(name, i)])[: shape[-2]] for i in range(int(np.prod(shape[:-2])))]
    return np.stack(slices).reshape(shape)


class Expanded(reference.Reference):
    """Attention as the papers write it: per head keys [W_UK c, k_rope] and values W_UV c."""

    def values(self, p: str, q: Array, c: Array, kr: Array, tap: reference.Tap) -> Array:  # noqa: ARG002
        s, n = self.s, len(q)
        w_uk, w_uv = (
            np.stack([np.concatenate([v for _, v, _ in self.w.slabs(p + name, h)])[:rows] for h in range(s.heads)])
            for name, rows in (("w_uk", s.r), ("w_uv", s.dv))
        )
        keys, values = np.einsum("hrk,tr->htk", w_uk, c), np.einsum("hvr,tr->htv", w_uv, c)
        score = np.einsum("nhk,htk->nht", q[..., : s.dn], keys) + np.einsum("nhk,tk->nht", q[..., s.dn :], kr)
        seen = np.asarray(np.tril(np.ones((n, n), bool))[:, None], like=score)
        score = np.where(seen, reference.softmax_scale(s) * score, -np.inf)
        return np.einsum("nht,htv->nhv", reference.softmax(score), values).reshape(n, -1)


class _Kept:
    """Weights that are read once."""

    def __init__(self, w: reference.Weights) -> None:
        self.w, self.kept = w, dict[Any, Any]()
        self.act, self.head = w.act, w.head

    def plain(self, name: str, rows: Array | None = None) -> Array:
        if rows is not None:
            return self.w.plain(name, rows)
        return self.kept[name] if name in self.kept else self.kept.setdefault(name, self.w.plain(name))

    def slabs(self, name: str, slice_: int = 0) -> Iterator[tuple[int, Array, Array | None]]:
        key = name, slice_
        return iter(self.kept[key] if key in self.kept else self.kept.setdefault(key, list(self.w.slabs(*key))))


class Model:
    """Passes over whole sequences: ``taps`` and ``spread`` of the last one; ``forced`` replaces taps in the next."""

    def __init__(self, s: Settings, w: reference.Weights, kv: str = "", form: type[reference.Reference] | None = None):
        self.ref = (form or reference.Reference)(s, _Kept(w), kv)
        self.forced: Mapping[str, Array] = {}

    def _pass(self, stages: Iterator[reference.Taps], p: str) -> tuple[Array, Array]:
        all_taps = {name: tap for taps in stages for name, tap in taps.items()}
        self.taps = {name: value for name, (value, _) in all_taps.items()}
        self.spread = {name: spread for name, (_, spread) in all_taps.items()}
        return self.taps[p + "logits"], reference.given(all_taps, p + "final_norm", self.forced)

    def forward(self, ids: Array) -> tuple[Array, Array]:
        """ids [n] -> (logits [n, V], hidden [n, d] after the final norm)."""
        return self._pass(self.ref.stages(ids, self.forced), "")

    def mtp_forward(self, next_ids: Array, hidden: Array) -> tuple[Array, Array]:
        """next_ids [n], hidden [n, d]: row i pairs token i + 1 with the hidden state of position i."""
        return self._pass(self.ref.mtp_stages(next_ids, hidden, self.forced), "mtp.")
