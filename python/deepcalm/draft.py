"""How many tokens to draft: the cost model of speculation, and the controller behind ``draft="auto"``.

Nothing here touches the text: whatever is drafted, every token is chosen from the main model's logits
(runtime/speculate.h). Decoding is bound by the bytes it reads, so cost is counted in bytes and checked against the
clock:

    plain step            B1 = fixed + head + layers x k experts + cache
    round with K drafts   B1 + (U(K+1) - U(1)) experts + K x MTP step        U(j): distinct experts of j adjacent tokens
    tokens per round      1 + a + a^2 + ... + a^K                            a: acceptance of one draft
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_DRAFT = 7
AUTO_MAX = 3  # longest chain that "auto" tries
PRIOR_ACCEPTANCE = 0.8  # as reported for MTP layers of V3 and R1; replaced by what is measured
PRIOR_WEIGHT = 8  # drafts that the prior counts for
MIN_GAIN = 1.02  # predicted gain below which drafting is not tried
ALLOWANCE = 0.01  # share of the plain cost that drafting may lose before it is turned off
GRACE_TOKENS = 64  # the allowance at the start of a text is that of this many tokens
RETRY_TOKENS = 256  # first pause after drafting lost; doubles each time
PLAIN_EVERY = 64  # while drafting, a plain step this often keeps its price known
PLAIN_FIRST = 2  # plain steps before the first draft


def expected_tokens(acceptance: float, k: int) -> float:
    """Tokens of a round with ``k`` drafts, each accepted with probability ``acceptance`` if those before it were."""
    return float(sum(acceptance**j for j in range(k + 1)))


@dataclass(frozen=True, slots=True)
class CostModel:
    """Bytes of a plain step and of rounds, from the packed file's sizes and the counted unions of experts.

    Args (all bytes): plain: a plain step without cache; expert: one routed expert of one layer; mtp_step: one MTP row
    with head; layers, top_k, n_experts: MoE layers, experts per token, routed experts.
    """

    plain: int
    expert: int
    mtp_step: int
    layers: int
    top_k: int
    n_experts: int

    @classmethod
    def of(cls, sizes: Mapping[str, int], config: Mapping[str, Any]) -> CostModel:
        """From ``_core.Model.weight_bytes`` and the configuration."""
        k = int(config["num_experts_per_tok"]) if config["n_routed_experts"] else 0
        fixed = sizes["fixed"] + sizes["head"] + sizes["embed_row"]
        return cls(
            plain=fixed + sizes["n_moe_layers"] * k * sizes["expert"],
            expert=sizes["expert"],
            mtp_step=sizes["mtp_fixed"] + k * sizes["expert"] + sizes["head"] + sizes["embed_row"],
            layers=sizes["n_moe_layers"],
            top_k=k,
            n_experts=int(config["n_routed_experts"]),
        )

    def union(self, rows: int, counted: Sequence[tuple[int, int]] = ()) -> float:
        """Distinct (layer, expert) pairs of ``rows`` adjacent tokens: counted windows, else as if routed at random."""
        if len(counted) >= rows and counted[rows - 1][0] >= 8:
            return counted[rows - 1][1] / counted[rows - 1][0]
        if not self.top_k:
            return 0.0
        return self.layers * self.n_experts * (1 - (1 - self.top_k / self.n_experts) ** rows)

    def relative_cost(self, k: int, counted: Sequence[tuple[int, int]] = ()) -> float:
        """Bytes of a round with ``k`` drafts over those of a plain step."""
        extra = (self.union(k + 1, counted) - self.union(1, counted)) * self.expert
        return 1 + (extra + k * self.mtp_step) / self.plain

    def gain(self, k: int, acceptance: float, counted: Sequence[tuple[int, int]] = ()) -> float:
        """Predicted speed with ``k`` drafts over plain decoding, where bytes decide."""
        return expected_tokens(acceptance, k) / self.relative_cost(k, counted)


@dataclass(slots=True)
class DraftStats:
    """What drafting did to one text; all sums over its rounds (a plain step is a round without drafts)."""

    rounds: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    experts: int = 0  # distinct (layer, expert) pairs of the main passes
    bytes: int = 0
    seconds: float = 0.0
    draft_bytes: int = 0
    draft_seconds: float = 0.0
    offered: list[int] = field(default_factory=lambda: [0] * (MAX_DRAFT + 1))  # [j]: rounds that verified a j-th draft
    taken: list[int] = field(default_factory=lambda: [0] * (MAX_DRAFT + 1))  # [j]: rounds whose j-th draft counted

    @property
    def acceptance(self) -> float:
        """Accepted over drafted tokens; 0 before the first draft."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_pass(self) -> float:
        """Tokens per main pass."""
        return self.tokens / self.rounds if self.rounds else 0.0

    def add(self, r: Mapping[str, Any]) -> None:
        """Adds a round as ``_core.Session.draft_round`` reports it."""
        self.rounds += 1
        self.tokens += len(r["tokens"])
        self.drafted += r["drafted"]
        self.accepted += r["accepted"]
        self.experts += r["experts_verify"]
        self.bytes += r["draft_bytes"] + r["verify_bytes"]
        self.seconds += r["draft_seconds"] + r["verify_seconds"]
        self.draft_bytes += r["draft_bytes"]
        self.draft_seconds += r["draft_seconds"]
        for j in range(1, r["drafted"] + 1):
            self.offered[j] += 1 if r["accepted"] >= j - 1 else 0
            self.taken[j] += 1 if r["accepted"] >= j else 0


