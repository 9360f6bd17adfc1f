"""Law L1: the bits of a position depend on the tokens up to it and on nothing else.

One run (one thread, one pass per 64 rows) is the truth of its ISA, weight format and cache type; every other way to get
to the same positions must give identical bits in logits, hidden states and cache rows: thread counts, pass sizes,
decode, taps, truncation, restored caches, MTP passes in between, drafting, other sessions at the same time.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import models
import tiny
from deepcalm import _core
from deepcalm.errors import SessionError, UnsupportedError
from deepcalm.sampling import Sampling

Case = tuple[models.PackedFile, str, models.Array]  # packed file, cache type, token ids [N]
N = 72  # crosses an attention chunk (64), and the rows whose heads a pass computes together (64)

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
    ("mistral4", "fp8", {"dtype": "source"}, "f16"),
    ("youtu", "bf16", {"dtype": "q4"}, "q8"),
    ("minicpm3", "bf16", {"dtype": "bf16"}, "bf16"),
    ("axk1", "bf16", {"dtype": "q8"}, "f16"),
]
IDS = ["-".join([p, s, *o.values(), kv]) for p, s, o, kv in CASES]


def _case(preset: str, source: str, options: dict[str, str], kv: str) -> Case:
    file = models.pack(models.checkpoint(preset, source), **options)
    return file, kv, tiny.token_ids(file.config["vocab_size"], N, 3)


@pytest.fixture(params=CASES, ids=IDS)
def case(request: pytest.FixtureRequest) -> Case:
    return _case(*request.param)


MTP = [i for i, case in enumerate(CASES) if tiny.PRESETS[case[0]].config["num_nextn_predict_layers"]]


@pytest.fixture(params=[CASES[i] for i in MTP], ids=[IDS[i] for i in MTP])
def mtp_case(request: pytest.FixtureRequest) -> Case:
    return _case(*request.param)


def same_run(what: str, run: models.Run, truth: models.Run) -> None:
    models.assert_same_bits(f"{what}: logits", run.logits, truth.logits)
    models.assert_same_bits(f"{what}: hidden", run.hidden, truth.hidden)
    models.assert_same_bits(f"{what}: cache", run.cache, truth.cache)


@pytest.mark.by_turns("isa", len(models.ISAS), always=0)
@pytest.mark.parametrize("isa", models.ISAS)
def test_pass_sizes_and_threads(case: Case, isa: str) -> None:
    file, kv, ids = case
    core = models.open_model(file, isa)
    truth = models.Run(core, ids, kv)
    assert np.isfinite(truth.logits).all() and truth.logits.std() > 0.5
    for size in (1, 3, 16, N):
        same_run(f"passes of {size}", models.Run(core, ids, kv, size), truth)
    same_run("mixed passes", models.Run(core, ids, kv, [9, 1, 4, 50, 8]), truth)
    same_run("small buffers", models.Run(core, ids, kv, 7, session=_core.Session(core, N, kv, 7)), truth)
    for threads in (2, 3):
        other = models.open_model(file, isa, threads)
        assert other.n_threads == threads
        for sizes in (64, [1, 5, 8, 50, 2, 1, 1, 4]):
            same_run(f"{threads} threads", models.Run(other, ids, kv, sizes), truth)


@pytest.mark.by_turns("isa", len(models.ISAS), always=0)
@pytest.mark.parametrize("isa", models.ISAS)
def test_mtp_passes(mtp_case: Case, isa: str) -> None:
    file, kv, ids = mtp_case
    truth_run = models.Run(models.open_model(file, isa), ids, kv)
    truth = truth_run.mtp(64)
    for size, threads in ((1, 1), (5, 2), (16, 3), (N, 1)):
        run = models.Run(models.open_model(file, isa, threads), ids, kv)
        for what, a, b in zip(("logits", "g", "cache"), run.mtp(size), truth, strict=True):
            models.assert_same_bits(f"MTP passes of {size}, {threads} threads: {what}", a, b)
        models.assert_same_bits("main cache after MTP", run.session.read_cache(False), truth_run.cache)


@pytest.mark.by_turns("isa", len(models.ISAS), always=0)
@pytest.mark.parametrize("isa", models.ISAS)
def test_taps_change_nothing(case: Case, isa: str) -> None:
    file, kv, ids = case
    core = models.open_model(file, isa, 2)
    truth = models.Run(core, ids, kv)
    same_run("all taps", models.Run(core, ids, kv, taps=["*"]), truth)
    same_run("one tap", models.Run(core, ids, kv, 16, taps=["layers.1.attn_latent"]), truth)
    whole, parts = (models.Run(core, ids, kv, size, taps=["*"]).taps for size in (N, 16))
    for name, tap in whole[0].items():
        models.assert_same_bits(f"tap {name}", np.concatenate([p[name] for p in parts]), tap)
    last = models.Run(core, ids[:60], kv).session
    models.assert_same_bits("logits of the last row only", last.forward(ids[60:], "last"), truth.logits[-1:])


@pytest.mark.by_turns("isa", len(models.ISAS), always=0)
@pytest.mark.parametrize("isa", models.ISAS)
def test_truncate_and_restore(case: Case, isa: str) -> None:
    file, kv, ids = case
    core = models.open_model(file, isa)
    truth = models.Run(core, ids, kv)

    detour = models.Run(core, ids[:50], kv).session
    detour.forward(ids[::-1].copy()[:20], "none")  # rejected drafts leave rows behind
    detour.truncate(41)
    assert detour.pos == 41
    models.assert_same_bits("after truncation", detour.forward(ids[41:], "all"), truth.logits[41:])
    models.assert_same_bits("cache after truncation", detour.read_cache(False), truth.cache)

    saved = models.Run(core, ids[:33], kv).session.state()
    restored = _core.Session(core, 96, kv, 64)  # another context length, other buffers
    restored.load_state(saved["tokens"], saved["cache"], saved["mtp_cache"], saved["hidden"])
    assert restored.pos == 33
    models.assert_same_bits("after restoring", restored.forward(ids[33:], "all"), truth.logits[33:])


SAMPLING, GREEDY = Sampling(0.8, 40, 0.95, 0.01, 7), Sampling()
N_VALID = 270  # fewer than vocab_size: padding rows are never drawn


def decode_plainly(
    core: Any, kv: str, prompt: models.Array, n_new: int, how: Sampling
) -> tuple[list[int], models.Array]:
    """One forward pass per token and one call of the sampler: what drafting must reproduce."""
    session = _core.Session(core, 128, kv, 64)
    tokens, rows = [], []
    logits = session.forward(prompt, "last")
    while True:
        rows.append(logits[0])
        tokens.append(_core.sample(logits[0], how, session.pos, N_VALID))
        if len(tokens) == n_new:
            return tokens, np.stack(rows)
        logits = session.forward(np.array(tokens[-1:], np.int32), "last")


@pytest.mark.parametrize(
    ("isa", "how"),
    [*((isa, GREEDY) for isa in models.ISAS), (models.ISAS[0], SAMPLING)],
    ids=[*(f"{isa}-greedy" for isa in models.ISAS), f"{models.ISAS[0]}-sampled"],
)
def test_drafting_changes_nothing(mtp_case: Case, isa: str, how: Sampling) -> None:
    """Real drafts, and drafts forced to be right 0..k times in a row: the same tokens, logits and caches."""
    file, kv, ids = mtp_case
    core = models.open_model(file, isa)
    prompt, n_new = ids[:50], 20  # crosses position 64
    tokens, rows = decode_plainly(core, kv, prompt, n_new + 8, how)
    truth = models.Run(core, np.concatenate([prompt, np.array(tokens, np.int32)]), kv)
    _, _, mtp_cache = truth.mtp(64)
    for k, forcing in ((0, False), (2, False), (1, True), (4, True)):
        session = _core.Session(core, 128, kv, 64, mtp=True)
        session.forward(prompt[:-1], "none")
        out, got, last, accepted = [], [], int(prompt[-1]), set()
        while len(out) < n_new:
            right = len(got) % (k + 1)  # how many drafts of this round to get right
            forced = [t if j < right else (t + 1) % N_VALID for j, t in enumerate(tokens[len(out) :][:k])]
            r = session.draft_round(last, k, how, N_VALID, want_logits=True, drafts=forced if forcing else None)
            assert len(r["tokens"]) == r["accepted"] + 1 and r["drafted"] == k
            if forcing:
                assert r["accepted"] == right
            accepted.add(r["accepted"])
            out += r["tokens"]
            got.append(r["logits"])
            last = out[-1]
        what = f"k = {k}, forced = {forcing}"
        assert out == tokens[: len(out)], what
        models.assert_same_bits(f"{what}: logits", np.concatenate(got), rows[: len(out)])
        state = session.state()
        n, m = len(prompt) + len(out) - 1, state["mtp_cache"].shape[1]
        assert session.pos == n and m + len(state["hidden"]) == n
        models.assert_same_bits(f"{what}: cache", state["cache"], truth.cache[:, :n])
        models.assert_same_bits(f"{what}: MTP cache", state["mtp_cache"], mtp_cache[:, :m])
        models.assert_same_bits(f"{what}: pending hidden states", state["hidden"], truth.hidden[m:n])
        if forcing:
            assert accepted == set(range(k + 1)), what


@pytest.mark.parametrize("isa", models.ISAS[:1])
def test_truncate_and_restore_with_drafting(mtp_case: Case, isa: str) -> None:
    """MTP rows and pending hidden states after detours are those of an undisturbed run."""
    file, kv, ids = mtp_case
    core = models.open_model(file, isa)
    truth = models.Run(core, ids, kv)
    mtp_cache = truth.mtp(64)[2]
    wrong = [(int(i) + 1) % N_VALID for i in ids]

    def draft(session: Any, pos: int, rows: int) -> None:
        """A round of rejected drafts after token `pos`; then the state must be the truth's."""
        assert session.pos == pos
        r = session.draft_round(int(ids[pos]), 2, GREEDY, N_VALID)
        state = session.state()
        n, m = pos + 1 + r["accepted"], state["mtp_cache"].shape[1]
        assert (m, len(state["hidden"])) == (rows, n - rows)
        models.assert_same_bits("cache", state["cache"][:, : pos + 1], truth.cache[:, : pos + 1])
        models.assert_same_bits("MTP cache", state["mtp_cache"], mtp_cache[:, :m])
        models.assert_same_bits("pending", state["hidden"][:1], truth.hidden[m : m + 1])
        session.truncate(pos + 1)

    session = _core.Session(core, 128, kv, 64, mtp=True)
    session.forward(ids[:50], "none")
    session.draft_round(int(ids[50]), 3, GREEDY, N_VALID, drafts=wrong[51:54])
    session.truncate(41)
    draft(session, 41, 40)  # the hidden state of position 40 is gone: computed again beside the token, without a draft
    session.truncate(42)
    models.assert_same_bits("logits", session.forward(ids[42:60], "all"), truth.logits[42:60])
    saved = session.state()
    restored = _core.Session(core, 80, kv, 9, mtp=True)
    restored.load_state(saved["tokens"], saved["cache"], saved["mtp_cache"], saved["hidden"])
    for s in (session, restored):
        draft(s, 60, 60)
        models.assert_same_bits("logits", s.forward(ids[61:65], "all"), truth.logits[61:65])


