"""Who drafts and how many tokens: the cost model of speculation, and the controller behind ``draft="auto"``.

Nothing here touches the text: whatever is drafted, every token is chosen from the main model's logits
(runtime/batch.h). Decoding is bound by the bytes it reads, so cost is counted in bytes and checked against the
clock. With the MTP layer, and with another drafter (drafters.py) whose step takes the place of the layer's:

    plain step            B1 = fixed + head + layers x k experts + cache
    round with K drafts   B1 + (U(K+1) - U(1)) experts + K x MTP step        U(j): distinct experts of j adjacent tokens
                          + (U1(t) - U1(1)) experts                          MTP rows of the t tokens of the last round
    tokens per round      1 + a + a^2 + ... + a^K                            a: acceptance of one draft
"""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from operator import mul
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from array import array

    from . import _core
    from .sampling import Sampling

MAX_DRAFT = 7

# What "auto" knows beforehand (docs/perf/notebook.md says what was tried without each). Its law is LIMIT; the rest
# decides how soon it drafts, and how soon it stops.
LIMIT = 0.02  # share of the plain bytes that drafting never loses in a text of LIMIT_TOKENS or more; least gain, too
LIMIT_TOKENS = 128
AUTO_MAX = 3  # longest chain of the MTP layer, which fades on its own output
PRIOR_ACCEPTANCE = 0.8  # as reported for MTP layers of V3 and R1; replaced by what is measured
PRIOR_WEIGHT = 8  # drafts that the prior counts for
MEMORY = 0.97  # weight of a draft's outcome in the acceptance, one round later
PAUSE = 256  # steps before drafting is tried again where it lost; a fourth of it if texts are many; doubles
PLAIN_FIRST = 6  # plain steps before the first draft; the first two may be slow, so their median is the pace
PLAIN_EVERY = 32  # the pause where drafting has won since the last one
SAFE_SHARE = 0.75 * LIMIT  # of the bytes without drafts, which are estimated
MAX_PENDING = 256  # tokens that a sequence's MTP cache lacks before a step catches up
PASS_ROWS = 256  # of a drafter's pass over tokens that it lacks
MAX_BATCH_ROWS = 320  # of a pass of a batch
UNION_EVERY = 16  # steps of a batch after which counted unions are looked at again
MAX_SLOWNESS = 2.0  # a round's seconds count as at most so many times those that its bytes predict: others are busy


def expected_tokens(acceptance: float | Sequence[float], k: int) -> float:
    """Tokens of a round with ``k`` drafts; draft j is accepted with probability ``acceptance`` [j-1] if j-1 was."""
    tokens, sure = 1.0, 1.0
    for j in range(k):
        sure *= acceptance if isinstance(acceptance, float | int) else acceptance[j]
        tokens += sure
    return tokens


