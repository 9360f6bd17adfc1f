"""The specification: the model in numpy, written from docs/format.md and docs/model.md alone, to be read.

``verify`` and the tests hold the runtime against it; it is itself held against transformers. Nothing of the C++ code,
of the packer's plan or of its reading of config.json is used here: tiles are decoded from the byte table, packed rows
are traced to checkpoint rows again, rope, softmax scale and routing come from the source's own config.json. Weights
are read in slabs, so memory stays small whatever the file's size. Values are float64, of numpy or of any array module
that answers to numpy's functions (cupy), that the weights are in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from ..files.checkpoint import Checkpoint
from ..files.packed import PackedFile

Array = Any  # np.ndarray; the docstrings give shapes, values are f64 unless they say otherwise
LATENT_EPS = 1e-6  # of the two latent norms, whatever rms_norm_eps says
NUDGE = 3e-7  # share of a row's largest value by which an f32 sum may be off, before it is rounded for a product
SLAB_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Format:
    """A weight format: bytes of a 16 x 32 tile, rounding of activations, allowed relative RMS of a tap behind it."""

    tile_bytes: int
    act: str
    tolerance: float


FORMATS = {
    "f32": Format(2048, "f32", 2e-5), "f16": Format(1024, "f32", 2e-5), "bf16": Format(1024, "bf16", 1e-4),
    "f8": Format(512, "bf16", 1e-4), "q8": Format(544, "i8", 1e-4), "q4": Format(288, "i8", 1e-4),
}  # fmt: skip
ELEMENTWISE = 1e-5  # allowed relative RMS of a tap without a product: norms, sums, rope of a given vector, routing


# ---- numbers --------------------------------------------------------------------------------------------------------


def bf16(bits: Array) -> Array:
    """uint16 bits -> f32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def bf16_round(x: Array) -> Array:
    """Nearest even bf16 of f32, as f32 (finite values)."""
    u = x.astype(np.float32).view(np.uint32)
    return ((u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)).view(np.float32)


def _e4m3() -> Array:
    code = np.arange(256)
    e, m = (code >> 3) & 15, code & 7
    return np.where(e == 0, m * 2.0**-9, (8 + m) * np.exp2(e - 10.0)) * np.where(code > 127, -1, 1)


E4M3 = _e4m3()  # [256] values in a packed file, where e4m3's NaN codes, 0x7F and 0xFF, are +-480 (docs/format.md 2)


def decode(fmt: str, scale: str, tiles: Array) -> tuple[Array, Array | None]:
    """Tiles uint8 [T, C, tile_bytes] -> (values or e4m3 values [16 T, 32 C], scales [16 T, C] of q8 and q4), f64."""
    t, c = tiles.shape[:2]
    scales: Array | None = None
    if fmt == "f32":
        v = tiles.view("<f4").reshape(t, c, 32, 16).transpose(0, 3, 1, 2)
    elif fmt in ("bf16", "f16"):
        bits = tiles.view("<u2").reshape(t, c, 16, 16, 2).transpose(0, 3, 1, 2, 4)
        v = bf16(bits) if fmt == "bf16" else np.ascontiguousarray(bits).view(np.float16)
    elif fmt == "q4":
        b = tiles[..., :256].reshape(t, c, 4, 16, 4).transpose(0, 3, 1, 2, 4).reshape(t, 16, c, 16)
        v = np.concatenate([b & 15, b >> 4], axis=3).astype(np.float64) - 8
    else:
        b = tiles[..., :512].reshape(t, c, 8, 16, 4).transpose(0, 3, 1, 2, 4)
        v = E4M3[b] if fmt == "f8" else b.astype(np.float64) - 128
    v = v.reshape(16 * t, 32 * c).astype(np.float64)
    if fmt in ("q8", "q4"):
        bits = np.ascontiguousarray(tiles[..., -32:]).view("<u2").transpose(0, 2, 1).reshape(16 * t, c)
        scales = (bf16(bits) if scale == "bf16" else np.ascontiguousarray(bits).view(np.float16)).astype(np.float64)
        v *= np.repeat(scales, 32, axis=1)
    return v, scales


def round_activations(kind: str, x: Array) -> Array:
    """x [n, cols] as a product with weights of this kind sees it (docs/model.md 7.1), f64."""
    x = x.astype(np.float32)
    if kind == "bf16":
        x = bf16_round(x)
    elif kind == "i8":
        g = np.pad(x, [(0, 0), (0, -x.shape[1] % 32)]).reshape(len(x), -1, 32)
        amax = np.abs(g).max(-1, keepdims=True)
        live = amax >= np.float32(2.0**-119)
        safe = np.where(live, amax, np.float32(1))
        d = np.where(live, amax / np.float32(127), np.float32(0)).astype(np.float64)
        return (np.rint(g * (np.float32(127) / safe)) * d).reshape(len(x), -1)[:, : x.shape[1]]
    return x.astype(np.float64)