class Controller:
    """Decides the drafts of each round of one text.

    ``draft`` a number: always that many. "off": none. "auto": drafts only while it pays. It starts where the cost model
    predicts a gain, keeps two accounts against plain decoding, in counted bytes and in seconds, and turns drafting off
    when either has lost more than ALLOWANCE of the plain cost; after a pause that doubles it tries again if the
    accounts have room for it. So on any text the loss is bounded, whatever the acceptance.
    """

    def __init__(self, cost: CostModel | None, draft: str | int) -> None:
        self.cost = cost
        self.fixed = None if draft == "auto" else 0 if draft == "off" else int(draft)
        self.stats = DraftStats()
        self.drafting = False
        self.switches = 0
        self._plain_seconds: deque[float] = deque(maxlen=9)
        self._plain_bytes = 0
        self._lost_bytes = self._lost_seconds = 0.0  # plain steps lost; negative: won
        self._pause = PLAIN_FIRST
        self._next_pause = RETRY_TOKENS
        self._since_plain = 0

    @property
    def acceptance(self) -> float:
        """Acceptance of a draft whose predecessors were accepted: measured, with a prior."""
        s = self.stats
        return (sum(s.taken) + PRIOR_ACCEPTANCE * PRIOR_WEIGHT) / (sum(s.offered) + PRIOR_WEIGHT)

    def predict(self, k: int, counted: Sequence[tuple[int, int]] = ()) -> float:
        """Predicted speed with ``k`` drafts over plain decoding, from bytes and the acceptance so far."""
        return self.cost.gain(k, self.acceptance, counted) if self.cost else 1.0

    def next_k(self, counted: Sequence[tuple[int, int]] = ()) -> int:
        """Drafts of the next round; ``counted``: ``_core.Session.expert_union()``."""
        if self.fixed is not None or self.cost is None:
            return self.fixed or 0
        if not self.drafting:
            if self._pause > 0:
                return 0
            best = max(range(1, AUTO_MAX + 1), key=lambda k: self.predict(k, counted))
            if self.predict(best, counted) < MIN_GAIN:
                self._pause = RETRY_TOKENS
                return 0
            self.drafting = True
            self.switches += 1
        if self._since_plain >= PLAIN_EVERY:
            return 0
        return max(range(1, AUTO_MAX + 1), key=lambda k: self.predict(k, counted))

    def min_confidence(self, counted: Sequence[tuple[int, int]] = ()) -> float:
        """Probability below which a draft is not worth a row of the verification pass: that row's relative cost."""
        if self.fixed is not None or self.cost is None:
            return 0.0
        return self.cost.relative_cost(1, counted) - 1 - self.cost.mtp_step / self.cost.plain

    def observe(self, r: Mapping[str, Any]) -> None:
        """Takes a finished round into account."""
        self.stats.add(r)
        n, seconds = len(r["tokens"]), r["draft_seconds"] + r["verify_seconds"]
        if r["draft_bytes"] == 0:
            self._plain_seconds.append(seconds)
            self._plain_bytes = r["verify_bytes"]
            self._since_plain = 0
            self._pause -= n
            return
        self._since_plain += n
        plain_seconds = statistics.median(self._plain_seconds) if self._plain_seconds else seconds
        plain_bytes = self._plain_bytes or r["verify_bytes"]
        steps = ALLOWANCE * max(self.stats.tokens, GRACE_TOKENS)
        # In plain steps. What was won long ago does not pay for losses now: credit is kept for one allowance only.
        read = (r["draft_bytes"] + r["verify_bytes"]) / plain_bytes - n
        self._lost_bytes = max(self._lost_bytes + read, -steps)
        self._lost_seconds = max(self._lost_seconds + seconds / plain_seconds - n, -steps)
        if self.drafting and max(self._lost_bytes, self._lost_seconds) > steps:
            self.drafting = False
            self.switches += 1
            self._pause = self._next_pause
            self._next_pause *= 2
