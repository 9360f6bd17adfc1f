"""Drafting with the MTP layer: exact in tokens, logits and caches after anything, and cheap where it does not pay.

model/test_bit_equality.py has the plain cases; here are random sequences of operations, the ends of texts, sampling as
a distribution, transformers' own drafting, and what the controller spends.
"""

from __future__ import annotations

import functools
import itertools
import json
from array import array
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import deepcalm
import device_cases
import models
import tiny
from deepcalm import SessionError, UnsupportedError, _core, cli, drafters
from deepcalm.drafting import LIMIT, LIMIT_TOKENS, PLAIN_EVERY, Controller, CostModel, Offer, Text, expected_tokens
from deepcalm.measure import drafts
from deepcalm.sampling import Sampling
from test_sampling import chi_square_p, softmax

F64 = npt.NDArray[np.float64]
N_VALID = 270
SAMPLINGS: list[dict[str, Any]] = [
    Sampling(),
    Sampling(temp=0.3),
    Sampling(temp=1.0),
    Sampling(temp=1.0, top_k=30, top_p=0.9, min_p=0.02),
]


@functools.cache
def demo_file() -> Any:
    return models.PackedFile(deepcalm.demo_path())


def random_file(rng: np.random.Generator) -> Any:
    preset = str(rng.choice(["v3", "glm4_moe_lite", "demo"]))
    if preset == "demo":
        return demo_file()
    return models.pack(
        models.checkpoint(preset, "bf16"), dtype=str(rng.choice(["f32", "bf16", "f16", "f8", "q8", "q4"]))
    )


class Twins:
    """A session that drafts and one that does not, driven alike; ``tokens`` are those in both caches."""

    def __init__(self, rng: np.random.Generator, file: Any) -> None:
        self.rng, self.kv = rng, str(rng.choice(models.CACHES))
        isa = str(rng.choice(models.ISAS))
        self.ctx = int(rng.choice([24, 80, 140]))
        self.core = models.open_model(file, isa, int(rng.integers(1, 4)))
        self.truth = models.open_model(file, isa, 1)
        self.how = replace(SAMPLINGS[rng.integers(len(SAMPLINGS))], seed=int(rng.integers(1 << 40)))
        self.vocab = int(file.config["vocab_size"])
        self.session, self.plain = self.make(self.core, True), _core.Session(self.truth, self.ctx, self.kv, 64)
        self.tokens: list[int] = []
        self.what = f"{file.path.name} {isa} {self.kv} {self.how}"

    def make(self, core: Any, mtp: bool) -> Any:
        return _core.Session(core, self.ctx, self.kv, int(self.rng.integers(8, 65)), mtp)

    def prefill(self) -> None:
        n = min(int(self.rng.choice([1, 2, 3, 9, 40])), self.ctx - len(self.tokens) - 1)
        ids = self.rng.integers(0, min(self.vocab, N_VALID), max(n, 0)).astype(np.int32)
        for part in models.chunks(len(ids), min(int(self.rng.integers(1, 9)), self.session.max_rows)):
            self.session.forward(ids[part], "none")
        if len(ids):
            self.plain.forward(ids, "none")
        self.tokens += ids.tolist()

    def truncate(self) -> None:
        n = int(self.rng.integers(len(self.tokens) + 1))
        if self.rng.random() < 0.5:  # within the last round
            n = max(len(self.tokens) - int(self.rng.integers(4)), 0)
        self.session.truncate(n)
        self.plain.truncate(n)
        del self.tokens[n:]

    def restore(self) -> None:
        s = self.session.state()
        self.session = self.make(self.core, True)
        self.session.load_state(s["tokens"], s["cache"], s["mtp_cache"], s["hidden"])

    def round(self) -> Counter[str]:
        """A round after a random token; half of the time with drafts given that are right for a while, or put in place
        of the MTP layer's."""
        room = self.ctx - len(self.tokens)
        if room == 0:
            return Counter()
        k, first, n = int(self.rng.integers(0, 8)), int(self.rng.integers(N_VALID)), len(self.tokens)
        known, rows, last = [], [], first
        for i in range(min(k + 1, room)):
            rows.append(self.plain.forward(np.array([last], np.int32), "last")[0])
            last = _core.sample(rows[-1], self.how, n + 1 + i, N_VALID)
            known.append(last)
        forced, given = None, False
        if self.rng.random() < 0.6:
            right = int(self.rng.integers(k + 1))
            forced = [t if j < right else (t + 1) % N_VALID for j, t in enumerate((known + [0] * k)[:k])]
            given = bool(self.rng.random() < 0.5)
        state = self.session.state()
        whole = (
            state["mtp_cache"].shape[1] + len(state["hidden"]) == n
        )  # else a hidden state was cut off: no drafts yet
        r = self.session.draft_round(first, 0 if given else k, self.how, N_VALID, want_logits=True, drafts=forced)
        made, accepted = r["tokens"], r["accepted"]
        assert made == known[: len(made)] and len(made) == accepted + 1, self.what
        again = n > 0 and not whole  # a row more
        most = min(k, room - 1, self.session.max_rows - 1 - again)
        assert r["drafted"] == (most if given or (n and whole) else 0), self.what
        if forced is not None:
            assert accepted == min(right, r["drafted"]), self.what
        models.assert_same_bits(f"{self.what}: logits", r["logits"], np.stack(rows[: len(made)]))
        self.tokens += [first, *made[:-1]]
        self.plain.truncate(len(self.tokens))
        real, again_too = int(forced is None and accepted > 0), int(given and again and accepted > 0)
        return Counter({f"k{r['drafted']}": 1, f"a{accepted}": 1, "real": real, "given": given, "again": again_too})

    def check(self) -> None:
        """Both caches, and the hidden states kept for the next round, are those of a fresh teacher-forced run."""
        state, n = self.session.state(), len(self.tokens)
        assert self.session.pos == self.plain.pos == n and state["tokens"].tolist() == self.tokens, self.what
        models.assert_same_bits(f"{self.what}: cache", state["cache"], self.plain.read_cache(False))
        m = state["mtp_cache"].shape[1]
        assert m + len(state["hidden"]) == n or (m, len(state["hidden"])) == (n - 1, 0), self.what
        if n == 0:
            return
        run = models.Run(self.truth, np.array(self.tokens, np.int32), self.kv)
        models.assert_same_bits(f"{self.what}: rebuilt cache", state["cache"], run.cache)
        if len(state["hidden"]):
            models.assert_same_bits(f"{self.what}: pending", state["hidden"], run.hidden[m:])
        if n > 1:
            models.assert_same_bits(f"{self.what}: MTP cache", state["mtp_cache"], run.mtp(16)[2][:, :m])


