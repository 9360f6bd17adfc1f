"""Decides how a checkpoint is packed: what every packed tensor is made of, its format, and what is dropped and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _core
from ..errors import UnsupportedError
from ..names import DTYPES
from .checkpoint import SOURCE_DTYPES, Checkpoint, Weight, source_names
from .config import rope_pairs
from .packed import SCALE_OF, TILE_COLS, TILE_ROWS, Tensor

Index = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class RowMap:
    """Checkpoint rows start..start+count-1 in packed order.

    rope = (period, begin): in every period of rows, those from ``begin`` on are rotary pairs (2j, 2j+1) in the
    checkpoint and half-split (j, j + n/2) in the packed file.
    """

    start: int
    count: int
    rope: tuple[int, int] | None = None

    def index(self, begin: int = 0, end: int | None = None) -> Index:
        """[end - begin] checkpoint row of each packed row begin..end-1."""
        rows = np.arange(self.start + begin, self.start + (self.count if end is None else end), dtype=np.int32)
        if self.rope is not None:
            period, first = self.rope
            j = rows % period - first  # position inside the rope rows, negative before them
            half = (period - first) // 2
            rows = np.where(j < 0, rows, rows - j + 2 * (j % half) + j // half).astype(np.int32)
        return rows


@dataclass(frozen=True, slots=True)
class Part:
    """One source weight's share of a slice: packed [rows, cols]. transpose: ``take`` selects packed columns."""

    weight: Weight
    take: RowMap
    rows: int
    cols: int
    transpose: bool = False

    def block_ids(self) -> tuple[Index, Index]:
        """f8: which scale block of the source each packed row and each packed column comes from."""
        a = self.take.index() // self.weight.block[0]
        b = np.arange(self.rows if self.transpose else self.cols, dtype=np.int32) // self.weight.block[1]
        return (b, a) if self.transpose else (a, b)


@dataclass(frozen=True, slots=True)
class Dropped:
    """A checkpoint tensor that is not in the packed file, and why."""

    name: str
    why: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that packing will do. ``notes`` are sentences that the user should read."""

    config: dict[str, Any]
    source: dict[str, Any]  # name, files, checksums, and the dtypes asked for
    tensors: list[Tensor]
    files: dict[str, bytes] = field(repr=False)
    dropped: list[Dropped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors and stored files, padding included, header excluded."""
        return sum(s.container()[2] for t in [*self.tensors, *self.file_tensors()] for s in t.stored)

    def file_tensors(self) -> list[Tensor]:
        """What the files are stored as, anew."""
        return [Tensor.file(name, len(data), data) for name, data in self.files.items()]

    @property
    def source_bytes(self) -> int:
        """Checkpoint bytes that are used; a weight used twice counts once."""
        return sum({p.weight.name: p.weight.nbytes for t in self.tensors for s in t.slices for p in s}.values())

    @property
    def active_bytes_per_token(self) -> int:
        """Weight bytes that decoding one token reads."""
        return sum(t.active_bytes(self.config["num_experts_per_tok"]) for t in self.tensors)


def make_plan(
    ckpt: Checkpoint, dtype: str, attn_dtype: str | None, head_dtype: str | None, draft_head: str | None = None
) -> Plan:
    """The plan for an open checkpoint; see ``deepcalm.pack.plan``."""
    options = dtypes(dtype, attn_dtype, head_dtype, draft_head)
    config = ckpt.config | draft_head_key(options, ckpt.config)
    tensors = []
    for spec in _core.expected_tensors(config):
        slices = _slices(spec, ckpt)
        fmt, scale, block, exact, note = _choose(spec, slices, options.get(spec["role"] + "_dtype", dtype))
        kinds = sorted({SOURCE_DTYPES[p.weight.kind] for parts in slices for p in parts})
        planned = {"slices": slices, "exact": exact, "note": note}
        tensors.append(Tensor.of(spec, fmt, scale, block, "+".join(kinds), **planned))
    files = ckpt.tokenizer_files()
    notes = list(ckpt.notes)
    dropped = _dropped(ckpt, {n for t in tensors for s in t.slices for p in s for n in p.weight.tensors}, notes)
    for why in dict.fromkeys(t.note for t in tensors if dtype == "source" and t.note.endswith(("again", ": f32"))):
        names = [t.name for t in tensors if t.note == why]
        notes.append(f"not as the source has them: {len(names)} tensors ({names[0]}, ...): {why}; choose by --dtype")
    if ckpt.mtp_dropped:
        notes.append(f"the MTP layer is dropped: {ckpt.mtp_dropped}; drafting will not be available")
    elif ckpt.raw_config.get("num_nextn_predict_layers") and not ckpt.has_mtp:
        notes.append("config.json names an MTP layer but the files hold none; drafting will not be available")
    if draft_head not in (None, "none") and not config["num_nextn_predict_layers"]:
        notes.append(f"draft head {draft_head} has no effect: no MTP layer is packed")
    if "tokenizer.json" not in files:
        notes.append("no tokenizer.json or tiktoken.model: the packed file has no tokenizer")
    return Plan(config, ckpt.identity() | {"options": options}, tensors, files, dropped, notes)


