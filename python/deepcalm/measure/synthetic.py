"""Packed models of a real model's exact geometry with seeded random weights, written directly, no checkpoint between.

For measuring speed and memory on shapes that cannot be shipped: the text that such a model writes is noise, but
activations stay in range (logit standard deviation about 2) and tokens spread over the experts. The same name, options
and seed give the same bytes.

Values are not drawn one by one: units of random codes, a prime number of them so that rows never line up, are made once
per format, mean and standard deviation and repeated, each tensor from its own hashed offset: writing runs at the disk's
speed, in less than 100 MB. tools/make_synthetic.py and tools/gguf_synthetic.py write the same models in other forms.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from .. import _core
from ..errors import ResourceError, UnsupportedError
from ..files.config import normalise
from ..files.pack import file_header, lay_out, slabs, write_at
from ..files.packed import SCALE_OF, TILE_COLS, TILE_ROWS, Tensor
from ..files.plan import Plan, draft_head_key
from ..files.plan import dtypes as plan_dtypes
from ..files.safetensors import whole_file

Config = dict[str, Any]
U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

TILE = TILE_ROWS * TILE_COLS
UNITS = {1: 2**21 - 9, 32: 65521, TILE: 4093}  # values of a unit -> units of a block, a prime: 2 to 8 MB
FLOATS = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
Q8_DEVIATION, Q4_DEVIATION, F8_DEVIATION = 42.0, 2.4, 96.0  # standard deviations of the codes: almost none saturate

_COMMON: Config = {
    "attention_bias": False, "hidden_act": "silu", "initializer_range": 0.02, "moe_layer_freq": 1,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
}  # fmt: skip
_V3_ROUTER: Config = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True}
_YARN: Config = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
                 "beta_slow": 1}  # fmt: skip
_MINICPM3_FACTORS = [
    1.0591234137867171, 1.1241891283591912, 1.2596935748670968, 1.5380380402321725, 2.093982484148734,
    3.1446935121267696, 4.937952647693647, 7.524541999994549, 10.475458000005451, 13.062047352306353,
    14.85530648787323, 15.906017515851266, 16.461961959767827, 16.740306425132907, 16.87581087164081,
    16.940876586213285,
]  # fmt: skip

# name -> (config.json, number of tokenizer entries; the rows above it are padding)
PRESETS: dict[str, tuple[Config, int]] = {
    "v2-lite": ({
        **_COMMON, "model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"],
        "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
        "q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 64, "num_experts_per_tok": 6,
        "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "topk_method": "greedy",
        "scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 1.0, "rms_norm_eps": 1e-6,
        "rope_theta": 10000, "rope_scaling": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        "max_position_embeddings": 163840, "vocab_size": 102400, "bos_token_id": 100000, "eos_token_id": 100001,
    }, 100002),
    "v3": ({
        **_COMMON, **_V3_ROUTER, "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"],
        "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128,
        "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256, "num_experts_per_tok": 8,
        "n_shared_experts": 1, "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5,
        "rms_norm_eps": 1e-6, "rope_theta": 10000, "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        "max_position_embeddings": 163840, "num_nextn_predict_layers": 1, "vocab_size": 129280,
        "bos_token_id": 0, "eos_token_id": 1,
    }, 128815),
    "moonlight": ({
        **_COMMON, **_V3_ROUTER, "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"],
        "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
        "q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "intermediate_size": 11264, "moe_intermediate_size": 1408, "n_routed_experts": 64, "num_experts_per_tok": 6,
        "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
        "routed_scaling_factor": 2.446, "rms_norm_eps": 1e-5, "rope_theta": 50000.0, "rope_scaling": None,
        "max_position_embeddings": 8192, "num_nextn_predict_layers": 0, "vocab_size": 163840,
        "bos_token_id": 163584, "eos_token_id": 163586,
    }, 163840),
    "glm-4.7-flash": ({
        **_COMMON, "model_type": "glm4_moe_lite", "architectures": ["Glm4MoeLiteForCausalLM"],
        "hidden_size": 2048, "num_hidden_layers": 47, "num_attention_heads": 20, "num_key_value_heads": 20,
        "q_lora_rank": 768, "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256,
        "intermediate_size": 10240, "moe_intermediate_size": 1536, "n_routed_experts": 64, "num_experts_per_tok": 4,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "topk_method": "noaux_tc",
        "norm_topk_prob": True, "routed_scaling_factor": 1.8, "rms_norm_eps": 1e-5, "rope_theta": 1000000,
        "rope_scaling": None, "max_position_embeddings": 202752, "num_nextn_predict_layers": 1, "vocab_size": 154880,
        "eos_token_id": [154820, 154827, 154829], "pad_token_id": 154820,
    }, 154856),
    "mistral-small-4": ({
        **_COMMON, "model_type": "mistral4", "architectures": ["Mistral4ForCausalLM"],
        "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 32,
        "q_lora_rank": 1024, "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "intermediate_size": 12288, "moe_intermediate_size": 2048, "n_routed_experts": 128, "num_experts_per_tok": 4,
        "n_shared_experts": 1, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
        "routed_scaling_factor": 1.0, "rms_norm_eps": 1e-6, "rope_theta": 10000, "rope_scaling": {
            **_YARN, "factor": 128, "original_max_position_embeddings": 8192, "mscale": 1.0, "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1},
        "max_position_embeddings": 1048576, "vocab_size": 131072, "bos_token_id": 1, "eos_token_id": 2,
    }, 131072),
    "a.x-k1": ({
        **_COMMON, **_V3_ROUTER, "model_type": "axk1", "architectures": ["AXK1ForCausalLM"],
        "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 64, "num_key_value_heads": 64,
        "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 192, "num_experts_per_tok": 8,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5,
        "rms_norm_eps": 1e-6, "rope_theta": 10000, "rope_scaling": None, "max_position_embeddings": 32768,
        "vocab_size": 163840, "bos_token_id": 163691, "eos_token_id": 163691,
    }, 163840),
    "youtu-2b": ({
        **_COMMON, "model_type": "youtu", "architectures": ["YoutuForCausalLM"], "tie_word_embeddings": True,
        "hidden_size": 2048, "num_hidden_layers": 32, "num_attention_heads": 16, "num_key_value_heads": 16,
        "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "intermediate_size": 6144, "rms_norm_eps": 1e-6, "rope_theta": 1600000, "rope_scaling": None,
        "max_position_embeddings": 131072, "vocab_size": 128256, "bos_token_id": 128000, "eos_token_id": 128001,
    }, 128256),
    "minicpm3-4b": ({
        **_COMMON, "model_type": "minicpm3", "architectures": ["MiniCPM3ForCausalLM"], "tie_word_embeddings": True,
        "hidden_size": 2560, "num_hidden_layers": 62, "num_attention_heads": 40, "num_key_value_heads": 40,
        "q_lora_rank": 768, "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32,
        "intermediate_size": 6400, "rms_norm_eps": 1e-5, "rope_scaling": {
            "type": "longrope", "original_max_position_embeddings": 32768,
            "short_factor": _MINICPM3_FACTORS, "long_factor": _MINICPM3_FACTORS},
        "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256,
        "max_position_embeddings": 32768, "vocab_size": 73448, "bos_token_id": 1, "eos_token_id": [2, 73440],
    }, 73448),
}  # fmt: skip


def make_config(spec: str, overrides: Sequence[str] = (), mtp: bool = True) -> tuple[Config, int]:
    """(config.json, tokenizer entries) of NAME[:layers] with KEY=JSON overrides; raises ValueError."""
    name, _, layers = spec.partition(":")
    if name not in PRESETS:
        raise ValueError(f"unknown model {name!r}: one of {', '.join(PRESETS)}")
    preset, n_tokens = PRESETS[name]
    config = dict(preset)
    if layers:
        most = config["num_hidden_layers"]
        if not (layers.isascii() and layers.isdigit() and 1 <= int(layers[:9]) <= most):
            raise ValueError(f"{spec}: layers {layers!r}, expected a number 1..{most}, as many as the model has")
        config["num_hidden_layers"] = int(layers)
    for item in overrides:
        key, _, value = item.partition("=")
        if key not in config:
            raise ValueError(f"{item}: no key {key!r} in the config of {name}")
        try:
            config[key] = json.loads(value)
        except ValueError:
            raise ValueError(f"{item}: {value!r} is not JSON") from None
    if not mtp:
        config["num_nextn_predict_layers"] = 0
    return config, min(n_tokens, config["vocab_size"])


def make_tokenizer(config: Config, n_tokens: int) -> tuple[str, Config]:
    """(tokenizer.json, tokenizer_config.json) of a byte-level BPE without merges.

    Text becomes bytes, and every id has text of its own to decode to.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    eos = config["eos_token_id"]
    special = {i: f"<|eos_{i}|>" for i in (eos if isinstance(eos, list) else [eos])}
    if config.get("bos_token_id") is not None:
        special[config["bos_token_id"]] = "<|bos|>"
    special = {i: text for i, text in special.items() if i < n_tokens}
    letters = iter(sorted(pre_tokenizers.ByteLevel.alphabet()))
    vocab = {special.get(i) or next(letters, f"\u0120{i}"): i for i in range(n_tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special.values()])
    bos = special.get(config.get("bos_token_id", -1))
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, config["bos_token_id"])]
        )
    return tokenizer.to_str(), {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": next(iter(special.values()), None),
        "add_bos_token": bos is not None, "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
    }  # fmt: skip


