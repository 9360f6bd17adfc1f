#!/usr/bin/env python3
"""Train a small story-telling model of the DeepSeek-V3 architecture and write it as a Hugging Face checkpoint.

This is the method by which the embedded demo model was made, in plain PyTorch: MLA with query and key/value latents,
sigmoid routing without auxiliary loss (noaux_tc: groups, and a bias that balances the load), a shared expert, a dense
first layer, and one multi-token-prediction (MTP) layer trained with the main model. It repeats the method, not the
bits: the shipped weights came from a faster implementation of the same model and schedule (see the model card).

    tools/train_demo.py OUT --text own=own.txt:1:1 --text tiny=tinystories.txt:6:3 --text bailey=bailey.txt:3:0

Each --text is NAME=FILE[:N1[:N2]]: a UTF-8 file (or .xz of one) whose documents end with `<|endoftext|>`, and how
often it is repeated in the first 70 % of the run and in the rest (default 1:1). 2 % of its documents are held out.
OUT receives config.json, model.safetensors (bf16), the tokenizer, log.csv, valid.csv, valid_docs.json, and at the end
demo.dcalm, packed as q8. Needs the `reference` extra; --device cuda helps.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import lzma
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

import deepcalm

BOS, EOS = "<|begin_of_text|>", "<|endoftext|>"  # ids 0 and 1
CONFIG: dict[str, Any] = {  # config.json, read by transformers and deepcalm alike
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 256, "num_hidden_layers": 6,
    "first_k_dense_replace": 1, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 4,
    "q_lora_rank": 96, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
    "n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 128, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    "norm_topk_prob": True, "moe_layer_freq": 1, "num_nextn_predict_layers": 1, "rope_theta": 10000.0,
    "rope_scaling": None, "rope_interleave": True, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
    "vocab_size": 4096, "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0,
    "tie_word_embeddings": False, "initializer_range": 0.02, "use_cache": True, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": None, "torch_dtype": "bfloat16",
}  # fmt: skip
# Turns of stories: a line that opens one is gone on with, any other one answered with a whole one, which is a document
# of its own as in training. A story that stopped in the middle of a sentence goes on with the next line; one that has
# ended, or fills half of the context, makes room. A system message begins every story.
TEMPLATE = """\
{%- set s = namespace(opening='', text='') -%}
{%- for m in messages -%}
    {%- if m.role == 'system' -%}
        {%- set s.opening = m.content | trim -%}
    {%- elif m.role == 'assistant' -%}
        {%- set s.text = s.text + m.content -%}
    {%- else -%}
        {%- set line = m.content | trim -%}
        {%- if loop.previtem is defined and loop.previtem.role == 'assistant' and
               (s.text.rstrip().endswith(('.', '!', '?', '"')) or s.text | length > 1000) -%}
            {%- set s.text = '' -%}
        {%- endif -%}
        {%- if s.text -%}
            {%- set apart = not s.text[-1:].isspace() and not line.startswith((',', '.', '!', '?')) -%}
            {%- set s.text = s.text + (' ' if apart else '') + line -%}
        {%- elif line.lower().startswith(('once ', 'long ago', 'in a ', 'one day', 'there ')) -%}
            {%- set s.text = s.opening + (' ' if s.opening else '') + line -%}
        {%- else -%}
            {%- set s.text = line + eos_token + bos_token + s.opening -%}
        {%- endif -%}
    {%- endif -%}
{%- endfor -%}
{{- bos_token + (s.text or s.opening) -}}
"""
PHASE_2_AT = 0.7  # part of the run after which the second repetition counts and the smaller MTP weight apply


# --- the model: parameter names are the checkpoint's tensor names --------------------------------------------------
class RMSNorm(nn.Module):
    """x * weight / rms(x), in f32."""

    def __init__(self, n: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(n)), eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def linear(n_in: int, n_out: int, gain: float = 1.0) -> nn.Linear:
    layer = nn.Linear(n_in, n_out, bias=False)
    nn.init.normal_(layer.weight, std=0.8 * gain * n_in**-0.5)
    return layer


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """RoPE on interleaved pairs (2j, 2j+1). x [..., S, dr], angle [S, dr/2]."""
    u, v = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((u * cos - v * sin, u * sin + v * cos), -1).flatten(-2)


class Attention(nn.Module):
    """MLA in its expanded form: queries, keys and values are built from two normed latents."""

    def __init__(self, c: dict[str, Any], gain: float) -> None:
        super().__init__()
        d, heads, self.r = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"]
        self.heads, self.dn, self.dr, self.dv = heads, c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
        self.q_a_proj = linear(d, c["q_lora_rank"])
        self.q_a_layernorm = RMSNorm(c["q_lora_rank"])
        self.q_b_proj = linear(c["q_lora_rank"], heads * (self.dn + self.dr))
        self.kv_a_proj_with_mqa = linear(d, self.r + self.dr)
        self.kv_a_layernorm = RMSNorm(self.r)
        self.kv_b_proj = linear(self.r, heads * (self.dn + self.dv))
        self.o_proj = linear(heads * self.dv, d, gain)

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        """x [B, S, d] -> [B, S, d]."""
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q_nope, q_rope = q.split([self.dn, self.dr], -1)  # [B, H, S, dn], [B, H, S, dr]
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([self.r, self.dr], -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k_nope, v = kv.split([self.dn, self.dv], -1)
        k_rope = rotate(k_rope, angle)[:, None].expand(-1, self.heads, -1, -1)  # one rope key, shared by all heads
        q = torch.cat((q_nope, rotate(q_rope, angle).to(v.dtype)), -1)
        k = torch.cat((k_nope, k_rope.to(v.dtype)), -1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # scale (dn + dr)^-0.5
        result: Tensor = self.o_proj(out.transpose(1, 2).flatten(-2))
        return result


class MLP(nn.Module):
    def __init__(self, d: int, width: int, gain: float) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = linear(d, width), linear(d, width), linear(width, d, gain)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Router(nn.Module):
    """noaux_tc: the bias decides who is chosen, never how much a chosen expert counts. Always f32."""

    e_score_correction_bias: Tensor

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.c = c
        self.weight = nn.Parameter(torch.randn(c["n_routed_experts"], c["hidden_size"]) * 0.02)
        self.register_buffer("e_score_correction_bias", torch.zeros(c["n_routed_experts"]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, d] -> expert indices [N, k] and weights [N, k] f32."""
        c, groups = self.c, self.c["n_group"]
        with torch.autocast(x.device.type, enabled=False):
            scores = torch.sigmoid(x.float() @ self.weight.t())  # [N, E]
        choice = scores.detach() + self.e_score_correction_bias
        group_score = choice.unflatten(-1, (groups, -1)).topk(2, -1).values.sum(-1)  # [N, G]
        kept = torch.zeros_like(group_score, dtype=torch.bool)
        kept.scatter_(1, group_score.topk(c["topk_group"], -1).indices, True)
        allowed = kept.repeat_interleave(c["n_routed_experts"] // groups, -1)
        idx = choice.masked_fill(~allowed, -math.inf).topk(c["num_experts_per_tok"], -1).indices
        weight = scores.gather(1, idx)
        return idx, weight / (weight.sum(-1, keepdim=True) + 1e-20) * c["routed_scaling_factor"]


class MoE(nn.Module):
    def __init__(self, c: dict[str, Any], gain: float) -> None:
        super().__init__()
        d, width = c["hidden_size"], c["moe_intermediate_size"]
        self.gate = Router(c)
        self.experts = nn.ModuleList(MLP(d, width, gain) for _ in range(c["n_routed_experts"]))
        self.shared_experts = MLP(d, width * c["n_shared_experts"], gain)
        self.load: Tensor | None = None  # [E] tokens per expert of the last training step

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        idx, weight = self.gate(rows)
        if self.training:
            self.load = torch.bincount(idx.flatten(), minlength=len(self.experts)).float()
        y = self.shared_experts(rows).float()
        for e, expert in enumerate(self.experts):
            row, slot = (idx == e).nonzero(as_tuple=True)
            y = y.index_add(0, row, expert(rows[row]).float() * weight[row, slot, None])
        out: Tensor = y.view_as(x)
        return out


class DecoderLayer(nn.Module):
    def __init__(self, c: dict[str, Any], moe: bool) -> None:
        super().__init__()
        d, gain = c["hidden_size"], (2 * c["num_hidden_layers"]) ** -0.5
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(d), RMSNorm(d)
        self.self_attn = Attention(c, gain)
        self.mlp = MoE(c, gain) if moe else MLP(d, c["intermediate_size"], gain)

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), angle)
        y: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return y