def covers_every_case(seen: Counter[str]) -> bool:
    """Every number of drafts, most lengths of an accepted run, an accepted real draft, every operation."""
    lengths = sum(seen[f"a{j}"] > 0 for j in range(8))
    kinds = (*(f"k{j}" for j in range(8)), "real", "given", "again", "prefill", "truncate", "restore")
    return lengths > 5 and all(seen[kind] for kind in kinds)


def test_any_sequence_of_operations_is_exact(rng: np.random.Generator) -> None:
    """On 16 models, and on as many more as one seed in a hundred needs to come across every case."""
    seen: Counter[str] = Counter()
    for n_models in range(80):
        if n_models >= 16 and covers_every_case(seen):
            break
        twins = Twins(rng, random_file(rng))
        for _ in range(12):
            kind = str(rng.choice(["round", "prefill", "truncate", "restore"], p=[0.6, 0.15, 0.15, 0.1]))
            seen += Counter([kind])
            seen += getattr(twins, kind)() or Counter()
            if rng.random() < 0.3:
                twins.check()
        twins.check()
    assert covers_every_case(seen), seen


def test_long_pending_rows_are_caught_up_in_batches() -> None:
    """More pending positions than a session keeps, from a long prompt and from plain steps."""
    file = models.pack(models.checkpoint("v3", "bf16"), dtype="q8")
    ids = tiny.token_ids(N_VALID, 620, 5)
    core = models.open_model(file, models.ISAS[0])
    session = _core.Session(core, 700, "f16", 100, mtp=True)
    session.forward(ids[:20], "none")
    plain = {"n_valid": N_VALID, "sampling": Sampling()}
    caught_up = [t for t in ids[20:320] if session.draft_round(int(t), 0, **plain)["draft_bytes"]]
    assert len(caught_up) == 1  # its bytes are counted where they are read
    for part in models.chunks(290, 100):
        session.forward(ids[320:610][part], "none")
    assert session.pos - session.mtp_pos <= 257
    session.draft_round(int(ids[610]), 2, **plain)
    run = models.Run(core, ids[:611], "f16", 50)
    models.assert_same_bits("MTP cache", session.read_cache(True), run.mtp(61)[2][:, : session.mtp_pos])