def _stored(spec: dict[str, Any], dtypes: dict[str, str]) -> Tensor:
    """How a tensor of the manifest is stored; as the packer would (plan.py), from a bf16 checkpoint."""
    fmt = dtypes.get(spec["role"], dtypes["all"])
    if fmt not in spec["formats"]:  # norms, router: f32; embedding, eh_proj: 16 bits or more
        fmt = "bf16" if "bf16" in spec["formats"] else "f32"
    block = (128, 128) if fmt == "f8" else None
    if spec["tiled"] and (spec["cols"] % TILE_COLS or any(n % TILE_ROWS for n in (spec["rows"], *spec["parts"]))):
        hint = f": --set vocab_size={-(-spec['rows'] // TILE_ROWS) * TILE_ROWS}" if spec["name"] == "head" else ""
        found = f"tensor {spec['name']}: {spec['rows']} x {spec['cols']}"
        raise UnsupportedError(f"{found}, expected multiples of 16 x 32{hint}")
    return Tensor.of(spec, fmt, SCALE_OF.get(fmt, "") if spec["tiled"] else "", block, "random")


def spread(spec: dict[str, Any], cfg: Config) -> tuple[float, float]:
    """(mean, standard deviation) of an entry of ``_core.expected_tensors``.

    1/sqrt(inputs) keeps a normed vector at 1; what joins the residual stream is divided by sqrt(2 * layers), so that
    the stream grows by about sqrt(2) over the whole depth.
    """
    if spec["role"] in ("norm", "bias", "embed"):
        return {"norm": (1.0, 0.1), "bias": (0.0, 0.02), "embed": (0.0, 1.0)}[spec["role"]]
    leaf = spec["name"].rpartition(".")[2]
    inputs = cfg["kv_lora_rank"] if leaf == "w_uk" else spec["cols"]
    gain = (2 * cfg["num_hidden_layers"]) ** -0.5 if leaf in ("wo", "w_down") else 2.0 if leaf == "head" else 1.0
    return 0.0, float(gain * inputs**-0.5)


