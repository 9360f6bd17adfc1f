"""What Hugging Face transformers computes from a checkpoint: a second opinion for ``verify``. Needs the extra
``reference`` (torch, transformers)."""

from __future__ import annotations

import contextlib
import json
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ResourceError
from ..files.checkpoint import Checkpoint, Weight

Array = Any  # np.ndarray; the docstrings give shapes


def opinion(ckpt: Checkpoint, ids: Array, n_new: int) -> tuple[Array, list[int] | None]:
    """Runs ids [n] in float32, eager attention -> (logits [n, vocab_size] f32, greedy tokens or None).

    The ``n_new`` tokens come from ``generate(use_mtp=True)``; None for a checkpoint without an MTP layer. Quantised
    checkpoints are first written as float32 into a temporary folder.

    Raises:
        ImportError: torch or transformers is not installed.
        ResourceError: transformers cannot run this checkpoint; the message is its own.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    quiet: Any = logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    n_layers = int(ckpt.config["num_hidden_layers"])
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    with _folder(ckpt) as folder, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **eager)
            tokens = torch.tensor(np.asarray(ids), dtype=torch.int64)[None]
            logits: Array = model(tokens).logits[0].numpy()
            if not ckpt.config["num_nextn_predict_layers"]:
                return logits, None
            # Its table of MTP layers has the released models' numbers (61, 47); GLM's config class has no MTP fields.
            model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{n_layers}\..*"]
            model.config.num_mtp_layers = 1
            model.config.mtp_mlp_layer_types = ["sparse"]
            out = model.generate(tokens, attention_mask=torch.ones_like(tokens), use_mtp=True, do_sample=False,
                                 max_new_tokens=n_new, min_new_tokens=n_new, eos_token_id=None,
                                 pad_token_id=0)  # fmt: skip
        except Exception as e:  # whatever foreign code raises at a checkpoint that it does not know: NameError, too
            raise ResourceError(f"transformers cannot run it: {type(e).__name__}: {e}") from None
        return logits, out[0, len(ids) :].tolist()


@contextlib.contextmanager
def _folder(ckpt: Checkpoint) -> Iterator[Path]:
    """A folder that transformers reads without further packages: the checkpoint's own, or a float32 copy."""
    if not ckpt.quantisation and not ckpt.prefix and ckpt.raw_config.get("model_type") != "kimi_k2":
        yield ckpt.path
        return
    from safetensors.numpy import save_file

    config = {k: v for k, v in ckpt.raw_config.items() if k != "quantization_config"}
    if config["model_type"] == "kimi_k2":
        config["model_type"] = "deepseek_v3"  # the same architecture; transformers knows it by this name
    with tempfile.TemporaryDirectory() as tmp:
        (Path(tmp) / "config.json").write_text(json.dumps(config))
        tensors = {w.name.removeprefix(ckpt.prefix): ckpt.load_f32(w).reshape(shape) for w, shape in _weights(ckpt)}
        save_file(tensors, Path(tmp) / "model.safetensors", {"format": "pt"})
        del tensors
        yield Path(tmp)


def _weights(ckpt: Checkpoint) -> Iterator[tuple[Weight, tuple[int, ...]]]:
    """(weight, natural shape) of everything below the checkpoint's prefix that is no scale."""
    for name, info in ckpt.tensors.items():
        if not name.startswith(ckpt.prefix) or name.endswith(("_scale_inv", "_scale", "_shape", "_g_idx")):
            continue
        if len(info.shape) == 3:  # all experts of a layer
            parts = ("gate", "up") if name.endswith("gate_up_proj") else ("down",)
            one = (info.shape[1] // len(parts), info.shape[2])
            experts = [f"{name.rpartition('.')[0]}.{e}.{part}" for e in range(info.shape[0]) for part in parts]
            yield from ((ckpt.weight(f"{expert}_proj.weight", one), one) for expert in experts)
            continue
        shape, weight = info.shape, name.removesuffix("_packed")
        if weight != name:
            rows, groups = ckpt.tensors[weight + "_scale"].shape
            stored = ckpt.tensors.get(weight + "_shape")
            width = np.dtype("<i4" if stored is not None and stored.dtype == "I32" else "<i8")
            shape = (rows, groups * ckpt.quantisation["int4_group"])
            if stored is not None:
                shape = tuple(np.frombuffer(ckpt.read(stored), width).tolist())
        yield ckpt.weight(weight, shape), shape
