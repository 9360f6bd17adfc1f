"""How many tokens to draft: the cost model of speculation, and the controller behind ``draft="auto"``.

Nothing here touches the text: whatever is drafted, every token is chosen from the main model's logits
(runtime/speculate.h). Decoding is bound by the bytes it reads, so cost is counted in bytes and checked against the
clock:

    plain step            B1 = fixed + head + layers x k experts + cache
    round with K drafts   B1 + (U(K+1) - U(1)) experts + K x MTP step        U(j): distinct experts of j adjacent tokens
                          + (U1(t) - U1(1)) experts                          MTP rows of the t tokens of the last round
    tokens per round      1 + a + a^2 + ... + a^K                            a: acceptance of one draft
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_DRAFT = 7

# What "auto" knows beforehand (docs/perf/notebook.md says what was tried without each). Its law is LIMIT; the rest
# decides how soon it drafts, and how soon it stops.
LIMIT = 0.02  # share of the plain bytes that drafting never loses in a text of LIMIT_TOKENS or more; least gain, too
LIMIT_TOKENS = 128
AUTO_MAX = 3  # longest chain
PRIOR_ACCEPTANCE = 0.8  # as reported for MTP layers of V3 and R1; replaced by what is measured
PRIOR_WEIGHT = 8  # drafts that the prior counts for
MEMORY = 0.97  # weight of a draft's outcome in the acceptance, one round later
PAUSE = 256  # tokens before drafting is tried again; twice and four times as many after it lost and lost again
PLAIN_FIRST = 6  # plain steps before the first draft; the first two may be slow, so their median is the price
PLAIN_EVERY = 32  # while drafting, a plain step this often keeps its price known
PROBES = 4  # rounds with a single draft each time drafting is turned on, before the clock is believed
DRAWDOWN = 1.25  # plain steps that drafting may lose by the clock, counted from its best moment, before it is off
DRAWDOWN_WON = 4.0  # and what had been won since it is on, but not more than so many
MAX_SLOWNESS = 2.0  # a round's seconds count as at most so many times those that its bytes predict: others are busy


def expected_tokens(acceptance: float | Sequence[float], k: int) -> float:
    """Tokens of a round with ``k`` drafts; draft j is accepted with probability ``acceptance`` [j-1] if j-1 was."""
    tokens, sure = 1.0, 1.0
    for j in range(k):
        sure *= acceptance if isinstance(acceptance, float | int) else acceptance[j]
        tokens += sure
    return tokens


@dataclass(frozen=True, slots=True)
class CostModel:
    """Bytes of a plain step and of rounds, from the packed file's sizes and the counted unions of experts.

    Args (all bytes): plain: a plain step without cache; expert: one routed expert, the mean of the main layers;
    mtp_step: one MTP row with head; mtp_expert: one routed expert of the MTP layer; layers, top_k, n_experts: MoE
    layers, experts per token, routed experts.
    """

    plain: int
    expert: float
    mtp_step: int
    mtp_expert: int
    layers: int
    top_k: int
    n_experts: int

    @classmethod
    def of(cls, sizes: Mapping[str, int], config: Mapping[str, Any]) -> CostModel:
        """From ``_core.Model.weight_bytes`` and the configuration."""
        k = int(config["num_experts_per_tok"]) if config["n_routed_experts"] else 0
        fixed = sizes["fixed"] + sizes["head"] + sizes["embed_row"]
        return cls(
            plain=fixed + k * sizes["experts"],
            expert=sizes["experts"] / max(sizes["n_moe_layers"], 1),
            mtp_expert=sizes["mtp_expert"],
            mtp_step=sizes["mtp_fixed"] + k * sizes["mtp_expert"] + sizes["mtp_head"] + sizes["embed_row"],
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

    def draft_bytes(self, k: int, rows: float) -> float:
        """Bytes of ``k`` drafts; the first one's pass brings the MTP cache up to date with ``rows`` tokens."""
        if not self.top_k or k == 0:
            return k * self.mtp_step
        batch = float(self.n_experts * (1 - (1 - self.top_k / self.n_experts) ** rows))
        return k * self.mtp_step + (batch - self.top_k) * self.mtp_expert

    def verify_bytes(self, k: int, counted: Sequence[tuple[int, int]] = ()) -> float:
        """Bytes of the main pass over ``k`` drafts and the token before them."""
        return self.plain + (self.union(k + 1, counted) - self.union(1, counted)) * self.expert

    def relative_cost(self, k: int, counted: Sequence[tuple[int, int]] = (), rows: float = 1) -> float:
        """Bytes of a round with ``k`` drafts over those of a plain step; ``rows``: see ``draft_bytes``."""
        return (self.verify_bytes(k, counted) + self.draft_bytes(k, rows)) / self.plain

    def worst_loss(self, k: int, rows: int) -> float:
        """Plain steps that a round with ``k`` drafts loses at most: none accepted, no expert shared."""
        most = (min((k + 1) * self.top_k, self.n_experts) - self.top_k) * self.layers
        batch = min(rows * self.top_k, self.n_experts) - self.top_k
        return (max(most, 0) * self.expert + max(batch, 0) * self.mtp_expert + k * self.mtp_step) / self.plain

    def gain(self, k: int, acceptance: float | Sequence[float], counted: Sequence[tuple[int, int]] = ()) -> float:
        """Predicted speed with ``k`` drafts over plain decoding, where bytes decide."""
        tokens = expected_tokens(acceptance, k)
        return tokens / self.relative_cost(k, counted, tokens)


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

    @property
    def experts_per_pass(self) -> float:
        """Distinct (layer, expert) pairs of a main pass."""
        return self.experts / self.rounds if self.rounds else 0.0

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

    ``draft`` a number: always that many. "off": none. "auto": drafts only while it pays. It starts where the cost
    model predicts a gain, keeps an account by the clock against plain decoding, and turns it off when that is too far
    below its best (DRAWDOWN, DRAWDOWN_WON); after a pause, which doubles while it fails, it tries again. No round
    starts that could, at worst, take the whole text's bytes beyond LIMIT: a text of LIMIT_TOKENS or more reads at most
    that share more than without drafting, whatever the acceptance. Drafting is not tried again before the time that a
    failure takes, MTP rows to catch up with included, fits into the same share.
    """

    def __init__(self, cost: CostModel | None, draft: str | int) -> None:
        self.cost = cost
        self.fixed = None if draft == "auto" else 0 if draft == "off" else int(draft)
        self.stats = DraftStats()
        self.drafting = False
        self.switches = 0
        self._plain_seconds: deque[float] = deque(maxlen=9)
        self._plain_bytes = 0
        self._lost = 0.0  # plain steps that the whole text lost in bytes; negative: won
        self._lost_seconds = 0.0  # the same by the clock
        self._probes = 0
        self._down = 0.0  # plain steps lost by the clock since the best moment
        self._won = 0.0  # plain steps won by the clock since drafting was turned on
        self._pause, self._next_pause = PLAIN_FIRST, PAUSE
        self._since_plain = 0
        # [j-1]: rounds lately that offered, and accepted, draft j after accepting all before it
        self._offered, self._taken = [0.0] * MAX_DRAFT, [0.0] * MAX_DRAFT

    @property
    def acceptance(self) -> list[float]:
        """[j-1]: acceptance of draft j when those before it were accepted: measured lately, with a prior."""
        rates, prior = [], PRIOR_ACCEPTANCE
        for offered, taken in zip(self._offered, self._taken, strict=True):
            rates.append((taken + prior * PRIOR_WEIGHT) / (offered + PRIOR_WEIGHT))
            prior = min(prior, rates[-1])  # later drafts come from the layer's own output: no better than those before
        return rates

    def next_k(self, counted: Sequence[tuple[int, int]] = (), pending: int = 1) -> int:
        """Drafts of the next round.

        Args:
            counted: ``_core.Session.expert_union()``.
            pending: tokens that the MTP cache lacks; the first draft's pass makes their rows.
        """
        if self.fixed is not None or self.cost is None:
            return self.fixed or 0
        if not self.drafting and self._pause > 0:
            return 0
        gains = {k: self.cost.gain(k, self.acceptance, counted) for k in range(1, AUTO_MAX + 1)}
        best = max(gains, key=lambda k: gains[k])
        if not self.drafting and gains[best] < 1 + LIMIT:
            self._rest()
            return 0
        share = LIMIT * max(self.stats.tokens, LIMIT_TOKENS)
        if not self.drafting and share - self._lost_seconds < DRAWDOWN:
            self._pause = PLAIN_EVERY
            return 0
        room = share - self._lost
        best = max((k for k in gains if self.cost.worst_loss(k, pending) <= room), key=lambda k: gains[k], default=0)
        if best == 0:
            if self.drafting:
                self._rest()
            return 0
        if not self.drafting:
            self.drafting = True
            self.switches += 1
            self._down = self._won = 0.0
            self._probes = PROBES
        return 0 if self._since_plain >= PLAIN_EVERY else 1 if self._probes else best

    def _rest(self) -> None:
        """No drafts for a while; what was accepted says little about the text after it."""
        if self.drafting:
            self.drafting, self.switches = False, self.switches + 1
            self._pause = PAUSE if self._won > 0 else self._next_pause
            self._next_pause = min(2 * self._pause, 4 * PAUSE)
        else:
            self._pause = PAUSE
        self._offered, self._taken = [n / 4 for n in self._offered], [n / 4 for n in self._taken]

    def min_confidence(self, counted: Sequence[tuple[int, int]] = ()) -> float:
        """Probability below which a draft is not worth a row of the verification pass: that row's relative cost."""
        if self.fixed is not None or self.cost is None:
            return 0.0
        return self.cost.relative_cost(1, counted) - 1 - self.cost.mtp_step / self.cost.plain

    def observe(self, r: Mapping[str, Any]) -> None:
        """Takes a finished round into account."""
        self.stats.add(r)
        n, seconds = len(r["tokens"]), r["draft_seconds"] + r["verify_seconds"]
        if not self.drafting:
            self._pause -= n
        if r["draft_bytes"] == 0:
            self._plain_seconds.append(seconds)
            self._plain_bytes = r["verify_bytes"]
            self._since_plain = 0
            return
        self._since_plain += n
        for j in range(min(r["accepted"] + 1, r["drafted"])):
            self._offered[j] = MEMORY * self._offered[j] + 1
            self._taken[j] = MEMORY * self._taken[j] + (j < r["accepted"])
        plain_seconds = statistics.median(self._plain_seconds) if self._plain_seconds else seconds
        plain_bytes = self._plain_bytes or r["verify_bytes"]
        read = (r["draft_bytes"] + r["verify_bytes"]) / plain_bytes  # in plain steps
        took = min(seconds / plain_seconds, MAX_SLOWNESS * read)
        if self._probes == PROBES:  # the layer's weights come from further away than they will
            took = min(took, read)
        self._lost += read - n
        self._lost_seconds += took - n
        if r["drafted"]:
            self._probes = max(self._probes - 1, 0)
        self._won += n - took
        self._down = max(self._down + took - n, 0.0)
        won = min(max(self._won + self._down, 0.0), DRAWDOWN_WON)
        if self.drafting and self._down > DRAWDOWN + won:
            self._rest()
