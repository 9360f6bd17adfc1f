"""The reference model: MLA + DeepSeekMoE + MTP in plain numpy, written to be read. This file is the specification.

One function per formula, whole sequences at a time, float64 unless told otherwise; no caching tricks, no fusion. The
attention exists twice: `attend_expanded` computes keys and values per head as the papers write it, `attend_absorbed`
is the form that the runtime uses (one shared key [c | k_rope] of width r + dr, one shared value c). `xp` is the array
module: numpy, or cupy to run the same specification on a GPU.

Shapes use: n rows of this call, T cached positions, d hidden, H heads, rq/r query/kv latent rank, dn/dr/dv head
widths, E experts, k experts per token. Rope channels are in half-split order everywhere (checkpoints are
interleaved; `Weights.from_hf` permutes once), so q and k_rope equal the runtime's taps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = Any  # np.ndarray or cupy.ndarray
LATENT_EPS = 1e-6  # eps of q_a_layernorm and kv_a_layernorm, whatever rms_norm_eps says

# ---- configuration --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Model configuration with every default resolved; names as in config.json."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int  # 0: plain q_proj
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    first_k_dense_replace: int
    n_group: int
    topk_group: int
    topk_method: str  # greedy | group_limited_greedy | noaux_tc
    scoring_func: str  # softmax | sigmoid
    norm_topk_prob: bool
    routed_scaling_factor: float
    rms_norm_eps: float
    rope_theta: float
    rope_type: str = "default"  # default | yarn
    rope_factor: float = 1.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0  # 0: absent, here and in the next two
    mscale_all_dim: float = 0.0
    attention_factor: float = 0.0
    rope_truncate: bool = True
    vocab_size: int = 0
    tie_word_embeddings: bool = False
    num_nextn_predict_layers: int = 0

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], has_mtp: bool) -> Config:
        """From a config.json of either style. has_mtp: the checkpoint really holds an MTP layer (eh_proj exists)."""
        kind = raw["model_type"]
        v2 = kind == "deepseek_v2"
        n_layers = raw["num_hidden_layers"]
        rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
        dense = raw.get("first_k_dense_replace", 0)
        if "mlp_layer_types" in raw:
            dense = raw["mlp_layer_types"].index("sparse")
        return cls(
            model_type=kind,
            hidden_size=raw["hidden_size"],
            num_hidden_layers=n_layers,
            num_attention_heads=raw["num_attention_heads"],
            q_lora_rank=raw["q_lora_rank"] or 0,
            kv_lora_rank=raw["kv_lora_rank"],
            qk_nope_head_dim=raw["qk_nope_head_dim"],
            qk_rope_head_dim=raw["qk_rope_head_dim"],
            v_head_dim=raw["v_head_dim"],
            intermediate_size=raw["intermediate_size"],
            moe_intermediate_size=raw["moe_intermediate_size"],
            n_routed_experts=raw["n_routed_experts"],
            num_experts_per_tok=raw["num_experts_per_tok"],
            n_shared_experts=raw["n_shared_experts"] or 0,
            first_k_dense_replace=dense,
            n_group=raw.get("n_group") or 1,
            topk_group=raw.get("topk_group") or 1,
            topk_method=raw.get("topk_method") or ("greedy" if v2 else "noaux_tc"),
            scoring_func=raw.get("scoring_func") or ("softmax" if v2 else "sigmoid"),
            norm_topk_prob=raw["norm_topk_prob"],
            routed_scaling_factor=raw["routed_scaling_factor"],
            rms_norm_eps=raw["rms_norm_eps"],
            rope_theta=rope.get("rope_theta") or raw["rope_theta"],
            rope_type=rope.get("rope_type") or rope.get("type") or "default",
            rope_factor=rope.get("factor", 1.0),
            original_max_position_embeddings=rope.get("original_max_position_embeddings", 0),
            beta_fast=rope.get("beta_fast", 32.0),
            beta_slow=rope.get("beta_slow", 1.0),
            mscale=rope.get("mscale", 0.0),
            mscale_all_dim=rope.get("mscale_all_dim", 0.0),
            attention_factor=rope.get("attention_factor", 0.0),
            rope_truncate=rope.get("truncate", True),
            vocab_size=raw["vocab_size"],
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            num_nextn_predict_layers=int(has_mtp),
        )

    def is_moe(self, layer: int) -> bool:
        return self.n_routed_experts > 0 and layer >= self.first_k_dense_replace


# ---- rope -----------------------------------------------------------------------------------------------------------


def inv_freq(cfg: Config) -> Array:
    """[dr/2] f64 inverse frequencies. Yarn divides the low ones by the factor, with a ramp between two channels."""
    dr = cfg.qk_rope_head_dim
    plain = cfg.rope_theta ** (-np.arange(0, dr, 2) / dr)
    if cfg.rope_type == "default":
        return plain

    def channel(rotations: float) -> float:  # the channel that turns this often within the original context
        turns = cfg.original_max_position_embeddings / (2 * np.pi * rotations)
        return float(dr * np.log(turns) / (2 * np.log(cfg.rope_theta)))

    low, high = channel(cfg.beta_fast), channel(cfg.beta_slow)
    if cfg.rope_truncate:
        low, high = np.floor(low), np.ceil(high)
    low, high = max(low, 0), min(high, dr - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(dr // 2) - low) / (high - low), 0, 1)
    return plain * (1 - ramp) + plain / cfg.rope_factor * ramp


def yarn_magnitude(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * np.log(factor) + 1.0


def rope_amplitude(cfg: Config) -> float:
    """A, which multiplies cos and sin. 1 for every released model, because their two mscales are equal."""
    if cfg.rope_type == "default":
        return 1.0
    if cfg.attention_factor:
        return cfg.attention_factor
    if cfg.mscale and cfg.mscale_all_dim:
        return yarn_magnitude(cfg.rope_factor, cfg.mscale) / yarn_magnitude(cfg.rope_factor, cfg.mscale_all_dim)
    return yarn_magnitude(cfg.rope_factor, 1.0)


def softmax_scale(cfg: Config) -> float:
    """sigma, which multiplies the whole score. From dn + dr, also in the absorbed form; times the magnitude squared."""
    scale = (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim) ** -0.5
    if cfg.rope_type != "default" and cfg.mscale_all_dim:
        scale *= yarn_magnitude(cfg.rope_factor, cfg.mscale_all_dim) ** 2
    return float(scale)


def rope_table(cfg: Config, positions: Array) -> tuple[Array, Array]:
    """positions [n] int -> cos, sin [n, dr/2] f32. The angle is a float32 product, as the models were trained with."""
    angle = np.asarray(positions, np.float32)[:, None] * inv_freq(cfg).astype(np.float32)
    a = rope_amplitude(cfg)
    return (
        (np.cos(angle.astype(np.float64)) * a).astype(np.float32),
        (np.sin(angle.astype(np.float64)) * a).astype(np.float32),
    )


def rotate(v: Array, cos: Array, sin: Array, xp: Any = np) -> Array:
    """Half-split rotation: channels (j, j + dr/2) form a pair. v [..., dr]; cos, sin broadcast to [..., dr/2]."""
    half = v.shape[-1] // 2
    a, b = v[..., :half], v[..., half:]
    return xp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def rotate_interleaved(v: Array, cos: Array, sin: Array, xp: Any = np) -> Array:
    """The checkpoint's own convention: channels (2j, 2j + 1) form a pair, the result stays in place."""
    a, b = v[..., 0::2], v[..., 1::2]
    return xp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(v.shape)