def test_more_hidden_states_than_an_engine_holds_are_refused() -> None:
    core = models.open_model(models.pack(models.checkpoint("v3", "bf16"), dtype="q8"), models.ISAS[0])
    source = _core.Session(core, 400, "f16", 300, mtp=True)
    source.forward(tiny.token_ids(N_VALID, 300, 1), "none")
    s = source.state()
    target = _core.Session(core, 400, "f16", 32, mtp=True)

    def load(rows: int) -> None:
        waiting = np.zeros((rows, s["hidden"].shape[1]), np.float32)
        target.load_state(s["tokens"], s["cache"], s["mtp_cache"][:, : 300 - rows], waiting)

    with pytest.raises(SessionError, match="257 hidden states wait for their MTP rows, at most 256"):
        load(257)
    assert (target.pos, target.mtp_pos) == (0, 0)
    load(256)
    assert (target.pos, target.mtp_pos) == (300, 44)


def test_states_that_no_session_leaves_are_refused() -> None:
    file = models.pack(models.checkpoint("v3", "bf16"), dtype="q8")
    core = models.open_model(file, models.ISAS[0])
    source = _core.Session(core, 64, "f16", 32, mtp=True)
    source.forward(tiny.token_ids(N_VALID, 9, 1), "none")
    how = {"n_valid": N_VALID, "sampling": Sampling()}
    source.draft_round(5, 2, drafts=[1, 1], **how)
    s = source.state()
    n = len(s["tokens"])
    full = np.concatenate([s["mtp_cache"]] + [s["mtp_cache"][:, :1]] * (n - s["mtp_cache"].shape[1]), axis=1)
    target = _core.Session(core, 64, "f16", 32, mtp=True)
    with pytest.raises(SessionError, match=f"{n} MTP rows and 0 hidden states for {n} positions"):
        target.load_state(s["tokens"], s["cache"], full, s["hidden"][:0])
    for forced in ([-1, 0], [0, 1 << 20]):
        with pytest.raises(SessionError, match="draft: token id"):
            source.draft_round(5, 2, drafts=forced, **how)
    assert source.pos == n
    with pytest.raises(SessionError):  # no token can be chosen: as if the round had not been
        source.draft_round(5, 2, **(how | {"n_valid": 0}))
    assert source.pos == n


# ---- the ends of texts


@functools.cache
def demo() -> deepcalm.Model:
    return deepcalm.Model(deepcalm.demo_path(), threads=1)


@pytest.mark.parametrize("temp", [0.0, 0.7])
def test_ends_inside_an_accepted_run(temp: float) -> None:
    """Text, reason and what the cache holds afterwards are those of plain decoding."""
    model = demo()
    ids = model.encode("Once upon a time, there was a little")
    new = list(model.session().generate(ids, max_tokens=24, temp=temp, seed=3, eos_ids=[]))
    pieces = [model.decode([t]) for t in new]
    ends: list[dict[str, Any]] = [{"max_tokens": n} for n in (1, 2, 3, 7, 8)]
    ends += [{"eos_ids": [new[i]], "max_tokens": 24} for i in range(3, 16)]
    ends += [{"stop": (pieces[i][-3:],), "max_tokens": 24} for i in range(3, 16)]
    ends += [{"ctx": len(ids) + n} for n in range(1, 9)]
    runs = 0
    for end in ends:
        options = {"temp": temp, "seed": 3, "eos_ids": [], **end}
        stop, ctx = options.pop("stop", ()), options.pop("ctx", 512)
        want: Any = None
        for draft in ("off", 1, 2, 3, 7):
            session = model.session(ctx=ctx, mtp=True)
            text = session.generate(ids, draft=draft, **options).text(stop)
            joined = "".join(text)
            got = joined, text.reason, session.tokens.tolist()
            want = want or got
            assert got == want, (end, draft)
            runs += int(text.generation.drafts.stats.accepted > 0)
    assert runs > 60  # real drafts were accepted before most ends


