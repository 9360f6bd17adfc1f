"""config.json of a Hugging Face checkpoint -> the normalised configuration (keys of ``runtime/config.h``).

Both styles are read: ``rope_theta`` + ``rope_scaling.type``, and ``rope_parameters`` + ``mlp_layer_types``. A
missing key is an error unless every released code agrees on its default; an unknown value is always an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .. import _core
from ..errors import ConfigError, show

DENSE = ("youtu", "minicpm3")  # no experts; the head is the embedding where config.json says nothing
# model_type -> (scoring_func, topk_method) where config.json does not say (transformers' exports drop both)
SUPPORTED = {
    "deepseek_v2": ("softmax", "greedy"),
    "deepseek_v3": ("sigmoid", "noaux_tc"),
    "kimi_k2": ("sigmoid", "noaux_tc"),
    "glm4_moe_lite": ("sigmoid", "noaux_tc"),
    "sarvam_mla": ("sigmoid", "noaux_tc"),
    "mistral4": ("softmax", "greedy"),
    "axk1": ("sigmoid", "noaux_tc"),
    **dict.fromkeys(DENSE, ("sigmoid", "noaux_tc")),
}
OWN_NAMES = {"sarvam_mla": {"num_experts": "n_routed_experts", "num_shared_experts": "n_shared_experts"}}
ALIASES = {"AXK1": "axk1", "youtu_llm": "youtu"}  # what its authors' own code calls a model_type
NOT_YET = ("deepseek_v32", "deepseek_v4", "longcat_flash")
# Names of a text model's tensors: what stands before "layers." and "embed_tokens.", and the head's. A multimodal
# wrapper's are the authors', or those of transformers' save_pretrained(save_original_format=False).
Layout = tuple[str, str]
PLAIN: tuple[Layout, ...] = (("model.", "lm_head.weight"),)
WRAPPED: tuple[Layout, ...] = (
    ("language_model.model.", "language_model.lm_head.weight"), ("model.language_model.", "lm_head.weight"),
)  # fmt: skip
WRAPPERS = ("kimi_k25", "mistral3")  # model_type of multimodal wrappers
UNCERTAIN = ("kimi_vl", "deepseek_vl_v2")  # wrappers whose layout no released code here settles

_REQUIRED = object()


class _Keys:
    """Typed access to one JSON object; every error names ``where`` and the key."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where

    @staticmethod
    def _name(key: str) -> str:
        """A key for a message; a stranger's own (a name of a group) may hold anything."""
        return key if key.isprintable() and len(key) <= 80 else show(key)

    def refuse(self, key: str, expected: str) -> ConfigError:
        found = show(self.raw[key]) if key in self.raw else "missing"
        return ConfigError(f"{self.where}: {self._name(key)} is {found}, expected {expected}")

    def _value(self, key: str, default: Any, null: Any) -> Any:
        """``default`` when the key is absent, ``null`` when it is null (None: null is refused)."""
        value = self.raw.get(key, default)
        return null if value is None else value

    def integer(self, key: str, default: Any = _REQUIRED, null: int | None = None) -> int:
        value = self._value(key, default, null)
        if type(value) is not int or not 0 <= value < 1 << 31:
            raise self.refuse(key, "an integer in 0..2147483647")
        return value

    def real(self, key: str, default: Any = _REQUIRED, null: float | None = None) -> float:
        value = self._value(key, default, null)
        if type(value) not in (int, float):
            raise self.refuse(key, "a number")
        try:
            out = float(value)
        except OverflowError:
            out = math.inf
        if not math.isfinite(out):
            raise self.refuse(key, "a finite number")
        return out

    def boolean(self, key: str, default: Any = _REQUIRED, null: bool | None = None) -> bool:
        value = self._value(key, default, null)
        if type(value) is not bool:
            raise self.refuse(key, "true or false")
        return value

    def choice(self, key: str, default: str, names: tuple[str, ...]) -> str:
        value = self.raw.get(key)
        if value is None:
            return default
        if not isinstance(value, str) or value not in names:
            raise self.refuse(key, "one of " + ", ".join(names))
        return value

    def object(self, key: str) -> _Keys | None:
        value = self.raw.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.refuse(key, "an object or null")
        return _Keys(value, f"{self.where}: {self._name(key)}")

    def must_be(self, key: str, allowed: tuple[Any, ...], why: str) -> None:
        """The key may be absent or null; any value not in ``allowed`` is refused."""
        value = self.raw.get(key)
        if value is not None and not any(type(value) is type(a) and value == a for a in allowed):
            raise self.refuse(key, f"{' or '.join(map(repr, allowed)) or 'absent'} ({why})")