def deinterleave(rows: Array, n_plain: int, xp: Any = np) -> Array:
    """rows [..., n_plain + dr, in]: the rope rows from interleaved to half-split order (even ones first, then odd)."""
    rope = rows[..., n_plain:, :]
    return xp.concatenate([rows[..., :n_plain, :], rope[..., 0::2, :], rope[..., 1::2, :]], axis=-2)


# ---- weights --------------------------------------------------------------------------------------------------------


@dataclass
class Matrix:
    """w [..., out, in]; act names how the activations of its product are rounded (see `Arithmetic`)."""

    w: Array
    act: str = "f32"

    def __getitem__(self, index: int) -> Matrix:  # one slice of a stack
        return Matrix(self.w[index], self.act)


@dataclass
class Mlp:
    gate: Matrix  # [F, d]
    up: Matrix  # [F, d]
    down: Matrix  # [d, F]


@dataclass
class Layer:
    """One decoder layer. Exactly one of `dense` and `router` is set."""

    attn_norm: Array  # [d]
    q: Matrix  # [H * (dn + dr), rq or d]; per head dn nope rows, then dr rope rows in half-split order
    kv_a: Matrix  # [r + dr, d]; r latent rows, then dr rope rows in half-split order
    kv_a_norm: Array  # [r]
    w_uk: Matrix  # [H, r, dn] transposed key up-projection: q_absorbed = w_uk q_nope
    w_uv: Matrix  # [H, dv, r] value up-projection
    o: Matrix  # [d, H * dv]
    ffn_norm: Array  # [d]
    q_a: Matrix | None = None  # [rq, d]
    q_a_norm: Array | None = None  # [rq]
    dense: Mlp | None = None
    router: Array | None = None  # [E, d]
    router_bias: Array | None = None  # [E]; selection only
    experts: list[Mlp] = field(default_factory=list)
    shared: Mlp | None = None


