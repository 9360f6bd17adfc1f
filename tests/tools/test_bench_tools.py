"""The measuring tools: the GGUF file that llama.cpp is given, what is made of the rounds of a row."""

from __future__ import annotations

import argparse
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bench_amx
import bench_batch
import bench_draft
import bench_drafters
import bench_peers
import bench_plot
import bench_rows
import gguf_synthetic
import jsonl
import lab
import models
import quality
import tiny
from deepcalm import _core, drafting
from deepcalm.check.perplexity import log_softmax

SIZES = ("hidden_size=64", "num_attention_heads=2", "kv_lora_rank=32", "qk_nope_head_dim=32", "qk_rope_head_dim=32",
         "v_head_dim=32", "intermediate_size=96", "moe_intermediate_size=32", "n_routed_experts=4", "vocab_size=64",
         "num_hidden_layers=2", "num_experts_per_tok=2")  # fmt: skip


class Reader:
    """A GGUF file, read from its published layout alone."""

    def __init__(self, path: Path) -> None:
        self.data, self.at = path.read_bytes(), 0
        assert self.take("4s") == b"GGUF" and self.take("I") == 3
        n_tensors, n_keys = self.take("Q"), self.take("Q")
        self.keys = {self.text(): self.value() for _ in range(n_keys)}
        self.tensors = {}
        for _ in range(n_tensors):
            name = self.text()
            shape = [self.take("Q") for _ in range(self.take("I"))]
            self.tensors[name] = (shape, self.take("I"), self.take("Q"))
        self.at += -self.at % self.keys["general.alignment"]

    def take(self, form: str) -> Any:
        (value,) = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return value

    def text(self) -> str:
        return str(self.take(f"{self.take('Q')}s").decode())

    def value(self) -> Any:
        kind = self.take("I")
        return self.text() if kind == 8 else self.take({4: "I", 6: "f", 7: "?"}[kind])

    def values(self, name: str) -> np.ndarray[Any, Any]:
        """Values of a tensor as f64, decoded block by block."""
        shape, kind, offset = self.tensors[name]
        n = int(np.prod(shape))
        raw = np.frombuffer(self.data, np.uint8, offset=self.at + offset)
        if kind in (0, 30):
            if kind == 0:
                return raw[: 4 * n].view("<f4").astype(np.float64)
            return (raw[: 2 * n].view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        size = {2: 18, 8: 34}[kind]
        blocks = raw[: n // 32 * size].reshape(-1, size)
        scale = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float64)
        codes = blocks[:, 2:].view(np.int8).astype(np.float64)
        if kind == 2:
            codes = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], 1).astype(np.float64) - 8
        return (codes * scale).reshape(-1)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "BF16"])
