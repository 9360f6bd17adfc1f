"""The examples of docs/examples: what they compute, and that they run."""

from __future__ import annotations

import builtins
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

import deepcalm
import models

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"


def run(name: str, *args: str | Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPCALM_THREADS", "1")
    monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def chat(path: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rest = iter(lines)
    monkeypatch.setattr(builtins, "input", lambda _: next(rest, ""))
    run("chat_loop.py", path, monkeypatch=monkeypatch)


@pytest.mark.parametrize("template", [True, False], ids=["template", "text"])
def test_examples_chat_loop_keeps_the_cache(
    template: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = models.packed() if template else models.without_template()
    assert deepcalm.Model(path).has_chat_template == template
    generate = deepcalm.Session.generate
    calls: list[tuple[int, int]] = []  # tokens kept, tokens given

    def short(self: deepcalm.Session, ids: list[int], **options: object) -> deepcalm.Generation:
        calls.append((self.pos, len(ids)))
        return generate(self, ids, **{**options, "max_tokens": 8})  # type: ignore[arg-type]

    monkeypatch.setattr(deepcalm.Session, "generate", short)
    chat(path, ["Once upon a time", " Then"], monkeypatch)
    said = capsys.readouterr().out
    assert len(calls) == 2 and calls[0][0] == 0 and calls[1][0] >= calls[0][1]
    assert [f"; {kept} of {kept + given} tokens from the cache]" in said for kept, given in calls] == [True, True]


def test_examples_chat_loop_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"chat_loop: .*none\.dcalm"):
        chat(tmp_path / "none.dcalm", ["Hello"], monkeypatch)


def test_examples_routing_has_every_chosen_expert_once() -> None:
    model = models.model()
    ids = [3, 7, 5, 9]
    layers = runpy.run_path(str(EXAMPLES / "routing.py"))["routing"](model, ids)
    with model.session(ctx=8) as session, session.trace() as taps:
        session.prefill(ids)
    assert list(layers) == list(range(model.config.first_k_dense_replace, model.config.num_hidden_layers))
    for i, weights in layers.items():
        assert weights.shape == (model.config.n_routed_experts, len(ids)) and weights.dtype == np.float32
        for n in range(len(ids)):
            chosen, of = taps[f"layers.{i}.topk_idx"][n], taps[f"layers.{i}.topk_weight"][n]
            assert set(np.flatnonzero(weights[:, n])) == set(chosen)
            assert weights[chosen, n].tolist() == of.tolist()


def test_examples_routing_draws_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    run("routing.py", "--out", tmp_path / "r.png", monkeypatch=monkeypatch)
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