class Values:
    """Blocks of random units, made when first needed; few distinct standard deviations exist in a model."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.normal = np.random.default_rng(seed).standard_normal(UNITS[1], dtype=np.float32).clip(-4.5, 4.5)
        self.blocks: dict[tuple[str, int, float, float], U8] = {}

    def encoded(self, fmt: str, x: F32, mean: float, deviation: float) -> U8:
        """Units x [n, values] -> [n, bytes]; q8 and q4: codes as in a tile, in any order, then a scale per 32."""
        codes: npt.NDArray[Any]
        if fmt in FLOATS or fmt == "f8":
            codes = F8_DEVIATION * x if fmt == "f8" else mean + np.float32(deviation) * x
            return codes.astype(FLOATS.get(fmt, ml_dtypes.float8_e4m3fn)).view(np.uint8)
        unit, most = (Q8_DEVIATION, 127) if fmt == "q8" else (Q4_DEVIATION, 7)
        codes = (np.rint(unit * x).clip(-most, most) + most + 1).astype(np.uint8)
        if fmt == "q4":
            codes = codes[:, : x.shape[1] // 2] | codes[:, x.shape[1] // 2 :] << 4
        scale = np.full((len(x), x.shape[1] // 32), deviation / unit, np.float16).view(np.uint8)
        return np.concatenate([codes, scale], 1)

    def pieces(self, name: str, fmt: str, unit: int, spread: tuple[float, float], n_bytes: int) -> Iterator[U8]:
        """The bytes of a tensor in units of so many values, piece after piece, none longer than a block."""
        key = (fmt, unit, *spread)
        if key not in self.blocks:
            self.blocks[key] = self.encoded(fmt, np.resize(self.normal, (UNITS[unit], unit)), *spread)
        block, digest = self.blocks[key], hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=8).digest()
        begin = int.from_bytes(digest, "little") % len(block) * block.shape[1]
        while n_bytes:
            piece = block.reshape(-1)[begin : begin + n_bytes]
            yield piece
            n_bytes, begin = n_bytes - len(piece), 0


def write_model(
    path: str | Path,
    spec: str,
    dtype: str = "q8",
    *,
    attn_dtype: str | None = None,
    head_dtype: str | None = None,
    overrides: Sequence[str] = (),
    seed: int = 0,
    progress: Callable[[int, int], object] | None = None,
    sparse: bool = False,
) -> int:
    """Writes the packed file ``path`` for NAME[:layers] and returns its size in bytes.

    Args:
        spec: a key of ``PRESETS``, with the number of main layers if not all.
        dtype, attn_dtype, head_dtype: as for ``deepcalm.pack`` of a bf16 checkpoint ("source" is bf16).
        overrides: "KEY=JSON" over config.json, for instance "first_k_dense_replace=1".
        progress: called with (bytes written, bytes in all).
        sparse: no weights, only a hole in their place: for a device that draws its own (``Model.open_on``).

    The file appears complete or not at all.

    Raises:
        ValueError: an unknown name or override.
        UnsupportedError: an unknown dtype, or a geometry that is not in whole tiles.
        ConfigError: a configuration that the runtime refuses.
        ResourceError: no room on the disk, or it cannot be written.
    """
    path = Path(path)
    options = plan_dtypes(dtype, attn_dtype, head_dtype, None)
    dtypes = {k.removesuffix("_dtype"): "bf16" if d == "source" else d for k, d in options.items()}
    dtypes["all"] = dtypes.pop("dtype")
    raw, n_tokens = make_config(spec, overrides)
    cfg = normalise(raw, {}, min(raw.get("num_nextn_predict_layers", 0), 1), spec)
    cfg |= draft_head_key(options, cfg)
    spreads, tensors = dict[str, tuple[float, float]](), []
    for entry in _core.expected_tensors(cfg):
        t = _stored(entry, dtypes)
        spreads[t.name] = spread(entry, cfg)
        scale = spreads[t.name][1] / F8_DEVIATION
        spreads[t.name + ".scale"] = (scale, 0.05 * scale)
        tensors.append(t)
    tokenizer, tokenizer_config = make_tokenizer(raw, n_tokens)
    files = {"tokenizer.json": tokenizer.encode(), "tokenizer_config.json": json.dumps(tokenizer_config).encode()}
    source = {"name": f"random weights in the geometry of {spec}", "seed": seed, "options": dtypes}
    plan = Plan(cfg, source | {"overrides": list(overrides)}, [], files)
    tensors += plan.file_tensors()
    total = lay_out(plan, tensors)
    folder = path.resolve().parent
    if (free := shutil.disk_usage(folder).free) < total and not sparse:
        raise ResourceError(f"{folder}: {total / 1e9:.2f} GB, {free / 1e9:.2f} GB are free on that disk")
    values = Values(seed)
    with whole_file(path) as name, name.open("wb", buffering=0) as out:
        os.ftruncate(out.fileno(), total)  # padding is never written: it reads as zeros
        with ThreadPoolExecutor(1, "deepcalm-write") as writer:
            for s in (s for t in tensors for s in t.stored):
                pieces: Iterable[U8] = [np.frombuffer(s.data, np.uint8)] if s.data else []
                if s.kind != "file" and not sparse:
                    unit = TILE if s.kind == "tiled" or s.role == "embed" else 1
                    pieces = values.pieces(s.name, s.format, unit, spreads[s.name], s.nbytes)
                _write(s, pieces, out.fileno(), writer)
                if progress:
                    progress(s.offset + s.container()[2], total)
        write_at(out.fileno(), file_header(plan, tensors), 0)
    return total


def _write(s: Tensor, pieces: Iterable[U8], fd: int, writer: ThreadPoolExecutor) -> None:
    """Writes and hashes a tensor's bytes, one beside the other."""
    sha, at, pending = hashlib.sha256(), s.offset, deque[Future[None]]()
    for piece in slabs(pieces, at):
        pending.append(writer.submit(write_at, fd, piece.data, at))
        sha.update(piece.data)
        at += len(piece)
        while len(pending) > 8:
            pending.popleft().result()
    for write in pending:
        write.result()
    s.sha256 = sha.hexdigest()