@pytest.mark.parametrize("k", [0, 2])
def test_a_failed_round_leaves_no_trace(tmp_path: Path, k: int) -> None:
    """Logits that overflow end the round with an error; the session is where it was and goes on exactly."""
    tensors = tiny.checkpoint_tensors(tiny.PRESETS["v3"], tiny.PRESETS["v3"].config, "f32", 0)
    folder = tiny.write(tmp_path / "hf", "v3", dtype="f32", n_shards=1)
    for name in ("lm_head.weight", "model.layers.3.shared_head.head.weight"):
        dtype, shape, data = tensors[name]
        huge = np.copysign(np.float32(3e38), np.frombuffer(data, "<f4"))
        tensors[name] = dtype, shape, huge.tobytes()
    tiny.write_safetensors(folder / "model.safetensors", tensors)
    file = models.pack(folder, dtype="f32")
    core = models.open_model(file, models.ISAS[0])
    ids = tiny.token_ids(file.config["vocab_size"], 20, 3)
    truth = models.Run(core, ids)
    session = _core.Session(core, 64, "f32", 64, mtp=True)
    session.forward(ids[:10], "none")
    with pytest.raises(SessionError, match="not finite"):
        session.draft_round(int(ids[10]), k, GREEDY, N_VALID)
    state = session.state()
    assert session.pos == 10 and state["tokens"].tolist() == ids[:10].tolist()
    # the MTP row of position 9 needed the failed token: gone again, with the hidden state that it consumed
    assert state["mtp_cache"].shape[1] + len(state["hidden"]) == (10 if k == 0 else 9)
    session.forward(ids[10:], "none")
    with pytest.raises(SessionError, match="not finite"):
        session.draft_round(0, 1, GREEDY, N_VALID)  # catches up over the tokens that came instead
    mtp_rows = session.state()["mtp_cache"]
    models.assert_same_bits("MTP cache", mtp_rows, truth.mtp(20)[2][:, : mtp_rows.shape[1]])
    assert mtp_rows.shape[1] == 19
    models.assert_same_bits("cache", session.read_cache(False), truth.cache)


