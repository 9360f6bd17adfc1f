"""The oracle nobody here wrote: Hugging Face transformers in float32, eager attention, MTP layer included.

Needs the `reference` extra (torch, transformers >= 5.23: older ones compute wrong V2 logits). Any checkpoint the tests
write is first dequantised to float32 by `checkpoint.load`, so fp8 and int4 sources need no support in transformers.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from . import checkpoint

Array = np.ndarray[Any, Any]


def logits(folder: Path, ids: Array) -> tuple[Array, Array, Array | None]:
    """Runs ids [n] -> (logits [n, V], hidden [n, d] after the final norm, MTP logits [n - 1, V] or None), float32.

    MTP row i is teacher-forced: it sees hidden[i] and ids[i + 1] and predicts token i + 2.
    """
    import safetensors.numpy
    import torch
    import transformers
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    config, tensors = json.loads((folder / "config.json").read_text()), checkpoint.load(folder)[1]
    n_layers = config["num_hidden_layers"]
    prefix = f"model.layers.{n_layers}."
    has_mtp = prefix + "eh_proj.weight" in tensors
    config.pop("quantization_config", None)
    if config["model_type"] == "kimi_k2":
        config["model_type"] = "deepseek_v3"  # the same architecture; transformers knows it by this name only
    with tempfile.TemporaryDirectory() as tmp, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (Path(tmp) / "config.json").write_text(json.dumps(config))
        if config["model_type"] == "mistral4":
            tensors = fuse_experts(tensors)  # its class knows no others
        contiguous = {name: np.ascontiguousarray(t) for name, t in tensors.items()}  # save_file ignores strides
        safetensors.numpy.save_file(contiguous, Path(tmp) / "model.safetensors", {"format": "pt"})
        eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
        auto = transformers.AutoModelForCausalLM  # which does not know every class
        its_own = getattr(transformers, config["architectures"][0], auto)
        model = its_own.from_pretrained(tmp, dtype=torch.float32, **eager)
        tokens = torch.tensor(ids, dtype=torch.int64)[None]
        hidden = model.model(tokens).last_hidden_state
        out = model(tokens).logits
        mtp_logits = None
        if has_mtp:
            # transformers looks for the real models' layer numbers (61, 47); and GLM's config class has no MTP fields
            model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{n_layers}\..*"]
            model.config.num_mtp_layers = 1
            model.config.mtp_mlp_layer_types = ["sparse"]
            mtp = MtpModel.from_pretrained(model)
            n = len(ids)
            g = mtp.forward_layer(
                0,
                hidden[:, :-1],
                position_ids=torch.arange(1, n)[None],
                mtp_cache=MtpCache(config=model.config.get_mtp_config()),
                input_ids=tokens[:, 1:],
            )
            mtp_logits = model.lm_head(g)[0].numpy()
        return out[0].numpy(), hidden[0].numpy(), mtp_logits


def fuse_experts(tensors: dict[str, Array]) -> dict[str, Array]:
    """The experts of a layer in one tensor each for gate and up, and for down."""
    out = {name: t for name, t in tensors.items() if ".mlp.experts." not in name}
    for p in {name.partition(".experts.")[0] for name in tensors if ".mlp.experts." in name}:
        n = sum(name.startswith(p + ".experts.") for name in tensors) // 3
        gate, up, down = (
            np.stack([tensors[f"{p}.experts.{e}.{part}_proj.weight"] for e in range(n)])
            for part in ("gate", "up", "down")
        )
        out |= {f"{p}.experts.gate_up_proj": np.concatenate([gate, up], axis=1), f"{p}.experts.down_proj": down}
    return out


def draft(folder: Path, ids: list[int], n_new: int) -> tuple[list[int], list[int]]:
    """Greedy generate(use_mtp=True) from ids -> (n_new tokens, accepted drafts of every round after the prompt's)."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.generation.candidate_generator import MTPCandidateGenerator
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    rounds: list[int] = []
    update = MTPCandidateGenerator.update_candidate_strategy

    def record(self: Any, input_ids: Any, scores: Any, num_matches: int) -> Any:
        rounds.append(int(num_matches))
        return update(self, input_ids, scores, num_matches)

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **eager)
        # as in logits(): the real models' layer numbers are wired in, and GLM's config class has no MTP fields
        model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{model.config.num_hidden_layers}\..*"]
        model.config.num_mtp_layers = 1
        model.config.mtp_mlp_layer_types = ["sparse"]
        tokens = torch.tensor(ids, dtype=torch.int64)[None]
        MTPCandidateGenerator.update_candidate_strategy = record
        try:
            out = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), use_mtp=True, do_sample=False, max_new_tokens=n_new,
                min_new_tokens=n_new, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        finally:
            MTPCandidateGenerator.update_candidate_strategy = update
    return out[0, len(ids) :].tolist(), rounds[1:]