@dataclass
class Mtp:
    enorm: Array  # [d] norm of the embedding half
    hnorm: Array  # [d] norm of the hidden half
    eh_proj: Matrix  # [d, 2d]; columns 0..d-1 read the embedding
    layer: Layer
    norm: Array  # [d] final norm of this path
    head: Matrix | None = None  # [V, d] its own, cheaper copy of the head; None: the main model's


@dataclass
class Weights:
    embed: Array  # [V, d]
    layers: list[Layer]
    norm: Array  # [d]
    head: Matrix  # [V, d]
    mtp: Mtp | None = None

    @classmethod
    def from_hf(cls, cfg: Config, tensors: Mapping[str, Any], xp: Any = np, dtype: Any = np.float64) -> Weights:
        """From dequantised tensors under their Hugging Face names (see `checkpoint.load`)."""

        def get(name: str) -> Array:
            return xp.asarray(tensors[name], dtype)

        def mlp(prefix: str) -> Mlp:
            return Mlp(*(Matrix(get(f"{prefix}.{part}_proj.weight")) for part in ("gate", "up", "down")))

        def layer(index: int) -> Layer:
            return _layer_from_hf(cfg, index, get, mlp, xp)

        mtp = None
        if cfg.num_nextn_predict_layers:
            p = f"model.layers.{cfg.num_hidden_layers}"
            mtp = Mtp(
                enorm=get(f"{p}.enorm.weight"),
                hnorm=get(f"{p}.hnorm.weight"),
                eh_proj=Matrix(get(f"{p}.eh_proj.weight")),
                layer=layer(cfg.num_hidden_layers),
                norm=get(f"{p}.shared_head.norm.weight"),
            )
        embed = get("model.embed_tokens.weight")
        return cls(
            embed=embed,
            layers=[layer(i) for i in range(cfg.num_hidden_layers)],
            norm=get("model.norm.weight"),
            head=Matrix(embed if cfg.tie_word_embeddings else get("lm_head.weight")),
            mtp=mtp,
        )


def _layer_from_hf(cfg: Config, index: int, get: Any, mlp: Any, xp: Any) -> Layer:
    heads, r = cfg.num_attention_heads, cfg.kv_lora_rank
    dn, dr, dv = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
    p = f"model.layers.{index}"
    attn = f"{p}.self_attn"

    q = get(f"{attn}.q_b_proj.weight" if cfg.q_lora_rank else f"{attn}.q_proj.weight")
    kv_b = get(f"{attn}.kv_b_proj.weight").reshape(heads, dn + dv, r)  # per head: key rows, then value rows
    out = Layer(
        attn_norm=get(f"{p}.input_layernorm.weight"),
        q=Matrix(deinterleave(q.reshape(heads, dn + dr, -1), dn, xp).reshape(q.shape)),
        kv_a=Matrix(deinterleave(get(f"{attn}.kv_a_proj_with_mqa.weight"), r, xp)),
        kv_a_norm=get(f"{attn}.kv_a_layernorm.weight"),
        w_uk=Matrix(kv_b[:, :dn].transpose(0, 2, 1)),
        w_uv=Matrix(kv_b[:, dn:]),
        o=Matrix(get(f"{attn}.o_proj.weight")),
        ffn_norm=get(f"{p}.post_attention_layernorm.weight"),
    )
    if cfg.q_lora_rank:
        out.q_a = Matrix(get(f"{attn}.q_a_proj.weight"))
        out.q_a_norm = get(f"{attn}.q_a_layernorm.weight")
    if not cfg.is_moe(index):
        out.dense = mlp(f"{p}.mlp")
        return out
    out.router = get(f"{p}.mlp.gate.weight")
    if cfg.topk_method == "noaux_tc":
        out.router_bias = get(f"{p}.mlp.gate.e_score_correction_bias")
    out.experts = [mlp(f"{p}.mlp.experts.{e}") for e in range(cfg.n_routed_experts)]
    if cfg.n_shared_experts:
        out.shared = mlp(f"{p}.mlp.shared_experts")
    return out