def test_a_model_without_mtp_layer_refuses_to_draft() -> None:
    file, kv, ids = _case(*CASES[0])
    core = models.open_model(file, models.ISAS[0])
    with pytest.raises(UnsupportedError, match="no MTP layer"):
        models.Run(core, ids[:4], kv).mtp(2)
    with pytest.raises(UnsupportedError, match="no MTP layer"):
        _core.Session(core, 128, kv, 64, mtp=True)


@pytest.mark.parametrize("isa", models.ISAS[:1])
def test_sessions_in_parallel(case: Case, isa: str) -> None:
    """Two sessions of one model, driven from two Python threads, do not see each other."""
    file, kv, ids = case
    core = models.open_model(file, isa, 2)
    orders = (ids, ids[::-1].copy())
    truth = [models.Run(core, order, kv) for order in orders]
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda order: models.Run(core, order, kv, 5), orders))
    for run, expected in zip(runs, truth, strict=True):
        same_run("two sessions", run, expected)


PARTIALS = [(models.ISAS[0], "f16"), (models.ISAS[-1], "f16"), *(("amx", "bf16") for _ in {"amx"} & {*models.ISAS})]


@pytest.mark.parametrize(("isa", "kv"), PARTIALS)
def test_across_attention_partials(isa: str, kv: str) -> None:
    """Positions 512 and 1024 start a partial; rows around them must not care how they got there."""
    file = models.pack(models.checkpoint("v2_lite", "bf16"), dtype="q8")
    ids = tiny.token_ids(file.config["vocab_size"], 1100, 4)
    truth = models.Run(models.open_model(file, isa), ids, kv, 256)
    assert np.isfinite(truth.logits).all()
    tails = ((1, [1, 1, 1, 2, 8, 9, 64]), (3, [5, 3, 1, 1, 1, 11, 64]), (2, [86]))
    heads_of_rest_split = (2, [10, 3, 3, 3, 3, 64])  # after two whole partials, with several rows
    for threads, tail in (*tails, heads_of_rest_split):
        sizes = [507, 507, *tail]
        same_run(f"{threads} threads", models.Run(models.open_model(file, isa, threads), ids, kv, sizes), truth)