# ---- sampling


def test_drafted_sampling_draws_from_the_target_distribution() -> None:
    """20,000 rounds from one state, a seed each; and drafts are accepted as often as shared noise can make them.

    With Gumbel noise shared by target p and draft q, both choose v with probability 1 / sum_u max(p_u/p_v, q_u/q_v);
    no coupling of p and q accepts more often than sum_v min(p_v, q_v).
    """
    n_valid, temp, n = 12, 1.0, 20_000
    file = models.pack(models.checkpoint("v3", "bf16"), dtype="q8")
    core = models.open_model(file, models.ISAS[0])
    ids = np.array([3, 7, 1], np.int32)
    run = models.Run(core, ids, "f16")
    p = softmax(run.logits[-1][:n_valid], temp)
    q = softmax(run.mtp(8)[0][-1][:n_valid], temp)
    second: dict[int, F64] = {}
    for v in range(n_valid):
        logits = models.Run(core, np.append(ids, np.int32(v)), "f16").logits[-1]
        second[v] = softmax(logits[:n_valid], temp)
    session = _core.Session(core, 16, "f16", 4, mtp=True)
    session.forward(ids[:2], "none")
    s = session.state()
    start = (s["tokens"], s["cache"], s["mtp_cache"], s["hidden"])
    first, pairs, accepted = np.zeros(n_valid), np.zeros((n_valid, n_valid)), 0
    for seed in range(n):
        session.load_state(*start)
        r = session.draft_round(1, 1, Sampling(temp=temp, seed=seed), n_valid)
        first[r["tokens"][0]] += 1
        accepted += r["accepted"]
        if r["accepted"]:
            pairs[r["tokens"][0], r["tokens"][1]] += 1
    assert chi_square_p(float(((first - n * p) ** 2 / (n * p)).sum()), n_valid - 1) > 1e-3
    v = int(pairs.sum(1).argmax())  # the token behind an accepted draft has its own target distribution
    m = pairs[v].sum()
    assert m > 300
    assert chi_square_p(float(((pairs[v] - m * second[v]) ** 2 / (m * second[v])).sum()), n_valid - 1) > 1e-3
    shared = sum(1 / np.maximum(p / p[v], q / q[v]).sum() for v in range(n_valid))
    best = float(np.minimum(p, q).sum())
    rate = accepted / n
    print(f"acceptance {rate:.3f}, by the formula {shared:.3f}, no coupling above {best:.3f}")
    assert abs(rate - shared) < 4 * (shared * (1 - shared) / n) ** 0.5
    assert best / 2 <= shared <= best  # 1/(2 - best) of it is guaranteed: Jaccard


# ---- transformers


@pytest.mark.reference
@pytest.mark.parametrize("preset", ["v3", "glm4_moe_lite"])
def test_transformers_drafts_the_same(preset: str, tmp_path: Path) -> None:
    """generate(use_mtp=True) on the same checkpoint: the same tokens, and the same drafts accepted.

    It drafts one token per MTP layer in the file, so one.
    """
    pytest.importorskip("torch", reason="torch is not installed (extra `reference`)")
    pytest.importorskip("transformers", reason="transformers is not installed (extra `reference`)")
    from safetensors.numpy import load_file, save_file

    from ref import hf

    folder = tiny.write(tmp_path / "hf", preset, dtype="f32", seed=5, n_shards=1)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name == "lm_head.weight" or name.endswith("shared_head.head.weight"):
            tensors[name][:5] *= 20  # five tokens are all that is ever said, so that random drafts are right at times
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    deepcalm.pack(folder, tmp_path / "m.dcalm")
    model = deepcalm.Model(tmp_path / "m.dcalm", threads=1)
    ids, n_new = tiny.token_ids(N_VALID, 12, 9).tolist(), 40
    theirs, accepted = hf.draft(folder, ids, n_new)
    core = model.session(kv="f32", mtp=True)._core
    how = {"sampling": Sampling(), "n_valid": int(model.config["vocab_size"])}
    ours = [int(core.forward(np.array(ids, np.int32), "last")[0].argmax())]
    counts = []
    while len(ours) < n_new:
        r = core.draft_round(ours[-1], 1, **how)
        ours += r["tokens"]
        counts.append(r["accepted"])
    assert ours[:n_new] == theirs
    # transformers does not accept a draft that would be the last token, so the last round is not compared
    assert counts[:-1] == accepted[: len(counts) - 1] and abs(len(accepted) - len(counts)) <= 1
    assert 0 < sum(counts) < len(counts)