def _distinct(rows: float, top_k: int, n_experts: int) -> float:
    return n_experts * (1 - (1 - top_k / n_experts) ** rows) if top_k else 0.0


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
    draft_routing: tuple[int, int] | None = None  # the drafter's own top_k and n_experts; None: the model's

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
        return self.layers * self.distinct(rows)

    def draft_bytes(self, k: int, rows: float) -> float:
        """Bytes of ``k`` drafts; the first one's pass brings the MTP cache up to date with ``rows`` tokens."""
        return self.mtp_pass(rows) + (k - 1) * self.mtp_step if k else 0.0

    def mtp_pass(self, rows: float) -> float:
        """Bytes of an MTP pass over ``rows`` tokens."""
        top_k, n_experts = self.draft_routing or (self.top_k, self.n_experts)
        return self.mtp_step + (_distinct(rows, top_k, n_experts) - top_k) * self.mtp_expert

    def distinct(self, rows: float) -> float:
        """Experts of one layer that ``rows`` tokens use, as if routed at random."""
        return _distinct(rows, self.top_k, self.n_experts)

    def verify_bytes(self, k: int, counted: Sequence[tuple[int, int]] = ()) -> float:
        """Bytes of the main pass over ``k`` drafts and the token before them."""
        return self.plain + (self.union(k + 1, counted) - self.union(1, counted)) * self.expert

    def relative_cost(self, k: int, counted: Sequence[tuple[int, int]] = (), rows: float = 1) -> float:
        """Bytes of a round with ``k`` drafts over those of a plain step; ``rows``: see ``draft_bytes``."""
        return (self.verify_bytes(k, counted) + self.draft_bytes(k, rows)) / self.plain

    def worst_passes(self, rows: int) -> float:
        """Bytes that a drafter's passes over ``rows`` tokens read at most."""
        top_k, n_experts = self.draft_routing or (self.top_k, self.n_experts)
        one = self.mtp_step + max(min(rows * top_k, n_experts) - top_k, 0) * self.mtp_expert
        return -(-rows // PASS_ROWS) * one

    def worst_batch(self, drafts: int, mtp_rows: int, union: float) -> float:
        """Bytes that one more draft of so many sequences loses at most, beside rows that use ``union`` experts."""
        more = min(drafts * self.top_k * self.layers, self.layers * self.n_experts - union)
        return max(more, 0) * self.expert + self.worst_passes(mtp_rows)

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
    drafters: dict[str, tuple[int, int]] = field(default_factory=dict)  # drafts offered and accepted, by who made them

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

    def add(self, r: Mapping[str, Any], drafter: str = "mtp") -> None:
        """Adds a round as ``_core.Session.draft_round`` reports it, and whose drafts it verified."""
        self.rounds += 1
        self.tokens += len(r["tokens"])
        self.drafted += r["drafted"]
        self.accepted += r["accepted"]
        self.experts += r["experts_verify"]
        self.bytes += r["draft_bytes"] + r["verify_bytes"]
        self.seconds += r["draft_seconds"] + r["verify_seconds"]
        self.draft_bytes += r["draft_bytes"]
        self.draft_seconds += r["draft_seconds"]
        count_drafts(self.drafters, drafter, r)
        for j in range(1, r["drafted"] + 1):
            self.offered[j] += 1 if r["accepted"] >= j - 1 else 0
            self.taken[j] += 1 if r["accepted"] >= j else 0


def count_drafts(drafters: dict[str, tuple[int, int]], drafter: str, r: Mapping[str, Any]) -> None:
    """Adds a round's drafts offered and accepted to those of ``drafter``."""
    if r["drafted"]:
        offered, accepted = drafters.get(drafter, (0, 0))
        drafters[drafter] = offered + r["drafted"], accepted + r["accepted"]


@dataclass(slots=True)
class Offer:
    """What a drafter could do in the next round.

    Args:
        drafter: its name in statistics.
        cost: of rounds with its drafts: its own step in place of the MTP layer's.
        most: drafts, at most.
        rows: tokens that its first pass has to catch up with.
        ids: the drafts, where they are known before one asks for them.
        kind: a number per kind of its drafts, each of which is accepted as often as it is.
        prior: how often a draft of that kind is accepted.
    """

    drafter: str
    cost: CostModel
    most: int = MAX_DRAFT
    rows: int = 1
    ids: Sequence[int] = ()
    kind: int = 0
    prior: float = PRIOR_ACCEPTANCE

    @property
    def key(self) -> tuple[str, int]:
        """What acceptance is counted by."""
        return self.drafter, self.kind


class Acceptance:
    """How often drafts counted lately. [j-1]: of draft j, where all before it counted."""

    def __init__(self, prior: float = PRIOR_ACCEPTANCE) -> None:
        self._prior = prior
        self._offered, self._taken = [0.0] * MAX_DRAFT, [0.0] * MAX_DRAFT

    def rates(self, priors: Sequence[float] | None = None) -> list[float]:
        """[MAX_DRAFT] what was measured, with a prior."""
        rates, most = [], 1.0
        for offered, taken, prior in zip(self._offered, self._taken, priors or (self._prior,) * MAX_DRAFT, strict=True):
            rates.append((taken + min(prior, most) * PRIOR_WEIGHT) / (offered + PRIOR_WEIGHT))
            most = min(most, rates[-1])  # as a rule later drafts are no better than those before
        return rates

    def add(self, drafted: int, accepted: int) -> None:
        """A round."""
        for j in range(min(accepted + 1, drafted)):
            self._offered[j] = MEMORY * self._offered[j] + 1
            self._taken[j] = MEMORY * self._taken[j] + (j < accepted)

    def fade(self) -> None:
        """What was measured says little about what comes."""
        self._offered, self._taken = [n / 4 for n in self._offered], [n / 4 for n in self._taken]


@dataclass(slots=True, eq=False)
class Text:
    """A sequence that drafts are made for.

    Args:
        ids: all of its tokens; a round is given the last one.
        core: what holds its cache.
        sampling: how its tokens are chosen.
        left: tokens that may still come.
        pending: those that the MTP layer's cache lacks.
        offer, k: whose drafts the next round verifies, and how many.
        drafts: those; a number where the round makes them, with the MTP layer.
        accepted: how often drafts counted, by their kind (in a batch).
    """

    ids: array[int]
    core: _core.Session
    sampling: Sampling
    left: int = 0
    pending: int = 1
    offer: Offer | None = None
    k: int = 0
    drafts: int | Sequence[int] = 0
    accepted: defaultdict[tuple[str, int], Acceptance] = field(default_factory=lambda: defaultdict(Acceptance))

    @property
    def key(self) -> tuple[str, int]:
        """The kind of the drafts of the step; ("", 0) without any."""
        return self.offer.key if self.offer and self.k else ("", 0)

    def add(self, accepted: int) -> None:
        """A step of a batch."""
        if self.k:
            self.accepted[self.key].add(self.k, accepted)
        self.left -= accepted + 1
        self.pending = accepted + 1 if self.key[0] == "mtp" else self.pending % MAX_PENDING + 1


class Kind(Acceptance):
    """What is known of one kind of drafts, from all texts: a new one starts from it.

    ``pause``: steps without them; ``tried``: since the last pause; ``switches``: how often they were begun or stopped.
    """

    def __init__(self, prior: float, pause: int) -> None:
        super().__init__(prior)
        self.pause, self._next_pause, self.tried, self.switches = pause, 0, 0, 0
        self._lost_before = 0.0, 0.0  # by all drafts, in bytes and by the clock, when the last pause began

    @property
    def probing(self) -> bool:
        """As many drafts tell, and no less."""
        return self.tried < PRIOR_WEIGHT

    def add(self, drafted: int, accepted: int) -> None:
        """Drafts of a text in a step."""
        super().add(drafted, accepted)
        self.switches += self.tried == 0
        self.tried += drafted

    def rest(self, lost: tuple[float, float], n: int) -> None:
        """No drafts for a while; what was accepted says little about what comes after it."""
        won = all(now < before for now, before in zip(lost, self._lost_before, strict=True))
        self.pause = PLAIN_EVERY if won else max(self._next_pause, PAUSE // min(n, 4))
        self._next_pause, self._lost_before = min(2 * self.pause, max(4 * PAUSE // n, PAUSE)), lost
        self.switches += self.tried > 0
        self.tried = 0
        self.fade()


class Controller:
    """Decides the drafts of every text of a batch, or of one alone, step by step.

    ``draft`` a number: always that many, by the first drafter that has any. "off": none. With "auto" a draft is made
    where its chance to count, times the bytes of a token without drafts, is more than what it adds to the step: experts
    that no other row uses, the time of a row (in bytes that could be read instead), and its part of the drafter's
    passes, each of which serves the drafts of one depth. Each text has the drafter that promises it most. The longest
    come first: where nobody waits for their places, others that end sooner save their own rows only, and the account
    says so. No step starts that could, at worst, take the bytes of all texts beyond LIMIT: LIMIT_TOKENS or more read at
    most that share more than without drafting, whatever the acceptance. Drafts that do not pay, in bytes or by the
    clock, are tried again after a pause, which doubles while they fail, a few at first.
    """

    def __init__(self, cost: CostModel, draft: str | int) -> None:
        self.cost = cost
        self.fixed = None if draft == "auto" else 0 if draft == "off" else int(draft)
        self.stats = DraftStats()
        self.kinds: dict[tuple[str, int], Kind] = {}
        self._read = self._lost = 0.0  # bytes of all answers without drafts; what drafts took and did not bring
        self._cache = 0.0  # bytes of the last step that were no weights
        self._random = [cost.layers * cost.distinct(rows) for rows in range(MAX_BATCH_ROWS + 1)]
        self._union: list[float] = []  # [rows] distinct (layer, expert) pairs of a pass
        self._plain = [0.0]  # [answers] bytes of a step without drafts
        self._steps = self._fresh = 0  # when counted unions are looked at again
        self._late = 0.0  # what drafts took by the clock and did not bring, in bytes that could be read in that time
        self._pace: deque[float] = deque([0.0], maxlen=9)  # bytes a second without drafts, lately
        self._fit = [0.0] * 5  # of seconds to bytes and rows of a step: sums of products, lately

    @property
    def drafting(self) -> bool:
        """Whether anything is drafted now."""
        return any(kind.tried for kind in self.kinds.values())

    @property
    def switches(self) -> int:
        """How often a kind of drafts was begun or stopped."""
        return sum(kind.switches for kind in self.kinds.values())

    def choose(
        self, answers: Sequence[Text], offers: Sequence[Sequence[Offer]], rows: int, most: int,
        counted: Callable[[], Sequence[tuple[int, int]]],
    ) -> None:  # fmt: skip
        """Sets each answer's ``offer`` and ``k``.

        Args:
            answers: as they are.
            offers: of the drafters at hand, for each answer.
            rows: of the main pass besides those of drafts.
            most: drafts of all answers together.
            counted: ``expert_union`` of the ``_core.Batch``, or of the session.
        """
        n = len(answers)
        for d, own in zip(answers, offers, strict=True):
            d.offer, d.k = next(iter(own), None), 0
            if self.fixed and d.offer:
                d.k = max(min(self.fixed, d.offer.most, most // n), 0)
        if self.fixed is not None or not answers:
            return
        self._steps += 1
        if n == 1 and self._union and not any(self._kind(offer).pause <= 0 for offer in offers[0]):
            return
        if self._steps >= self._fresh:
            self._union, self._fresh = self._unions(counted()), self._steps + UNION_EVERY
        cost, union = self.cost, self._union
        self._plain = [0.0, *(cost.plain + (u - union[1]) * cost.expert + self._cache * (i + 1) / n
                              for i, u in enumerate(union[1 : n + 1]))]  # fmt: skip
        risk_left = SAFE_SHARE * max(self._read, LIMIT_TOKENS * self._plain[n] / n) - self._lost
        groups: dict[tuple[str, int], list[tuple[Text, list[float]]]] = {}
        for d, own in zip(answers, offers, strict=True):
            promises = [p for offer in own if (p := self._promise(d, offer, rows, n))]
            if promises:
                _, d.offer, chances = max(promises, key=lambda p: p[0])
                groups.setdefault(d.offer.key, []).append((d, chances))
        for key, able in groups.items():
            drafts, risk, pays = self._group(self.kinds[key], able, rows, most, risk_left)
            rows, most, risk_left = rows + drafts, most - drafts, risk_left - risk
            if not pays and most and max(d.left for d, _ in able) > 1:
                self.kinds[key].rest((self._lost, self._late), n)
                for d in answers:
                    d.accepted[key].fade()

    def _kind(self, offer: Offer) -> Kind:
        if (kind := self.kinds.get(offer.key)) is None:
            kind = self.kinds[offer.key] = Kind(offer.prior, PLAIN_FIRST - self._steps)
        return kind

    def _promise(self, d: Text, offer: Offer, rows: int, n: int) -> tuple[float, Offer, list[float]] | None:
        """Bytes that an offer saves an answer, as if all of them used it, and the chances of its drafts to count."""
        if (kind := self._kind(offer)).pause > 0:
            return None
        rates = Acceptance(offer.prior).rates() if kind.probing else d.accepted[offer.key].rates(kind.rates())
        chances = [1.0, *accumulate(rates, mul)]
        step = offer.cost.mtp_step / n + (self._union[rows + 1] - self._union[rows]) * self.cost.expert
        gains = accumulate(c * self._plain[n] / n - step for c in chances[1 : offer.most + 1])
        return max(gains, default=0.0), offer, chances

    def _group(
        self, kind: Kind, able: list[tuple[Text, list[float]]], rows: int, most: int, risk_left: float
    ) -> tuple[int, float, bool]:
        """Drafts of one kind for answers, depth by depth: how many, bytes they lose at worst, and whether any pay."""
        offer = able[0][0].offer
        assert offer
        cost, union, row_time, n = offer.cost, self._union, self._row_time(), len(self._plain) - 1
        price, total, total_risk, pays = self._plain[n] / n, 0, 0.0, False
        able = sorted(able, key=lambda x: -x[0].left)
        longest = AUTO_MAX if offer.drafter == "mtp" else MAX_DRAFT
        for depth in range(1, 2 if kind.probing else longest + 1):
            row = (union[rows + 1] - union[rows]) * cost.expert + row_time
            able = [(d, c) for d, c in able if d.k == depth - 1 and d.offer and depth <= d.offer.most
                    and c[depth] * price > (1 + LIMIT) * row]  # fmt: skip
            gain, wanted, now = 0.0, (0, 0.0), (0, 0.0)  # drafts, and what they lose at worst
            value, draft_rows = 0.0, 0
            for b, (d, c) in enumerate(able[:most], 1):
                draft_rows += d.offer.rows if d.offer and depth == 1 else 1
                value += c[depth] * price / (1 + LIMIT)
                # of the MTP layer, about that of a layer
                cache = self._cache * b / n / max(cost.layers, 1) if cost.mtp_step else 0.0
                won = value - (union[rows + b] - union[rows]) * cost.expert - b * row_time - cache
                worst = b, cost.worst_batch(b, draft_rows, union[rows]) + cache
                # A draft follows a draft as a rule: what the first one catches up with is a risk, not its price.
                if won - cost.mtp_pass(2 * b if depth == 1 else b) > gain:
                    gain, wanted = won - cost.mtp_pass(2 * b if depth == 1 else b), worst
                if worst[1] <= risk_left and (kind.probing or won > cost.mtp_pass(draft_rows)):
                    now = worst
            pays |= gain > 0
            best, risk = wanted if wanted[1] <= risk_left else now if gain > 0 else (0, 0.0)
            for d, _ in able[:best]:
                d.k = depth
            rows, most, risk_left = rows + best, most - best, risk_left - risk
            total, total_risk = total + best, total_risk + risk
            if not best:
                break
        return total, total_risk, pays

    def _unions(self, counted: Sequence[tuple[int, int]]) -> list[float]:
        """[rows] as if routed at random, times what counting found for about as many rows."""
        random = self._random
        known = {j: experts / n / random[j] for j, (n, experts) in enumerate(counted, 1) if n >= 8 and random[j]}
        known = known or {1: 1.0}
        edges = [(j + after + 1) // 2 for j, after in pairwise(known)]  # from here on the later one is as near
        parts = zip(known.values(), [0, *edges], [*edges, len(random)], strict=True)
        return [*accumulate((scale * u for scale, begin, end in parts for u in random[begin:end]), max)]

    def min_confidence(self, rows: int) -> float:
        """Probability below which a draft is not worth its row in a pass of ``rows``."""
        if self.fixed is not None or not self._plain[-1]:
            return 0.0
        row = (self._union[rows] - self._union[rows - 1]) * self.cost.expert + self._row_time()
        return row * (len(self._plain) - 1) / self._plain[-1]

    def observe(
        self, answers: Sequence[tuple[Text, Mapping[str, Any]]], step: Mapping[str, Any], prefill: bool, others: bool
    ) -> None:
        """Takes a step into account.

        Args:
            answers: each one's state and its result, as ``_core.Batch.step`` reports it.
            step: what it reports of the step; draft_bytes with those of another model, mtp_bytes without.
            prefill: rows of prompts were in it too; the MTP passes over them are the prompts' own.
            others: somebody waits for the place of an answer that ends.
        """
        if self.fixed is not None or not answers:
            return
        cost, n, tried, made = self.cost, len(answers), any(d.k for d, _ in answers), 0
        account = tried or prefill  # else the step was what it is without drafts
        before = self._remaining([d for d, _ in answers]) if account and not others else 0.0
        mtp = [d for d, _ in answers if d.key[0] == "mtp"] if tried else []
        depth, mtp_rows = max((d.k for d in mtp), default=0), sum(d.pending for d in mtp)
        for kind in self.kinds.values():
            kind.pause -= 1
        for d, r in answers:  # one that was not confident enough for a row did not count either
            if d.k:
                self.kinds[d.key].add(d.k, r["accepted"])
            d.add(r["accepted"])
            made += 1 + r["accepted"]
        without = float(step["verify_bytes"])
        if account:
            without = made * self._plain[n] / n if others else before - self._remaining([d for d, _ in answers])
        weights = cost.plain + (step["experts_verify"] - cost.layers * cost.top_k) * cost.expert
        self._cache = max(step["verify_bytes"] - weights, 0.0)
        self._read += without
        seconds = step["draft_seconds"] + step["verify_seconds"]
        if not prefill and seconds > 0:  # each step counts as much, the slow ones too
            byte, row = (step["draft_bytes"] + step["verify_bytes"]) / seconds, step["rows"] / seconds
            products = (byte * byte, byte * row, row * row, byte, row)
            self._fit = [MEMORY * old + new for old, new in zip(self._fit, products, strict=True)]
        spent = step["draft_bytes"] - step["mtp_bytes"]  # by another model
        self._lost += spent + (cost.draft_bytes(depth, mtp_rows) if prefill else step["mtp_bytes"])
        if tried:
            rows = step["rows"] - sum(r["drafted"] for _, r in answers)
            self._lost += (step["experts_verify"] - self._union[rows]) * cost.expert + self._plain[n] - without
            read = step["draft_bytes"] + step["verify_bytes"]
            self._late += min(seconds * statistics.median(self._pace), MAX_SLOWNESS * read) - without
        elif seconds > 0 and not prefill:
            self._pace.append(step["verify_bytes"] / seconds)

    def _row_time(self) -> float:
        """What a row costs besides bytes, in bytes that could be read in that time."""
        bb, br, rr, bt, rt = self._fit
        scale = bb * rr - br * br
        tried = sum(k.tried for k in self.kinds.values())
        if tried < PRIOR_WEIGHT or scale <= 1e-4 * bb * rr:  # steps were too much alike to tell
            return 0.0
        byte, row = (bt * rr - rt * br) / scale, (rt * bb - bt * br) / scale
        return min(max(row / byte, 0.0), self._plain[1]) if byte > 0 else self._plain[1]

    def _remaining(self, answers: Sequence[Text]) -> float:
        """Bytes that the rest of these answers reads without drafts."""
        total, done = 0.0, 0
        for i, left in enumerate(sorted(d.left for d in answers)):
            total, done = total + (left - done) * self._plain[len(answers) - i], left
        return total
