"""Counters of the passes: bytes against the packed file's own table, stage seconds against the clock on the wall."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

import models
import tiny
from deepcalm import _core

# Which stage reads which tensor of a layer; experts apart.
READERS = {
    "attn_norm": ("attn_norm",),
    "qkv_a": ("wqkv_a",),
    "latent": ("kv_a_norm", "q_a_norm"),
    "q_b": ("wq_b",),
    "w_uk": ("w_uk",),
    "w_uv": ("w_uv",),
    "wo": ("wo",),
    "ffn_norm": ("ffn_norm",),
    "router": ("router",),
    "route": ("router_bias",),
    "experts_up": ("shared.w_gate_up",),
    "experts_down": ("shared.w_down", "post_moe_norm"),
    "ffn_up": ("w_gate_up",),
    "ffn_down": ("w_down",),
}
CASES = [
    ("v2_lite", "bf16", {"dtype": "q8"}, "f16"),
    ("v2_grouped", "bf16", {"dtype": "q4"}, "q8"),
    ("v3", "bf16", {"dtype": "bf16"}, "bf16"),
    ("v3", "f16", {"dtype": "q8"}, "f16"),
    ("gigachat3", "fp8", {"dtype": "source"}, "f32"),
    ("kimi_k2", "int4", {"dtype": "source"}, "f16"),
    ("mistral4", "fp8", {"dtype": "source"}, "f16"),
    ("minicpm3", "bf16", {"dtype": "q8"}, "f16"),
    ("axk1", "bf16", {"dtype": "bf16"}, "f16"),
]


def table_bytes(file: models.PackedFile, name: str) -> int:
    """Bytes of a tensor and its scales; 0 if the model has none of that name."""
    return sum(e.n_bytes for n, e in file.entries.items() if n in (name, name + ".scale"))


def expected_bytes(file: models.PackedFile, taps: dict[str, Any], n: int, pos: int, row_bytes: int) -> dict[str, int]:
    """Stage -> bytes of one pass of n rows after `pos` positions, from the file's table and the experts chosen.

    `taps` decide: those of a main pass have layers, those of an MTP pass the prefix "mtp.".
    """
    cfg, mtp = file.config, "mtp.embed" in taps
    out: dict[str, int] = {}

    def add(stage: str, n_bytes: int) -> None:
        if n_bytes:
            out["mtp." * mtp + stage] = out.get("mtp." * mtp + stage, 0) + n_bytes

    add("embed", n * table_bytes(file, "embed") // cfg["vocab_size"])
    prefixes = ["mtp."] if mtp else [f"layers.{i}." for i in range(cfg["num_hidden_layers"])]
    for p in prefixes:
        for stage, names in READERS.items():
            add(stage, sum(table_bytes(file, p + name) for name in names))
        add("attention", (pos + n) * row_bytes)
        if p + "topk_idx" in taps:
            touched = len(np.unique(taps[p + "topk_idx"]))
            for stage, name in (("experts_up", "experts.w_gate_up"), ("experts_down", "experts.w_down")):
                add(stage, touched * table_bytes(file, p + name) // cfg["n_routed_experts"])
    if mtp:
        add("embed", table_bytes(file, "mtp.enorm") + table_bytes(file, "mtp.hnorm"))
        add("eh_proj", table_bytes(file, "mtp.eh_proj"))
    add("final_norm", table_bytes(file, "mtp.final_norm" if mtp else "final_norm"))
    add("head", table_bytes(file, "mtp.head" if mtp and "mtp.head" in file.entries else "head"))
    return out


def stages(session: Any) -> dict[str, tuple[Any, ...]]:
    return {name: rest for name, *rest in session.stage_stats()}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=[c[0] for c in CASES])
def test_stage_bytes_are_those_of_the_file(case: tuple[str, str, dict[str, str], str], threads: int) -> None:
    preset, source, options, kv = case
    file = models.pack(models.checkpoint(preset, source), **options)
    core = models.open_model(file, models.ISAS[0], threads)
    ids = tiny.token_ids(file.config["vocab_size"], 90, 7)
    session = _core.Session(core, 128, kv, 64)
    expected: dict[str, int] = {}
    passes, begin, hidden = 0, 0, []

    def ran(taps: dict[str, Any], n: int, pos: int) -> None:
        row_bytes = session.read_cache(False).shape[2]
        for stage, n_bytes in expected_bytes(file, taps, n, pos, row_bytes).items():
            expected[stage] = expected.get(stage, 0) + n_bytes
        assert {s: v[1] for s, v in stages(session).items() if v[1]} == expected

    session.trace(["*"])
    for size in (1, 60, 3, 1, 9, 16):  # both ways of dealing attention, passes that cross a chunk
        session.forward(ids[begin : begin + size], "last")
        hidden.append(session.hidden())
        ran(session.taps(), size, begin)
        passes, begin = passes + 1, begin + size
    if file.config["num_nextn_predict_layers"]:
        h = np.concatenate(hidden)
        for a, b in ((0, 40), (40, 41)):
            session.mtp_forward(ids[a + 1 : b + 1], h[a:b], "last")
            ran(session.taps(), b - a, a)
    found, totals = stages(session), session.stats()
    assert found["qkv_a"][0] == passes * file.config["num_hidden_layers"]
    assert found["head"][0] == found["embed"][0] == passes
    cache = sum(v[1] for s, v in found.items() if s.endswith("attention"))
    assert cache == totals["cache_bytes"]
    assert sum(v[1] for v in found.values()) - cache == totals["weight_bytes"]


def test_a_pass_without_logits_reads_no_head() -> None:
    file = models.pack(models.checkpoint("v2_lite", "bf16"), dtype="q8")
    session = _core.Session(models.open_model(file, models.ISAS[0]), 128, "f16", 64)
    session.forward(tiny.token_ids(file.config["vocab_size"], 5, 7), "none")
    assert "head" not in stages(session) and stages(session)["final_norm"][0] == 1


@pytest.mark.parametrize("threads", [1, 2])
def test_stage_seconds_add_up_to_the_wall_time(threads: int) -> None:
    """Best of several: another process may take the core between the two readings of the clock."""
    file = models.pack(models.checkpoint("v2_lite", "bf16"), dtype="f32")
    core = models.open_model(file, models.ISAS[-1], threads)
    session = _core.Session(core, 1024, "f32", 96)
    ids = tiny.token_ids(file.config["vocab_size"], 96, 7)
    excess = []
    for _ in range(10):
        before, counted = stages(session), session.stats()["seconds"]
        start = time.perf_counter()
        session.forward(ids, "none")
        wall = time.perf_counter() - start
        after = stages(session)
        spent = {s: v[2] - before[s][2] if s in before else v[2] for s, v in after.items()}
        assert min(spent.values()) >= 0
        assert sum(spent.values()) == pytest.approx(session.stats()["seconds"] - counted, rel=1e-6, abs=1e-9)
        assert sum(spent.values()) <= wall
        excess.append(wall - sum(spent.values()) - 0.02 * wall)
    assert min(excess) < 20e-6, excess
    # A thread that leaves a barrier late is in one stage while another already waits in the next: only sums are bound.
    waits = {stage: v[3:] for stage, v in stages(session).items()}
    for stage, (wait_sum, wait_max) in waits.items():
        assert 0 <= wait_max <= wait_sum <= threads * wait_max + 1e-9, stage
        assert (wait_sum > 0) == (threads > 1), stage
    assert sum(wait_sum for wait_sum, _ in waits.values()) <= threads * session.stats()["seconds"]
