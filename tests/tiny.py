"""Seeded tiny random checkpoints in Hugging Face layout, one preset per architecture variant.

Written with numpy alone (no torch) and bit-stable: every weight is an integer hash (SplitMix64) of seed, tensor name
and element index, turned into a float by exact arithmetic, so a checkpoint is the same on every machine and numpy
version and golden vectors need no committed weights. Norm weights are 1 +- 0.3 and correction biases +- 0.3 (defaults
of ones and zeros would hide bugs); scales are chosen for a logit standard deviation near 1.5. Widths are odd on
purpose.

    tiny.write(tmp_path, "v3", dtype="bf16")      # -> tmp_path, with config.json, *.safetensors, tokenizer, template
    tiny.write(tmp_path, "v3", vocab_size=333)    # any key of the preset's config may be overridden
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
DTYPES = ("bf16", "f16", "f32", "fp8", "int4")


@dataclass(frozen=True)
class TinySpec:
    """One architecture variant. ``config`` has the keys of an old-style config.json (``rope_scaling``, ...)."""

    config: dict[str, Any]
    dtype: str = "bf16"  # dtype the real checkpoint ships in; `write` uses it unless told otherwise
    style: str = "old"  # "old": rope_theta + rope_scaling; "new": rope_parameters + mlp_layer_types (transformers >= 5)
    n_shards: int = 1  # > 1: model-0000i-of-0000n.safetensors and an index
    mtp_copies: bool = False  # layer L repeats embedding and head, as DeepSeek's files do
    rotary_buffers: bool = False  # stale *.rotary_emb.inv_freq tensors that a loader must skip
    bias_dtype: str = "f32"  # of e_score_correction_bias ("" = the checkpoint's; "none": the files have none)
    fp8_block: tuple[int, int] | None = (128, 128)  # None: one scale for a tensor
    fused_experts: bool = False  # stored as `fuse_experts` makes them
    generation_eos: tuple[int, ...] = ()  # eos ids that only generation_config.json knows
    tokenizer: str = "hf"  # "hf": tokenizer.json; "tiktoken": tiktoken.model (Kimi, Moonlight); "none"
    extra_config: dict[str, Any] = field(default_factory=dict)  # written as is, must not change the result


# Widths and counts of every preset, under the keys below.
SIZES = {
    #                 hidden  heads  q_lora  kv_lora  nope  rope  v    dense  expert  experts  top  shared
    "v2_lite":       (78,     3,     None,   36,      20,   12,   18,  90,    35,     10,      3,   2),
    "v2_grouped":    (84,     4,     44,     40,      24,   16,   20,  100,   28,     16,      4,   2),
    "v3":            (76,     5,     52,     42,      22,   16,   26,  110,   38,     24,      5,   1),
    "moonlight":     (70,     2,     None,   34,      18,   10,   22,  77,    33,     9,       3,   2),
    "gigachat3":     (200,    2,     None,   144,     128,  32,   192, 264,   136,    6,       2,   1),
    "kimi_k2":       (96,     3,     50,     38,      26,   16,   30,  98,    32,     20,      4,   1),
    "glm4_moe_lite": (90,     5,     46,     44,      24,   8,    36,  86,    31,     12,      4,   1),
    "kanana2":       (58,     4,     None,   30,      14,   10,   16,  70,    18,     128,     6,   2),
    "sarvam":        (66,     4,     None,   38,      18,   12,   20,  82,    26,     32,      8,   1),
    "mistral4":      (82,     3,     48,     40,      18,   18,   28,  94,    34,     14,      4,   1),
    "axk1":          (74,     4,     42,     38,      20,   12,   24,  96,    30,     16,      4,   1),
    "youtu":         (80,     3,     40,     36,      22,   14,   26,  88,    0,      0,       0,   0),
    "minicpm3":      (84,     3,     44,     34,      20,   12,   28,  92,    0,      0,       0,   0),
}  # fmt: skip
_SIZE_KEYS = (
    *("hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"),
    *("v_head_dim", "intermediate_size", "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok"),
    "n_shared_experts",
)


def _config(model_type: str, sizes: str, **keys: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "num_nextn_predict_layers": 0,
        "tie_word_embeddings": False,
        "bos_token_id": 265,
        "eos_token_id": 266,
        **dict(zip(_SIZE_KEYS, SIZES[sizes], strict=True)),
        **keys,
    }


def _yarn(factor: float, original: int, fast: float, slow: float, mscale: float, all_dim: float) -> dict[str, Any]:
    return {
        "type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": fast,
        "beta_slow": slow,
        "mscale": mscale,
        "mscale_all_dim": all_dim,
    }


_NOAUX = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True}
_LEGACY_NOISE = {"aux_loss_alpha": 0.001, "seq_aux": True, "ep_size": 1, "moe_layer_freq": 1, "pretraining_tp": 1}

PRESETS: dict[str, TinySpec] = {
    # DeepSeek-V2-Lite: softmax greedy, plain q_proj, YaRN with mscale = mscale_all_dim = 0.707, two shared experts.
    "v2_lite": TinySpec(
        _config(
            "deepseek_v2",
            "v2_lite",
            scoring_func="softmax",
            topk_method="greedy",
            norm_topk_prob=False,
            routed_scaling_factor=1.0,
            rope_theta=100.0,
            rope_scaling=_yarn(40, 32, 32, 1, 0.707, 0.707),
            max_position_embeddings=1280,
            vocab_size=307,
        ),
        rotary_buffers=True,
        extra_config=_LEGACY_NOISE,
    ),
    # DeepSeek-V2: group_limited_greedy with scale 16, q-LoRA; mscale != mscale_all_dim, so the rope factor A is not 1.
    "v2_grouped": TinySpec(
        _config(
            "deepseek_v2",
            "v2_grouped",
            n_group=4,
            topk_group=2,
            scoring_func="softmax",
            topk_method="group_limited_greedy",
            norm_topk_prob=False,
            routed_scaling_factor=16.0,
            rope_theta=200.0,
            rope_scaling=_yarn(40, 48, 8, 1, 1.0, 0.707),
            max_position_embeddings=1920,
            vocab_size=300,
        ),
        style="new",
        n_shards=3,
    ),
    # DeepSeek-V3: grouped noaux_tc, YaRN, q-LoRA, one MTP layer that repeats embedding and head.
    "v3": TinySpec(
        _config(
            "deepseek_v3",
            "v3",
            n_group=4,
            topk_group=2,
            routed_scaling_factor=2.5,
            rope_theta=300.0,
            rope_scaling=_yarn(40, 32, 4, 1, 1.0, 1.0),
            max_position_embeddings=1280,
            num_nextn_predict_layers=1,
            vocab_size=311,
            **_NOAUX,
        ),
        n_shards=2,
        mtp_copies=True,
        extra_config=_LEGACY_NOISE,
    ),
    # Moonlight: deepseek_v3 without q-LoRA, groups or YaRN; eps 1e-5 (the latent norms keep 1e-6).
    "moonlight": TinySpec(
        _config(
            "deepseek_v3",
            "moonlight",
            routed_scaling_factor=2.446,
            rms_norm_eps=1e-5,
            rope_theta=50000.0,
            max_position_embeddings=256,
            vocab_size=299,
            **_NOAUX,
        ),
        bias_dtype="",
        generation_eos=(267,),
        extra_config=_LEGACY_NOISE,
    ),
    # GigaChat3: FP8 in real 128 x 128 blocks, kv_b heads of 128 + 192 = 320 rows (2.5 blocks), MTP.
    "gigachat3": TinySpec(
        _config(
            "deepseek_v3",
            "gigachat3",
            num_hidden_layers=2,
            routed_scaling_factor=2.5,
            rope_theta=100000.0,
            rope_scaling=_yarn(16, 40, 32, 1, 1.0, 1.0),
            max_position_embeddings=640,
            num_nextn_predict_layers=1,
            vocab_size=290,
            **_NOAUX,
        ),
        dtype="fp8",
        style="new",
        mtp_copies=True,
    ),
    # Kimi-K2: kimi_k2, YaRN with both betas 1 (a step in the frequencies), eos in two files, no groups.
    "kimi_k2": TinySpec(
        _config(
            "kimi_k2",
            "kimi_k2",
            routed_scaling_factor=2.827,
            rope_theta=50000.0,
            rope_scaling=_yarn(64, 32, 1, 1, 1.0, 1.0),
            max_position_embeddings=2048,
            vocab_size=305,
            **_NOAUX,
        ),
        dtype="int4",
        generation_eos=(267,),
        extra_config=_LEGACY_NOISE,
    ),
    # GLM-4.7-Flash: nope and value widths differ, eps 1e-5, MTP without copies, three eos ids, no bos.
    "glm4_moe_lite": TinySpec(
        _config(
            "glm4_moe_lite",
            "glm4_moe_lite",
            routed_scaling_factor=1.8,
            rms_norm_eps=1e-5,
            rope_theta=1000000.0,
            max_position_embeddings=512,
            num_nextn_predict_layers=1,
            vocab_size=302,
            bos_token_id=None,
            eos_token_id=[266, 268, 269],
            **_NOAUX,
        ),
        style="new",
    ),
    # Kanana-2: deepseek_v3 without q-LoRA, with 128 experts.
    "kanana2": TinySpec(
        _config(
            "deepseek_v3",
            "kanana2",
            routed_scaling_factor=2.5,
            rope_theta=10000.0,
            max_position_embeddings=256,
            vocab_size=298,
            **_NOAUX,
        ),
        extra_config=_LEGACY_NOISE,
    ),
    # sarvam-105b: V3 under names of its own, YaRN as "deepseek_yarn", no MTP, no q-LoRA.
    "sarvam": TinySpec(
        _config(
            "sarvam_mla",
            "sarvam",
            routed_scaling_factor=2.5,
            rope_theta=10000.0,
            rope_scaling=_yarn(40, 32, 32, 1, 1.0, 1.0),
            max_position_embeddings=1280,
            vocab_size=303,
            **_NOAUX,
        )
    ),
    # Mistral Small 4: softmax, greedy and normalised, queries that grow by position, one FP8 scale for a tensor.
    "mistral4": TinySpec(
        _config(
            "mistral4",
            "mistral4",
            first_k_dense_replace=0,
            scoring_func="softmax",
            topk_method="greedy",
            norm_topk_prob=True,
            routed_scaling_factor=1.0,
            rope_theta=100.0,
            rope_scaling=_yarn(128, 32, 32, 1, 1.0, 1.0) | {"llama_4_scaling_beta": 0.2},
            max_position_embeddings=4096,
            vocab_size=303,
        ),
        dtype="fp8",
        style="new",
        fp8_block=None,
        fused_experts=True,
    ),
    # A.X-K1: V3 with a norm behind the experts, whose weight dense layers have too; no bias in the files.
    "axk1": TinySpec(
        _config(
            "axk1",
            "axk1",
            n_group=8,
            topk_group=4,
            routed_scaling_factor=2.5,
            rope_theta=10000.0,
            rope_scaling=_yarn(32, 32, 32, 1, 1.0, 1.0),
            max_position_embeddings=1024,
            eos_token_id=265,
            vocab_size=304,
            **_NOAUX,
        ),
        style="new",
        bias_dtype="none",
    ),
    # Youtu-LLM: dense, the head is the embedding.
    "youtu": TinySpec(
        _config(
            "youtu",
            "youtu",
            first_k_dense_replace=3,
            rope_theta=1600000.0,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            vocab_size=301,
        ),
        style="new",
    ),
    # MiniCPM3: dense and tied, half-split rope with a factor for each frequency, three factors of its own.
    "minicpm3": TinySpec(
        _config(
            "minicpm3",
            "minicpm3",
            first_k_dense_replace=3,
            rms_norm_eps=1e-5,
            rope_scaling={
                "type": "longrope",
                "original_max_position_embeddings": 256,
                "short_factor": [1.06, 1.12, 1.54, 4.9, 13.1, 16.9],
                "long_factor": [1.06, 1.12, 1.54, 4.9, 13.1, 16.9],
            },
            max_position_embeddings=512,
            tie_word_embeddings=True,
            eos_token_id=[266, 268],
            vocab_size=306,
            scale_emb=1.6,
            scale_depth=1.4,
            dim_model_base=21,
        )
    ),
}
OWN_NAMES = {"sarvam_mla": {"n_routed_experts": "num_experts", "n_shared_experts": "num_shared_experts"}}
_ARCHITECTURES = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "glm4_moe_lite": "Glm4MoeLiteForCausalLM",
    "sarvam_mla": "SarvamMLAForCausalLM",
    "mistral4": "Mistral4ForCausalLM",
    "axk1": "AXK1ForCausalLM",
    "youtu": "YoutuForCausalLM",
    "minicpm3": "MiniCPM3ForCausalLM",
}
_TORCH_DTYPE = {"f32": "float32", "f16": "float16"}  # fp8 and int4 checkpoints keep the rest in bfloat16

# ---- numbers from nothing -------------------------------------------------------------------------------------------


def _hash(seed: int, name: str, n: int) -> Array:
    """SplitMix64 of (seed, name, 0..n-1): [n] uint64, integer arithmetic only."""
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little")
    z = (np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniform(seed: int, name: str, n: int) -> Array:
    """[n] f64 in [-1, 1), multiples of 2^-52."""
    return (_hash(seed, name, n) >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0


def normal(seed: int, name: str, n: int) -> Array:
    """[n] f64 with mean 0 and variance 1: the sum of four 16-bit uniforms, exact before the last multiplication."""
    z = _hash(seed, name, n)
    parts = (z & np.uint64(0xFFFF)) + ((z >> np.uint64(16)) & np.uint64(0xFFFF))
    parts += ((z >> np.uint64(32)) & np.uint64(0xFFFF)) + (z >> np.uint64(48))
    return (parts.astype(np.float64) - 131070.0) * (1.7320508075688772 / 65536.0)


def token_ids(vocab: int, n: int, seed: int = 0) -> Array:
    """[n] int32 random token ids in 0..vocab-1."""
    return (_hash(seed, "token_ids", n) % np.uint64(vocab)).astype(np.int32)


# ---- storage dtypes -------------------------------------------------------------------------------------------------


def bf16_bits(x: Array) -> Array:
    """f32 -> uint16 bf16 codes, nearest even (finite input)."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def bf16_value(bits: Array) -> Array:
    """uint16 bf16 codes -> f32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def e4m3_table() -> Array:
    """[256] f64 values of the e4m3fn codes; 0x7F and 0xFF are NaN."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    value[(code & 0x7F) == 0x7F] = np.nan
    return np.where(code >= 128, -value, value)