# ---- arithmetic -----------------------------------------------------------------------------------------------------


class Arithmetic:
    """Where numbers are rounded. This one rounds nothing; tests of quantised formats substitute their own."""

    xp: Any = np

    def activation(self, x: Array, kind: str) -> Array:  # noqa: ARG002
        """x [..., in] as the product with a matrix of this ActKind sees it."""
        return x

    def cached(self, c: Array, k_rope: Array) -> tuple[Array, Array]:
        """Cache row c [n, r], k_rope [n, dr] as attention reads it back, in this step and in every later one."""
        return c, k_rope

    def attend(self, q: Array, key: Array, c: Array, mask: Array, scale: float) -> Array:
        """q [n, H, r + dr], key [T, r + dr], c [T, r], mask [n, T] True = visible -> [n, H, r] weighted mean of c."""
        xp = self.xp
        score = scale * xp.einsum("nhk,tk->nht", q, key)
        return xp.einsum("nht,tr->nhr", softmax(xp.where(mask[:, None, :], score, -xp.inf), xp), c)

    def linear(self, x: Array, m: Matrix) -> Array:
        """x [..., in] -> [..., out]"""
        return self.activation(x, m.act) @ m.w.swapaxes(-1, -2)


def rmsnorm(x: Array, w: Array, eps: float, xp: Any = np) -> Array:
    return w * x / xp.sqrt((x * x).mean(-1, keepdims=True) + eps)


def softmax(x: Array, xp: Any = np) -> Array:
    e = xp.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(x: Array, xp: Any = np) -> Array:
    return 1 / (1 + xp.exp(-x))


def silu(x: Array, xp: Any = np) -> Array:
    return x * sigmoid(x, xp)


def top(u: Array, k: int, xp: Any = np) -> Array:
    """Indices of the k largest of u [n, m]; among equals the lowest index. [n, k] in order of falling value."""
    return xp.argsort(-u, axis=-1, kind="stable")[:, :k]


