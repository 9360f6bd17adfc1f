"""What a configuration alone says of a model: its parameters, and the cache that each kind of attention keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import _core

GROUPS = 8  # key-value heads of the GQA that a model is compared with


@dataclass(frozen=True, slots=True)
class Attention:
    """One kind of attention with a model's heads."""

    name: str  # MHA, GQA, MQA, MLA
    values: int  # numbers that a position keeps in a layer's cache
    operations: int  # multiplications and additions that a new token spends on a cached position in a layer


def attentions(config: Mapping[str, Any]) -> tuple[Attention, Attention, Attention, Attention]:
    """The model's own attention, last, behind what its heads would keep as MHA, GQA and MQA.

    Keys have qk_nope_head_dim + qk_rope_head_dim numbers, values v_head_dim; MLA is in absorbed form.
    """
    heads, r, dr = config["num_attention_heads"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    per_head = config["qk_nope_head_dim"] + dr + config["v_head_dim"]
    return (
        Attention("MHA", heads * per_head, 2 * heads * per_head),
        Attention("GQA", min(GROUPS, heads) * per_head, 2 * heads * per_head),
        Attention("MQA", per_head, 2 * heads * per_head),
        Attention("MLA", r + dr, 2 * heads * (r + dr + r)),
    )


@dataclass(frozen=True, slots=True)
class Parameters:
    """Weights of a model, each counted once, without its MTP layer."""

    total: int
    active: int  # those that a decoded token reads: the chosen experts, one row of the embedding
    routed: int  # those of the chosen experts, of `active`
    mtp: int  # of the MTP layer besides
    mtp_active: int  # that one row of the MTP layer reads, the head not counted


def parameters(config: Mapping[str, Any]) -> Parameters:
    """Counts the weights that a packed file of this configuration holds. Raises ConfigError."""
    k, d, tied = config["num_experts_per_tok"], config["hidden_size"], config.get("tie_word_embeddings")
    total = active = routed = mtp = mtp_active = 0
    for spec in _core.expected_tensors(config):
        name, role = spec["name"], spec["role"]
        rows = sum(spec["parts"]) or spec["rows"]
        n = rows * max(spec["cols"], 1) * spec["n_slices"]
        read = n // spec["n_slices"] * k if role == "expert" else d if role == "embed" else n
        if name == "mtp.head":
            continue  # the same weights as the head's
        if name.startswith("mtp."):
            mtp, mtp_active = mtp + n, mtp_active + read
            continue
        active += 0 if name == "embed" and tied else read  # its row is one of the head's
        routed += read if role == "expert" else 0
        total += 0 if name == "head" and tied else n
    return Parameters(total, active, routed, mtp, mtp_active)