def dtypes(dtype: str, attn_dtype: str | None, head_dtype: str | None, draft_head: str | None) -> dict[str, str]:
    """What is asked for, by option; the formats that follow from ``dtype`` filled in. Raises UnsupportedError."""
    wide = "q8" if dtype == "q4" else dtype
    options = {"dtype": dtype, "attn_dtype": attn_dtype or wide, "head_dtype": head_dtype or wide,
               "draft_head_dtype": draft_head or ("q4" if dtype in ("q8", "q4") else "none")}  # fmt: skip
    for option, value in options.items():
        allowed = (*DTYPES, "none") if option == "draft_head_dtype" else DTYPES
        if value not in allowed:
            raise UnsupportedError(f"{option} {value!r}, expected one of {', '.join(allowed)}")
    return options


def draft_head_key(options: dict[str, str], config: dict[str, Any]) -> dict[str, int]:
    """What the configuration says of a copy of the head for drafts; nothing where drafts read the head itself."""
    same = options["draft_head_dtype"] in ("none", options["head_dtype"])
    return {} if same or not config["num_nextn_predict_layers"] else {"mtp_draft_head": 1}


def _slices(spec: dict[str, Any], ckpt: Checkpoint) -> list[list[Part]]:
    """The parts of every slice of an expected tensor."""
    cfg, name, rows, cols = ckpt.config, spec["name"], spec["rows"], spec["cols"]
    rest = name.split(".", 2)[2] if name.startswith("layers.") else name.removeprefix("mtp.")
    names = list(source_names(name, spec["n_slices"], ckpt))
    heads, dn, dr = cfg["num_attention_heads"], cfg["qk_nope_head_dim"], cfg["qk_rope_head_dim"]
    r, dv = cfg["kv_lora_rank"], cfg["v_head_dim"]
    pairs = rope_pairs(ckpt.raw_config)

    if not cols:
        return [[Part(ckpt.weight(names[0], (rows,)), RowMap(0, 1), 1, rows)]]
    if rest in ("w_uk", "w_uv"):  # head h of kv_b: dn key rows, then dv value rows
        w = ckpt.weight(names[0], (heads * (dn + dv), r))
        if rest == "w_uk":
            return [[Part(w, RowMap(h * (dn + dv), dn), r, dn, transpose=True)] for h in range(heads)]
        return [[Part(w, RowMap(h * (dn + dv) + dn, dv), dv, r)] for h in range(heads)]
    parts = spec["parts"] or [rows]
    ropes: list[tuple[int, int] | None] = [None] * len(parts)
    if pairs and rest == "wq_b":
        ropes = [(dn + dr, dn)]
    elif pairs and rest == "wqkv_a":
        ropes = [None if cfg["q_lora_rank"] else (dn + dr, dn), (r + dr, r)]
    n = len(parts)
    weights = [ckpt.weight(source, (parts[i % n], cols)) for i, source in enumerate(names)]
    flat = [Part(w, RowMap(0, w.rows, ropes[i % n]), w.rows, cols) for i, w in enumerate(weights)]
    return [flat[i : i + n] for i in range(0, len(flat), n)]


Choice = tuple[str, str, "tuple[int, int] | None", bool, str]  # format, scale dtype, f8 scale block, exact codes, note


def _choose(spec: dict[str, Any], slices: list[list[Part]], dtype: str) -> Choice:
    """How a tensor is stored under the dtype asked for its role."""
    kinds = {(p.weight.kind, p.weight.scale_dtype) for parts in slices for p in parts}
    kind, scale = next(iter(kinds))
    names = " and ".join(sorted({SOURCE_DTYPES[k] for k, _ in kinds}))
    allowed = spec["formats"]
    if allowed == ["f32"]:  # norms, biases, router
        return "f32", "", None, False, ""
    if "q8" not in allowed:  # embedding, eh_proj: 16 bits or more
        if dtype in allowed or kind in ("bf16", "f16"):
            return dtype if dtype in allowed else kind, "", None, False, ""
        return ("f32" if dtype == "source" else "bf16"), "", None, False, "" if kind == "f32" else f"was {names}"
    if dtype == "source" and len(kinds) > 1:
        return "f32", "", None, False, f"{names} in one tensor: f32 keeps both"
    if kinds == {("f8", "f32")} and dtype in ("source", "f8"):
        if block := _f8_block(slices, spec["interleaved"]):
            note = "" if block == slices[0][0].weight.block else f"scale block {block[0]} x {block[1]}"
            return "f8", "f32", block, True, note
        if dtype == "source":
            return "f32", "", None, False, "scale blocks do not fit 16 x 32 tiles: f32"
    if kind == "i4" and len(kinds) == 1 and dtype in ("source", "q4"):
        if not slices[0][0].transpose:
            return "q4", scale, None, True, ""
        if dtype == "source":
            return "f32", "", None, False, "int4 cannot be transposed: f32"
    if all(p.weight.q8_codes and not p.transpose for parts in slices for p in parts) and dtype in ("source", "q8"):
        return "q8", "f16", None, True, ""
    if kind == "i8" and dtype == "source":
        return "f32", "", None, False, "int8 that is transposed or has f32 scales: f32"
    target = ("q8" if kind == "fp4" else kind) if dtype == "source" else dtype
    block = (16 if len(slices[0]) > 1 else 128, 128) if target == "f8" else None
    note = f"{names} quantised again" if target in SCALE_OF and kind in ("f8", "i8", "i4", "fp4") else ""
    return target, SCALE_OF.get(target, ""), block, False, note


