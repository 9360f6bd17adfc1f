"""Who drafts: the MTP layer and the text itself.

A drafter offers drafts for the next round with their price (``drafting.Offer``); the controller chooses one offer, or
none, and the round verifies its drafts. Whoever made them, the tokens are those without drafts: a drafter that is wrong
costs time, never the text.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from .drafting import MAX_DRAFT, CostModel, Offer
from .errors import SessionError, one_line

if TYPE_CHECKING:
    from .model import Model
    from .sampling import Sampling

NAMES = ("mtp", "ngram")  # of drafters, in the order in which a number of drafts asks them
LONGEST = 12  # tokens that the text's end is compared over
CANDIDATES = 4096  # places where its last token occurred before, latest first, that are looked at
# Shortest match of a kind, and how often a draft behind one is accepted: on texts that repeat themselves and others.
KINDS = ((8, 0.8), (4, 0.6), (2, 0.3))


def check_drafter(drafter: str) -> tuple[str, ...]:
    """The names in ``drafter``: "auto" alone, or some of NAMES with commas between.

    Raises:
        ValueError: another one.
    """
    names = tuple(drafter.split(",")) if isinstance(drafter, str) else ()
    if names != ("auto",) and (not names or not set(names) <= set(NAMES)):
        raise ValueError(f"drafter: {one_line(repr(drafter), 80)}, expected auto, {', '.join(NAMES)}")
    return names


def keeps_mtp(draft: str | int, drafter: str = "auto") -> bool | None:
    """Whether a session that drafts so keeps MTP state; None: if the model has the layer."""
    names = check_drafter(drafter)
    return None if names == ("auto",) and draft not in ("off", 0) else "mtp" in names and draft not in ("off", 0)


@dataclass(slots=True)
class Text:
    """A sequence as drafters see it.

    ids: all of its tokens, the one that a round is given last; they may be appended to and never change. room: drafts
    that may follow. mtp_rows: tokens that the MTP layer's cache lacks.
    """

    ids: array[int]
    sampling: Sampling
    room: int = 0
    mtp_rows: int = 1


Wanted = tuple[Text, Offer | None, int]  # so many drafts of what was offered for a text


class Drafter:
    """What makes drafts; ``cost``: of rounds with them."""

    def __init__(self, cost: CostModel) -> None:
        self.cost = cost

    def offer(self, text: Text, most: int) -> Offer | None:
        """What it could draft, at most so much; takes next to no time."""
        raise NotImplementedError

    def make(self, wanted: Sequence[tuple[Text, Offer, int]]) -> list[int | Sequence[int]]:
        """Drafts for texts that share a step; a number: the round makes them, with the MTP layer."""
        return [offer.ids[:k] for _, offer, k in wanted]


class Mtp(Drafter):
    """The model's own MTP layer, which works inside the round."""

    def offer(self, text: Text, most: int) -> Offer:
        """Always."""
        return Offer("mtp", self.cost, most, text.mtp_rows)

    def make(self, wanted: Sequence[tuple[Text, Offer, int]]) -> list[int | Sequence[int]]:
        """As many as are wanted."""
        return [k for *_, k in wanted]


class Ngram(Drafter):
    """The text itself: what followed where its last tokens occurred before, in prompt or answer.

    Nothing is kept that would have to follow the sequence: comparing 100,000 tokens takes a tenth of a millisecond,
    where a step's attention reads some hundred bytes of every one of them in every layer.
    """

    def __init__(self, cost: CostModel) -> None:
        super().__init__(replace(cost, mtp_step=0, mtp_expert=0))

    def offer(self, text: Text, most: int) -> Offer | None:
        """Behind the longest match, the latest of those."""
        length, ids = continuation(text.ids, most)
        kinds = ((least, prior) for least, prior in KINDS if length >= least)
        return next((Offer("ngram", self.cost, most, 1, ids, *kind) for kind in kinds), None)


def continuation(ids: array[int], n: int) -> tuple[int, list[int]]:
    """How many last tokens occurred before, at most LONGEST, and ``n`` tokens that followed; over and over those that
    are there if the text ends earlier."""
    text = np.array(ids, np.int32)  # a copy: a view would keep ids from growing for as long as a traceback holds it
    end, length = len(text) - 1, 0
    at = np.flatnonzero(text[:-1] == text[-1:])[-CANDIDATES:]
    while len(at) and length < LONGEST:
        found, length = at, length + 1
        at = at[at >= length]
        at = at[text[at - length] == text[end - length]]
    if not length:
        return 0, []
    start = int(found[-1]) + 1
    following: list[int] = text[start + np.arange(n) % (end + 1 - start)].tolist()
    return length, following


class Drafters:
    """Those at hand for the sequences of a model.

    Raises:
        SessionError: the MTP layer was named, and there is no state of it.
        ValueError: a name that is none.
    """

    def __init__(self, model: Model, drafter: str, draft: str | int, mtp: bool) -> None:
        cost, names = CostModel.of(model.core.weight_bytes, model.config), check_drafter(drafter)
        if names == ("auto",):  # a device drafts with the MTP layer by itself, without waiting for the host
            names = ("mtp",) * mtp + ("ngram",) * (model.device == "cpu" or not mtp)
        elif "mtp" in names and not mtp and draft not in ("off", 0):
            raise SessionError("drafter mtp: the session keeps no MTP state; make it with session(mtp=True)")
        kinds: dict[str, type[Drafter]] = {"mtp": Mtp, "ngram": Ngram}
        self._all = {} if draft in ("off", 0) else {name: kinds[name](cost) for name in names}
        self.only_mtp = not self._all.keys() - {"mtp"}

    def offers(self, text: Text) -> list[Offer]:
        """For the next round of ``text``."""
        most = min(text.room, MAX_DRAFT)
        return [o for d in self._all.values() if most > 0 and (o := d.offer(text, most))]

    def make(self, wanted: Sequence[Wanted]) -> list[int | Sequence[int]]:
        """The drafts that were chosen for texts that share a step: ids, or how many the MTP layer makes in it."""
        made: list[int | Sequence[int]] = [0] * len(wanted)
        for name, drafter in self._all.items():
            mine = {i: (text, o, k) for i, (text, o, k) in enumerate(wanted) if o and k and o.drafter == name}
            for i, drafts in zip(mine, drafter.make([*mine.values()]) if mine else (), strict=True):
                made[i] = drafts
        return made