# ---- the controller


COST = CostModel(plain=1000, expert=2, mtp_step=50, mtp_expert=2, layers=10, top_k=8, n_experts=256)


class World:
    """Rounds as a model would report them; plain steps cost 1000 bytes and a second.

    acceptance: of a draft at a token number; noise: seconds are multiplied by what it returns; slow: a round with
    drafts takes so many times the seconds that its bytes say.
    """

    def __init__(
        self, acceptance: Any, noise: Any = lambda _rng: 1.0, seed: int = 0, cost: CostModel = COST, slow: float = 1.0
    ) -> None:
        self.control = Controller(cost, "auto")
        self.text = Text(array("i"), None, Sampling())  # type: ignore[arg-type]
        self.rng, self.acceptance, self.noise, self.cost = np.random.default_rng(seed), acceptance, noise, cost
        self.bytes = self.seconds = 0.0
        self.tokens, self.ks, self.last, self.slow = 0, [], 200, slow

    def step(self) -> None:
        text, offers = self.text, [Offer("mtp", self.cost, rows=self.last)]
        text.left = 10**6
        self.control.choose([text], [offers], 1, 7, tuple)
        k, a = text.k, 0
        while a < k and self.rng.random() < self.acceptance(self.tokens):
            a += 1
        verify, draft = int(self.cost.verify_bytes(k)), int(self.cost.draft_bytes(k, self.last))
        factor = self.noise(self.rng) / self.cost.plain * (self.slow if k else 1.0)
        made = {"tokens": [0] * (a + 1), "drafted": k, "accepted": a}
        step = {"rows": 1 + k, "experts_verify": self.cost.union(k + 1), "draft_bytes": draft, "mtp_bytes": draft,
                "verify_bytes": verify, "draft_seconds": draft * factor, "verify_seconds": verify * factor}  # fmt: skip
        self.control.observe([(text, made)], step, prefill=False, others=True)
        self.last = a + 1 if k else self.last + 1
        self.tokens += a + 1
        self.bytes += draft + verify
        self.seconds += (draft + verify) / self.cost.plain * (self.slow if k else 1.0)
        self.ks.append(k)
        if self.tokens >= LIMIT_TOKENS:
            assert self.bytes <= (1 + LIMIT) * self.tokens * self.cost.plain, self.tokens

    def run(self, tokens: int) -> float:
        """Speed in bytes over plain decoding."""
        start, read = self.tokens, self.bytes
        while self.tokens < start + tokens:
            self.step()
        return (self.tokens - start) * self.cost.plain / (self.bytes - read)


def test_controller_drafts_where_it_pays_and_only_there() -> None:
    always = World(lambda _t: 0.95)
    assert always.run(2000) > 0.95 * max(COST.gain(k, 0.95) for k in (1, 2, 3)) > 1.2
    assert always.control.switches == 1 and always.ks.count(0) < 2000 / PLAIN_EVERY + 8
    for a in (0.0, 0.05, 0.1):
        assert max(COST.gain(k, a) for k in (1, 2, 3)) < 0.95
        never = World(lambda _t, a=a: a)
        assert never.run(4000) > 0.99
        assert never.control.switches < 14 and never.ks.count(0) > 3800  # pauses double
    dear = World(lambda _t: 1.0, cost=CostModel(1000, 45, 900, 45, 1, 8, 256))
    assert dear.run(1000) == 1.0 and set(dear.ks) == {0}  # the prediction alone rules it out