class MtpLayer(DecoderLayer):
    """Joins the embedding of the next token with the main model's final hidden state, and looks one token further."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__(c, moe=True)
        d = c["hidden_size"]
        self.enorm, self.hnorm, self.eh_proj = RMSNorm(d), RMSNorm(d), linear(2 * d, d)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(d)})

    def mtp(self, embedding: Tensor, hidden: Tensor, angle: Tensor) -> Tensor:
        z = self.eh_proj(torch.cat((self.enorm(embedding), self.hnorm(hidden)), -1)).float()
        y: Tensor = self.shared_head["norm"](self(z, angle))
        return y


class Decoder(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        n = c["num_hidden_layers"]
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(DecoderLayer(c, i >= c["first_k_dense_replace"]) for i in range(n))
        self.layers.append(MtpLayer(c))  # stored as one more layer, run only by StoryModel.mtp_hidden
        self.norm = RMSNorm(c["hidden_size"])
        nn.init.normal_(self.embed_tokens.weight, std=0.1)


class StoryModel(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.model = Decoder(c)
        self.lm_head = nn.Linear(c["hidden_size"], c["vocab_size"], bias=False)
        nn.init.normal_(self.lm_head.weight, std=0.02)
        dr = c["qk_rope_head_dim"]
        self.frequency = c["rope_theta"] ** (-torch.arange(0, dr, 2, dtype=torch.float32) / dr)  # [dr/2]

    def angles(self, n: int) -> Tensor:
        device = self.lm_head.weight.device
        return torch.outer(torch.arange(n, device=device), self.frequency.to(device))  # [n, dr/2]

    def hidden(self, ids: Tensor) -> Tensor:
        """ids [B, S] -> hidden states after the final norm [B, S, d]: what the head and the MTP layer read."""
        x: Tensor = self.model.embed_tokens(ids)
        for layer in list(self.model.layers)[:-1]:
            x = layer(x, self.angles(ids.shape[1]))
        h: Tensor = self.model.norm(x)
        return h

    def mtp_hidden(self, next_ids: Tensor, hidden: Tensor) -> Tensor:
        """next_ids [B, S]: the tokens that follow each position; hidden [B, S, d] -> normed MTP states [B, S, d]."""
        mtp = self.model.layers[-1]
        assert isinstance(mtp, MtpLayer)
        return mtp.mtp(self.model.embed_tokens(next_ids), hidden, self.angles(next_ids.shape[1]))

    def losses(self, window: Tensor) -> tuple[Tensor, Tensor]:
        """window [B, S+2] -> cross entropies: position i predicts token i+1 (main) and token i+2 (MTP)."""
        n = window.shape[1] - 2
        h = self.hidden(window[:, :n])
        g = self.mtp_hidden(window[:, 1 : n + 1], h)

        def entropy(state: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(self.lm_head(state).float().flatten(0, 1), target.flatten())

        return entropy(h, window[:, 1 : n + 1]), entropy(g, window[:, 2:])

    def moes(self) -> list[MoE]:
        return [module for module in self.modules() if isinstance(module, MoE)]


# --- text ---------------------------------------------------------------------------------------------------------
def read_documents(path: Path) -> list[str]:
    data = path.read_bytes()
    text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8")
    return [doc for part in text.split(EOS) if (doc := part.replace(BOS, "").strip())]


def train_tokenizer(documents: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE; every encoded text begins with BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> list[npt.NDArray[np.uint16]]:
    """Each document as [BOS, ..., EOS]."""
    return [np.array([*e.ids, 1], np.uint16) for e in tokenizer.encode_batch(documents)]


def batches(documents: list[npt.NDArray[np.uint16]], n: int, context: int, seed: int) -> Iterator[Tensor]:
    """Endless [n, context+2] batches: shuffled documents end to end, cut into windows, windows shuffled every epoch."""
    rng = np.random.default_rng(seed)
    stream = np.concatenate([documents[i] for i in rng.permutation(len(documents))]).astype(np.int64)
    starts = np.arange(0, len(stream) - context - 1, context)
    if len(starts) < n:
        raise SystemExit(f"{len(stream)} tokens are too few for one batch of {n} windows of {context}")
    while True:
        rng.shuffle(starts)
        for i in range(0, len(starts) - n + 1, n):
            yield torch.from_numpy(np.stack([stream[s : s + context + 2] for s in starts[i : i + n]]))


# --- training -----------------------------------------------------------------------------------------------------
def save_checkpoint(out: Path, c: dict[str, Any], model: StoryModel, tokenizer: Tokenizer) -> None:
    weights = {
        name: value.detach().cpu().to(torch.float32 if name.endswith("correction_bias") else torch.bfloat16)
        for name, value in model.state_dict().items()
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    generation = {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "add_bos_token": True,
        "clean_up_tokenization_spaces": False, "model_max_length": c["max_position_embeddings"],
    }  # fmt: skip
    files = {"config": c, "generation_config": generation, "tokenizer_config": tokenizer_config}
    for name, content in files.items():
        (out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    (out / "chat_template.jinja").write_text(TEMPLATE)


def append(path: Path, line: str) -> None:
    with path.open("a") as f:
        f.write(line + "\n")


@torch.no_grad()
def validate(model: StoryModel, documents: list[npt.NDArray[np.uint16]], context: int, device: str) -> list[float]:
    """Mean main and MTP loss over at most 32 windows of one source's held-out documents."""
    stream = torch.from_numpy(np.concatenate(documents).astype(np.int64))
    context = min(context, len(stream) - 2)
    windows = [stream[i : i + context + 2] for i in range(0, len(stream) - context - 1, context)][:32]
    model.eval()
    losses = [[x.item() for x in model.losses(w[None].to(device))] for w in windows]
    model.train()
    return [float(x) for x in np.mean(losses, 0)]


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Run the recipe and write the checkpoint. Returns the first and last logged losses."""
    torch.manual_seed(args.seed)
    out, c = args.out, dict(CONFIG)
    c.update({key: json.loads(value) for key, value in (item.split("=", 1) for item in args.set)})
    context = args.context
    out.mkdir(parents=True, exist_ok=True)

    held_out: dict[str, list[str]] = {}
    sources: dict[str, tuple[list[str], list[int]]] = {}
    for item in args.text:
        name, _, rest = item.partition("=")
        path, *repeats = rest.split(":")
        documents = read_documents(Path(path))
        random.Random(name).shuffle(documents)
        n = max(1, len(documents) // 50)
        held_out[name] = documents[:n]
        first = int(repeats[0]) if repeats else 1
        sources[name] = documents[n:], [first, int(repeats[1]) if len(repeats) > 1 else first]
    tokenizer = train_tokenizer([d for docs, _ in sources.values() for d in docs[:5000]], c["vocab_size"])
    c["vocab_size"] = tokenizer.get_vocab_size()  # smaller than asked for only on tiny texts
    encoded = {name: encode(tokenizer, docs) for name, (docs, _) in sources.items()}
    valid = {name: encode(tokenizer, docs) for name, docs in held_out.items()}
    (out / "valid_docs.json").write_text(json.dumps(held_out))
    n_rows = args.batch // context
    mixtures = [[d for name, docs in encoded.items() for d in docs * sources[name][1][p]] for p in (0, 1)]
    phases = [batches(docs, n_rows, context, args.seed + p) for p, docs in enumerate(mixtures)]

    model = StoryModel(c).to(args.device)
    decay = [p for p in model.parameters() if p.dim() > 1]
    no_decay = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": no_decay, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))
    log, valid_log = out / "log.csv", out / "valid.csv"
    log.write_text("step,tokens,main_loss,mtp_loss,lr,tok_per_s,grad_norm,max_load,min_load\n")
    valid_log.write_text("step,source,main_loss,mtp_loss\n")
    history, since = [], time.perf_counter()
    for step in range(args.steps):
        progress = step / args.steps
        phase, mtp_weight = (0, 0.3) if progress < PHASE_2_AT else (1, 0.1)
        warm_up = min(1.0, (step + 1) / min(200, 1 + args.steps // 10))
        lr = args.lr * warm_up * (0.04 + 0.96 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        window = next(phases[phase]).to(args.device)
        autocast = torch.autocast(args.device, torch.bfloat16) if args.bf16 else contextlib.nullcontext()
        with autocast:
            main_loss, mtp_loss = model.losses(window)
        optimizer.zero_grad()
        (main_loss + mtp_weight * mtp_loss).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        if not math.isfinite(norm):
            raise SystemExit(f"step {step}: the gradient is not finite")
        optimizer.step()
        # Load balance without a loss: an expert that got too many tokens becomes a little harder to choose.
        rate = 5e-3 if progress < 0.1 else 1e-3 if progress < 0.9 else 0.0
        loads = torch.stack([moe.load for moe in model.moes() if moe.load is not None])  # [layers, E]
        for moe, load in zip(model.moes(), loads, strict=True):
            moe.gate.e_score_correction_bias += rate * torch.sign(load.mean() - load)
        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            speed = args.log_every * args.batch / (time.perf_counter() - since)
            since = time.perf_counter()
            share = loads / loads.mean(1, keepdim=True)
            a, b = main_loss.item(), mtp_loss.item()
            history.append((a, b))
            row = f"{step + 1},{(step + 1) * args.batch},{a:.4f},{b:.4f},{lr:.6f},{speed:.0f},{norm:.3f}"
            append(log, f"{row},{share.max():.2f},{share.min():.2f}")
            print(f"step {step + 1}/{args.steps}  loss {a:.3f}  mtp {b:.3f}  {speed:.0f} tok/s", flush=True)
        if (step + 1) % args.valid_every == 0 or step + 1 == args.steps:
            for name, held in valid.items():
                a, b = validate(model, held, context, args.device)
                append(valid_log, f"{step + 1},{name},{a:.4f},{b:.4f}")
                print(f"  held out {name}: loss {a:.3f}  mtp {b:.3f}")
            save_checkpoint(out, c, model, tokenizer)
    return {"model": model.eval(), "tokenizer": tokenizer, "history": history}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE[:N1[:N2]]")
    parser.add_argument("--steps", type=int, default=5646)
    parser.add_argument("--batch", type=int, default=8192, help="tokens per step")
    parser.add_argument("--context", type=int, default=512, help="tokens per window")
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="bf16 matrix products (f32 weights, norms, router, loss)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="override a config value")
    parser.add_argument("--log-every", type=int, default=25)
    parser.add_argument("--valid-every", type=int, default=500, help="steps between validations and checkpoints")
    return parser


if __name__ == "__main__":
    options = arguments().parse_args()
    train(options)
    deepcalm.pack(options.out, options.out / "demo.dcalm", dtype="q8", force=True)