# ---- configuration, from config.json itself -------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What the formulas need; symbols as in docs/model.md."""

    d: int
    layers: int
    heads: int
    rq: int
    r: int
    dn: int
    dr: int
    dv: int
    dense: int  # layers before the first with experts
    width: int
    expert_width: int
    experts: int
    top_k: int
    shared: int
    groups: int
    top_groups: int
    grouping: str  # "" | "max" | "top2"
    softmax: bool
    bias: bool
    normed: bool
    factor: float
    eps: float
    theta: float
    yarn: Mapping[str, Any] | None
    pairs: bool  # the checkpoint's rope rows are pairs (2j, 2j + 1)
    tied: bool
    vocab: int
    beta: float = 0.0  # queries at p are multiplied by 1 + beta ln(1 + floor(p / original))
    original: int = 1
    factors: tuple[float, ...] = ()  # longrope: of the frequencies, and A
    stretch: float = 1.0
    on_embedding: float = 1.0
    on_residual: float = 1.0
    on_logits: float = 1.0
    post_norm: bool = False  # on what the experts give

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Settings:
        """From an unwrapped config.json of either style."""
        v2 = raw["model_type"] in ("deepseek_v2", "mistral4")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        kind = (rope.get("rope_type") or rope.get("type") or "default").removeprefix("deepseek_")
        method = (raw["model_type"] != "axk1" and raw.get("topk_method")) or ("greedy" if v2 else "noaux_tc")
        types, experts = raw.get("mlp_layer_types"), raw.get("n_routed_experts") or 0
        dense = types.count("dense") if types else raw.get("first_k_dense_replace", 0)
        return cls(
            raw["hidden_size"], raw["num_hidden_layers"], raw["num_attention_heads"], raw.get("q_lora_rank") or 0,
            raw["kv_lora_rank"], raw["qk_nope_head_dim"], raw["qk_rope_head_dim"],
            raw.get("v_head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
            dense if experts else 1 << 30, raw["intermediate_size"], raw.get("moe_intermediate_size") or 0, experts,
            raw.get("num_experts_per_tok") or 0, raw.get("n_shared_experts") or 0, raw.get("n_group") or 1,
            raw.get("topk_group") or 1,
            {"greedy": "", "group_limited_greedy": "max", "noaux_tc": "top2"}[method],
            (raw.get("scoring_func") or ("softmax" if v2 else "sigmoid")) == "softmax", method == "noaux_tc",
            bool(raw.get("norm_topk_prob")), raw.get("routed_scaling_factor") or 1.0,
            raw["rms_norm_eps"], rope.get("rope_theta") or raw.get("rope_theta", 1e4), rope if kind == "yarn" else None,
            raw.get("rope_interleave") is not False and raw["model_type"] != "minicpm3",
            bool(raw.get("tie_word_embeddings", raw["model_type"] in ("youtu", "minicpm3"))),
            raw["vocab_size"], **_of_some(raw, rope, kind),
        )  # fmt: skip


def _of_some(raw: Mapping[str, Any], rope: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """What only some models have."""
    original = rope.get("original_max_position_embeddings") or 1
    out: dict[str, Any] = {"beta": rope.get("llama_4_scaling_beta") or 0.0, "original": original}
    if kind == "longrope":
        longer = rope.get("factor") or raw["max_position_embeddings"] / original
        stretch = float(np.sqrt(1 + np.log(longer) / np.log(original))) if longer > 1 else 1.0
        out |= {"factors": tuple(rope["short_factor"]), "stretch": rope.get("attention_factor") or stretch}
    out["post_norm"] = raw["model_type"] == "axk1"
    if raw["model_type"] == "minicpm3":
        d, depth = raw["hidden_size"], raw["num_hidden_layers"] ** 0.5
        out |= {"on_embedding": raw["scale_emb"], "on_residual": (raw["scale_depth"] or depth) / depth}
        out |= {"on_logits": (raw["dim_model_base"] or d) / d}
    return out


def _magnitude(s: Settings, key: str) -> float:
    """m(c) of docs/model.md 3.4; 0 where the key is absent or 0."""
    y = s.yarn or {}
    return (0.1 * y[key] * float(np.log(y["factor"])) + 1 if y["factor"] > 1 else 1.0) if y.get(key) else 0.0


def inv_freq(s: Settings) -> Array:
    """[dr/2] radians per position."""
    f = s.theta ** (-np.arange(0, s.dr, 2) / s.dr) / np.array(s.factors or 1.0)
    if s.yarn is None:
        return f
    turns = np.array([s.yarn.get("beta_fast") or 32.0, s.yarn.get("beta_slow") or 1.0]) * 2 * np.pi
    at = s.dr * np.log(s.yarn["original_max_position_embeddings"] / turns) / (2 * np.log(s.theta))
    if s.yarn.get("truncate", True):
        at = np.array([np.floor(at[0]), np.ceil(at[1])])
    lo, hi = max(at[0], 0.0), min(at[1], s.dr - 1.0)
    ramp = np.clip((np.arange(s.dr // 2) - lo) / (hi - lo or 0.001), 0, 1)
    return f * (1 - ramp) + f / s.yarn["factor"] * ramp


def amplitude(s: Settings) -> float:
    """A, on cos and sin."""
    if s.yarn is None:
        return s.stretch
    if s.yarn.get("attention_factor"):
        return float(s.yarn["attention_factor"])
    a, b = _magnitude(s, "mscale"), _magnitude(s, "mscale_all_dim")
    return a / b if a and b else 0.1 * float(np.log(s.yarn["factor"])) + 1 if s.yarn["factor"] > 1 else 1.0


def softmax_scale(s: Settings) -> float:
    """sigma, on the whole score."""
    return float((s.dn + s.dr) ** -0.5 * (_magnitude(s, "mscale_all_dim") or 1.0) ** 2)


def query_scale(s: Settings, n: int) -> Array:
    """[n] factors of the queries at positions 0 .. n - 1."""
    return 1 + s.beta * np.log(1 + np.arange(n) // s.original)


def rotate(s: Settings, v: Array, first: int = 0) -> Array:
    """v [n, ..., dr], row i at position first + i; channels (j, j + dr/2) turn together, by an angle in f32."""
    position = np.arange(first, first + len(v), dtype=np.float32)
    angle = (position[:, None] * inv_freq(s).astype(np.float32)).astype(np.float64)
    shape = (len(v), *[1] * (v.ndim - 2), s.dr // 2)
    table = (t.reshape(shape) * amplitude(s) for t in (np.cos(angle), np.sin(angle)))
    cos, sin = (np.asarray(t, like=v) for t in table)
    a, b = v[..., : s.dr // 2], v[..., s.dr // 2 :]
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


# ---- formulas -------------------------------------------------------------------------------------------------------


def rmsnorm(x: Array, w: Array, eps: float) -> Array:
    """w x / sqrt(mean x^2 + eps)"""
    return w * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def softmax(z: Array) -> Array:
    """Over the last axis."""
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def scores(s: Settings, z: Array, bias: Array | None) -> tuple[Array, Array]:
    """Gate logits z [n, E] -> (p [n, E] for the weights, u [n, E] for the choice: -inf where the group is out)."""
    p = softmax(z) if s.softmax else 1 / (1 + np.exp(-z))
    u = p if bias is None else p + bias
    if s.grouping and s.groups > 1:
        place = np.argsort(np.argsort(-group_scores(s, u), axis=-1, kind="stable"), axis=-1)
        u = np.where(np.repeat(place < s.top_groups, s.experts // s.groups, axis=1), u, -np.inf)
    return p, u


def group_scores(s: Settings, u: Array) -> Array:
    """u [n, E] -> [n, groups]: the best expert of each group, or the sum of its two best."""
    best = np.sort(u.reshape(len(u), s.groups, -1), axis=-1)
    return best[..., -1] if s.grouping == "max" else best[..., -2:].sum(-1)


def choose(s: Settings, u: Array) -> Array:
    """[n, k] expert indices, ascending."""
    return np.sort(np.argsort(-u, axis=-1, kind="stable")[:, : s.top_k], axis=-1)


def expert_weights(s: Settings, p: Array, experts: Array) -> Array:
    """[n, k] weights of the chosen experts."""
    w = np.take_along_axis(p, experts, axis=1)
    return (w / (w.sum(-1, keepdims=True) + 1e-20) if s.normed else w) * s.factor


# ---- weights --------------------------------------------------------------------------------------------------------


class Weights(Protocol):
    """Matrices in packed layout (stacked parts padded to 16 rows), under their packed names."""

    def slabs(self, name: str, slice_: int = 0) -> Iterator[tuple[int, Array, Array | None]]:
        """(first row, values [k, cols], scales) of slice after slab, top to bottom; k is a multiple of 16."""

    def plain(self, name: str, rows: Array | None = None) -> Array:
        """A vector, or these rows of the embedding."""

    def head(self, p: str) -> str:
        """Name of the head of the main model (p "") or of the MTP layer (p "mtp.")."""

    def act(self, name: str) -> str:
        """Rounding of the activations that meet this matrix; "" for none."""


def slab_rows(cols: int) -> int:
    """Rows of a slab."""
    return max(1, SLAB_ELEMENTS // cols // 16) * 16


class PackedWeights:
    """The packed file as the byte table describes it."""

    def __init__(self, file: PackedFile) -> None:
        self.file = file

    def act(self, name: str) -> str:
        return FORMATS[self.file.entries[name].format].act

    def head(self, p: str) -> str:
        return p + "head" if p + "head" in self.file.entries else "head"

    def plain(self, name: str, rows: Array | None = None) -> Array:
        e = self.file.entries[name]
        kind = {"f32": "<f4", "f16": "<f2", "bf16": "<u2"}[e.format]
        cols = e.shape[-1]
        size = cols * np.dtype(kind).itemsize
        which = [0] if rows is None else rows
        out = np.stack([self.file.read_array(e.offset + int(i) * size, cols, kind) for i in which])
        out = (bf16(out) if e.format == "bf16" else out).astype(np.float64)
        return out[0] if rows is None else out

    def slabs(self, name: str, slice_: int = 0) -> Iterator[tuple[int, Array, Array | None]]:
        e = self.file.entries[name]
        rows, cols = e.shape[-2:] if len(e.shape) > 1 else (1, *e.shape)
        if e.kind == "plain":
            for row in range(0, rows, slab_rows(cols)):
                values = self.plain(name, np.arange(row, min(row + slab_rows(cols), rows)))
                yield row, values.reshape(-1, cols), None
            return
        row_bytes, n_tiles = -(-cols // 32) * FORMATS[e.format].tile_bytes, -(-rows // 16)
        grid = self.file.entries.get(name + ".scale")
        block: Array | None = None
        if grid is not None:
            size = grid.shape[1] * grid.shape[2]
            block = self.file.read_array(grid.offset + 4 * slice_ * size, size, "<f4")
            block = block.reshape(grid.shape[1:]).astype(np.float64)
        step = slab_rows(cols) // 16
        for t in range(0, n_tiles, step):
            n = min(step, n_tiles - t)
            begin = e.offset + (slice_ * n_tiles + t) * row_bytes
            raw = self.file.read_array(begin, n * row_bytes)
            v, scales = decode(e.format, e.scale, raw.reshape(n, -1, FORMATS[e.format].tile_bytes))
            if block is not None and e.scale_block is not None:
                i = np.minimum(np.arange(16 * t, 16 * (t + n)) // e.scale_block[0], len(block) - 1)
                j = np.minimum(np.arange(v.shape[1]) // e.scale_block[1], block.shape[1] - 1)
                scales = block[i[:, None], j[None, :]]
                v = v * scales
            yield 16 * t, v, scales


class SourceWeights:
    """The checkpoint's values where the packed file must have them: names, parts, slices, rope order, stated again."""

    def __init__(self, ckpt: Checkpoint, settings: Settings) -> None:
        self.ckpt, self.s = ckpt, settings
        self.weight = lru_cache(maxsize=64)(ckpt.weight)
        self._grid = lru_cache(maxsize=8)(ckpt.read_scale)

    def act(self, name: str) -> str:  # noqa: ARG002
        return ""

    def head(self, p: str) -> str:  # noqa: ARG002
        return "head"

    def origin(self, name: str, slice_: int) -> tuple[list[tuple[str, tuple[int, ...], Array]], bool]:
        """([(checkpoint name, its shape, [packed rows] its row in each packed row or -1)], transposed)."""
        s, rest = self.s, name.split(".", 2)[2] if name.startswith("layers.") else name.removeprefix("mtp.")
        name = "head" if name == "mtp.head" else name
        prefix = self.ckpt.prefix
        top = {"embed": f"{prefix}embed_tokens.weight", "head": self.ckpt.lm_head, "final_norm": f"{prefix}norm.weight"}
        if s.tied and name in ("embed", "head") and not self.ckpt.has_weight(top[name]):
            name = "embed" if name == "head" else "head"
        if name in top:
            shape: tuple[int, ...] = (s.d,) if name == "final_norm" else (s.vocab, s.d)
            rows = np.arange(1 if len(shape) == 1 else s.vocab)
            return [(top[name], shape, rows)], False
        layer = s.layers if name.startswith("mtp.") else int(name.split(".")[1])
        p = f"{prefix}layers.{layer}."
        q_rows, kv_rows = s.heads * (s.dn + s.dr), s.r + s.dr
        vectors = {
            "attn_norm": ("input_layernorm", s.d), "ffn_norm": ("post_attention_layernorm", s.d),
            "post_moe_norm": ("post_mlp_layernorm", s.d),
            "q_a_norm": ("self_attn.q_a_layernorm", s.rq), "kv_a_norm": ("self_attn.kv_a_layernorm", s.r),
            "enorm": ("enorm", s.d), "hnorm": ("hnorm", s.d), "final_norm": ("shared_head.norm", s.d),
        }  # fmt: skip
        if rest == "router_bias":
            return [(p + "mlp.gate.e_score_correction_bias", (s.experts,), np.arange(1))], False
        if rest in vectors:
            return [(f"{p}{vectors[rest][0]}.weight", (vectors[rest][1],), np.arange(1))], False
        if rest in ("w_uk", "w_uv"):
            key = rest == "w_uk"
            rows = slice_ * (s.dn + s.dv) + (np.arange(s.dn) if key else s.dn + np.arange(s.dv))
            return [(p + "self_attn.kv_b_proj.weight", (s.heads * (s.dn + s.dv), s.r), rows)], key
        if rest == "wqkv_a":
            first = ("q_a_proj", s.rq, np.arange(s.rq)) if s.rq else ("q_proj", q_rows, self._rope(q_rows, s.dn))
            parts = [first, ("kv_a_proj_with_mqa", kv_rows, self._rope(kv_rows, s.r))]
            pads = [-(-n // 16) * 16 for _, n, _ in parts]
            out: list[tuple[str, tuple[int, ...], Array]] = []
            begin = 0
            for (tensor, n, take), pad in zip(parts, pads, strict=True):
                index = np.full(sum(pads), -1)
                index[begin : begin + n] = take
                out.append((f"{p}self_attn.{tensor}.weight", (n, s.d), index))
                begin += pad
            return out, False
        if rest in ("wq_b", "wo", "router", "eh_proj"):
            matrices: dict[str, tuple[str, tuple[int, ...]]] = {
                "wq_b": ("self_attn.q_b_proj", (q_rows, s.rq)), "wo": ("self_attn.o_proj", (s.d, s.heads * s.dv)),
                "router": ("mlp.gate", (s.experts, s.d)), "eh_proj": ("eh_proj", (s.d, 2 * s.d)),
            }  # fmt: skip
            tensor, shape = matrices[rest]
            index = self._rope(q_rows, s.dn) if rest == "wq_b" else np.arange(shape[0])
            return [(f"{p}{tensor}.weight", shape, index)], False
        kind, _, last = rest.rpartition(".")
        where = {"": "mlp.", "experts": f"mlp.experts.{slice_}.", "shared": "mlp.shared_experts."}[kind]
        width = {"": s.width, "experts": s.expert_width, "shared": s.shared * s.expert_width}[kind]
        if last == "w_down":
            return [(f"{p}{where}down_proj.weight", (s.d, width), np.arange(s.d))], False
        row = np.arange(2 * (-(-width // 16) * 16))  # 16 rows of gate, 16 of up, and so on
        natural = row // 32 * 16 + row % 16
        return [(f"{p}{where}{part}_proj.weight", (width, s.d),
                 np.where((row // 16 % 2 == i) & (natural < width), natural, -1))
                for i, part in enumerate(("gate", "up"))], False  # fmt: skip

    def keeps_blocks(self, name: str, slice_: int) -> bool:
        """Whether codes can be kept: every 16 x 32 tile in one f8 scale block; groups and scales that q8 can hold."""
        origins, transposed = self.origin(name, slice_)
        for tensor, shape, index in origins:
            w = self.weight(tensor, shape)
            if w.kind in ("i8", "fp4"):
                grid = np.asarray(self._grid(w)) / (1 if w.kind == "i8" else 2)
                if transposed or not w.q8_codes or (grid.astype(np.float16) != grid).any():
                    return False
                continue
            block = w.block
            ids = [index[index >= 0] // block[0], np.arange(shape[-1]) // block[1]]
            for along, tile in zip(ids[::-1] if transposed else ids, (16, 32), strict=True):
                tiles = np.pad(along, (0, -len(along) % tile), mode="edge").reshape(-1, tile)
                if (tiles != tiles[:, :1]).any():
                    return False
        return True

    def _rope(self, rows: int, plain: int) -> Array:
        """Checkpoint row of each packed row: per period of plain + dr rows, even rope rows first, then odd ones."""
        row = np.arange(rows)
        period = plain + self.s.dr
        j, half = row % period - plain, self.s.dr // 2
        return np.where((j < 0) | (not self.s.pairs), row, row - j + np.where(j < half, 2 * j, 2 * (j - half) + 1))

    def read(self, name: str, shape: tuple[int, ...], begin: int, end: int) -> Array:
        """Rows of a checkpoint tensor, f64."""
        w = self.weight(name, shape)
        raw = self.ckpt.read_rows(w, begin, end)
        if w.kind in ("f8", "i8", "fp4"):
            grid = self._grid(w)
            assert grid is not None
            i, j = np.arange(begin, end) // w.block[0], np.arange(w.cols) // w.block[1]
            if w.kind == "f8":
                value = np.where((raw & 0x7F) == 0x7F, np.nan, E4M3[raw])
            elif w.kind == "i8":
                value = (raw.view(np.int8) if w.data.dtype == "I8" else raw.astype(np.int16) - 128)[:, : w.cols]
            else:
                code = np.stack([raw & 15, raw >> 4], axis=2).reshape(len(raw), -1)
                value = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[code & 7] * np.where(code > 7, -1, 1)
            return value * grid[i[:, None], j[None, :]].astype(np.float64)
        if w.kind == "i4":
            bits = self.ckpt.read_scale(w, begin, end)
            assert bits is not None
            scale = (bf16(bits) if w.scale_dtype == "bf16" else bits.view(np.float16)).astype(np.float64)
            j = np.arange(w.cols)
            code = (raw[:, j // 2] >> np.where(j % 2, 4, 0).astype(np.uint8)) & 15
            return (code.astype(np.float64) - 8) * scale[:, j // w.block[1]]
        if w.kind == "bf16":
            return bf16(raw.view("<u2")).astype(np.float64)
        return raw.view("<f4" if w.kind == "f32" else "<f2").astype(np.float64)

    def plain(self, name: str, rows: Array | None = None) -> Array:
        tensor, shape, _ = self.origin(name, 0)[0][0]
        if rows is None:
            return self.read(tensor, shape, 0, 1)[0]
        return np.stack([self.read(tensor, shape, int(i), int(i) + 1)[0] for i in rows])

    def slabs(self, name: str, slice_: int = 0) -> Iterator[tuple[int, Array, Array | None]]:
        origins, transposed = self.origin(name, slice_)
        if transposed:
            tensor, shape, index = origins[0]
            whole = self.read(tensor, shape, index[0], index[-1] + 1).T
            index = np.arange(len(whole))
        else:
            index = origins[0][2]
        cols = whole.shape[1] if transposed else origins[0][1][-1]
        step = slab_rows(cols)
        for begin in range(0, len(index), step):
            end = min(begin + step, len(index))
            out = np.zeros((-(-(end - begin) // 16) * 16, cols))
            if transposed:
                out[: end - begin] = whole[begin:end]
            for tensor, shape, rows in [] if transposed else origins:
                take = rows[begin:end]
                live = np.flatnonzero(take >= 0)
                if len(live):
                    low = int(take[live].min())
                    out[live] = self.read(tensor, shape, low, int(take[live].max()) + 1)[take[live] - low]
            yield begin, out, None


# ---- cache ----------------------------------------------------------------------------------------------------------

CACHE_CHUNK, CACHE_PARTIAL = 64, 512  # positions that share a running maximum; after which it starts anew


def cache_round(kv: str, c: Array, k_rope: Array) -> tuple[Array, Array]:
    """c [n, r] and k_rope [n, dr] as read back from a cache of type f32, f16, bf16, q8; "": unrounded. Both f64.

    q8: codes within +-127 with one f16 scale, max|c| / 127, per 32 channels; k_rope in f16.
    """
    if kv == "f32":
        c, k_rope = c.astype(np.float32), k_rope.astype(np.float32)
    elif kv == "bf16":
        c, k_rope = bf16_round(c), bf16_round(k_rope)
    elif kv:
        k_rope = k_rope.astype(np.float32).astype(np.float16)
        c = c.astype(np.float32 if kv == "q8" else np.float16)
    if kv == "q8":  # in f32, as the runtime does: a code near a tie must fall on the same side
        groups = np.pad(c, [(0, 0), (0, -c.shape[1] % 32)]).reshape(len(c), -1, 32)
        step = (np.abs(groups).max(-1, keepdims=True) / np.float32(127)).astype(np.float16).astype(np.float32)
        codes = np.rint(groups * np.divide(np.float32(1), step, out=np.zeros_like(step), where=step > 0))
        c = (np.clip(codes, -127, 127) * step).reshape(len(c), -1)[:, : c.shape[1]]
    return c.astype(np.float64), k_rope.astype(np.float64)


def attend(
    kv: str, scale: float, qa: Array, qr: Array, c: Array, kr: Array, ends: Array | None = None
) -> tuple[Array, Array | float]:
    """Attention of qa [n, h, r], qr [n, h, dr] on c [T, r], kr [T, dr] -> ([n, h, r], [n, h] spread).

    Row i sees the first ``ends`` [i] positions; None: i + 1. A bf16 cache rounds queries, and probabilities relative to
    the running maximum of their partial.
    """
    if kv == "bf16":
        qa, qr = (bf16_round(v).astype(np.float64) for v in (qa, qr))
    n, n_pos = len(qa), len(c)
    score = scale * (np.einsum("nhr,tr->nht", qa, c) + np.einsum("nhr,tr->nht", qr, kr))
    ends = np.arange(1, n + 1) if ends is None else ends
    seen = np.asarray((np.arange(n_pos) < ends[:, None])[:, None], like=score)
    score = np.where(seen, score, -np.inf)
    if kv != "bf16":
        return np.einsum("nht,tr->nhr", softmax(score), c), 0.0
    top = np.empty_like(score)
    for begin in range(0, n_pos, CACHE_CHUNK):
        most = score[..., begin : begin + CACHE_CHUNK].max(-1, keepdims=True)
        most = np.maximum(most, top[..., begin - 1 : begin]) if begin % CACHE_PARTIAL else most
        top[..., begin : begin + CACHE_CHUNK] = most
    weight = np.exp(np.where(seen, top - score.max(-1, keepdims=True), 0))
    raw = np.exp(np.where(seen, score - np.where(seen, top, 0), -np.inf))
    sides = []
    for nudge in (-NUDGE, NUDGE):
        p = bf16_round(raw * (1 + 4 * nudge)) * weight
        sides.append(np.einsum("nht,tr->nhr", p / p.sum(-1, keepdims=True), c))
    return (sides[0] + sides[1]) / 2, np.linalg.norm(sides[1] - sides[0], axis=2)


# ---- the model ------------------------------------------------------------------------------------------------------

# name -> (value, spread: [n] or [n, h] norms of what undecided roundings may change, 0 for none)
Taps = dict[str, "tuple[Array, Array | float]"]
Tap = Callable[..., Array]  # records (name, value, spread) of a layer and returns the value that goes on


def given(taps: Taps, name: str, forced: Mapping[str, Array]) -> Array:
    """The value of a tap, f64 or indices: the forced one if there is one."""
    value = taps[name][0]
    x: Array = np.asarray(forced[name], like=value) if name in forced else value
    return x if x.dtype.kind == "i" else x.astype(np.float64)


class Reference:
    """The model over a sequence from position 0. With forced taps every stage is computed from the runtime's own input.

    Activations that no tap shows are rounded twice, nudged down and up: where the two differ, the rounding is too close
    to a tie for f32 sums to decide, and the difference is reported beside the value.
    """

    def __init__(self, settings: Settings, weights: Weights, kv: str = "") -> None:
        self.s, self.w, self.kv = settings, weights, kv

    def product(self, x: Array, name: str, slice_: int = 0, unseen: bool = False) -> tuple[Array, Array | float]:
        """x [n, cols] -> (W x [n, packed rows], spread)."""
        act, rows = self.w.act(name), x
        both = unseen and act not in ("", "f32")
        if act:
            nudge = NUDGE * np.abs(x).max(-1, keepdims=True) if both else 0
            rows = round_activations(act, np.concatenate([x - nudge, x + nudge]) if both else x)
        y = np.concatenate([rows @ v[:, : x.shape[1]].T for _, v, _ in self.w.slabs(name, slice_)], axis=1)
        if not both:
            return y, 0.0
        low, high = np.split(y, 2)
        return (low + high) / 2, np.linalg.norm(high - low, axis=1)

    def mlp(self, x: Array, name: str, width: int, slice_: int = 0) -> tuple[Array, Array | float]:
        """Gate, up and down projection of ``name``."""
        y = self.product(x, name + "w_gate_up", slice_)[0].reshape(len(x), -1, 2, 16)
        gate, up = (y[:, :, i].reshape(len(x), -1)[:, :width] for i in (0, 1))
        with np.errstate(over="ignore"):  # exp of a very negative gate: the quotient is 0
            act = gate / (1 + np.exp(-gate)) * up
        out, spread = self.product(act, name + "w_down", slice_, unseen=True)
        return out[:, : self.s.d], spread

    def embedding(self, ids: Array) -> Taps:
        """What enters the first layer, for ids [n]."""
        return {"embed": (self.w.plain("embed", ids) * self.s.on_embedding, 0.0)}

    def layer(self, p: str, x: Array, forced: Mapping[str, Array]) -> Taps:
        """All taps of a layer (prefix ``p``) on the residual stream x [n, d]."""
        s, plain, out = self.s, self.w.plain, dict[str, "tuple[Array, Array | float]"]()

        def tap(name: str, value: Array, spread: Array | float = 0.0) -> Array:
            out[p + name] = (value, spread)
            return given(out, p + name, forced)

        a = tap("attn_norm", rmsnorm(x, plain(p + "attn_norm"), s.eps))
        x = x + s.on_residual * tap("attn_out", *self.attention(p, a, tap))
        b = tap("ffn_norm", rmsnorm(x, plain(p + "ffn_norm"), s.eps))
        if (s.layers if p == "mtp." else int(p.split(".")[1])) < s.dense:
            y = tap("ffn_out", *self.mlp(b, p, s.width))
        else:
            y = tap("routed_out", *self.routed(p, b, tap))
            if s.shared:
                y = y + tap("shared_out", *self.mlp(b, p + "shared.", s.shared * s.expert_width))
            if s.post_norm:
                y = tap("moe_out", rmsnorm(y, plain(p + "post_moe_norm"), s.eps))
        tap("layer_out", x + s.on_residual * y)
        return out

    def attention(self, p: str, a: Array, tap: Tap) -> tuple[Array, Array | float]:
        """The normed input a [n, d] -> [n, d]."""
        s, plain = self.s, self.w.plain
        width = s.heads * (s.dn + s.dr)
        start = -(-(s.rq or width) // 16) * 16
        qkv = self.product(a, p + "wqkv_a")[0]
        q, t = qkv[:, :width], qkv[:, start : start + s.r + s.dr]
        if s.rq:
            q_a = tap("q_a", rmsnorm(qkv[:, : s.rq], plain(p + "q_a_norm"), LATENT_EPS))
            q = self.product(q_a, p + "wq_b")[0][:, :width]
        q = q.reshape(len(a), s.heads, -1)
        q = np.concatenate([q[..., : s.dn], rotate(s, q[..., s.dn :])], axis=-1)
        q = tap("q", q * np.asarray(query_scale(s, len(a))[:, None, None], like=q))
        c = tap("c_kv", rmsnorm(t[:, : s.r], plain(p + "kv_a_norm"), LATENT_EPS))
        kr = tap("k_rope", rotate(s, t[:, s.r :]))
        v = self.values(p, q, *cache_round(self.kv, c, kr), tap)
        y, spread = self.product(v, p + "wo", unseen=True)
        return y[:, : s.d], spread

    def values(self, p: str, q: Array, c: Array, kr: Array, tap: Tap) -> Array:
        """q [n, h, dn + dr] on the cached c [n, r], kr [n, dr] -> [n, h dv].

        Absorbed: W_UK moves to the query, W_UV behind the mean, and all heads share one key [c, kr] and one value c.
        """
        s, heads = self.s, range(self.s.heads)
        qa = np.stack([self.product(q[:, h, : s.dn], p + "w_uk", h)[0][:, : s.r] for h in heads], axis=1)
        qa = tap("q_absorbed", qa)
        u = tap("attn_latent", *attend(self.kv, softmax_scale(s), qa, q[..., s.dn :], c, kr))
        return np.concatenate([self.product(u[:, h], p + "w_uv", h)[0][:, : s.dv] for h in heads], axis=1)

    def routed(self, p: str, b: Array, tap: Tap) -> tuple[Array, Array | float]:
        """The chosen experts of b [n, d], weights on their outputs."""
        s = self.s
        z = tap("gate_logits", self.product(b, p + "router")[0][:, : s.experts])
        prob, u = scores(s, z, self.w.plain(p + "router_bias") if s.bias else None)
        experts = tap("topk_idx", choose(s, u))
        weight = tap("topk_weight", expert_weights(s, prob, experts))
        out, loose = np.zeros_like(b), np.zeros_like(b[:, 0])
        for e in np.unique(experts):
            rows, slots = np.nonzero(experts == e)
            y, spread = self.mlp(b[rows], p + "experts.", s.expert_width, int(e))
            out[rows] += weight[rows, slots][:, None] * y
            loose[rows] += weight[rows, slots] * spread
        return out, loose

    def head(self, p: str, x: Array, forced: Mapping[str, Array]) -> Taps:
        """final_norm and logits of the main model (p "") or of the MTP layer."""
        out: Taps = {p + "final_norm": (rmsnorm(x, self.w.plain(p + "final_norm"), self.s.eps), 0.0)}
        logits = self.product(given(out, p + "final_norm", forced), self.w.head(p))[0][:, : self.s.vocab]
        return out | {p + "logits": (logits * self.s.on_logits, 0.0)}

    def mtp_input(self, next_ids: Array, hidden: Array) -> Taps:
        """What enters the MTP layer: next_ids [n] beside the main model's hidden [n, d] after its final norm."""
        e = rmsnorm(self.embedding(next_ids)["embed"][0], self.w.plain("mtp.enorm"), self.s.eps)
        h = rmsnorm(hidden.astype(np.float64), self.w.plain("mtp.hnorm"), self.s.eps)
        y, spread = self.product(np.concatenate([e, h], axis=1), "mtp.eh_proj", unseen=True)
        return {"mtp.embed": (y[:, : self.s.d], spread)}

    def stages(self, ids: Array, forced: Mapping[str, Array] | None = None) -> Iterator[Taps]:
        """The whole model over ids [n]: taps of the embedding, of each layer on the output of the one before, the head.

        Where ``forced`` has a tap, what follows uses that value.
        """
        forced, last = forced or {}, "embed"
        taps = self.embedding(ids)
        yield taps
        for i in range(self.s.layers):
            taps, last = self.layer(f"layers.{i}.", given(taps, last, forced), forced), f"layers.{i}.layer_out"
            yield taps
        yield self.head("", given(taps, last, forced), forced)

    def mtp_stages(self, next_ids: Array, hidden: Array, forced: Mapping[str, Array] | None = None) -> Iterator[Taps]:
        """The same for the MTP layer: its input, the layer, its head; row i is about token i + 2."""
        forced = forced or {}
        taps = self.mtp_input(next_ids, hidden)
        yield taps
        taps = self.layer("mtp.", given(taps, "mtp.embed", forced), forced)
        yield taps
        yield self.head("mtp.", given(taps, "mtp.layer_out", forced), forced)
