"""tools/train_demo.py: the recipe learns, and what it saves is what transformers and deepcalm read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.reference
DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A two-layer model of width 64 after 40 steps on the held-out texts (a few seconds)."""
    torch = pytest.importorskip("torch")
    import train_demo

    out = tmp_path_factory.mktemp("trained")
    tiny = (
        "hidden_size=64", "num_hidden_layers=2", "intermediate_size=128", "num_attention_heads=2", "q_lora_rank=32",
        "num_key_value_heads=2", "kv_lora_rank=32", "n_routed_experts=8", "num_experts_per_tok=2",
        "moe_intermediate_size=32", "vocab_size=512",
    )  # fmt: skip
    args = [str(out), "--text", f"stories={DATA / 'stories.txt'}:2:1", "--text", f"books={DATA / 'books.txt'}:1:0"]
    args += ["--steps", "40", "--batch", "1024", "--context", "128", "--log-every", "5", "--lr", "5e-3"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    result = train_demo.train(train_demo.arguments().parse_args(args + [f"--set={item}" for item in tiny]))
    torch.set_num_threads(threads)
    return out, result


def test_train_demo_loss_falls_and_is_logged(trained: tuple[Path, dict[str, Any]]) -> None:
    out, result = trained
    first, last = result["history"][0], result["history"][-1]
    assert last[0] < first[0] - 1 and last[1] < first[1] - 1  # nats, main and MTP
    log = (out / "log.csv").read_text().splitlines()
    assert len(log) == 1 + 40 // 5 and log[0].startswith("step,tokens,main_loss,mtp_loss")
    assert {line.split(",")[1] for line in (out / "valid.csv").read_text().splitlines()[1:]} == {"stories", "books"}
    bias = [moe.gate.e_score_correction_bias for moe in result["model"].moes()]
    assert all(0 < b.abs().max() < 0.2 for b in bias)  # the balancing moved every layer's bias


def test_train_demo_checkpoint_gives_the_same_logits_in_transformers(trained: tuple[Path, dict[str, Any]]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, result = trained
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and all(".layers.2." in key for key in info["unexpected_keys"])
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("Once there was a curious little cat named Pepper.", return_tensors="pt").input_ids
    assert ids[0].tolist() == result["tokenizer"].encode("Once there was a curious little cat named Pepper.").ids
    ours = result["model"]
    with torch.no_grad():
        for p in ours.parameters():
            p.copy_(p.bfloat16().float())  # what was saved
        expected = ours.lm_head(ours.hidden(ids))
        got = model(ids).logits
    assert (got - expected).abs().max() < 1e-4 and expected.std() > 0.5