_ROPE_KEYS = {
    "type", "rope_type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale",
    "mscale_all_dim", "attention_factor", "truncate", "partial_rotary_factor", "short_factor", "long_factor",
}  # fmt: skip
_ROPE_TYPES = ("default", "yarn", "deepseek_yarn", "longrope")
_QUERY_SCALE_KEYS = {"llama_4_scaling_beta", "max_position_embeddings"}


def _rope(k: _Keys, model_type: str) -> dict[str, Any]:
    new, old = k.object("rope_parameters"), k.object("rope_scaling")
    if new is not None and old is not None:
        raise k.refuse("rope_scaling", "null beside rope_parameters")
    r = new or old or _Keys({}, k.where)
    if "rope_theta" in k.raw and "rope_theta" in r.raw and k.real("rope_theta") != r.real("rope_theta"):
        raise r.refuse("rope_theta", f"the top level's {show(k.raw['rope_theta'])}")
    default = 10000.0 if model_type == "minicpm3" else _REQUIRED
    theta = (r if "rope_theta" in r.raw else k).real("rope_theta", default)
    scaled = model_type == "mistral4"  # queries by their position
    for key in r.raw:
        if key not in _ROPE_KEYS and not (scaled and key in _QUERY_SCALE_KEYS):
            raise ConfigError(f"{r.where}: {show(key)} is not a known key")
    dn, dr = k.integer("qk_nope_head_dim"), k.integer("qk_rope_head_dim")
    for holder in (k, r):
        of_head = [dr / (dn + dr)] if scaled and dr else []  # transformers' share of its head_dim, dn + dr
        holder.must_be("partial_rotary_factor", (1, 1.0, *of_head), "all rope channels are rotated")
    if r.raw.get("type") is not None and r.raw.get("rope_type") is not None and r.raw["type"] != r.raw["rope_type"]:
        raise r.refuse("rope_type", f"the same as type {show(r.raw['type'])}")
    kind_key = "rope_type" if r.raw.get("rope_type") is not None else "type"
    if old is not None and kind_key not in old.raw:
        raise old.refuse("type", "default, yarn or longrope")
    kind = r.choice(kind_key, "default", _ROPE_TYPES).removeprefix("deepseek_")
    rope: dict[str, Any] = {"rope_theta": theta, "rope_type": kind, "rope_factor": 1.0}
    rope |= {"original_max_position_embeddings": 0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.0}
    rope |= {"mscale_all_dim": 0.0, "attention_factor": 0.0, "rope_truncate": True}
    if kind == "yarn":
        rope["rope_factor"] = r.real("factor")
        rope["original_max_position_embeddings"] = r.integer("original_max_position_embeddings")
        for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0), ("mscale", 0.0), ("mscale_all_dim", 0.0)):
            rope[key] = r.real(key, default, null=default)
        rope["attention_factor"] = r.real("attention_factor", 0.0, null=0.0)
        rope["rope_truncate"] = r.boolean("truncate", True, null=True)
    elif kind == "longrope":
        rope |= _longrope(k, r, dr // 2)
    if scaled:
        rope["llama_4_scaling_beta"] = r.real("llama_4_scaling_beta")
        rope["original_max_position_embeddings"] = r.integer("original_max_position_embeddings")
        r.must_be("max_position_embeddings", (k.integer("max_position_embeddings"),), "as at the top level")
    return rope


def _longrope(k: _Keys, r: _Keys, n: int) -> dict[str, Any]:
    """A factor of each of the n frequencies, the same at every length; A is derived from the lengths."""
    factors = r.raw.get("short_factor")
    if not isinstance(factors, list) or len(factors) != n:
        raise r.refuse("short_factor", f"{n} numbers, half of qk_rope_head_dim")
    if r.raw.get("long_factor") != factors:
        raise r.refuse("long_factor", "short_factor's values (frequencies that follow the length are not implemented)")
    for key in ("mscale", "mscale_all_dim"):
        r.must_be(key, (0, 0.0), "not a key of longrope")
    original, longest = r.integer("original_max_position_embeddings"), k.integer("max_position_embeddings")
    if original < 2:
        raise r.refuse("original_max_position_embeddings", "2 or more")
    factor = r.real("factor", longest / original, null=longest / original)
    derived = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {
        "short_factor": [_Keys({"short_factor": f}, r.where).real("short_factor") for f in factors],
        "original_max_position_embeddings": original,
        "attention_factor": r.real("attention_factor", derived, null=derived),
    }


def rope_pairs(raw: Mapping[str, Any]) -> bool:
    """Whether the checkpoint's rope rows are pairs (2j, 2j + 1); else they are half-split already."""
    return raw.get("rope_interleave") is not False and raw["model_type"] != "minicpm3"


def _scales(k: _Keys, cfg: Mapping[str, Any]) -> dict[str, Any]:
    """MiniCPM3's three factors, of its own keys; null is transformers' way to say none."""
    d, depth = cfg["hidden_size"], math.sqrt(cfg["num_hidden_layers"])
    return {
        "embed_scale": k.real("scale_emb"), "residual_scale": k.real("scale_depth", null=depth) / depth,
        "logit_scale": k.real("dim_model_base", null=float(d)) / max(d, 1),
    }  # fmt: skip


def _dense_layers(k: _Keys, n_layers: int) -> int:
    """first_k_dense_replace, from itself or from mlp_layer_types = ["dense"] * n + ["sparse"] * rest."""
    k.must_be("moe_layer_freq", (1,), "every layer after the dense ones has experts")
    types = k.raw.get("mlp_layer_types")
    if types is None:
        return min(k.integer("first_k_dense_replace"), n_layers)
    n_dense = types.count("dense") if isinstance(types, list) else 0
    if types != ["dense"] * n_dense + ["sparse"] * (n_layers - n_dense):
        raise k.refuse("mlp_layer_types", f"{n_layers} entries, 'dense' ones first, then 'sparse'")
    if "first_k_dense_replace" in k.raw and k.integer("first_k_dense_replace") != n_dense:
        raise k.refuse("first_k_dense_replace", f"{n_dense} as mlp_layer_types says")
    return n_dense


def _moe(k: _Keys, model_type: str, n_layers: int) -> dict[str, Any]:
    scoring, method = SUPPORTED[model_type]
    moe: dict[str, Any] = {
        "n_routed_experts": k.integer("n_routed_experts", 0 if model_type in DENSE else _REQUIRED, null=0)
    }
    if moe["n_routed_experts"] == 0:
        moe |= dict.fromkeys(("moe_intermediate_size", "num_experts_per_tok", "n_shared_experts"), 0)
        moe |= {"first_k_dense_replace": n_layers, "n_group": 1, "topk_group": 1, "norm_topk_prob": False}
        return moe | {"topk_method": method, "scoring_func": scoring, "routed_scaling_factor": 1.0}
    moe["moe_intermediate_size"] = k.integer("moe_intermediate_size")
    moe["num_experts_per_tok"] = k.integer("num_experts_per_tok")
    moe["n_shared_experts"] = k.integer("n_shared_experts", null=0)
    moe["first_k_dense_replace"] = _dense_layers(k, n_layers)
    moe["topk_method"] = method  # axk1: whatever the file says, which no released code reads but for the bias
    if model_type != "axk1":
        moe["topk_method"] = k.choice("topk_method", method, ("greedy", "group_limited_greedy", "noaux_tc"))
    moe["scoring_func"] = k.choice("scoring_func", scoring, ("softmax", "sigmoid"))
    grouped = moe["topk_method"] != "greedy"
    for key in ("n_group", "topk_group"):  # greedy routing has no groups, whatever the file says
        value = k.integer(key, _REQUIRED if grouped else 1, null=1)
        moe[key] = value if grouped else 1
    moe["norm_topk_prob"] = k.boolean("norm_topk_prob", null=False)
    if model_type == "mistral4":
        k.must_be("n_group", (1,), "groups are not implemented here")
    elif moe["norm_topk_prob"] and moe["scoring_func"] == "softmax":
        raise k.refuse(
            "norm_topk_prob",
            "false with softmax routing (the released codes disagree: transformers ignores it, the original then "
            "drops routed_scaling_factor)",
        )
    moe["routed_scaling_factor"] = k.real("routed_scaling_factor")
    return moe


def token_ids(raw: Mapping[str, Any], key: str, where: str, vocab_size: int) -> list[int]:
    """The ids of a key that is absent, null, an int or a list of ints; each below vocab_size."""
    value = raw.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for i in ids:
        if type(i) is not int or not 0 <= i < vocab_size:
            raise ConfigError(f"{where}: {key} is {show(value)}, expected token ids in 0..{vocab_size - 1}")
    return ids


def unwrap(raw: object, where: str) -> tuple[dict[str, Any], tuple[Layout, ...]]:
    """(text model's config under the keys used here, how its tensors may be named); refuses unknown model types."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: expected a JSON object")
    model_type, layouts = raw.get("model_type"), PLAIN
    if model_type in WRAPPERS:  # whose own tie_word_embeddings says nothing: transformers' default is true
        inner, layouts = raw.get("text_config"), WRAPPED
        if not isinstance(inner, dict):
            raise ConfigError(f"{where}: text_config is {show(inner)}, expected an object in a {model_type} checkpoint")
        shared = ("quantization", "quantization_config", "bos_token_id", "eos_token_id")
        raw = {key: raw[key] for key in shared if key in raw} | inner
        model_type = raw.get("model_type")
    if isinstance(model_type, str) and model_type in ALIASES:
        raw, model_type = raw | {"model_type": ALIASES[model_type]}, ALIASES[model_type]
    if not isinstance(model_type, str) or model_type not in SUPPORTED:
        why = " (planned, not supported yet)" if model_type in NOT_YET else ""
        if model_type in UNCERTAIN:
            why = ", a wrapper whose tensor names are not known for certain: save its language model by itself"
        names = ", ".join([*SUPPORTED, *WRAPPERS])
        raise ConfigError(f"{where}: model_type is {show(model_type)}{why}, expected one of {names}")
    for theirs, ours in OWN_NAMES.get(model_type, {}).items():
        if theirs in raw and raw.setdefault(ours, raw[theirs]) != raw[theirs]:
            raise ConfigError(f"{where}: {theirs} is {show(raw[theirs])}, expected {ours}'s {show(raw[ours])}")
    return raw, layouts


def normalise(raw: dict[str, Any], generation: dict[str, Any], n_mtp: int, where: str) -> dict[str, Any]:
    """The normalised configuration of an unwrapped config.json, checked by ``_core.validate_config``.

    generation: generation_config.json (may be empty); its eos ids are added to the config's. n_mtp: MTP layers that the
    packed file will hold, 0 or 1, decided by the tensors and not by ``num_nextn_predict_layers``.
    """
    k = _Keys(raw, where)
    model_type = str(raw["model_type"])
    cfg: dict[str, Any] = {"model_type": model_type}
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim"):
        cfg[key] = k.integer(key)
    for key in ("qk_rope_head_dim", "intermediate_size", "max_position_embeddings", "vocab_size"):
        cfg[key] = k.integer(key)
    per_head = cfg["hidden_size"] // max(cfg["num_attention_heads"], 1) if model_type == "minicpm3" else None
    cfg["v_head_dim"] = k.integer("v_head_dim", _REQUIRED if per_head is None else per_head, null=per_head)
    cfg["q_lora_rank"] = k.integer("q_lora_rank", 0, null=0)
    if not 1 <= cfg["num_hidden_layers"] <= 1024:
        raise k.refuse("num_hidden_layers", "1..1024")
    cfg |= _moe(k, model_type, cfg["num_hidden_layers"])
    if model_type == "axk1":
        cfg["post_moe_norm"] = 1
    cfg["rms_norm_eps"] = k.real("rms_norm_eps")
    cfg |= _rope(k, model_type)
    if model_type == "minicpm3":
        cfg |= _scales(k, cfg)
        k.must_be("rope_interleave", (False,), "its rope rows are half-split")
    cfg["num_nextn_predict_layers"] = n_mtp
    cfg["tie_word_embeddings"] = k.boolean("tie_word_embeddings", model_type in DENSE)
    cfg["rope_layout"] = "half"
    k.must_be("hidden_act", ("silu",), "no other activation is implemented")
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        k.must_be(key, (False,), "not implemented")
    for key in ("sliding_window", "index_topk"):
        k.must_be(key, (), "only full attention is implemented")
    k.must_be("layer_types", (["full_attention"] * cfg["num_hidden_layers"],), "only full attention is implemented")
    k.must_be("rope_interleave", (True, False), "")
    k.must_be("use_mla", (True,), "a model with other attention")
    vocab = cfg["vocab_size"]
    both = ((raw, where), (generation, "generation_config.json"))
    bos = [i for source, name in both for i in token_ids(source, "bos_token_id", name, vocab)]
    eos = [i for source, name in both for i in token_ids(source, "eos_token_id", name, vocab)]
    cfg["bos_token_id"] = bos[0] if bos else None
    cfg["eos_token_ids"] = sorted(set(eos))
    try:
        _core.validate_config(cfg)
    except ConfigError as e:
        raise ConfigError(f"{where}: {str(e).removeprefix('config: ')}") from None
    return cfg


def _block(k: _Keys, key: str) -> tuple[int, int]:
    sizes = k.raw.get(key)
    if not (isinstance(sizes, list) and all(type(n) is int and 1 <= n <= 1 << 20 for n in sizes) and len(sizes) == 2):
        raise k.refuse(key, "two block sizes, for example [128, 128]")
    return sizes[0], sizes[1]


# compressed-tensors: its formats that are read, and type and bits of weights -> strategies
CT_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mxfp4-pack-quantized",
              "nvfp4-pack-quantized", "mixed-precision")  # fmt: skip
CT_WEIGHTS = {"int4": ("group", "channel"), "int8": ("group", "channel"), "float8": ("tensor", "channel", "block"),
              "float4": ("group", "tensor_group")}  # fmt: skip


def _scheme(w: _Keys) -> dict[str, Any]:
    """What the weights of one group of compressed-tensors add to ``quantisation``."""
    kind = f"{w.raw.get('type')}{w.raw.get('num_bits')}"
    if kind not in CT_WEIGHTS:
        raise w.refuse("num_bits", "4 or 8 of type int or float")
    if kind.startswith("int") and w.raw.get("symmetric") is None:
        raise w.refuse("symmetric", "True")
    w.must_be("symmetric", (True,), "zero points are not read")
    w.must_be("actorder", (False, "static", "weight"), "columns in another order are not read")
    if w.raw.get("strategy") not in CT_WEIGHTS[kind]:
        raise w.refuse("strategy", " or ".join(map(repr, CT_WEIGHTS[kind])))
    if w.raw["strategy"] == "block":
        return {"fp8_block": _block(w, "block_structure")}
    if not kind.startswith("int"):
        return {}
    size = w.integer("group_size") if w.raw["strategy"] == "group" else 0
    if w.raw["strategy"] == "group" and (size < 32 or size % 32):
        raise w.refuse("group_size", "a multiple of 32")
    return {f"{kind}_group": size}


def quantisation(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What ``quantization_config`` says of shapes: "fp8_block": (rows, cols); "int4_group", "int8_group": columns of a
    scale, 0 for a row's; empty where scales tell by themselves how many there are (docs/model.md 2.3, 2.4)."""
    for key in ("quantization", "quantization_config"):
        value = raw.get(key)
        if isinstance(value, dict) and "quant_method" not in value and {"bits", "group_size"} <= set(value):
            found = f"{key} is that of an mlx {show(value['bits'])}-bit checkpoint"
            raise ConfigError(f"{where}: {found}, which is not read; pack the checkpoint that it was made from")
    k = _Keys(raw, where).object("quantization_config")
    if k is None:
        return {}
    method = k.raw.get("quant_method")
    if method == "fp8":
        k.must_be("fmt", ("e4m3",), "no other fp8 encoding is read")
        null = k.raw.get("weight_block_size", ()) is None
        return {} if null else {"fp8_block": _block(k, "weight_block_size")}
    if method == "modelopt":
        k.must_be("quant_algo", ("NVFP4", "FP8"), "no other is read")
        return {}
    if method != "compressed-tensors":
        raise k.refuse("quant_method", "fp8, compressed-tensors or modelopt; pack what it was made from: deepcalm pack "
                       "ORG/NAME FILE --dtype q4")  # fmt: skip
    if k.raw.get("format") not in CT_FORMATS:
        raise k.refuse("format", " or ".join(CT_FORMATS))
    for key in ("sparsity_config", "transform_config"):
        k.must_be(key, ({},), "sparse or rotated weights are not read")
    groups, out = k.object("config_groups"), dict[str, Any]()
    if groups is None or not groups.raw:
        raise k.refuse("config_groups", "groups with weights")
    for name in groups.raw:
        group = groups.object(name)
        w = group.object("weights") if group is not None else None
        if w is None:
            raise groups.refuse(name, "an object with weights")
        for key, value in _scheme(w).items():
            if out.setdefault(key, value) != value:
                raise groups.refuse(name, f"the {key} of the group before it, {out[key]}")
    return out