def test_controller_follows_a_text_that_changes() -> None:
    world = World(lambda t: 0.95 if t % 4000 < 2000 else 0.05)
    gains = [world.run(2000) for _ in range(6)]
    assert min(gains[0::2]) > 1.1 and min(gains[1::2]) > 0.97 and world.control.switches > 4


@pytest.mark.parametrize("seed", range(5))
def test_controller_stands_a_noisy_clock(seed: int) -> None:
    def noise(rng: np.random.Generator) -> float:
        return float(rng.choice([0.9, 1.0, 1.1, 30.0], p=[0.3, 0.39, 0.3, 0.01]))

    assert World(lambda _t: 0.95, noise, seed).run(4000) > 1.15
    assert World(lambda _t: 0.0, noise, seed).run(4000) > 0.99


def test_controller_keeps_what_pays() -> None:
    """A few drafts refused in a row are no reason to stop what gains by a third, as when one draft of five is wrong."""
    speeds = []
    for seed in range(10):
        world = World(lambda _t: 0.8, lambda rng: float(rng.lognormal(0, 0.1)), seed)
        world.run(2000)
        speeds.append(world.tokens / world.seconds)
    assert np.mean(speeds) > 1.15 * COST.gain(1, 0.8) > 1.6


@pytest.mark.parametrize("seed", range(5))
def test_controller_believes_the_clock(seed: int) -> None:
    """Where bytes promise a gain and the processor does not keep it, little time is lost."""
    world = World(lambda _t: 0.9, lambda rng: float(rng.uniform(0.95, 1.05)), seed, slow=1.6)
    world.last = 1  # no prompt to catch up with
    world.run(256)
    assert any(world.ks) and world.seconds < 1.02 * world.tokens
    world.run(4000)
    assert world.seconds < 1.02 * world.tokens


