"""Who drafts: the MTP layer, the text itself, another model.

A drafter offers drafts for the next round with their price (``drafting.Offer``); the controller chooses one offer, or
none, and the round verifies its drafts. Whoever made them, the tokens are those without drafts: a drafter that is wrong
costs time, never the text.
"""

from __future__ import annotations

import contextlib
import re
import weakref
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from . import _core, limits
from .drafting import MAX_DRAFT, PASS_ROWS, CostModel, Offer, Text
from .errors import Error, SessionError, one_line

if TYPE_CHECKING:
    from .model import Model

MATCHES = {2: 0.3, 4: 0.6, 8: 0.8, 12: 0.8}  # tokens that occurred before -> how often a draft behind them is accepted


def check_drafter(drafter: str) -> tuple[str, ...]:
    """The names in ``drafter``, between commas: mtp, ngram, model:FILE; auto, for the first two where they are at hand.

    Raises:
        ValueError: another one.
    """
    names = re.split(r",(?=auto|mtp|ngram|model:)", drafter) if isinstance(drafter, str) else [""]
    if not all(re.fullmatch("auto|mtp|ngram|model:.+", name, re.DOTALL) for name in names):
        raise ValueError(f"drafter: {one_line(repr(drafter), 80)}, expected auto, mtp, ngram or model:FILE, or several "
                         "with commas between")  # fmt: skip
    return tuple(dict.fromkeys(names))


def keeps_mtp(draft: str | int, drafter: str = "auto") -> bool | None:
    """Whether a session that drafts so keeps MTP state; None: if the model has the layer."""
    names = check_drafter(drafter)
    return draft not in ("off", 0) and ("mtp" in names or (None if "auto" in names else False))


def absolute(drafter: str) -> str:
    """The same names, files as a process in another folder finds them. Raises as ``check_drafter``."""
    names = (name.partition("model:") for name in check_drafter(drafter))
    return ",".join(f"model:{Path(file).absolute()}" if file else name for name, _, file in names)


class Drafter:
    """What makes drafts; ``cost``: of rounds with them."""

    def __init__(self, cost: CostModel) -> None:
        self.cost = cost

    def offer(self, text: Text, most: int) -> Offer | None:
        """What it could draft, at most so much; takes next to no time."""
        raise NotImplementedError

    def make(self, texts: Sequence[Text], _spent: Counter[str]) -> None:
        """Sets ``drafts`` of texts that share a step and took its offers; adds the "bytes" and "seconds" it takes."""
        for text in texts:
            text.drafts = text.offer.ids[: text.k] if text.offer else ()

    def forget(self, core: _core.Session) -> None:
        """Nothing is drafted for this sequence any more: what is kept of it goes."""


class Mtp(Drafter):
    """The model's own MTP layer, which works inside the round."""

    def offer(self, text: Text, most: int) -> Offer:
        """Always."""
        return Offer("mtp", self.cost, most, text.pending)

    def make(self, texts: Sequence[Text], _spent: Counter[str]) -> None:
        """As many as are wanted."""
        for text in texts:
            text.drafts = text.k


class Ngram(Drafter):
    """The text itself: what followed where its last tokens occurred before, in prompt or answer.

    Nothing is kept that would have to follow the sequence: searching 100,000 tokens takes a tenth of a millisecond,
    where a step's attention reads some hundred bytes of every one of them in every layer.
    """

    def __init__(self, cost: CostModel) -> None:
        super().__init__(replace(cost, mtp_step=0, mtp_expert=0))

    def offer(self, text: Text, most: int) -> Offer | None:
        """Behind the longest match."""
        length, ids = continuation(text.ids, most)
        return Offer("ngram", self.cost, most, 1, ids, length, MATCHES[length]) if length else None


