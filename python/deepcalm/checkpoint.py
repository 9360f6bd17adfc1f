"""Reads a Hugging Face checkpoint folder: configuration, shards, and every weight by rows in the form it is stored.

Nothing is mapped and nothing is read before it is asked for; sizes are checked against the files first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from deepcalm import _core, hf_config
from deepcalm.container import MAX_HEADER_BYTES, File, Header, TensorInfo, parse_json, read_file, read_header, show
from deepcalm.errors import CheckpointError

MAX_CONFIG_BYTES = 16 << 20
MAX_TOKENIZER_BYTES = 256 << 20
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")

KINDS = {"F32": "f32", "BF16": "bf16", "F16": "f16", "F8_E4M3": "f8"}
_BITS = {"f32": 32, "bf16": 16, "f16": 16, "f8": 8, "i4": 4}
# Tensors that only other quantisations have -> its name. Presence refuses the weight they belong to.
_FOREIGN = {
    "qweight": "GPTQ or AWQ", "qzeros": "GPTQ or AWQ", "scales": "GPTQ or AWQ", "g_idx": "GPTQ",
    "weight_zero_point": "zero points", "weight_g_idx": "activation ordering", "weight_scale_2": "NVFP4",
    "weight_blocks": "MXFP4", "weight_scales": "MXFP4", "SCB": "bitsandbytes int8", "weight_format": "bitsandbytes int8",
    "weight.absmax": "bitsandbytes 4-bit", "weight.quant_map": "bitsandbytes 4-bit",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Weight:
    """One logical weight: its name in the checkpoint, natural shape and how it is stored.

    kind: "f32" | "bf16" | "f16" | "f8" (e4m3 * block scale) | "i4" ((code - 8) * group scale). A vector is [1, cols].
    """

    name: str
    kind: str
    rows: int
    cols: int
    data: TensorInfo
    scale: TensorInfo | None = None  # f8: f32 grid over blocks; i4: bf16 or f16 [rows, cols / group]
    block: tuple[int, int] = (1, 1)  # f8: scale block; i4: (1, group)
    extra: tuple[str, ...] = ()  # further tensors that belong to it (weight_shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored row (i4 rows are whole 32-bit words)."""
        return -(-self.cols // 8) * 4 if self.kind == "i4" else self.cols * _BITS[self.kind] // 8

    @property
    def nbytes(self) -> int:
        """Stored bytes, scales included."""
        return self.data.nbytes + (self.scale.nbytes if self.scale else 0)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of all checkpoint tensors that make up this weight."""
        return (self.data.name, *([self.scale.name] if self.scale else []), *self.extra)

    @property
    def scale_dtype(self) -> str:
        """ "bf16" | "f16" | "f32" of the scales, "" without."""
        return self.scale.dtype.lower() if self.scale else ""


class Checkpoint:
    """An open checkpoint folder. Use as a context manager, or close().

    Attributes: ``path``; ``raw_config`` (unwrapped config.json), ``generation`` (generation_config.json or {});
    ``prefix`` of the text tensors' names; ``tensors``: name -> TensorInfo; ``mtp_dropped``: why an MTP layer in the
    files is not used, or ""; ``config``: the normalised configuration.
    Raises CheckpointError or its subclass ConfigError.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files: dict[str, File] = {}
        self._headers: dict[str, Header] = {}
        self._file_of: dict[str, str] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the shards."""
        for f in self._files.values():
            f.close()

    # ---- opening ----------------------------------------------------------------------------------------------------

    def _json(self, name: str, limit: int = MAX_CONFIG_BYTES) -> Any:
        path = self.path / name
        return parse_json(read_file(path, limit, CheckpointError), str(path), CheckpointError)

    def _open(self) -> None:
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path}: not a folder, expected a Hugging Face checkpoint with config.json")
        if not (self.path / "config.json").exists():
            raise CheckpointError(f"{self.path}: no config.json")
        where = str(self.path / "config.json")
        self.raw_config, self.prefix = hf_config.unwrap(self._json("config.json"), where)
        self.quantisation = hf_config.quantisation(self.raw_config, where)
        generation = self._json("generation_config.json") if (self.path / "generation_config.json").exists() else {}
        if not isinstance(generation, dict):
            raise CheckpointError(f"{self.path / 'generation_config.json'}: expected a JSON object")
        self.generation: dict[str, Any] = generation
        self._open_shards()
        self.config = self.normalised_config(0)  # names every fault of the file before any tensor is looked at
        self.mtp_dropped = self._mtp_missing()
        if self.has_mtp and not self.mtp_dropped:
            self.config = self.normalised_config(1)

    def normalised_config(self, n_mtp: int) -> dict[str, Any]:
        """The normalised configuration with that many MTP layers (0 or 1)."""
        return hf_config.normalise(self.raw_config, self.generation, n_mtp, str(self.path / "config.json"))

    def _open_shards(self) -> None:
        if (self.path / INDEX).exists():
            index = self._json(INDEX, MAX_HEADER_BYTES)
            weight_map = index.get("weight_map") if isinstance(index, dict) else None
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{self.path / INDEX}: weight_map is missing or empty")
            for name, shard in weight_map.items():
                plain = isinstance(shard, str) and shard.endswith(".safetensors") and shard.isprintable()
                if not plain or "/" in shard or "\\" in shard or shard.startswith("."):
                    raise CheckpointError(
                        f"{self.path / INDEX}: {show(name)} is in {show(shard)}, expected the name of a .safetensors file "
                        "in the same folder"
                    )
            shards = sorted(set(weight_map.values()))
        elif (self.path / "model.safetensors").exists():
            weight_map, shards = {}, ["model.safetensors"]
        else:
            found = sorted(p.name for p in self.path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".safetensors", ".gguf"))
            hint = f"; found {', '.join(map(show, found[:3]))}" if found else ""
            pickle = any(name.endswith((".bin", ".pt", ".pth")) for name in found)
            hint += " (pickle files are not read: convert to safetensors)" if pickle else ""
            raise CheckpointError(f"{self.path}: neither model.safetensors nor {INDEX}{hint}")
        for shard in shards:
            f = self._files[shard] = File(self.path / shard, CheckpointError)
            header = self._headers[shard] = read_header(f)
            for name, info in header.tensors.items():
                if name in self.tensors:
                    raise CheckpointError(f"{f.path}: tensor {show(name)} is also in {self._file_of[name]}")
                self.tensors[name] = info
                self._file_of[name] = shard
        for name, shard in weight_map.items():
            if self._file_of.get(name) != shard:
                raise CheckpointError(f"{self.path / shard}: tensor {show(name)} is missing, {INDEX} lists it there")

    @property
    def has_mtp(self) -> bool:
        """Whether layer ``num_hidden_layers`` has an ``eh_proj``: an MTP layer, complete or not."""
        return self.has_weight(f"{self.mtp_prefix}eh_proj.weight")

    @property
    def mtp_prefix(self) -> str:
        """Prefix of the MTP layer's tensor names."""
        return f"{self.prefix}model.layers.{self.config['num_hidden_layers']}."

    def _mtp_missing(self) -> str:
        if not self.has_mtp:
            return ""
        spec = _core.expected_tensors(self.normalised_config(1))
        for t in spec:
            if not t["name"].startswith("mtp."):
                continue
            for name in source_names(t["name"], t["n_slices"], self):
                if not self.has_weight(name):
                    return f"{name} is missing"
        return ""

    # ---- weights ----------------------------------------------------------------------------------------------------

    def shard_of(self, tensor: str) -> Path:
        """The file that holds a tensor."""
        return self.path / self._file_of[tensor]

    def has_weight(self, name: str) -> bool:
        """Whether ``name`` ("...weight" or a bias) is stored in any form, supported or not."""
        base = name.removesuffix("weight")
        return name in self.tensors or base + "weight_packed" in self.tensors or base + "qweight" in self.tensors

    def weight(self, name: str, shape: tuple[int, ...]) -> Weight:
        """The weight ``name`` of natural ``shape`` (1-D or 2-D); refuses other shapes, dtypes and quantisations."""
        base = name.removesuffix("weight")
        for suffix, what in _FOREIGN.items():
            if base != name and base + suffix in self.tensors:
                raise CheckpointError(f"{self.shard_of(base + suffix)}: tensor {base + suffix}: {what} is not supported")
        if base + "weight_packed" in self.tensors:
            return self._int4(name, base, shape)
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.path}: tensor {name} is missing, expected shape {list(shape)}")
        where = f"{self._files[self._file_of[name]].path}: tensor {name}"
        if info.dtype not in KINDS:
            raise CheckpointError(f"{where}: dtype {info.dtype}, expected one of {', '.join(KINDS)} or int4 pack-quantized")
        if info.shape != shape:
            raise CheckpointError(f"{where}: shape {list(info.shape)}, expected {list(shape)}")
        rows, cols = shape if len(shape) == 2 else (1, shape[0])
        scale = self.tensors.get(name + "_scale_inv")
        if info.dtype != "F8_E4M3":
            if scale is not None or base + "weight_scale" in self.tensors:
                raise CheckpointError(f"{where}: has a scale, but dtype {info.dtype} needs none")
            return Weight(name, KINDS[info.dtype], rows, cols, info)
        if scale is None:
            found = f"found {base}weight_scale" if base + "weight_scale" in self.tensors else "found none"
            raise CheckpointError(f"{where}: F8_E4M3 needs {name}_scale_inv, {found}")
        block = self.quantisation.get("fp8_block")
        if block is None:
            raise CheckpointError(f"{where}: F8_E4M3, but config.json has no quantization_config.weight_block_size")
        grid = (-(-rows // block[0]), -(-cols // block[1]))
        self._check(scale, ("F32",), grid, f"for {list(shape)} in blocks of {list(block)}")
        return Weight(name, "f8", rows, cols, info, scale, block)

    def _int4(self, name: str, base: str, shape: tuple[int, ...]) -> Weight:
        packed = self.tensors[base + "weight_packed"]
        where = f"{self.shard_of(packed.name)}: tensor {packed.name}"
        group = self.quantisation.get("int4_group")
        if group is None:
            raise CheckpointError(f"{where}: packed weights, but config.json's quantization_config is not pack-quantized")
        if len(shape) != 2:
            raise CheckpointError(f"{where}: expected an unquantised tensor of shape {list(shape)}")
        rows, cols = shape
        self._check(packed, ("I32",), (rows, -(-cols // 8)), f"for {list(shape)}")
        scale = self.tensors.get(base + "weight_scale")
        if scale is None:
            raise CheckpointError(f"{where}: {base}weight_scale is missing")
        self._check(scale, ("BF16", "F16"), (rows, -(-cols // group)), f"for {list(shape)} in groups of {group}")
        extra: tuple[str, ...] = ()
        if base + "weight_shape" in self.tensors:
            stored = self.tensors[base + "weight_shape"]
            self._check(stored, ("I32", "I64"), (2,), "")
            got = np.frombuffer(self.read(stored), "<i4" if stored.dtype == "I32" else "<i8").tolist()
            if got != list(shape):
                raise CheckpointError(f"{where}: weight_shape says {got}, expected {list(shape)}")
            extra = (stored.name,)
        if name in self.tensors:
            raise CheckpointError(f"{where}: {name} is stored as well")
        return Weight(name, "i4", rows, cols, packed, scale, (1, group), extra)

    def _check(self, info: TensorInfo, dtypes: tuple[str, ...], shape: tuple[int, ...], why: str) -> None:
        if info.dtype not in dtypes or info.shape != shape:
            raise CheckpointError(
                f"{self.shard_of(info.name)}: tensor {info.name}: {info.dtype} {list(info.shape)}, expected "
                f"{' or '.join(dtypes)} {list(shape)} {why}".rstrip()
            )

    # ---- bytes ------------------------------------------------------------------------------------------------------

    def read(self, info: TensorInfo, begin: int = 0, limit: int | None = None) -> bytes:
        """Stored bytes of a tensor from ``begin`` on, at most ``limit``."""
        n = info.nbytes - begin if limit is None else min(limit, info.nbytes - begin)
        return self._files[self._file_of[info.name]].read(info.offset + begin, n)

    def read_rows(self, w: Weight, begin: int, end: int, out: npt.NDArray[np.uint8] | None = None) -> npt.NDArray[np.uint8]:
        """Stored bytes of rows begin..end-1: uint8 [end - begin, w.row_bytes], in the front of ``out`` if it is given."""
        n = (end - begin) * w.row_bytes
        buffer = np.empty(n, np.uint8) if out is None else out[:n]
        file = self._files[self._file_of[w.data.name]]
        file.read_into(memoryview(buffer), w.data.offset + begin * w.row_bytes)
        return buffer.reshape(end - begin, w.row_bytes)

    def read_scale(self, w: Weight, begin: int = 0, end: int | None = None) -> npt.NDArray[Any] | None:
        """Scales of w: f8: the whole f32 grid; i4: uint16 [end - begin, groups] of those rows; None without scales.

        An infinite or NaN scale is refused with its position, and so is one that takes 448 * scale out of f32.
        """
        if w.scale is None:
            return None
        if w.kind == "f8":
            grid = np.frombuffer(self.read(w.scale), "<f4").reshape(w.scale.shape)
            limit = np.float32(np.finfo(np.float32).max / 448)
            bad = ~(np.abs(grid) <= limit)
            if bad.any():
                r, c = np.argwhere(bad)[0]
                where = f"{self.shard_of(w.scale.name)}: tensor {w.scale.name}"
                raise CheckpointError(f"{where}: scale [{r}, {c}] is {grid[r, c]}, expected a finite number below {limit:.3g}")
            return grid
        end = w.rows if end is None else end
        row = 2 * w.scale.shape[1]
        buffer = np.empty((end - begin, w.scale.shape[1]), np.uint16)
        file = self._files[self._file_of[w.scale.name]]
        file.read_into(memoryview(buffer).cast("B"), w.scale.offset + begin * row)
        return buffer

    def load_f32(self, w: Weight, begin: int = 0, end: int | None = None) -> npt.NDArray[np.float32]:
        """Rows begin..end-1 as f32 [n, cols], exact but for one rounding of e4m3 * scale; NaN and infinity are refused."""
        end = w.rows if end is None else end
        out = np.empty((end - begin, w.cols), np.float32)
        if out.size == 0:
            return out
        data, scale = self.read_rows(w, begin, end), self.read_scale(w, begin, end)
        bad = _core.convert_rows(out, "f32", w.kind, data, w.cols, begin, scale, *w.block, w.scale_dtype)
        if bad is not None:
            raise self.bad_value(w, begin + bad[0], bad[1], "f32")
        return out

    def bad_value(self, w: Weight, row: int, col: int, to: str) -> CheckpointError:
        """The error for a value that does not fit format ``to``."""
        at = f"[{col}]" if len(w.data.shape) == 1 else f"[{row}, {col}]"
        data, scale = self.read_rows(w, row, row + 1), self.read_scale(w, row, row + 1)
        line = np.empty((1, w.cols), np.float32)
        hit = _core.convert_rows(line, "f32", w.kind, data, w.cols, row, scale, *w.block, w.scale_dtype)
        finite = hit is None or hit[1] > col
        found = f"{line[0, col]:.6g}" if finite else "not finite"
        why = {"f16": "|w| <= 65504", "bf16": "|w| <= 3.39e38", "f32": "a finite number"}
        expected = why.get(to, f"a value whose {to} scale neither over- nor underflows (try --dtype bf16)")
        return CheckpointError(
            f"{self.shard_of(w.data.name)}: tensor {w.data.name}: value at {at} is {found}, "
            f"expected {expected if finite else 'a finite number'} for {to}"
        )

    # ---- files beside the weights -----------------------------------------------------------------------------------

    def tokenizer_files(self) -> dict[str, bytes]:
        """tokenizer.json (converted from tiktoken.model where there is no other), tokenizer_config.json, ..."""
        out = {}
        for name in TOKENIZER_FILES:
            if (self.path / name).exists():
                data = read_file(self.path / name, MAX_TOKENIZER_BYTES, CheckpointError)
                if name.endswith(".json"):
                    parse_json(data, str(self.path / name), CheckpointError)
                if data:
                    out[name] = data
        model = self.path / "tiktoken.model"
        if "tokenizer.json" not in out and model.exists():
            from deepcalm.tiktoken_convert import convert

            out["tokenizer.json"] = convert(
                read_file(model, MAX_TOKENIZER_BYTES, CheckpointError), out.get("tokenizer_config.json", b"{}"), str(model)
            )
        return {name: out[name] for name in TOKENIZER_FILES if name in out}

    def identity(self) -> dict[str, Any]:
        """What the packed file records about its source: {name, files: {name: bytes}, config_sha256, index_sha256}.

        index_sha256 covers the shard names and headers: every tensor's name, shape, dtype and place.
        """
        index = hashlib.sha256()
        for shard, header in self._headers.items():
            index.update(shard.encode() + b"\0" + header.raw)
        config = read_file(self.path / "config.json", MAX_CONFIG_BYTES, CheckpointError)
        return {
            "name": self.path.resolve().name,
            "files": {shard: f.size for shard, f in self._files.items()},
            "config_sha256": hashlib.sha256(config).hexdigest(),
            "index_sha256": index.hexdigest(),
        }

    def mtimes(self) -> dict[str, int]:
        """Modification time of every shard, ns: a resumed pack starts over when one has changed."""
        return {shard: f.mtime_ns for shard, f in self._files.items()}


# ---- packed tensor -> checkpoint weights ----------------------------------------------------------------------------

_LAYER = {
    "attn_norm": ["input_layernorm.weight"],
    "q_a_norm": ["self_attn.q_a_layernorm.weight"],
    "kv_a_norm": ["self_attn.kv_a_layernorm.weight"],
    "wq_b": ["self_attn.q_b_proj.weight"],
    "w_uk": ["self_attn.kv_b_proj.weight"],
    "w_uv": ["self_attn.kv_b_proj.weight"],
    "wo": ["self_attn.o_proj.weight"],
    "ffn_norm": ["post_attention_layernorm.weight"],
    "w_gate_up": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "w_down": ["mlp.down_proj.weight"],
    "router": ["mlp.gate.weight"],
    "router_bias": ["mlp.gate.e_score_correction_bias"],
    "shared.w_gate_up": ["mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"],
    "shared.w_down": ["mlp.shared_experts.down_proj.weight"],
    "enorm": ["enorm.weight"],
    "hnorm": ["hnorm.weight"],
    "eh_proj": ["eh_proj.weight"],
    "final_norm": ["shared_head.norm.weight"],
}


def source_names(packed: str, n_slices: int, ckpt: Checkpoint) -> Iterator[str]:
    """Names of the checkpoint weights that make up a packed tensor: its parts in order, expert after expert."""
    cfg, prefix = ckpt.config, ckpt.prefix
    if packed == "embed":
        yield prefix + "model.embed_tokens.weight"
    elif packed == "final_norm":
        yield prefix + "model.norm.weight"
    elif packed == "head":
        yield prefix + ("model.embed_tokens.weight" if cfg["tie_word_embeddings"] else "lm_head.weight")
    else:
        scope, _, rest = packed.partition(".")
        layer = cfg["num_hidden_layers"]
        if scope == "layers":
            number, _, rest = rest.partition(".")
            layer = int(number)
        p = f"{prefix}model.layers.{layer}."
        if rest == "wqkv_a":
            yield p + ("self_attn.q_a_proj.weight" if cfg["q_lora_rank"] else "self_attn.q_proj.weight")
            yield p + "self_attn.kv_a_proj_with_mqa.weight"
        elif rest in ("experts.w_gate_up", "experts.w_down"):
            for e in range(n_slices):
                for kind in ("gate", "up") if rest.endswith("gate_up") else ("down",):
                    yield f"{p}mlp.experts.{e}.{kind}_proj.weight"
        else:
            for suffix in _LAYER[rest]:
                yield p + suffix