def test_auto_drafts_with_the_demo_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that goes by bytes, which does not depend on who else uses the machine."""
    model, read = demo(), {}
    real = deepcalm.Session.draft_round

    def by_bytes(*args: Any, **options: Any) -> dict[str, Any]:
        r = real(*args, **options)
        return r | {f"{part}_seconds": r[f"{part}_bytes"] / 1e9 for part in ("draft", "verify")}

    monkeypatch.setattr(deepcalm.Session, "draft_round", by_bytes)
    ids = model.encode("Once upon a time")
    for draft in ("off", "auto", 1, 3):
        generation = model.session(mtp=draft != "off").generate(ids, max_tokens=200, draft=draft, eos_ids=[])
        list(generation)
        read[draft] = generation.drafts.stats.bytes
    assert read["auto"] < 0.95 * read["off"] and read["auto"] < 1.05 * min(read[1], read[3])


@pytest.mark.parametrize("name", ["v3", "glm4_moe_lite", "demo"])
def test_auto_reads_at_most_two_per_cent_more(name: str) -> None:
    """Bytes counted by the passes, prefill apart; random weights accept next to nothing."""
    model = demo() if name == "demo" else deepcalm.Model(models.packed(name, dtype="q8"), threads=1)
    prompts = [model.encode(t) for t in ("Once upon a time", "The little bunny")]
    for ids in [*prompts, tiny.token_ids(N_VALID, 150, 2).tolist()]:
        for temp in (0.0, 1.0):
            read, texts = [], []
            for draft in ("off", "auto"):
                session = model.session(mtp=draft == "auto")
                session.prefill(ids)
                before = session.stats
                generation = session.generate(max_tokens=160, draft=draft, temp=temp, seed=1, eos_ids=[])
                texts.append(list(generation))
                done = session.stats - before
                read.append(done.weight_bytes + done.cache_bytes)
            assert texts[0] == texts[1] and len(texts[0]) == 160
            assert read[1] <= (1 + LIMIT) * read[0], (name, temp, read[1] / read[0])


# ---- measurement


def test_bench_draft_measures_what_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = deepcalm.Model(models.packed("v3", dtype="q8"), threads=1)
    monkeypatch.setattr(drafts, "PROBE_MIB", 8)
    options: dict[str, Any] = {"decode_tokens": 60, "repeats": 3}
    for k, accept in ((1, 1.0), (3, 0.0), (2, 0.7)):
        r = drafts.bench_draft(model, k, accept, 9, **options)
        assert abs(r.acceptance - expected_tokens(accept, k) / k + 1 / k) < 0.15
        assert r.tokens_per_pass == pytest.approx(1 + k * r.acceptance)
        assert r.plain_experts == 10 and 10 < r.experts_per_pass <= 10 * (k + 1)  # 2 MoE layers, top 5
        # what was read is what the cost model says, cache rows and the first tokens apart
        measured = r.plain_bytes_per_token / r.drafted_bytes_per_token
        assert measured == pytest.approx(r.predicted_bytes, rel=0.1)
        assert r.predicted > 0 and 0 < r.speedup.low <= r.speedup.median <= r.speedup.high
    own = drafts.bench_draft(demo(), 1, prompt=demo().encode("Once upon a time"), **options)
    assert own.acceptance > 0.8 and own.predicted_bytes > 1
    with pytest.raises(UnsupportedError, match="no MTP layer"):
        drafts.bench_draft(models.model("moonlight"), 1, drafter="mtp")
    with pytest.raises(SessionError, match="the model has 512"):
        drafts.bench_draft(demo(), 1, prompt=500)
    with pytest.raises(ValueError, match=r"0\.\.1"):
        drafts.bench_draft(demo(), 1, accept=1.5)


def test_chosen_ids_are_taken_for_the_models_choices() -> None:
    """What a text is measured with: drafts count where they are its tokens, and the cache is the text's."""
    file = models.packed("v3")
    ids = tiny.token_ids(N_VALID, 12, 1).tolist()
    session, plain = (_core.Session(models.open_model(models.PackedFile(file), models.ISAS[0]), 32, "f16", 8, mtp=True)
                      for _ in range(2))  # fmt: skip
    how: dict[str, Any] = {"sampling": Sampling(), "n_valid": N_VALID}
    session.forward(np.array(ids[:4], np.int32), "none")
    r = session.draft_round(ids[4], 0, drafts=[*ids[5:7], (ids[7] + 1) % N_VALID], chosen=ids[5:9], **how)
    assert (r["tokens"], r["drafted"], r["accepted"]) == (ids[5:8], 3, 2)
    r = session.draft_round(ids[7], 2, chosen=ids[8:11], **how)  # the layer's drafts, right or not
    assert r["tokens"] == ids[8 : 8 + len(r["tokens"])] and r["drafted"] == 2
    with pytest.raises(SessionError, match="token id 99999"):
        session.draft_round(ids[9], 0, chosen=[99999], **how)
    session.truncate(8)
    rows = [s.forward(np.array(part, np.int32), "last") for s, part in ((session, ids[8:]), (plain, ids[:8]))]
    models.assert_same_bits("logits", rows[0], plain.forward(np.array(ids[8:], np.int32), "last"))


def documents(name: str) -> list[int]:
    return demo().encode((Path(__file__).parents[1] / "data" / name).read_text(), bos=True)


