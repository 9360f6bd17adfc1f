"""Drafts in a batch: what the controller spends, in a model of passes and in passes themselves."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import pytest

import deepcalm
import models
from deepcalm.drafting import LIMIT, LIMIT_TOKENS, MAX_PENDING, Controller, CostModel, Offer, Text
from deepcalm.sampling import Sampling

# DeepSeek-V3 and a shallow model whose MTP passes are dear, in millions of bytes
DEEP = CostModel(plain=37000, expert=44, mtp_step=1610, mtp_expert=44, layers=58, top_k=8, n_experts=256)
FLAT = CostModel(plain=2600, expert=9, mtp_step=180, mtp_expert=9, layers=26, top_k=6, n_experts=64)


class World:
    """Steps of ``n`` answers that never end, routed at random; draft of answer i counts with ``acceptance(i)``."""

    def __init__(self, n: int, acceptance: Any, cost: CostModel, slow: float = 0.0) -> None:
        self.control, self.n, self.acceptance, self.cost = Controller(cost, "auto"), n, acceptance, cost
        self.rng, self.slow = np.random.default_rng(n), slow
        self.answers = [Text(array("i"), None, Sampling()) for _ in range(n)]  # type: ignore[arg-type]
        for d in self.answers:
            d.left = 10**6
        self.counted = [(0, 0)] * 64
        self.tokens = self.drafts = 0
        self.read = self.plain = self.seconds = 0.0

    def distinct(self, rows: int, layers: int) -> int:
        c = self.cost
        if rows == 1:
            return layers * c.top_k
        return int(self.rng.binomial(layers * c.n_experts, 1 - (1 - c.top_k / c.n_experts) ** rows))

    def choose(self) -> list[int]:
        offers = [[Offer("mtp", self.cost, rows=d.pending)] for d in self.answers]
        self.control.choose(self.answers, offers, self.n, 64 - self.n, lambda: self.counted)
        return [d.k for d in self.answers]

    def step(self) -> None:
        c = self.cost
        ks = self.choose()
        results = []
        for i, k in enumerate(ks):
            accepted = 0
            while accepted < k and self.rng.random() < self.acceptance(i):
                accepted += 1
            results.append({"drafted": k, "accepted": accepted})
        rows, passes = self.n + sum(ks), [sum(k >= depth for k in ks) for depth in range(1, max(ks) + 1)]
        if passes:
            passes[0] = sum(d.pending for d, k in zip(self.answers, ks, strict=True) if k)
        late = [d for d, k in zip(self.answers, ks, strict=True) if not k and d.pending == MAX_PENDING]
        passes += [MAX_PENDING * len(late)] * bool(late)
        experts = self.distinct(rows, c.layers)
        draft = sum(c.mtp_step + (self.distinct(r, 1) - c.top_k) * c.mtp_expert for r in passes)
        verify = c.plain + (experts - c.layers * c.top_k) * c.expert
        passes_seen, pairs = self.counted[rows - 1]
        self.counted[rows - 1] = passes_seen + 1, pairs + experts
        seconds = verify + self.slow * rows * c.plain
        made = sum(r["accepted"] + 1 for r in results)
        self.control.observe(
            list(zip(self.answers, results, strict=True)),
            {"rows": rows, "experts_verify": experts, "draft_bytes": draft, "mtp_bytes": draft, "verify_bytes": verify,
             "draft_seconds": draft, "verify_seconds": seconds}, False, True,
        )  # fmt: skip
        self.tokens, self.drafts = self.tokens + made, self.drafts + sum(ks)
        self.read, self.seconds = self.read + draft + verify, self.seconds + draft + seconds
        self.plain += made / self.n * (c.plain + (c.union(self.n) - c.union(1)) * c.expert)

    def run(self, steps: int) -> float:
        """Bytes of the same tokens without drafts over those that were read."""
        for _ in range(steps):
            self.step()
            assert self.tokens < LIMIT_TOKENS or self.read <= (1 + LIMIT) * self.plain, self.tokens
        return self.plain / self.read


@pytest.mark.parametrize("cost", [DEEP, FLAT], ids=["deep", "flat"])
@pytest.mark.parametrize("n", [1, 4, 16])
def test_drafts_pay_or_cost_next_to_nothing(n: int, cost: CostModel) -> None:
    assert World(n, lambda _i: 0.95, cost).run(600) > 1.1
    for acceptance in (0.8, 0.5, 0.2, 0.0):
        assert World(n, lambda _i, a=acceptance: a, cost).run(600) > 1 - LIMIT


def test_answers_whose_drafts_count_are_drafted_for() -> None:
    world = World(16, lambda i: 0.9 if i % 2 else 0.0, FLAT)
    assert world.run(500) > 1.3
    world.choose()
    assert all((d.k > 0) == bool(i % 2) for i, d in enumerate(world.answers))


def test_rows_that_take_time_are_drafted_for_less() -> None:
    """Where a row takes a third of the time of a plain step, however few bytes it reads."""
    fast, slow = World(16, lambda _i: 0.5, FLAT), World(16, lambda _i: 0.5, FLAT, slow=0.3)
    fast.run(300)
    slow.run(300)
    assert slow.drafts < fast.drafts / 4


# No two texts alike.
WHO = (
    "cat",
    "dog",
    "boy",
    "girl",
    "bird",
    "frog",
    "king",
    "bear",
    "fish",
    "duck",
    "tree",
    "boat",
    "star",
    "lion",
    "mouse",
    "sun",
)


class ByBytes:
    """``_core.Batch`` with a clock that goes by bytes, which does not depend on who else uses the machine."""

    def __init__(self, passes: Any) -> None:
        self.passes = passes

    def __getattr__(self, name: str) -> Any:
        return getattr(self.passes, name)

    def step(self, work: list[Any]) -> Any:
        results, info = self.passes.step(work)
        return results, info | {f"{part}_seconds": info[f"{part}_bytes"] / 1e9 for part in ("draft", "verify")}


def read(model: deepcalm.Model, draft: str | int, n: int, temp: float) -> tuple[int, Any]:
    """Bytes of the answers' steps, and the answers."""
    with model.batch(max_sequences=n, draft=draft) as b:
        b._passes = ByBytes(b._passes)  # type: ignore[assignment]
        requests = [
            b.submit(model.encode(f"A {who} was"), sampling=Sampling(temp=temp, seed=i), max_tokens=150, eos_ids=())
            for i, who in enumerate(WHO[:n])
        ]
        list(b.run())
        return b.stats.decode_bytes, [r.choices[0].tokens for r in requests]


@pytest.mark.parametrize("name", ["v3", "glm4_moe_lite", "demo"])
def test_auto_reads_at_most_two_per_cent_more(name: str) -> None:
    """Bytes counted by the passes; random weights accept next to nothing, the demo model's drafts pay."""
    path = deepcalm.demo_path() if name == "demo" else models.packed(name, dtype="q8")
    model, shares = deepcalm.Model(path, threads=1), []
    for n in (1, 4, 16):
        for temp in (0.0, 1.0):
            (off, texts), (auto, same) = (read(model, draft, n, temp) for draft in ("off", "auto"))
            assert same == texts
            assert auto <= (1 + LIMIT) * off, (n, temp)
            shares.append(auto / off)
    assert name != "demo" or (min(shares[:2]) < 0.9 and max(shares[-2:]) < 0.95), shares
