"""bench: what it counts against independent counts, the report, the command; memory of a process that decodes."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import commands
import deepcalm
import models
from deepcalm import _core, cli
from deepcalm.errors import SessionError
from deepcalm.files import packed
from deepcalm.measure import bench, drafts, machine, report, synthetic


@pytest.fixture(autouse=True)
def _cheap_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    commands.cheap_probes(monkeypatch)


@pytest.fixture(scope="module")
def result() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        commands.cheap_probes(patch)
        model = deepcalm.Model(models.packed(dtype="q8"), threads=2)
        yield bench.bench(model, 40, (0, 7, 70), decode_tokens=3, repeats=3, random_weights=True)


def test_bench_stages_add_up(result: Any) -> None:
    p = result.prefill
    assert sum(s.seconds for s in p.stages) == pytest.approx(p.seconds)
    assert sum(s.operations for s in p.stages) == 3 * p.operations
    assert p.rate.low <= p.rate.median <= p.rate.high and p.stages[-1].stage == "outside passes"
    assert p.instruction_share.median < p.kernel_share.median
    assert [d.context for d in result.decode] == [0, 7, 70]
    for d in result.decode:
        assert sum(s.seconds for s in d.stages) == pytest.approx(d.seconds)
        assert sum(s.bytes for s in d.stages) == pytest.approx(9 * d.bytes_per_token, abs=9)
        assert abs(d.bytes_per_token / d.active_bytes_per_token - 1) < 0.05
        assert d.share.median == pytest.approx(d.bandwidth.median / 20)
        assert 0 < d.bound_share.low <= d.bound_share.median and d.attention_ceiling == 100
    assert result.decode[2].bytes_per_token > result.decode[1].bytes_per_token > result.decode[0].bytes_per_token
    e = result.experts
    assert e.finite and 0 < e.busiest_share < 1 and e.tokens == 40
    m = result.memory
    assert m.resident == m.mapped + m.cache + m.other > 10 << 20


@pytest.mark.parametrize("preset", ["v3", "v2_lite"])
def test_operations_are_those_of_the_configuration(preset: str) -> None:
    """Two multiply-adds per weight that a token meets, from config.json's sizes; attention in its absorbed form."""
    model = models.model(preset)
    c, n, pos = model.config, 5, 9
    d, heads, r, dr = c.hidden_size, c.num_attention_heads, c.kv_lora_rank, c.qk_rope_head_dim
    dn, dv, rq, width = c.qk_nope_head_dim, c.v_head_dim, c.q_lora_rank, c.moe_intermediate_size

    def pad(rows: int) -> int:
        return -(-rows // 16) * 16

    q_rows = heads * (dn + dr)
    qkv_a = pad(rq or q_rows) + pad(r + dr)
    attention = qkv_a * d + q_rows * rq + heads * r * (dn + dv) + d * heads * dv
    moe = c.n_routed_experts * d + c.num_experts_per_tok * (2 * pad(width) * d + d * width)
    shared = c.n_shared_experts * width
    moe += 2 * pad(shared) * d + d * shared
    dense = 2 * pad(c.intermediate_size) * d + d * c.intermediate_size
    layers, n_dense = c.num_hidden_layers, c.first_k_dense_replace
    want = 2 * n * (layers * attention + n_dense * dense + (layers - n_dense) * moe) + 2 * c.vocab_size * d
    want += layers * sum(2 * heads * (pos + i + 1) * (r + dr + r) for i in range(n))
    found = bench.operations(model, n, pos)
    assert sum(found.values()) == want
    assert found["attention", "attention"] == layers * sum(2 * heads * (pos + i + 1) * (2 * r + dr) for i in range(n))


@pytest.mark.parametrize("kv", ["f16", "bf16", "f32", "q8"])
def test_fill_makes_a_context_of_random_rows(kv: str) -> None:
    model = models.model()
    session = model.session(128, kv, mtp=False)
    bench.fill(session, 70)
    assert session.pos == 70 and session.last_logits is None
    taps: dict[str, Any]
    with session.trace("layers.1.attn_latent") as taps:
        logits = session.decode(3)
    # A value that softmax mixes from rows of N(0, 1): neither zero nor outside them.
    latent = taps["layers.1.attn_latent"]
    assert np.isfinite(logits).all() and 0.02 < latent.std() < 1.1
    bench.fill(session, 0)
    assert session.pos == 0
    with pytest.raises(SessionError, match="this session holds 128"):
        bench.fill(session, 129)


def test_bench_refuses() -> None:
    model = models.model()
    with pytest.raises(SessionError, match="need 1301 positions, the model has 1280"):
        bench.bench(model, contexts=(0, 1290), decode_tokens=10)
    for bad in ({"repeats": 0}, {"contexts": ()}, {"contexts": (-1,)}):
        with pytest.raises(ValueError, match=">= "):
            bench.bench(model, **bad)  # type: ignore[arg-type]


def test_others_counts_other_processes() -> None:
    others = machine.Others()
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        pass
    quiet, stolen = others.cores()
    others = machine.Others()
    subprocess.run([sys.executable, "-c", "import time; e = time.monotonic() + 0.5\nwhile time.monotonic() < e: pass"],
                   check=True)  # fmt: skip
    busy, _ = others.cores()
    assert quiet >= 0 and stolen >= 0 and busy > 0.4  # this process, waiting for its child, uses nothing


def test_machine_is_described() -> None:
    info = machine.machine()
    assert info["cores"] >= 1 and info["memory_gb"] > 0.1 and info["version"] == _core.__version__
    assert info["processor"] != "unknown" or not Path("/proc/cpuinfo").exists()


# ---- report


def test_report_fits_the_terminal(result: Any) -> None:
    for width in (80, 120):
        text = report.text(result, "deepcalm bench x.dcalm " + "--flag " * 30, width)
        assert max(map(len, text.splitlines())) <= width and "\u2026" not in text
    assert re.search(r"^context 70 +[\d.]+ ", text, re.M) and "random cache rows" in text
    assert text.count("stage by stage") == 3 and text.count("\nwall time") == 3
    for block in text.split("stage by stage")[2:]:  # the stages' ms add up to the last line's
        rows = [line for line in block.splitlines() if re.match(r"[a-z_]+ .*\d\.\d{3}", line)]
        times = [float(re.findall(r"\d+\.\d{3}", line)[0]) for line in rows]
        assert len(times) > 15 and sum(times[:-1]) == pytest.approx(times[-1], abs=0.02)


def measured(r: Any, share: float = 0.8, bound: float = 0.8, ceiling: float = 1e9, **other: Any) -> Any:
    """A result with these numbers: on a quiet machine, without waits."""
    one, stage = bench.Spread.of, dataclasses.replace
    decode = [
        stage(d, share=one([share]), bound_share=one([bound]), attention_ceiling=ceiling, bound_rate=10.0,
              stages=[stage(s, wait_sum=0.0) for s in d.stages]) for d in r.decode
    ]  # fmt: skip
    prefill = stage(r.prefill, kernel_share=one([0.7]), seconds=1e6)
    quiet = {"other_cores": 0.0, "stolen_cores": 0.0, "machine": r.machine | {"cores": 2}, "mtp_layers": 1}
    return stage(r, decode=decode, prefill=prefill, **(quiet | other))


def test_conclusion_follows_from_the_numbers(result: Any) -> None:
    c = report.conclusion(measured(result))
    assert c["what binds"] == (
        "decode at context 0: memory bandwidth; decode at context 70: memory bandwidth; prefill: arithmetic."
    )
    assert c["how far"].startswith("decode at context 0 reaches 80 % of its bound, ")
    assert c["how far"].endswith("prefill reaches 70 % of its bound.")
    assert c["to try"] == "fewer bytes a weight, as pack --dtype q4 has; --draft 2, to see whether drafts pay."
    rows = "".join(f"{k:<12}{v}\n" for k, v in c.items())
    assert report.text(measured(result), "x", 500).endswith("\n\n" + rows + "\n")

    plain = measured(result, kernels={"q4": 1.0}, mtp_layers=0)
    assert report.conclusion(plain).keys() == {"what binds", "how far"}
    slow = report.conclusion(measured(result, ceiling=1e-9))
    assert slow["what binds"].count("attention's arithmetic") == 2 and "to try" not in slow
    cached = report.conclusion(measured(result, share=1.5))
    assert "not memory, the weights stay in the processor's caches" in cached["what binds"]
    assert cached["how far"] == "prefill reaches 70 % of its bound." and "to try" not in cached
    far = report.conclusion(measured(result, bound=0.3, other_cores=1.5))
    assert re.search(r"each explains less than half of the time; \w+( \w+)* loses most, [\d.]+ ms", far["what binds"])
    assert far["to try"] == "a quieter machine, 1.5 cores were not ours."
    more = report.conclusion(measured(result, machine=result.machine | {"cores": 8}))
    assert more["to try"].startswith("--threads 2,4, for there are 8 cores; ")
    waiting = measured(result)
    waits = [dataclasses.replace(s, wait_sum=s.seconds) for s in waiting.decode[0].stages]
    waiting.decode[0] = dataclasses.replace(waiting.decode[0], stages=waits)
    assert report.conclusion(waiting)["to try"].startswith("--threads 1,2, for 50 % of a step are waits at barriers; ")


def test_conclusion_of_drafts() -> None:
    model = models.model()
    r = drafts.bench_draft(model, 2, 1.0, 8, 6, 2)
    for speedup, acceptance, says, then in (
        ((1.2, 1.3), 0.9, "drafts pay: 1.25 times plain with 90 % of them right.", "--draft 3."),
        ((1.2, 1.3), 0.7, "drafts pay", None),
        ((0.9, 1.1), 0.9, "drafts change nothing", None),
        ((0.6, 0.7), 0.1, "drafts do not pay: 0.65 times", "--draft 1."),
    ):
        c = report.draft_conclusion(
            dataclasses.replace(r, speedup=bench.Spread.of([*speedup]), acceptance=acceptance, tokens_per_pass=2.5)
        )
        assert c["what binds"].startswith(says) and c.get("to try") == then
        assert c["how far"].startswith("2.50 of at most 3 tokens a pass")


def test_linear_cost_recovers_a_line() -> None:
    assert report.linear_cost([0, 10], [200, 170]) is None
    contexts = [0, 1024, 4096]
    a, b, off = report.linear_cost(contexts, [1e3 / (5 + 0.01 * c) for c in contexts]) or (0, 0, 0)
    assert (a, b) == (pytest.approx(5), pytest.approx(0.01)) and off < 1e-9
    *_, off = report.linear_cost(contexts, [1e3 / ms for ms in (5, 30, 46)]) or (0, 0, 0)
    assert off > 0.2


def test_bench_fits_its_defaults_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short maximum context, as the demo model's: no default is too long for it."""
    model = models.model()
    monkeypatch.setitem(model.config._values, "max_position_embeddings", 40)
    r = bench.bench(model, repeats=1)
    assert (r.prefill.tokens, [d.context for d in r.decode]) == (39, [0])
    monkeypatch.setitem(model.config._values, "max_position_embeddings", 1080)
    r = bench.bench(model, repeats=1, decode_tokens=2)
    assert (r.prefill.tokens, [d.context for d in r.decode]) == (512, [0, 1024])
    monkeypatch.setitem(model.config._values, "max_position_embeddings", 40)
    assert drafts.bench_draft(model, 1, repeats=1, decode_tokens=8).context == 30
    with pytest.raises(SessionError, match="the model has 40"):
        bench.bench(model, decode_tokens=40)


# ---- the command

SMALL = ["--prompt", "16", "--tokens", "2", "--repeats", "2"]


def test_bench_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = str(models.packed())
    args = ["bench", path, *SMALL, "--contexts", "8,0", "--threads", "2,1"]
    assert cli.main([*args, "--json-file", str(tmp_path / "r.json")]) == 0
    out = capsys.readouterr().out
    assert out.count("stage by stage") == 6 and "2 threads" in out and "1 thread," in out
    value = json.loads((tmp_path / "r.json").read_text())
    assert [r["threads"] for r in value["runs"]] == [1, 2] and "command" in value
    assert [d["context"] for d in value["runs"][0]["decode"]] == [0, 8]
    assert cli.main([*args, "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == value.keys()
    assert {"what binds"} <= value["runs"][0]["conclusion"].keys() <= {"what binds", "how far", "to try"}
    assert "\nwhat binds  decode at context 0: " in out


def test_bench_synthetic_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    keep = tmp_path / "kept.dcalm"
    sizes = ["hidden_size=64", "vocab_size=512", "intermediate_size=64", "moe_intermediate_size=32", "kv_lora_rank=32",
             "bos_token_id=1", "eos_token_id=2", "n_routed_experts=16"]  # fmt: skip
    args = ["bench", "--synthetic", "v2-lite:2", "--dtype", "q4", *SMALL, "--contexts", "0", "--threads", "1"]
    for s in sizes:
        args += ["--set", s]
    assert cli.main([*args, "--attn-dtype", "f16", "--head-dtype", "bf16", "--keep", str(keep), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["runs"][0]["experts"]["finite"] and re.search(r"v2-lite:2: .* of memory available", err)
    with packed.PackedFile(keep) as f:
        assert f.config["hidden_size"] == 64 and f.config["num_hidden_layers"] == 2
        assert [f.entries[name].format for name in ("layers.0.wo", "head")] == ["f16", "bf16"]
    assert cli.main([*args, "--keep", str(keep)]) == 1
    assert "exists; measure it with" in capsys.readouterr().err
    assert cli.main([*args, "--set", "colour=1"]) == 2
    assert "no key 'colour'" in capsys.readouterr().err
    assert cli.main([*args, "-q"]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"^model +v2-lite:2, ", out, re.MULTILINE) and err == ""


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--isa", "neon"], "'neon' is not one of"),
        (["--contexts", "1,x"], "expected numbers 0..999999999"),
        (["--threads", "0"], "expected numbers 1..1024"),
        (["--threads", "1,5000"], "expected numbers 1..1024"),
        (["--draft", "1", "--contexts", "0"], "a context of at least 1"),
        (["--draft", "1", "--prompt", "64"], "--context N is the length of its prompt"),
        (["--draft", "2", "--tokens", "4"], "--tokens 4: with --draft 2 expected at least 5"),
        (["--synthetic", "v2-lite:99"], "layers '99', expected a number 1..27"),
        (["--accept", "0.5"], "--draft K"),
        (["--draft", "1", "--contexts", "1,2"], "one context"),
        (["--dtype", "q8"], "go with --synthetic"),
        (["x.dcalm", "--synthetic", "v3"], "either FILE"),
        (["--synthetic", "v9"], "unknown model"),
    ],
)
def test_bench_usage(args: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *args]) == 2
    assert text in capsys.readouterr().err


def test_bench_names_a_full_disk_behind_json_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", str(models.packed()), *SMALL, "--contexts", "0", "--json-file", "/dev/full"]) == 1
    assert "deepcalm: error: /dev/full: cannot be written: No space left on device" in capsys.readouterr().err


def test_bench_output_that_cannot_be_written_fails_before_measuring(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "bench", lambda *_, **__: pytest.fail("measured"))
    assert cli.main(["bench", "--json-file", "no/such/file"]) == 1
    assert "deepcalm: error: no/such/file: " in capsys.readouterr().err


# ---- memory

MEMORY_SCRIPT = """
import sys
import deepcalm
model = deepcalm.Model(sys.argv[1], threads=2)
session = model.session(2048)
ids = [(7 * i) % 4000 for i in range(600)]
def kb(key):
    return dict(line.split(":", 1) for line in open("/proc/self/status"))[key].split()[0]
session.decode(7)
few = kb("RssAnon")
session.prefill(ids)
long = kb("RssAnon")
for i in ids[:8]:
    session.decode(i)
cache = session.cache_bytes * session.pos // session.ctx
print(kb("VmRSS"), cache, model.file_bytes, few, long, kb("RssAnon"))
"""


@pytest.mark.parametrize(
    ("spec", "sizes"),
    [pytest.param("v2-lite:3", ["hidden_size=1024", "intermediate_size=2048", "moe_intermediate_size=512"],
                  marks=pytest.mark.exhaustive),
     ("v3:1", ["first_k_dense_replace=1", "intermediate_size=2048", "num_nextn_predict_layers=0"])],
    ids=["v2-lite", "v3's attention"],
)  # fmt: skip
def test_resident_memory_is_weights_cache_and_little_else(spec: str, sizes: list[str], tmp_path: Path) -> None:
    """All weights of these models are touched; nothing is copied, nothing allocated in their size."""
    path = tmp_path / "m.dcalm"
    sizes = ["vocab_size=4096", "bos_token_id=1", "eos_token_id=2", *sizes]
    synthetic.write_model(path, spec, "q8", overrides=sizes)
    out = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(path)], check=True, capture_output=True, text=True,
        env=commands.environment(),
    ).stdout  # fmt: skip
    kb, cache, weights, few, long, after = map(int, out.split())
    assert weights > 200e6
    assert 0.9 * weights < kb * 1024 < weights + cache + 100e6, (kb * 1024 - weights - cache) / 1e6
    assert long * 1024 < cache + 100e6, (long * 1024 - cache) / 1e6
    # The buffers of 256 rows are given back when decoding starts.
    assert long - few > 10_000 and after - few < cache // 1024 + 4_000, (few, long, after)