def _f8_block(slices: list[list[Part]], interleaved: bool) -> tuple[int, int] | None:
    """The largest scale block, 16 x 32 times powers of two, that leaves every element its scale; None if none does."""
    rows: set[tuple[int, ...]] = set()  # distinct sequences of source blocks, tile after tile
    cols: set[tuple[int, ...]] = set()
    seen = set()
    for parts in slices:
        geometry = tuple((p.take, p.rows, p.cols, p.transpose, p.weight.block) for p in parts)
        if geometry in seen:
            continue
        seen.add(geometry)
        by_part = []
        for i, part in enumerate(parts):
            row_ids, col_ids = part.block_ids()
            row_tiles, col_tiles = _per_tile(row_ids, TILE_ROWS), _per_tile(col_ids, TILE_COLS)
            if row_tiles is None or col_tiles is None:
                return None
            by_part.append([n * len(parts) + i for n in row_tiles])
            cols.add(tuple(col_tiles))
        rows.add(tuple(n for tiles in (zip(*by_part, strict=True) if interleaved else by_part) for n in tiles))
    block = slices[0][0].weight.block
    return _largest(rows, TILE_ROWS, max(block)), _largest(cols, TILE_COLS, max(block))


def _per_tile(ids: Index, tile: int) -> list[int] | None:
    """The block of every tile of rows or columns; None where a tile mixes blocks."""
    padded = np.pad(ids, (0, -len(ids) % tile), mode="edge").reshape(-1, tile)
    return None if (padded != padded[:, :1]).any() else [int(n) for n in padded[:, 0]]


def _largest(sequences: Iterable[tuple[int, ...]], tile: int, limit: int) -> int:
    """Largest tile * 2^k <= limit whose groups each lie in one block; powers of two nest with 128-column sums."""
    n = 1 << max((limit // tile).bit_length() - 1, 0)
    while not all(len(set(s[i : i + n])) == 1 for s in sequences for i in range(0, len(s), n)):
        n //= 2
    return n * tile


def _dropped(ckpt: Checkpoint, used: set[str], notes: list[str]) -> list[Dropped]:
    """Every tensor of the checkpoint that the plan does not use."""
    cfg, mtp, layers = ckpt.config, ckpt.mtp_prefix, f"{ckpt.prefix}layers."
    embed, head = (next(source_names(name, 1, ckpt)) for name in ("embed", "head"))
    copies = {mtp + "embed_tokens.weight": embed, mtp + "shared_head.head.weight": head}
    copies |= {ckpt.lm_head: head}
    out = []
    for name, info in ckpt.tensors.items():
        if name in used:
            continue
        number = name.removeprefix(layers).partition(".")[0] if name.startswith(layers) else ""
        layer = int(number) if number.isascii() and number.isdigit() and len(number) < 7 else -1
        if name.endswith("rotary_emb.inv_freq"):
            why = "rope frequencies are computed from the configuration"
        elif ckpt.prefix != "model." and not name.startswith((ckpt.prefix, ckpt.lm_head)):
            why = f"{name.removeprefix('model.').partition('.')[0]} is not part of the text model"
        elif layer > cfg["num_hidden_layers"]:
            why = "further MTP module: only the first is used"
        elif layer == cfg["num_hidden_layers"] and not cfg["num_nextn_predict_layers"]:
            why = f"MTP layer incomplete: {ckpt.mtp_dropped or 'no eh_proj'}"
        elif name in copies and copies[name] in ckpt.tensors:
            why = f"copy of {copies[name]}"
            if not ckpt.same_bytes(name, copies[name]):
                why = f"differs from {copies[name]}, which is used instead"
                notes.append(f"{name} {why}" + ("; drafts may be accepted less often" if name.startswith(mtp) else ""))
        elif name.endswith(".post_mlp_layernorm.weight"):
            why = "only layers with experts use it"
        elif name.endswith(("input_scale", "input_global_scale", "activation_scale", "k_scale", "v_scale")):
            why = "activation scale: the runtime rounds activations by itself"
        else:
            why = "not part of this architecture"
        out.append(Dropped(name, why, info.nbytes))
    return out
