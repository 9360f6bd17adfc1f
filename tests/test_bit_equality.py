"""Law L1: the bits of a position depend on the tokens up to it and on nothing else.

One run (one thread, one pass per 64 rows) is the truth of its ISA, weight format and cache type; every other way to get
to the same positions must give identical bits in logits, hidden states and cache rows: thread counts, pass sizes,
decode, taps, truncation, restored caches, MTP passes in between.
"""

from __future__ import annotations

import numpy as np
import pytest

import runtime_cases as rc
import tiny
from deepcalm import _core

N = 72  # crosses an attention chunk (64)

CASES = [
    ("v2_lite", "bf16", {"dtype": "q8"}, "f16"),
    ("v2_grouped", "bf16", {"dtype": "q4"}, "q8"),
    ("v3", "bf16", {"dtype": "f32"}, "f32"),
    ("v3", "bf16", {"dtype": "bf16"}, "bf16"),
    ("v3", "bf16", {"dtype": "q4", "attn_dtype": "q4"}, "f16"),
    ("moonlight", "f16", {"dtype": "source"}, "q8"),
    ("gigachat3", "fp8", {"dtype": "source"}, "f16"),
    ("kimi_k2", "int4", {"dtype": "source"}, "bf16"),
    ("glm4_moe_lite", "bf16", {"dtype": "q8"}, "f32"),
]
IDS = ["-".join([p, s, *o.values(), kv]) for p, s, o, kv in CASES]


@pytest.fixture(params=CASES, ids=IDS)
def case(request: pytest.FixtureRequest) -> tuple[rc.packed.PackedFile, str, rc.Array]:
    preset, source, options, kv = request.param
    file = rc.pack(rc.checkpoint(preset, source), **options)
    return file, kv, tiny.token_ids(file.config["vocab_size"], N, 3)


Case = tuple[rc.packed.PackedFile, str, rc.Array]


def assert_same_bits(what: str, a: rc.Array, b: rc.Array) -> None:
    assert a.shape == b.shape and a.dtype == b.dtype, what
    x, y = (np.ascontiguousarray(v).view(np.uint8) for v in (a, b))
    if not np.array_equal(x, y):
        first = np.argwhere(np.atleast_1d(x != y))[0].tolist()
        raise AssertionError(f"{what}: {(x != y).sum()} bytes differ, first at {first}")


def same_run(what: str, run: rc.Run, truth: rc.Run) -> None:
    assert_same_bits(f"{what}: logits", run.logits, truth.logits)
    assert_same_bits(f"{what}: hidden", run.hidden, truth.hidden)
    assert_same_bits(f"{what}: cache", run.cache, truth.cache)


@pytest.mark.parametrize("isa", rc.ISAS)
def test_pass_sizes_and_threads(case: Case, isa: str) -> None:
    file, kv, ids = case
    core = rc.open_model(file, isa)
    truth = rc.Run(core, ids, kv)
    assert np.isfinite(truth.logits).all() and truth.logits.std() > 0.5
    for size in (1, 3, 16, N):
        same_run(f"passes of {size}", rc.Run(core, ids, kv, size), truth)
    same_run("mixed passes", rc.Run(core, ids, kv, [9, 1, 4, 50, 8]), truth)
    for threads in (2, 3):
        other = rc.open_model(file, isa, threads)
        assert other.n_threads == threads
        for sizes in (64, [1, 5, 8, 50, 2, 1, 1, 4]):
            same_run(f"{threads} threads", rc.Run(other, ids, kv, sizes), truth)


@pytest.mark.parametrize("isa", rc.ISAS)
def test_mtp_passes(case: Case, isa: str) -> None:
    file, kv, ids = case
    if not file.config["num_nextn_predict_layers"]:
        with pytest.raises(Exception, match="MTP"):
            rc.Run(rc.open_model(file, isa), ids[:4], kv).mtp(2)
        return
    truth_run = rc.Run(rc.open_model(file, isa), ids, kv)
    truth = truth_run.mtp(64)
    for size, threads in ((1, 1), (5, 2), (16, 3), (N, 1)):
        run = rc.Run(rc.open_model(file, isa, threads), ids, kv)
        for what, a, b in zip(("logits", "g", "cache"), run.mtp(size), truth, strict=True):
            assert_same_bits(f"MTP passes of {size}, {threads} threads: {what}", a, b)
        assert_same_bits("main cache after MTP", run.session.read_cache(False), truth_run.cache)


@pytest.mark.parametrize("isa", rc.ISAS)
def test_taps_change_nothing(case: Case, isa: str) -> None:
    file, kv, ids = case
    core = rc.open_model(file, isa, 2)
    truth = rc.Run(core, ids, kv)
    same_run("all taps", rc.Run(core, ids, kv, taps=["*"]), truth)
    same_run("one tap", rc.Run(core, ids, kv, 16, taps=["layers.1.attn_latent"]), truth)
    last = rc.Run(core, ids[:60], kv).session
    assert_same_bits("logits of the last row only", last.forward(ids[60:], "last"), truth.logits[-1:])


@pytest.mark.parametrize("isa", rc.ISAS)
def test_truncate_and_restore(case: Case, isa: str) -> None:
    file, kv, ids = case
    core = rc.open_model(file, isa)
    truth = rc.Run(core, ids, kv)

    detour = rc.Run(core, ids[:50], kv).session
    detour.forward(ids[::-1].copy()[:20], "none")  # rejected drafts leave rows behind
    detour.truncate(41)
    assert detour.pos == 41
    assert_same_bits("after truncation", detour.forward(ids[41:], "all"), truth.logits[41:])
    assert_same_bits("cache after truncation", detour.read_cache(False), truth.cache)

    saved = rc.Run(core, ids[:33], kv).session.state()
    restored = _core.Session(core, 96, kv, 64)  # another context length, other buffers
    restored.load_state(saved["tokens"], saved["cache"], saved["mtp_cache"], saved["hidden"])
    assert restored.pos == 33
    assert_same_bits("after restoring", restored.forward(ids[33:], "all"), truth.logits[33:])


@pytest.mark.parametrize("isa", [rc.ISAS[0], rc.ISAS[-1]])
def test_across_attention_partials(isa: str) -> None:
    """Position 1024 starts a second partial; rows around it must not care how they got there."""
    file = rc.pack(rc.checkpoint("v2_lite", "bf16"), dtype="q8")
    ids = tiny.token_ids(file.config["vocab_size"], 1100, 4)
    truth = rc.Run(rc.open_model(file, isa), ids, "f16", 256)
    assert np.isfinite(truth.logits).all()
    for threads, tail in ((1, [1, 1, 1, 2, 8, 9, 64]), (3, [5, 3, 1, 1, 1, 11, 64]), (2, [86])):
        sizes = [507, 507, *tail]
        same_run(f"{threads} threads", rc.Run(rc.open_model(file, isa, threads), ids, "f16", sizes), truth)


@pytest.mark.parametrize("isa", rc.ISAS)
def test_isa_names_name_one_set_of_bits(isa: str) -> None:
    """Two models of the same ISA agree bit for bit; different ISAs agree to rounding (or a name would be a lie)."""
    file = rc.pack(rc.checkpoint("v3", "bf16"), dtype="f32")
    ids = tiny.token_ids(file.config["vocab_size"], N, 3)
    run = rc.Run(rc.open_model(file, isa), ids)
    best = rc.Run(rc.open_model(file, rc.ISAS[0]), ids)
    assert rc.open_model(file, isa).isa == isa
    assert np.abs(run.logits - best.logits).max() <= 1e-4