@pytest.mark.parametrize(("name", "windows"), [("edits.txt", 1), ("books.txt", 2)])
def test_drafts_of_a_text_are_counted(name: str, windows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as a loop over its tokens finds, and for the bytes that the cost model says; "auto" where they pay."""
    monkeypatch.setattr(_core, "read_bandwidth", lambda *_: 10.0)
    text, k, prompt, size = documents(name)[: windows * 300], 4, 100, 300
    offered = accepted = 0
    for start in range(0, len(text), size):
        window, at, first = text[start : start + size], prompt, True
        while at < len(window):
            length, ids = drafters.continuation(array("i", window[:at]), min(k, len(text) - start - at - 1))
            ids = ids if length > 1 else []
            right = next((i for i, token in enumerate(ids) if token != text[start + at + i]), len(ids))
            if not first:
                offered, accepted = offered + len(ids), accepted + right
            at, first = at + right + 1, False
    options: dict[str, Any] = {"drafter": "ngram", "text": text, "repeats": 1, "steady": True}
    r = drafts.bench_draft(demo(), k, None, prompt, size - prompt, **options)
    assert (r.windows, r.decode_tokens, r.drafters) == (windows, windows * 200, {"ngram": (offered, accepted)})
    auto = drafts.bench_draft(demo(), "auto", None, prompt, size - prompt, **options)
    for result in (r, auto):
        assert result.gain_bytes == pytest.approx(result.predicted_bytes, rel=0.03)
        assert result.worst_bytes < result.gain_bytes + 1e-9 and result.draft_bytes_share == 0
    least = 1.3 if name == "edits.txt" else 0.98
    assert auto.worst_bytes > least and (name != "edits.txt" or r.gain_bytes > least)


def test_a_text_is_cut_into_windows() -> None:
    assert drafts.cut([5, 5, 5, 0, 6, 6, 6, 6, 6, 0, 7], {0}, 3, 2, 1) == [[5, 5, 5], [6, 6, 6, 6], [6, 6]]
    with pytest.raises(SessionError, match="the longest document of the text has 2 tokens, expected at least 3"):
        drafts.cut([1, 1, 0, 1], {0}, 9, 3)


def test_bench_draft_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_core, "read_bandwidth", lambda *_: 10.0)  # reads a GiB
    args = ["bench", str(models.packed()), "--context", "8", "--tokens", "6", "--repeats", "2", "--threads", "1"]
    assert cli.main([*args, "--draft", "2", "--accept", "0.5"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert " ".join(names[:10]) == "command model drafts passes bytes plain drafted gain speedup machine"
    assert names[10] == "what"  # binds
    assert cli.main([*args, "--draft", "1", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["k"] == 1 and value["accept"] is None and value["speedup"]["median"] > 0 and "command" in value
    text = tmp_path / "text"
    text.write_text("one two three " * 9)
    assert cli.main([*args, "--draft", "auto", "--drafter", "ngram", "--text", str(text), "--tokens", "20"]) == 0
    assert "as many as pay; accepted: " in (out := capsys.readouterr().out) and "windows of a text" in out
    assert cli.main([*args, "--accept", "0.5"]) == cli.main([*args, "--text", str(text)]) == 2


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_bytes_are_counted_where_layers_differ(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Routed experts in f32, then bf16, then f32 in the MTP layer: every layer's own bytes, and no other's."""
    plain = tiny.checkpoint_tensors

    def mixed(spec: Any, cfg: Any, dtype: str, seed: int) -> Any:
        wide = (f"layers.{cfg['first_k_dense_replace']}.mlp.experts", f"layers.{cfg['num_hidden_layers']}.mlp.experts")
        f32 = plain(spec, cfg, "f32", seed)
        return {n: f32[n] if any(w in n for w in wide) else t for n, t in plain(spec, cfg, dtype, seed).items()}

    monkeypatch.setattr(tiny, "checkpoint_tensors", mixed)
    file = models.pack(tiny.write(tmp_path / "hf", "v3", dtype="bf16"), dtype="source")
    experts = [e for n, e in sorted(file.entries.items()) if n.endswith("experts.w_down")]
    assert [e.format for e in experts] == ["f32", *["bf16"] * (len(experts) - 2), "f32"] and len(experts) > 2
    core = models.open_model(file, models.ISAS[0]) if device == "cpu" else device_cases.open_core(file, device)
    cost = CostModel.of(core.weight_bytes, file.config)
    session = _core.Session(core, 64, "f32", 8)
    ids = tiny.token_ids(file.config["vocab_size"], 6, 1)
    read = [session.stats()["weight_bytes"]]
    for step in (
        lambda: session.forward(ids[:1], "last"),
        lambda: session.mtp_forward(ids[1:2], session.hidden(), "last"),
    ):
        step()
        read.append(session.stats()["weight_bytes"])
    assert [b - a for a, b in itertools.pairwise(read)] == [cost.plain, cost.mtp_step]
    session.forward(ids[1:], "last")
    cpu = _core.Session(models.open_model(file, "scalar"), 64, "f32", 8)
    cpu.forward(ids[:1], "last")
    before = cpu.stats()["weight_bytes"]
    cpu.forward(ids[1:], "last")  # several experts of each layer, as many as the router says
    assert session.stats()["weight_bytes"] - read[-1] == cpu.stats()["weight_bytes"] - before
