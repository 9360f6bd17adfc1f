"""Steps of several sequences (runtime/batch.h): a sequence's bits are those it has alone, whoever shares its passes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

import models
import tiny
from deepcalm import _core
from deepcalm.errors import SessionError
from deepcalm.sampling import Sampling

N_VALID = tiny.N_TOKENS
CTX = 4160
HOW = [Sampling(), Sampling(temp=0.9, top_p=0.9, seed=5), Sampling(temp=1.1, top_k=7, seed=2**63)]


def small(seed: int = 0, kind: str = "q8") -> models.PackedFile:
    """A shallow model with a long context."""
    layers = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "max_position_embeddings": CTX}
    return models.pack(models.checkpoint("v3", "bf16", seed, **layers), dtype=kind)


@dataclass
class Sequence_:
    """A sequence in steps with others, and its twin that goes alone."""

    core: Any
    ids: list[int]
    how: Sampling
    kv: str = "f16"
    mtp: bool = True
    ctx: int = CTX
    done: list[int] = field(default_factory=list)  # chosen tokens
    scores: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.session = _core.Session(self.core, self.ctx, self.kv, 64, self.mtp)
        self.alone = _core.Session(self.core, self.ctx, self.kv, 64, self.mtp)

    def work(self, rows: int, k: int) -> tuple[Any, ...]:
        """Up to ``rows`` tokens of the prompt, or the last token with ``k`` drafts behind it."""
        todo = (self.ids + self.done)[self.session.pos :]
        part = todo[:rows]
        last = len(part) == len(todo)
        drafts = k if last and len(part) == 1 and self.done and self.mtp else 0
        return (self.session, part, drafts, self.how if last else None, N_VALID, 0.0, 2 if last else -1)

    def take(self, result: dict[str, Any]) -> None:
        assert result["error"] is None, result["error"]
        self.done += result["tokens"]
        self.scores += result["scores"]

    def check(self) -> None:
        """Tokens, scores and cache rows are those of the twin, which goes one token at a time after its prompt."""
        logits = [self.alone.forward(np.array(self.ids[i : i + 64], np.int32))[0] for i in range(0, len(self.ids), 64)][
            -1:
        ]
        for i, token in enumerate(self.done):
            assert _core.sample(logits[-1], self.how, len(self.ids) + i, N_VALID) == token
            assert _core.scores(logits[-1], N_VALID, token, 2) == tuple(self.scores[i])
            logits.append(self.alone.forward(np.array([token], np.int32))[0])
        state, truth = self.session.state(), self.alone.state()
        n, m = len(state["tokens"]), state["mtp_cache"].shape[1]
        assert state["tokens"].tolist() == (self.ids + self.done)[:n] and n >= len(self.ids)
        models.assert_same_bits("cache", state["cache"], truth["cache"][:, :n])
        again = _core.Session(self.core, self.ctx, self.kv, 64, self.mtp)
        again.forward(state["tokens"][:64])
        for i in range(64, n, 64):
            again.forward(state["tokens"][i : i + 64])
        m = min(m, again.mtp_pos)
        models.assert_same_bits("MTP cache", state["mtp_cache"][:, :m], again.read_cache(True)[:, :m])


def run(batch: Any, sequences: Sequence[Sequence_], rng: np.random.Generator, answer: int, drafts: int = 3) -> None:
    """Steps in a random order of chunks until every sequence has an answer of so many tokens or more."""
    while left := [s for s in sequences if len(s.done) < answer]:
        chosen = [s for s in left if rng.random() < 0.8] or left[:1]
        work = [s.work(int(rng.integers(1, 65)), int(rng.integers(0, drafts + 1))) for s in chosen]
        results, cost = batch.step(work)
        assert cost["rows"] >= sum(len(w[1]) for w in work)
        for s, r in zip(chosen, results, strict=True):
            s.take(r)


@pytest.mark.parametrize("preset", ["mistral4", "minicpm3", "axk1"])
def test_what_one_model_has_follows_the_sequence(preset: str) -> None:
    """Queries that grow by position, scaled embeddings and logits, a norm behind the experts: row by row."""
    core = models.open_model(models.pack(models.checkpoint(preset, "bf16"), dtype="q8"), models.ISAS[0], 2)
    ids = [tiny.token_ids(N_VALID, n, n).tolist() for n in (3, 40, 90)]
    sequences = [Sequence_(core, s, how, mtp=False, ctx=128) for s, how in zip(ids, HOW, strict=True)]
    run(_core.Batch(core, 256), sequences, np.random.default_rng(1), 9)
    for s in sequences:
        s.check()


BORDERS, ONE_LONG = (1, 63, 64, 511, 512, 513), (4000, 1, 5, 70)


@pytest.mark.parametrize(
    ("lengths", "threads"),
    [*((BORDERS, n) for n in (1, 2, 3)), (ONE_LONG, 2),
     *(pytest.param(ONE_LONG, n, marks=pytest.mark.exhaustive) for n in (1, 3))],
    ids=lambda x: "one long" if x is ONE_LONG else "borders" if x is BORDERS else None,
)  # fmt: skip
def test_sequences_have_the_bits_that_they_have_alone(threads: int, lengths: tuple[int, ...]) -> None:
    rng = np.random.default_rng(threads)
    core = models.open_model(small(), models.ISAS[0], threads)
    batch = _core.Batch(core, 512)
    kinds = ["f16", "f16", "bf16", "q8", "f32"]
    sequences = [
        Sequence_(core, tiny.token_ids(N_VALID, n, i).tolist(), HOW[i % 3], kinds[i % 5], bool(i % 4))
        for i, n in enumerate(lengths)
    ]
    run(batch, sequences, rng, 9)
    for s in sequences:
        s.check()
    union = batch.expert_union()
    assert sum(n for n, _ in union) > 0
    assert all(pairs <= n * small().config["n_routed_experts"] for n, pairs in union), "more than its layer has"


# Positions in the cache and its type: 64 heads x 8 rows x 9 partials are more sums than a round of attention holds, as
# many as two rounds hold and more with 2 threads; the others cross the borders of partials.
WIDE = [(4100, "f16"), (505, "f32"), (4095, "bf16"), (1020, "q8"), (600, "f16")]


def wide(core: Any, pos: int, kv: str, damage: float | None = None) -> Any:
    """A session whose cache holds rows of other positions; damage: a value of one of them."""
    short, s = (_core.Session(core, CTX, kv, 64) for _ in range(2))
    short.forward(tiny.token_ids(N_VALID, 64, pos))
    state = short.state()
    rng = np.random.default_rng(pos)
    rows = np.ascontiguousarray(state["cache"][:, rng.integers(0, 64, pos)])
    if damage is not None:
        rows[1, pos // 3].view(np.float16 if kv == "f16" else np.float32)[5] = damage
    s.load_state(tiny.token_ids(N_VALID, pos, 1), rows, state["mtp_cache"], state["hidden"])
    return s


@pytest.mark.sanitize
@pytest.mark.parametrize("damage", [{}, {0: np.inf, 1: np.nan}], ids=["", "not finite"])
def test_rounds_of_attention(damage: dict[int, float]) -> None:
    """Groups that several rounds share, side by side with whole ones: each sequence's bits, and every cache row counted
    once, for any number of threads."""
    file = models.pack(
        models.checkpoint(
            "v3", "bf16", num_hidden_layers=2, first_k_dense_replace=1, max_position_embeddings=CTX,
            num_attention_heads=64,
        ),
        dtype="q8",
    )  # fmt: skip
    ids = [tiny.token_ids(N_VALID, 8, 100 + i).tolist() for i in range(len(WIDE))]
    core = models.open_model(file, models.ISAS[0], 1)
    alone = [wide(core, *how, damage.get(i)) for i, how in enumerate(WIDE)]
    logits = [[s.forward(np.array([t], np.int32))[0] for t in ids[i]][-1] for i, s in enumerate(alone)]
    for threads in (1, 2, 3, 5):
        core = models.open_model(file, models.ISAS[0], threads)
        batch = _core.Batch(core, 64)
        sessions = [wide(core, *how, damage.get(i)) for i, how in enumerate(WIDE)]
        results, _ = batch.step(
            [(s, part, 0, Sampling(), N_VALID, 0.0, 3) for s, part in zip(sessions, ids, strict=True)]
        )
        for i, (s, r) in enumerate(zip(sessions, results, strict=True)):
            if i in damage:
                assert "not finite" in str(r["error"]) and s.pos == WIDE[i][0]
                continue
            (token,) = r["tokens"]
            assert tuple(r["scores"][0]) == _core.scores(logits[i], N_VALID, token, 3)
            models.assert_same_bits("cache", s.read_cache(False), alone[i].read_cache(False))
        row_bytes = [s.read_cache(False).shape[2] for s in sessions]
        read = sum(2 * (pos + 8) * n for (pos, _), n in zip(WIDE, row_bytes, strict=True))
        assert batch.stats()["cache_bytes"] == read, threads


@pytest.mark.by_turns("isa", len(models.ISAS), always=0)
@pytest.mark.parametrize("isa", models.ISAS)
@pytest.mark.parametrize("preset", ["v2_lite", "v3", "kimi_k2", "glm4_moe_lite"])
def test_every_instruction_set(isa: str, preset: str) -> None:
    rng = np.random.default_rng()
    source, options = ("int4", {}) if preset == "kimi_k2" else ("bf16", {"dtype": "q4"})
    file = models.pack(models.checkpoint(preset, source), **options)
    core = models.open_model(file, isa, 2)
    mtp = file.config["num_nextn_predict_layers"] > 0
    sequences = [
        Sequence_(core, tiny.token_ids(N_VALID, int(n), i).tolist(), HOW[i % 3], models.CACHES[i % 4], mtp, 256)
        for i, n in enumerate(rng.integers(1, 150, 5))
    ]
    run(_core.Batch(core, 400), sequences, rng, 6)
    for s in sequences:
        s.check()


@pytest.mark.sanitize
def test_a_nan_ends_its_own_sequence() -> None:
    core = models.open_model(models.with_nan(77), models.ISAS[0], 2)
    sequences = [Sequence_(core, [3 + i, 40 + i, 9], HOW[i % 3], ctx=64) for i in range(8)]
    sequences[3].ids[1] = 77
    batch = _core.Batch(core, 64)
    results, _ = batch.step([s.work(64, 0) for s in sequences])
    assert "not finite" in str(results[3]["error"])
    assert isinstance(results[3]["error"], SessionError)
    assert sequences[3].session.pos == 0
    for i, (s, r) in enumerate(zip(sequences, results, strict=True)):
        if i != 3:
            s.take(r)
    others = sequences[:3] + sequences[4:]
    run(batch, others, np.random.default_rng(0), 6)
    for s in others:
        s.check()


def test_bad_work_ends_alone() -> None:
    core = models.open_model(small(), models.ISAS[0], 1)
    a, b = (Sequence_(core, [1, 2, 3], HOW[0]) for _ in range(2))
    batch = _core.Batch(core, 64)
    bad = (b.session, [N_VALID + 10**6], 0, HOW[0], N_VALID, 0.0, -1)
    (first, second), _ = batch.step([a.work(8, 0), bad])
    a.take(first)
    assert "token id" in str(second["error"])
    other = _core.Session(models.open_model(models.small(), models.ISAS[0], 1), 64, "f16", 64)
    for session in (a.session, other):
        (first, second), _ = batch.step([a.work(8, 0), (session, [1], 0, HOW[0], N_VALID, 0.0, -1)])
        a.take(first)
        assert "a session twice, or of another model" in str(second["error"])
    a.check()
    with pytest.raises(SessionError, match="65 rows, at most 64"):
        batch.step([(b.session, [1] * 65, 0, None, N_VALID, 0.0, -1)])


@pytest.mark.sanitize
@pytest.mark.parametrize("mtp", [False, True])
def test_a_fork_goes_on_as_its_source_would(mtp: bool) -> None:
    core = models.open_model(small(), models.ISAS[0], 2)
    ids = tiny.token_ids(N_VALID, 700, 1)
    source = Sequence_(core, ids[:600].tolist(), HOW[1], mtp=mtp)
    batch = _core.Batch(core, 256)
    run(batch, [source], np.random.default_rng(1), 5)
    for n in (0, 1, 63, 600, source.session.pos):
        fork = Sequence_(core, (source.ids + source.done)[: max(n, 1)], HOW[2], mtp=mtp)
        fork.session = source.session.fork(core, n, 800)
        assert fork.session.pos == n and fork.session.ctx == 800
        fork.ids += ids[600:640].tolist()
        run(batch, [fork], np.random.default_rng(n), 5)
        fork.check()
    source.check()
    assert source.session.hidden().size == 0, "hidden rows that nobody asked for"
    raw = _core.Session(core, 64, "f16", 8)
    raw.forward(ids[:2])
    raw.mtp_forward(ids[1:6], np.zeros((5, small().config["hidden_size"]), np.float32))
    assert raw.fork(core, 1, 2).mtp_pos == 1, "more MTP rows than the new session holds"
    with pytest.raises(SessionError, match=r"fork: 900 positions, expected 0\.\."):
        source.session.fork(core, 900, 1000)


def test_a_batch_and_a_session_at_work_on_one_model() -> None:
    core = models.open_model(small(), models.ISAS[0], 2)
    truth = models.Run(core, tiny.token_ids(N_VALID, 96, 8), "f16", 1)
    errors: list[BaseException] = []

    def session() -> None:
        try:
            for _ in range(4):
                got = models.Run(core, truth.ids, "f16", 1)
                models.assert_same_bits("logits", got.logits, truth.logits)
        except BaseException as e:
            errors.append(e)

    other = threading.Thread(target=session)
    other.start()
    sequences = [Sequence_(core, tiny.token_ids(N_VALID, 30 + i, i).tolist(), HOW[i % 3]) for i in range(4)]
    run(_core.Batch(core, 256), sequences, np.random.default_rng(3), 40)
    other.join()
    assert not errors, errors
    for s in sequences:
        s.check()