@pytest.mark.parametrize("kv", models.CACHES)
@pytest.mark.parametrize("isa", models.ISAS)
def test_a_row_that_is_no_number_reaches_none_before_it(isa: str, kv: str) -> None:
    """In the same pass, so that its cache row lies beside theirs; with threads that share the heads out."""
    file = models.with_nan(77)
    ids = tiny.token_ids(file.config["vocab_size"], 70, 3)
    ids[ids == 77] = 78
    truth = models.Run(models.open_model(file, isa), ids, kv)
    for at, threads in ((3, 1), (40, 3), (65, 2)):
        bad = np.where(np.arange(70) < at, ids, 77).astype(np.int32)
        run = models.Run(models.open_model(file, isa, threads), bad, kv, 70)
        models.assert_same_bits("logits", run.logits[:at], truth.logits[:at])
        assert np.isnan(run.logits[at:]).all()


@pytest.mark.parametrize("isa", models.ISAS)
def test_isa_names_name_one_set_of_bits(isa: str) -> None:
    """Two models of the same ISA agree bit for bit; different ISAs agree to rounding (or a name would be a lie)."""
    file = models.pack(models.checkpoint("v3", "bf16"), dtype="f32")
    ids = tiny.token_ids(file.config["vocab_size"], N, 3)
    run = models.Run(models.open_model(file, isa), ids)
    best = models.Run(models.open_model(file, models.ISAS[0]), ids)
    assert models.open_model(file, isa).isa == isa
    assert np.abs(run.logits - best.logits).max() <= 1e-4