def continuation(ids: array[int], n: int) -> tuple[int, list[int]]:
    """How many last tokens, of the numbers in MATCHES, occurred before, and ``n`` tokens that followed the latest time;
    over and over those that are there if the text ends earlier."""
    data, length, end = ids.tobytes(), 0, 4 * len(ids) - 4  # bytes before the last token, then those before a draft
    for more in MATCHES:
        at = data.rfind(data[-4 * more :], 0, end)
        while at > 0 and at % 4:  # between tokens
            at = data.rfind(data[-4 * more :], 0, at + 4 * more - 1)
        if at < 0:
            break
        length, end = more, at + 4 * more
    following = ids[end // 4 :] if length else ids[:0]
    return length, [following[i % len(following)] for i in range(n if length else 0)]


class Second(Drafter):
    """``model`` drafts for ``main``, which has the same tokens; its own sequences follow those that they draft for.

    Where it fails, its logits are not finite or its context is full, it drafts nothing.
    """

    def __init__(self, main: Model, model: Model, name: str) -> None:
        cost, own = (CostModel.of(m.core.weight_bytes, m.config) for m in (main, model))
        super().__init__(replace(cost, mtp_step=own.plain, mtp_expert=round(own.expert * own.layers),
                                 draft_routing=(own.top_k, own.n_experts)))  # fmt: skip
        self.model, self._n_valid, self._name = model, main.n_valid, name
        self._limit = int(model.config["max_position_embeddings"])
        self._following: weakref.WeakKeyDictionary[_core.Session, _core.Session | None] = weakref.WeakKeyDictionary()

    def _start(self, text: Text) -> _core.Session | None:
        """The sequence that follows a text from now on; None: there is no memory for it."""
        ctx, mine = min(self._limit, text.core.ctx), None
        with contextlib.suppress(Error, MemoryError):
            mine = _core.Session(self.model.core, ctx, "f16", min(PASS_ROWS, ctx), False)
            available = limits.available_memory() if self.model.device == "cpu" else None
            if available is not None and mine.cache_bytes > available:
                mine = None
        self._following[text.core] = mine
        return mine

    def _missing(self, text: Text) -> list[int]:
        """The tokens that the sequence which follows lacks, once those that differ are cut off; one at least."""
        mine = self._following[text.core]
        assert mine
        ids, have = np.array(text.ids, np.int32), mine.tokens
        n = min(len(ids) - 1, len(have))
        same = int(np.append(np.flatnonzero(ids[:n] != have[:n]), n)[0])
        mine.truncate(same)
        missing: list[int] = ids[same:].tolist()
        return missing

    def offer(self, text: Text, most: int) -> Offer | None:
        """As long as it has room and has not failed."""
        most = min(most, min(self._limit, text.core.ctx) - len(text.ids) + 1)
        mine = self._following.get(text.core, text)
        if most < 1 or mine is None:
            return None
        return Offer(self._name, self.cost, most, len(text.ids) if mine is text else len(self._missing(text)))

    def make(self, texts: Sequence[Text], spent: Counter[str]) -> None:
        """Passes that all of them share: what is missing, then token by token, with the noise of the draft's place."""
        made = {text: list[int]() for text in texts}
        try:
            todo = {text: self._missing(text) for text in texts if self._following.get(text.core) or self._start(text)}
            passes = _core.Batch(self.model.core, PASS_ROWS)
            while todo:
                work, room = [], PASS_ROWS
                for text, ids in todo.items():
                    part = ids[:room]
                    room -= len(part)
                    mine = self._following[text.core]
                    assert mine
                    how = text.sampling if len(part) == len(ids) else None
                    work.append((text, (mine, part, 0, how, self._n_valid, 0.0, -1)))
                    if not room:
                        break
                results, info = passes.step([w for _, w in work])
                spent.update(bytes=info["verify_bytes"], seconds=info["verify_seconds"])
                for (text, w), r in zip(work, results, strict=True):
                    made[text] += r["tokens"]
                    todo[text] = todo[text][len(w[1]) :] or r["tokens"]
                    if r["error"] is not None:
                        self._following[text.core] = None
                    if r["error"] is not None or len(made[text]) == text.k:
                        del todo[text]
        except (Error, MemoryError):  # the texts go on without these drafts
            self._following |= {text.core: None for text in texts}
        for text in texts:
            text.drafts = made[text]

    def forget(self, core: _core.Session) -> None:
        """Its sequence."""
        self._following.pop(core, None)


class Drafters:
    """Those at hand for the sequences of a model.

    Raises:
        SessionError: the MTP layer was named, and there is no state of it.
        Error: another model that cannot be opened or has other tokens (``Model.second``).
        ValueError: a name that is none.
    """

    def __init__(self, model: Model, drafter: str, draft: str | int, mtp: bool) -> None:
        cost = CostModel.of(model.core.weight_bytes, model.config)
        self._all: dict[str, Drafter] = {}
        names = check_drafter(drafter)
        for name in () if draft in ("off", 0) else names:
            if name == "mtp" and not mtp:
                raise SessionError("drafter mtp: the session keeps no MTP state; make it with session(mtp=True)")
            if name == "mtp" or (name == "auto" and mtp):
                self._all["mtp"] = Mtp(cost)
            if name in ("ngram", "auto"):
                self._all["ngram"] = Ngram(cost)
            if name.startswith("model:"):
                self._all[name] = model.second(name.removeprefix("model:"))
        self.only_mtp = not self._all.keys() - {"mtp"}

    def offers(self, text: Text) -> list[Offer]:
        """For the next round of ``text``."""
        most = min(text.left - 1, MAX_DRAFT)
        return [o for d in self._all.values() if most > 0 and (o := d.offer(text, most))]

    def make(self, texts: Sequence[Text]) -> Counter[str]:
        """Sets ``drafts`` of texts that share a step as was chosen; the "bytes" and "seconds" that it took."""
        spent: Counter[str] = Counter()
        for text in texts:
            text.drafts = 0
        for name, drafter in self._all.items():
            if mine := [text for text in texts if text.key[0] == name]:
                drafter.make(mine, spent)
        return spent

    def forget(self, core: _core.Session) -> None:
        """Nothing is drafted for this sequence any more."""
        for drafter in self._all.values():
            drafter.forget(core)