def route(z: Array, bias: Array | None, cfg: Config, xp: Any = np, forced: Array | None = None) -> tuple[Array, Array]:
    """Router. z [n, E] gate logits -> (experts [n, k] ascending, weights [n, k]). forced replaces the selection.

    A greedy: softmax, top-k. B group_limited_greedy: the same inside the KG groups with the largest maximum.
    C noaux_tc: sigmoid, bias added for the selection only, groups ranked by the sum of their two best.
    """
    n, n_experts = z.shape
    p = softmax(z, xp) if cfg.scoring_func == "softmax" else sigmoid(z, xp)
    u = p if bias is None else p + bias
    if cfg.topk_method != "greedy" and cfg.n_group > 1:
        groups = xp.sort(u.reshape(n, cfg.n_group, -1), axis=-1)
        rank = groups[..., -1] if cfg.topk_method == "group_limited_greedy" else groups[..., -2:].sum(-1)
        kept = xp.zeros((n, cfg.n_group), bool)
        kept[xp.arange(n)[:, None], top(rank, cfg.topk_group, xp)] = True
        u = xp.where(xp.repeat(kept, n_experts // cfg.n_group, axis=1), u, -xp.inf)
    experts = xp.sort(top(u, cfg.num_experts_per_tok, xp) if forced is None else xp.asarray(forced), axis=-1)
    weights = p[xp.arange(n)[:, None], experts]
    if cfg.topk_method == "noaux_tc" and cfg.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return experts, weights * cfg.routed_scaling_factor


# ---- the model ------------------------------------------------------------------------------------------------------


class Cache:
    """Latent cache of one layer: c [T, r] after its norm, k_rope [T, dr] rotated, as `Arithmetic.cached` left them."""

    def __init__(self) -> None:
        self.c: Array | None = None
        self.k_rope: Array | None = None

    def __len__(self) -> int:
        return 0 if self.c is None else self.c.shape[0]

    def append(self, c: Array, k_rope: Array, xp: Any) -> None:
        self.c = c if self.c is None else xp.concatenate([self.c, c])
        self.k_rope = k_rope if self.k_rope is None else xp.concatenate([self.k_rope, k_rope])

    def truncate(self, n: int) -> None:
        if self.c is not None and self.k_rope is not None:
            self.c, self.k_rope = self.c[:n], self.k_rope[:n]


class Model:
    """The whole model over one growing sequence. ``form`` is "absorbed" or "expanded".

    Every named intermediate passes through `tap`, which records it under the runtime's name. A test may force taps:
    what follows then uses the given value, so that each stage is checked alone, fed with the runtime's own input.
    """

    def __init__(
        self, cfg: Config, weights: Weights, form: str = "absorbed", arithmetic: Arithmetic | None = None, xp: Any = np
    ) -> None:
        self.cfg, self.weights, self.form, self.xp = cfg, weights, form, xp
        self.arith = arithmetic or Arithmetic()
        self.arith.xp = xp
        self.caches = [Cache() for _ in range(cfg.num_hidden_layers)]
        self.mtp_cache = Cache()
        self.taps: dict[str, Array] = {}  # of the last forward
        self.forced: Mapping[str, Array] = {}  # for the next forwards, by tap name
        self._prefix = ""

    def tap(self, name: str, value: Array) -> Array:
        name = self._prefix + name
        self.taps[name] = value
        return self.forced.get(name, value)

    def forward(self, ids: Array) -> tuple[Array, Array]:
        """ids [n] int, the next tokens -> (logits [n, V], hidden [n, d] after the final norm)."""
        self.taps, self._prefix = {}, ""
        x = self.tap("embed", self.weights.embed[self.xp.asarray(ids)])
        for i, layer in enumerate(self.weights.layers):
            self._prefix = f"layers.{i}."
            x = self.layer(layer, x, self.caches[i])
        self._prefix = ""
        return self.head(x, self.weights.norm)

    def mtp_forward(self, next_ids: Array, hidden: Array) -> tuple[Array, Array]:
        """Rows m..m+n-1 of the MTP layer: row i pairs token i + 1 with the main model's hidden state of position i.

        next_ids [n], hidden [n, d] -> (logits [n, V] of token i + 2, g [n, d]).
        """
        cfg, xp, mtp = self.cfg, self.xp, self.weights.mtp
        assert mtp is not None
        self.taps, self._prefix = {}, "mtp."
        e = rmsnorm(self.weights.embed[xp.asarray(next_ids)], mtp.enorm, cfg.rms_norm_eps, xp)
        h = rmsnorm(hidden, mtp.hnorm, cfg.rms_norm_eps, xp)
        z = self.tap("embed", self.arith.linear(xp.concatenate([e, h], axis=-1), mtp.eh_proj))
        return self.head(self.layer(mtp.layer, z, self.mtp_cache), mtp.norm, mtp.head)

    def head(self, x: Array, norm: Array, w: Matrix | None = None) -> tuple[Array, Array]:
        h = self.tap("final_norm", rmsnorm(x, norm, self.cfg.rms_norm_eps, self.xp))
        return self.tap("logits", self.arith.linear(h, w or self.weights.head)), h

    def layer(self, w: Layer, x: Array, cache: Cache) -> Array:
        """One decoder layer on the residual stream x [n, d]; appends n rows to the cache."""
        eps, xp, tap = self.cfg.rms_norm_eps, self.xp, self.tap
        a = tap("attn_norm", rmsnorm(x, w.attn_norm, eps, xp))
        x = x + tap("attn_out", self.attention(w, a, cache))
        b = tap("ffn_norm", rmsnorm(x, w.ffn_norm, eps, xp))
        y = x + (tap("ffn_out", self.mlp(w.dense, b)) if w.dense else self.moe(w, b))
        return tap("layer_out", y)

    def attention(self, w: Layer, a: Array, cache: Cache) -> Array:
        """a [n, d] normed input -> [n, d]"""
        cfg, xp, tap, linear = self.cfg, self.xp, self.tap, self.arith.linear
        n, heads, r = a.shape[0], cfg.num_attention_heads, cfg.kv_lora_rank
        dn, dr = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim
        past = len(cache)
        cos, sin = (xp.asarray(t, np.float64) for t in rope_table(cfg, np.arange(past, past + n)))

        latent = a if w.q_a is None else tap("q_a", rmsnorm(linear(a, w.q_a), w.q_a_norm, LATENT_EPS, xp))
        q = linear(latent, w.q).reshape(n, heads, dn + dr)
        q_rope = rotate(q[..., dn:], cos[:, None], sin[:, None], xp)
        q = tap("q", xp.concatenate([q[..., :dn], q_rope], axis=-1))
        t = linear(a, w.kv_a)
        c = tap("c_kv", rmsnorm(t[:, :r], w.kv_a_norm, LATENT_EPS, xp))
        k_rope = tap("k_rope", rotate(t[:, r:], cos, sin, xp))

        cache.append(*self.arith.cached(c, k_rope), xp)
        mask = xp.arange(past + n)[None, :] <= xp.arange(past, past + n)[:, None]  # [n, T]
        attend = self.attend_absorbed if self.form == "absorbed" else self.attend_expanded
        return linear(attend(w, q[..., :dn], q[..., dn:], cache, mask).reshape(n, -1), w.o)

    def attend_absorbed(self, w: Layer, q_nope: Array, q_rope: Array, cache: Cache, mask: Array) -> Array:
        """[n, H, dv]. W_UK moves to the query, W_UV behind the mean: all heads share one key and one value."""
        xp, linear = self.xp, self.arith.linear
        heads = range(self.cfg.num_attention_heads)
        q_absorbed = xp.stack([linear(q_nope[:, h], w.w_uk[h]) for h in heads], axis=1)  # [n, H, r]
        query = xp.concatenate([self.tap("q_absorbed", q_absorbed), q_rope], axis=-1)
        key = xp.concatenate([cache.c, cache.k_rope], axis=-1)
        latent = self.tap("attn_latent", self.arith.attend(query, key, cache.c, mask, softmax_scale(self.cfg)))
        return xp.stack([linear(latent[:, h], w.w_uv[h]) for h in heads], axis=1)

    def attend_expanded(self, w: Layer, q_nope: Array, q_rope: Array, cache: Cache, mask: Array) -> Array:
        """[n, H, dv]. As the paper writes it: per head keys [W_UK c | k_rope] and values W_UV c."""
        xp = self.xp
        k_nope = xp.einsum("hrk,tr->htk", w.w_uk.w, cache.c)
        values = xp.einsum("hvr,tr->htv", w.w_uv.w, cache.c)
        score = xp.einsum("nhk,htk->nht", q_nope, k_nope) + xp.einsum("nhk,tk->nht", q_rope, cache.k_rope)
        score = xp.where(mask[:, None, :], softmax_scale(self.cfg) * score, -xp.inf)
        return xp.einsum("nht,htv->nhv", softmax(score, xp), values)

    def mlp(self, w: Mlp, x: Array) -> Array:
        linear = self.arith.linear
        return linear(silu(linear(x, w.gate), self.xp) * linear(x, w.up), w.down)

    def moe(self, w: Layer, b: Array) -> Array:
        """Routed experts, weights on their outputs, plus the shared expert without a weight."""
        cfg, xp, tap = self.cfg, self.xp, self.tap
        z = tap("gate_logits", b @ w.router.T)
        experts = tap("topk_idx", route(z, w.router_bias, cfg, xp)[0])
        weights = tap("topk_weight", route(z, w.router_bias, cfg, xp, forced=experts)[1])
        routed = xp.zeros(b.shape)
        for e in range(cfg.n_routed_experts):
            rows, slots = xp.nonzero(experts == e)
            if rows.size:
                routed[rows] += weights[rows, slots][:, None] * self.mlp(w.experts[e], b[rows])
        routed = tap("routed_out", routed)
        return routed if w.shared is None else routed + tap("shared_out", self.mlp(w.shared, b))