def e4m3_bits(x: Array) -> Array:
    """f64 -> uint8 e4m3fn codes, nearest, ties to even, saturating at 448."""
    mag = np.minimum(np.abs(x), 448.0)
    exponent = np.frexp(np.maximum(mag, 2.0**-6))[1] - 1  # of eight times the step between codes
    code = np.rint(np.ldexp(mag, 3 - exponent)).astype(np.int64) + 8 * (exponent + 6)
    return (code | np.where(np.signbit(x), 128, 0)).astype(np.uint8)


def quantise_fp8(w: Array, block: tuple[int, int]) -> tuple[Array, Array]:
    """w [o, i] -> (codes uint8 [o, i], weight_scale_inv f32 [ceil(o/block[0]), ceil(i/block[1])])."""
    o, i = w.shape
    grid = (-(-o // block[0]), -(-i // block[1]))
    scale = np.empty(grid, np.float32)
    codes = np.empty((o, i), np.uint8)
    for a in range(grid[0]):
        for b in range(grid[1]):
            rows, cols = slice(a * block[0], (a + 1) * block[0]), slice(b * block[1], (b + 1) * block[1])
            scale[a, b] = np.float32(np.abs(w[rows, cols]).max() / 448.0)
            codes[rows, cols] = e4m3_bits(w[rows, cols] / np.float64(scale[a, b]))
    return codes, scale


def quantise_int4(w: Array) -> tuple[Array, Array]:
    """w [o, i], i % 32 == 0 -> (weight_packed int32 [o, i/8] low nibble first, code + 8; scale bf16 bits [o, i/32])."""
    o, i = w.shape
    if i % 32:
        raise ValueError(f"int4 groups need a width that is a multiple of 32, found {i}")
    groups = w.reshape(o, i // 32, 32)
    scale = bf16_bits((np.abs(groups).max(-1) / 7.5).astype(np.float32))
    codes = np.clip(np.rint(groups / bf16_value(scale)[..., None].astype(np.float64)), -8, 7).reshape(o, i // 8, 8) + 8
    packed = np.bitwise_or.reduce(codes.astype(np.uint32) << (4 * np.arange(8, dtype=np.uint32)), axis=-1)
    return packed.view(np.int32), scale


# A stored tensor: (safetensors dtype, shape, little-endian bytes)
Stored = tuple[str, tuple[int, ...], bytes]


def _store(x: Array, dtype: str) -> Stored:
    if dtype == "bf16":
        return "BF16", x.shape, bf16_bits(x).astype("<u2").tobytes()
    name, kind = {"f16": ("F16", "<f2"), "f32": ("F32", "<f4")}[dtype]
    return name, x.shape, np.ascontiguousarray(x).astype(kind).tobytes()


def write_safetensors(path: Path, tensors: Mapping[str, Stored], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file: 8-byte header length, JSON header padded with spaces to a multiple of 8, raw data."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for _, _, data in tensors.values():
            f.write(data)


def rewrite(folder: Path, change: Callable[[dict[str, Stored]], Any], file: str = "model.safetensors") -> Path:
    """Applies ``change`` to the stored tensors {name: (dtype, shape, bytes)} of one of a checkpoint's files."""
    path = folder / file
    blob = path.read_bytes()
    n = 8 + int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8:n])
    header.pop("__metadata__", None)
    places = {name: (e["dtype"], tuple(e["shape"]), e["data_offsets"]) for name, e in header.items()}
    tensors = {name: (dtype, shape, blob[n + at[0] : n + at[1]]) for name, (dtype, shape, at) in places.items()}
    change(tensors)
    write_safetensors(path, tensors)
    return folder


def fuse_experts(tensors: dict[str, Stored]) -> None:
    """Experts as ``save_pretrained(save_original_format=False)`` of transformers 5 writes them."""
    layers = sorted({n.partition(".experts.")[0] for n in tensors if ".mlp.experts." in n})
    for p, suffix in ((p + ".experts.", s) for p in layers for s in ("", "_scale_inv")):
        n = len({name.split(".")[5] for name in tensors if name.startswith(p) and name.split(".")[5].isdigit()})
        for target, parts in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
            names = [f"{p}{e}.{part}_proj.weight{suffix}" for e in range(n) for part in parts]
            if names and names[0] in tensors:
                kind, (rows, cols), _ = tensors[names[0]]
                data = b"".join(tensors[name][2] for name in names)
                tensors[p + target + suffix] = (kind, (n, len(parts) * rows, cols), data)
    for name in [n for n in tensors if ".experts." in n and n.split(".")[5].isdigit()]:
        del tensors[name]


# ---- the tensors of a checkpoint ------------------------------------------------------------------------------------


def tensor_shapes(cfg: Mapping[str, Any], mtp_copies: bool = False) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every unquantised tensor of an old-style config, in file order (docs/model.md 2)."""
    d, heads, r = cfg["hidden_size"], cfg["num_attention_heads"], cfg["kv_lora_rank"]
    dn, dr, dv = cfg["qk_nope_head_dim"], cfg["qk_rope_head_dim"], cfg["v_head_dim"]
    n_layers = cfg["num_hidden_layers"]

    def mlp(prefix: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{prefix}.gate_proj.weight", (width, d)
        yield f"{prefix}.up_proj.weight", (width, d)
        yield f"{prefix}.down_proj.weight", (d, width)

    yield "model.embed_tokens.weight", (cfg["vocab_size"], d)
    for layer in range(n_layers + cfg["num_nextn_predict_layers"]):
        p = f"model.layers.{layer}"
        if layer >= n_layers:
            if mtp_copies:
                yield f"{p}.embed_tokens.weight", (cfg["vocab_size"], d)
                yield f"{p}.shared_head.head.weight", (cfg["vocab_size"], d)
            yield f"{p}.enorm.weight", (d,)
            yield f"{p}.hnorm.weight", (d,)
            yield f"{p}.eh_proj.weight", (d, 2 * d)
            yield f"{p}.shared_head.norm.weight", (d,)
        yield f"{p}.input_layernorm.weight", (d,)
        if cfg["q_lora_rank"]:
            yield f"{p}.self_attn.q_a_proj.weight", (cfg["q_lora_rank"], d)
            yield f"{p}.self_attn.q_a_layernorm.weight", (cfg["q_lora_rank"],)
            yield f"{p}.self_attn.q_b_proj.weight", (heads * (dn + dr), cfg["q_lora_rank"])
        else:
            yield f"{p}.self_attn.q_proj.weight", (heads * (dn + dr), d)
        yield f"{p}.self_attn.kv_a_proj_with_mqa.weight", (r + dr, d)
        yield f"{p}.self_attn.kv_a_layernorm.weight", (r,)
        yield f"{p}.self_attn.kv_b_proj.weight", (heads * (dn + dv), r)
        yield f"{p}.self_attn.o_proj.weight", (d, heads * dv)
        yield f"{p}.post_attention_layernorm.weight", (d,)
        if cfg["model_type"] == "axk1":
            yield f"{p}.post_mlp_layernorm.weight", (d,)
        if layer < cfg["first_k_dense_replace"] or not cfg["n_routed_experts"]:
            yield from mlp(f"{p}.mlp", cfg["intermediate_size"])
            continue
        yield f"{p}.mlp.gate.weight", (cfg["n_routed_experts"], d)
        if cfg["topk_method"] == "noaux_tc":
            yield f"{p}.mlp.gate.e_score_correction_bias", (cfg["n_routed_experts"],)
        for x in range(cfg["n_routed_experts"]):
            yield from mlp(f"{p}.mlp.experts.{x}", cfg["moe_intermediate_size"])
        if cfg["n_shared_experts"]:
            yield from mlp(f"{p}.mlp.shared_experts", cfg["n_shared_experts"] * cfg["moe_intermediate_size"])
    yield "model.norm.weight", (d,)
    if not cfg["tie_word_embeddings"]:
        yield "lm_head.weight", (cfg["vocab_size"], d)


def _values(cfg: Mapping[str, Any], seed: int, name: str, shape: tuple[int, ...]) -> Array:
    """f64 values of one tensor before it is stored. Linear maps keep a unit-variance input near unit variance."""
    n = int(np.prod(shape))
    mtp = f"model.layers.{cfg['num_hidden_layers']}."
    copies = {
        mtp + "embed_tokens.weight": "model.embed_tokens.weight",
        mtp + "shared_head.head.weight": "lm_head.weight",
    }
    name = copies.get(name, name)
    if name.endswith("norm.weight"):
        return (1.0 + 0.3 * uniform(seed, name, n)).reshape(shape)
    if name.endswith("e_score_correction_bias"):
        return (0.3 * uniform(seed, name, n)).reshape(shape)
    gain = 1.0
    if name == "lm_head.weight":
        gain = 1.5
    elif name.endswith("down_proj.weight"):
        # silu(g) * u of unit-variance g, u has a second moment of 0.36; a routed sum should weigh like the shared one
        gain = 1.6 / (cfg["routed_scaling_factor"] if ".experts." in name else 1.0) ** 0.5
    elif name.endswith("mlp.gate.weight"):
        gain = 1.3
    fan_in = shape[-1]
    if name == "model.embed_tokens.weight":
        logit_scale = (cfg.get("dim_model_base") or shape[-1]) / shape[-1]
        gain, fan_in = (1.5 / logit_scale, shape[-1]) if cfg["tie_word_embeddings"] else (0.1, 1)
    w = normal(seed, name, n).reshape(shape) * (gain / float(fan_in) ** 0.5)
    # Small inputs to the norms of embedding and latents: there a wrong eps (1e-5 for 1e-6) shows in the logits.
    if name.endswith("q_a_proj.weight"):
        w *= 0.1
    elif name.endswith("kv_a_proj_with_mqa.weight"):
        w[: cfg["kv_lora_rank"]] *= 0.1
    return w


_MADE: dict[str, dict[str, Stored]] = {}  # the last 16 checkpoints: tests write the same ones again and again


def checkpoint_tensors(spec: TinySpec, cfg: Mapping[str, Any], dtype: str, seed: int) -> dict[str, Stored]:
    """Every stored tensor of a checkpoint, quantised as the real ones are (docs/model.md 2.3, 2.4)."""
    key = repr((spec, cfg, dtype, seed))
    _MADE[key] = _MADE.pop(key, None) or _make_tensors(spec, cfg, dtype, seed)
    if len(_MADE) > 16:
        del _MADE[next(iter(_MADE))]
    return dict(_MADE[key])


def _make_tensors(spec: TinySpec, cfg: Mapping[str, Any], dtype: str, seed: int) -> dict[str, Stored]:
    plain = dtype if dtype in ("f32", "f16") else "bf16"
    out: dict[str, Stored] = {}
    for name, shape in tensor_shapes(cfg, spec.mtp_copies):
        w = _values(cfg, seed, name, shape)
        base = name.removesuffix(".weight")
        linear = (base.endswith("_proj") and not base.endswith("eh_proj")) or base.endswith("kv_a_proj_with_mqa")
        if dtype == "fp8" and linear:
            codes, scale = quantise_fp8(w, spec.fp8_block or shape)
            out[name] = ("F8_E4M3", shape, codes.tobytes())
            grid = scale.shape if spec.fp8_block or ".mlp.experts." in name else ()
            out[name + "_scale_inv"] = ("F32", grid, scale.astype("<f4").tobytes())
        elif dtype == "int4" and ".mlp.experts." in name:
            packed, scale = quantise_int4(w)
            out[base + ".weight_packed"] = ("I32", packed.shape, packed.astype("<i4").tobytes())
            out[base + ".weight_scale"] = ("BF16", scale.shape, scale.astype("<u2").tobytes())
            out[base + ".weight_shape"] = ("I64", (2,), np.array(shape, "<i8").tobytes())
        elif name.endswith("e_score_correction_bias") and spec.bias_dtype == "none":
            continue
        elif name.endswith("e_score_correction_bias"):
            out[name] = _store(w, spec.bias_dtype or plain)
        else:
            out[name] = _store(w, plain)
    if dtype == "fp8" and not spec.fp8_block:
        for name in [n for n in out if n.endswith(".weight_scale_inv") and ".experts." not in n]:
            out[name.replace("weight_scale_inv", "activation_scale")] = _store(np.array(0.01), "f32")
    if spec.fused_experts:
        fuse_experts(out)
    if spec.rotary_buffers:
        for layer in range(cfg["num_hidden_layers"]):
            half = np.ones(cfg["qk_rope_head_dim"] // 2)
            out[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = _store(half, "f32")
    return out


# ---- the files beside them ------------------------------------------------------------------------------------------


def config_json(spec: TinySpec, cfg: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """config.json as the original authors write it ("old") or as transformers >= 5 exports it ("new")."""
    out: dict[str, Any] = {"architectures": [_ARCHITECTURES[cfg["model_type"]]], "hidden_act": "silu"}
    out |= {"num_key_value_heads": cfg["num_attention_heads"], "attention_bias": False, "use_cache": True, **cfg}
    out |= spec.extra_config
    if not cfg["n_routed_experts"] and cfg["model_type"] in ("youtu", "minicpm3"):
        for key in (*_SIZE_KEYS[8:], "first_k_dense_replace", "n_group", "topk_group", "num_nextn_predict_layers"):
            del out[key]
    if cfg["model_type"] == "minicpm3" and spec.style == "old":
        del out["v_head_dim"], out["rope_theta"]  # hidden_size / num_attention_heads, 10000
    torch_dtype = _TORCH_DTYPE.get(dtype, "bfloat16")
    if spec.style == "old":
        out["torch_dtype"] = torch_dtype
        if cfg["model_type"] == "sarvam_mla":
            out = {OWN_NAMES["sarvam_mla"].get(key, key): value for key, value in out.items()}
            out |= {"head_dim": cfg["kv_lora_rank"] + cfg["qk_rope_head_dim"]}
            out |= {"q_head_dim": cfg["qk_nope_head_dim"] + cfg["qk_rope_head_dim"]}
            out["rope_scaling"] = {**out["rope_scaling"], "type": "deepseek_yarn"}
    else:
        scaling = dict(out.pop("rope_scaling") or {})
        kind = scaling.pop("type", "default")
        out["rope_parameters"] = {"rope_type": kind, "rope_theta": out.pop("rope_theta"), **scaling}
        out |= {
            "dtype": torch_dtype,
            "head_dim": cfg["qk_rope_head_dim"],
            "rope_interleave": cfg["model_type"] != "minicpm3",
        }
        if cfg["model_type"] == "mistral4":
            out["head_dim"] += cfg["qk_nope_head_dim"]
            partial = cfg["qk_rope_head_dim"] / out["head_dim"]
            more = {"max_position_embeddings": cfg["max_position_embeddings"], "partial_rotary_factor": partial}
            out["rope_parameters"] |= {"type": kind, **more}
        out.pop("scoring_func", None)  # transformers writes neither: the default comes from model_type
        if cfg["model_type"] == "deepseek_v2":
            out |= {"n_group": cfg["n_group"] if cfg["n_group"] > 1 else None, "mlp_bias": False}
        else:
            out.pop("topk_method", None)
        if cfg["model_type"] in ("glm4_moe_lite", "axk1"):
            dense = out.pop("first_k_dense_replace")
            out["mlp_layer_types"] = ["dense"] * dense + ["sparse"] * (cfg["num_hidden_layers"] - dense)
    if dtype == "fp8":
        out["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic" if spec.fp8_block else "static",
            "weight_block_size": list(spec.fp8_block) if spec.fp8_block else None,
        }
    elif dtype == "int4":
        weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
        out["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
            "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|down)_proj.*"],
            "kv_cache_scheme": None,
        }
    return out


SPECIALS = ("<bos>", "<eos>", "<|im_end|>", "<|user|>", "<|observation|>", "<|assistant|>", "<think>", "</think>")
MERGES = (("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("e", "r"), ("o", "n"), ("Ġ", "a"), ("o", "u"), ("Ġ", "t"))
FIRST_SPECIAL = 256 + len(MERGES)  # 265: ids 0..255 are the bytes, then the merged pairs, then SPECIALS
N_TOKENS = FIRST_SPECIAL + len(SPECIALS)  # 273; every preset's vocab_size is larger (padding rows)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}{{ '<|user|>' + m['content'] }}"
    "{% else %}{{ '<|assistant|>' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def byte_alphabet() -> list[str]:
    """[256] the GPT-2 character of each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    chars = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}
    return [chars[b] for b in range(256)]


def write_tokenizer(path: Path) -> None:
    """tokenizer.json: byte-level BPE with the alphabet, nine merges and the specials; the id of a byte is that byte."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {c: i for i, c in enumerate(byte_alphabet())}
    vocab |= {a + b: 256 + i for i, (a, b) in enumerate(MERGES)}
    vocab |= {text: FIRST_SPECIAL + i for i, text in enumerate(SPECIALS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    tokenizer.save(str(path))


def write_tiktoken(path: Path) -> None:
    """tiktoken.model, the same tokens as "base64 rank" lines; the specials are in tokenizer_config.json."""
    back = {c: b for b, c in enumerate(byte_alphabet())}
    tokens = [bytes([b]) for b in range(256)] + [bytes(back[c] for c in a + b) for a, b in MERGES]
    path.write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens)))


def write(directory: Path | str, preset: str, *, dtype: str | None = None, seed: int = 0, **overrides: Any) -> Path:
    """Writes the checkpoint of ``preset`` into ``directory`` (created) and returns it.

    dtype: "bf16" | "f16" | "f32" | "fp8" (linear layers e4m3 in blocks, the rest bf16) | "int4" (routed experts as
    compressed-tensors, the rest bf16; needs hidden_size and moe_intermediate_size that are multiples of 32); None: the
    preset's own. overrides: keys of the preset's config, or fields of TinySpec (style, n_shards, tokenizer, ...).
    """
    spec = PRESETS[preset]
    options = {f.name: overrides.pop(f.name) for f in dataclasses.fields(spec) if f.name in overrides}
    spec = dataclasses.replace(spec, **options)
    unknown = sorted(set(overrides) - set(spec.config))
    if unknown:
        raise TypeError(f"no such key in the config of {preset}: {', '.join(unknown)}")
    cfg = {**spec.config, **overrides}
    dtype = dtype or spec.dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
    out = Path(directory)
    out.mkdir(parents=True, exist_ok=True)

    (out / "config.json").write_text(json.dumps(config_json(spec, cfg, dtype), indent=2) + "\n")
    eos = cfg["eos_token_id"] if isinstance(cfg["eos_token_id"], list) else [cfg["eos_token_id"]]
    generation_eos = sorted({*eos, *spec.generation_eos})
    generation = {"eos_token_id": generation_eos if len(generation_eos) > 1 else generation_eos[0]}
    if cfg["bos_token_id"] is not None:
        generation["bos_token_id"] = cfg["bos_token_id"]
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")

    tokenizer_config: dict[str, Any] = {
        "bos_token": None if cfg["bos_token_id"] is None else SPECIALS[cfg["bos_token_id"] - FIRST_SPECIAL],
        "eos_token": SPECIALS[eos[0] - FIRST_SPECIAL],
        "added_tokens_decoder": {
            str(FIRST_SPECIAL + i): {"content": t, "special": True, "normalized": False} for i, t in enumerate(SPECIALS)
        },
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    template = CHAT_TEMPLATE if cfg["bos_token_id"] is not None else CHAT_TEMPLATE.removeprefix("{{ bos_token }}")
    if spec.style == "new":
        (out / "chat_template.jinja").write_text(template)
    else:
        tokenizer_config["chat_template"] = template
    if spec.tokenizer == "hf":
        write_tokenizer(out / "tokenizer.json")
    elif spec.tokenizer == "tiktoken":
        write_tiktoken(out / "tiktoken.model")
        tokenizer_config["tokenizer_class"] = "TikTokenTokenizer"
    if spec.tokenizer != "none":
        (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2, ensure_ascii=False) + "\n")

    tensors = checkpoint_tensors(spec, cfg, dtype, seed)
    if spec.n_shards == 1:
        write_safetensors(out / "model.safetensors", tensors, {"format": "pt"})
        return out
    names = sorted(tensors)  # like real shards: names out of layer order, a tensor and its scale may be in two files
    weight_map = {}
    for i in range(spec.n_shards):
        shard = names[i * len(names) // spec.n_shards : (i + 1) * len(names) // spec.n_shards]
        file = f"model-{i + 1:05d}-of-{spec.n_shards:05d}.safetensors"
        write_safetensors(out / file, {n: tensors[n] for n in shard}, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(len(t[2]) for t in tensors.values())}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return out


def digest(directory: Path) -> str:
    """SHA-256 of config.json and every safetensors file: whether a checkpoint was regenerated bit for bit."""
    h = hashlib.sha256()
    for path in [*sorted(directory.glob("*.safetensors")), directory / "config.json"]:
        h.update(path.name.encode() + b"\0" + path.read_bytes())
    return h.hexdigest()