def test_gguf_holds_every_matrix_in_one_type(tmp_path: Path, kind: str) -> None:
    size = gguf_synthetic.write(tmp_path / "m.gguf", "v2-lite", kind, SIZES)
    f = Reader(tmp_path / "m.gguf")
    assert f.keys["general.architecture"] == "deepseek2" and f.keys["deepseek2.attention.key_length_mla"] == 64
    assert f.keys["deepseek2.attention.q_lora_rank"] == 0
    assert f.tensors["blk.1.ffn_down_exps.weight"][0] == [32, 64, 4]
    assert f.tensors["blk.0.attn_k_b.weight"][0] == [32, 32, 2]
    number = {"Q8_0": 8, "Q4_0": 2, "BF16": 30}[kind]
    for name, (shape, found, offset) in f.tensors.items():
        plain = len(shape) == 1 or "gate_inp" in name
        assert found == (0 if plain else number) and offset % 32 == 0, name
        values = f.values(name)
        assert values.size == np.prod(shape) and np.isfinite(values).all(), name
    head = f.values("output.weight")
    assert head.std() * 64**0.5 == pytest.approx(2, rel=0.06) and abs(head.mean()) < 0.05
    last = max(f.tensors, key=lambda name: f.tensors[name][2])
    elems, block = {0: (1, 4), 2: (32, 18), 8: (32, 34), 30: (1, 2)}[f.tensors[last][1]]
    n_bytes = f.values(last).size // elems * block
    assert size == f.at + f.tensors[last][2] + -(-n_bytes // 32) * 32


def a_round(ours: float, peer: float, probes: tuple[float, float]) -> dict[str, Any]:
    both = [{"rate": ours, "gb_s": 9.0}] * 2
    return {"probes": [{"all": p, "one": p} for p in probes], "ours": both, "peer": [{"rate": peer}], "others": 0.0,
            "stolen": 0.0}  # fmt: skip


def test_peers_keep_pairs_whose_probes_agree() -> None:
    row = {"rounds": [a_round(10, 5, (10, 11)), a_round(30, 5, (10, 20)), a_round(12, 5, (10, 10))]}
    s = bench_peers.summary(row)
    assert (s["agree"], s["of"]) == (2, 3)
    assert s["ratio"] == pytest.approx(2.2) and (s["low"], s["high"]) == (2.0, pytest.approx(2.4))
    assert s["share"] == pytest.approx((9 / 10.5 + 9 / 10) / 2) and s["read"] == (10, 20)
    mine = {"probes": [{"all": 10.0}] * 2, "ours": [{"rate": 8.0, "gb_s": 9.0}], "others": 0.1, "stolen": 0.25}
    theirs = [{"probes": [{"all": p}] * 2, "peer": [{"rate": r}], "others": 0.0, "stolen": 0.0}
              for p, r in ((13.0, 4.0), (13.0, 4.0), (11.0, 2.0))]  # fmt: skip
    s = bench_peers.summary({"rounds": [mine], "peer_rounds": theirs[:2]})
    assert (s["ratio"], s["agree"], s["of"], s["share"], s["others"]) == (2, 0, 2, 0.9, 0.35)
    s = bench_peers.summary({"rounds": [mine], "peer_rounds": theirs})
    assert (s["ratio"], s["agree"], s["of"]) == (4, 1, 3)


def test_the_goal_of_a_pair_follows_from_its_probes() -> None:
    pair = a_round(10, 4, (20, 30)) | {"bf16": [{"rate": 9.0, "gb_s": 8.0}]}
    for p, f32 in zip(pair["probes"], (90.0, 110.0), strict=True):
        p |= {"f32": f32, "bf16": 50.0}
    row = {"what": "decode", "layers": 2, "context": 4000, "rounds": [pair]}
    weights, operations = 0.9 - 8000 * 1152e-9, 8000 * 34816e-9  # GB, 1e9 of a step
    aim = 1 / (weights / (0.9 * 25) + operations / 65)
    assert bench_peers.summary(row)["goal"] == pytest.approx(aim / 4)
    aim = 1 / (weights / (0.9 * 25) + operations / 30)
    assert bench_peers.summary(row, "bf16")["goal"] == pytest.approx(aim / 4)
    assert bench_peers.summary(row | {"what": "prefill"})["goal"] == 0


def test_a_row_is_measured_until_enough_pairs_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    probes = iter([(10, 20), (10, 11), (20, 10), (10, 10), *[(10, 20)] * 9])
    monkeypatch.setattr(bench_peers, "measure", lambda *_: a_round(2, 1, next(probes)))
    args = argparse.Namespace(rounds=2, tokens=1, repeats=1)
    row = bench_peers.Row(bench_peers.CASES[0], 1, "decode", 0)
    assert len(bench_peers.run_row(row, (), Path(), Path(), Path(), args)) == 4
    assert len(bench_peers.run_row(row, (), Path(), Path(), Path(), args)) == 4  # none agrees: no more than twice


def test_speed_over_the_goal() -> None:
    stages = [{"stage": "attention", "calls": 20, "seconds": 0.5, "bytes": 2e9}, {"stage": "head", "calls": 10}]
    row = {"stages": stages, "bytes_per_token": 1.1e9, "attention_rate": 65.0, "attention_ceiling": 100.0,
           "read_bandwidth": {"median": 10.0}, "rate": {"median": 5.0}}  # fmt: skip
    # 0.9e9 bytes at 9 GB/s, 65 / 10 / 2 = 3.25e9 operations at 65 e9/s: 0.15 s of 0.2
    assert bench_rows.of_goal(row, "f16") == pytest.approx(0.75)
    assert bench_rows.of_goal(row, "bf16") == pytest.approx((0.1 + 3.25 / 60) * 5)


def test_results_are_saved_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    first = bench_rows.Results(path, again=False)
    first.head["command"] = "c"
    first.add("a", {"n": 123456, "rate": [1.23456, {"low": 0.000123456}]})
    again = bench_rows.Results(path, again=False)
    assert again.has("a") and not again.has("b") and again.rows == first.rows and again.head == first.head
    assert path.read_text() == (
        '{"command": "c"}\n{"key": "a", "n": 123456, "rate": [1.235, {"low": 0.0001235}]}\n'
    )  # a row a line, four significant digits
    assert not bench_rows.Results(path, again=True).has("a")


@pytest.mark.parametrize("folder", [bench_rows.DOCS, bench_rows.DOCS / "zen4"], ids=["xeon", "zen4"])
def test_the_tables_of_the_docs_are_made_from_the_rows_beside_them(folder: Path) -> None:
    for name, tool in (("rows", bench_rows), ("peers", bench_peers)):
        results = bench_rows.Results(folder / f"{name}.jsonl", again=False)
        assert tool.markdown(results) == (folder / f"{name}.md").read_text()
    name, page = ("draft", bench_draft) if folder == bench_rows.DOCS else ("drafters", bench_drafters)
    assert page.markdown(jsonl.read(folder / f"{name}.jsonl")) == (folder / f"{name}.md").read_text()


def test_a_result_of_bench_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    decode = [{"context": c, "rate": {"median": 100 / (1 + c)}, "bound_rate": 120.0} for c in (0, 1, 2)]
    run = {"file": "m.dcalm", "isa": "scalar", "kv": "f16", "threads": 1, "machine": lab.machine(), "decode": decode}
    bench_plot.draw([run, run | {"threads": 2}], tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert re.fullmatch(r"([0-9a-f]{9}(-dirty)?)?", lab.commit())


def test_draft_page_says_which_controller_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    head, *rows = jsonl.read(Path(bench_draft.__file__).parents[1] / "docs" / "perf" / "draft.jsonl")
    head["auto"]["controller"] = bench_draft.controller()
    assert "LIMIT" in head["auto"]["controller"]
    assert "\nThe controller is the present one.\n" in bench_draft.markdown([head, *rows])
    monkeypatch.setattr(drafting, "PLAIN_FIRST", 9)
    text = bench_draft.markdown([head, *rows])
    assert "With an older controller" in text and "Then: PLAIN_FIRST 6. Now: PLAIN_FIRST 9. " in text


def test_batch_rows_and_gaps_of_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script as it is run, its table, and that its prediction holds where routing is as good as random."""
    out = tmp_path / "batch.jsonl"
    sizes = {"prompt": 9, "tokens": 12, "long": 150, "repeats": 2, "threads": 1, "model": models.packed(), "out": out}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr("sys.argv", ["bench_batch.py", *options, "--counts", "1", "4"])
    monkeypatch.setattr(_core, "read_bandwidth", lambda _threads: 10.0)
    assert bench_batch.main() == 0
    head, *rows = jsonl.read(out)
    assert [(r["n"], r["how"]) for r in rows] == [(1, "greedy"), (4, "greedy"), (1, "top_p 0.9"), (4, "top_p 0.9")]
    for r in rows:
        assert r["bytes_per_token"]["low"] == r["bytes_per_token"]["high"] and len(r["sha256"]) == 16
        assert r["bytes_per_token"]["median"] == pytest.approx(r["predicted_bytes"], rel=0.12)
        assert r["union"]["median"] == pytest.approx(r["predicted_union"], rel=0.25)
    assert len({r["sha256"] for r in rows}) == 4 and head["gaps"]["steps"] == 3  # of 64 rows
    text = out.with_suffix(".md").read_text()
    assert text.count("\n| 4 |") == 2 and "Longest time between two tokens of 8 answers" in text


@pytest.mark.skipif("amx" not in models.ISAS, reason="no avx512x here, on which amx is emulated")
def test_amx_beside_avx512x(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"model": models.packed(), "prompts": 9, "rounds": 2, "threads": 1}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr("sys.argv", ["bench_amx.py", *options])
    assert bench_amx.main() == 0
    out = capsys.readouterr().out
    assert ("EMULATED: not measured" in out) == any(i["emulated"] for i in _core.isas())
    assert [line.split(" | ")[1] for line in out.splitlines()[-3:]] == [
        "prefill of 9, tok/s", "decode of a row, GB/s", "8 rows, GB/s"
    ]  # fmt: skip


def test_batch_rows_whose_texts_differ_are_no_result() -> None:
    runs = [{"rate": 1.0, "texts": [[1, 2]]}, {"rate": 3.0, "texts": [[1, 3]]}]
    with pytest.raises(SystemExit, match="different tokens"):
        bench_batch.summary(runs)
    assert bench_batch.summary([runs[0], runs[0]])["rate"] == {"median": 1.0, "low": 1.0, "high": 1.0}


def test_quality_tells_cache_types_apart() -> None:
    model, ids = models.model("moonlight"), tiny.token_ids(tiny.N_TOKENS, 100).tolist()
    cells = [c.strip() for c in quality.caches(model, ids, 64).split("|")]
    kl = {kv: float(cell.split()[0]) for kv, cell in zip(quality.CACHES, cells[::2], strict=False)}
    assert 0 < kl["f16"] < kl["bf16"] / 30 and kl["f16"] < kl["q8"] / 30
    rounds = [model.session(kv=kv, mtp=False).prefill(ids[:64], all_logits=True) for kv in ("f32", "bf16")]
    p, q = (log_softmax(x) for x in rounds)
    monolith = (np.exp(p) * (p - q)).sum(axis=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "ROWS", 7)
        cells = [c.strip() for c in quality.caches(model, ids[:64], 64).split("|")]
    assert float(cells[2].split()[0]) == pytest.approx(monolith.mean(), rel=0.01)