@pytest.mark.parametrize("isa", models.ISAS)
@pytest.mark.parametrize("i", [0, 3])
def test_bits_do_not_depend_on_the_processor(i: int, isa: str) -> None:
    """The policy that a model takes from its processor sets paths through memory and instructions, not results."""
    file, kv, ids = _case(*CASES[i])

    def bits(one_stream: bool, bf16_dot: bool) -> bytes:
        m = models.open_model(file, isa)
        _core.testing.set_policy(m, one_stream, bf16_dot)
        run = models.Run(m, ids[:40], kv, [32, *[1] * 8])
        return run.logits.tobytes() + run.hidden.tobytes()

    assert len({bits(*policy) for policy in [(False, False), (True, True)]}) == 1


# SHA-256 of the logits below, of the first nine cases and of all. A change of arithmetic renews them, on purpose and
# with its reason.
BITS = {
    "amx": ("23c6f4cbf855fa5d", "8a0408bbe930d903"),
    "avx512x": ("f358303a6ac98795", "b13d90c95a8ee583"),
    "avx512": ("0a5a70cb184f1ae0", "8a73dde9d8da4bba"),
    "avx2": ("0a5a70cb184f1ae0", "8a73dde9d8da4bba"),
    "scalar": ("22d69dbd4856ee62", "3f24493594c9a4ef"),
}


@pytest.mark.parametrize("isa", models.ISAS)
def test_bits_are_those_of_every_machine_and_compiler(isa: str) -> None:
    """No C library, no compiler and no processor has a say in them, only the name of the instruction set."""
    digest, seen = hashlib.sha256(), []
    for preset, source, options, kv in CASES:
        file, _, ids = _case(preset, source, options, kv)
        run = models.Run(models.open_model(file, isa), ids, kv)
        digest.update(run.logits.tobytes())
        if file.config["num_nextn_predict_layers"]:
            digest.update(run.mtp(64)[0].tobytes())
        seen.append(digest.hexdigest()[:16])
    assert (seen[8], seen[-1]) == BITS[isa]
