"""Drafters beside the MTP layer: whoever drafts, tokens and logits are those without drafts."""

from __future__ import annotations

from array import array
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import deepcalm
import models
import tiny
from deepcalm.drafters import LONGEST, continuation
from deepcalm.errors import SessionError


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(0, 7))
def test_the_longest_match_goes_on_as_the_text_did(ids: list[int], n: int) -> None:
    length, found = 0, 0
    for end in range(len(ids) - 1):
        same = 0
        while same < min(end + 1, LONGEST) and ids[end - same] == ids[-1 - same]:
            same += 1
        if same and same >= length:
            length, found = same, end
    longer = [*ids]
    for _ in range(n if length else 0):
        longer.append(longer[len(longer) - (len(ids) - 1 - found)])
    assert continuation(array("i", ids), n) == (length, longer[len(ids) :])


def text_of(model: deepcalm.Model, ids: list[int], **options: Any) -> tuple[list[int], list[Any], dict[str, Any]]:
    """Tokens, log probabilities and who drafted what."""
    session = model.session(96, mtp=options.get("drafter") == "mtp")
    generation = session.generate(ids, max_tokens=60, eos_ids=(), logprobs=3, **options)
    tokens = list(generation)
    assert session.tokens.tolist() == ids + tokens
    return tokens, generation.scores, generation.drafts.stats.drafters


@pytest.mark.parametrize("name", ["demo", "v2_lite"])
def test_the_text_drafts_for_itself(name: str) -> None:
    """Prompts that repeat themselves, so that there are drafts; a model with random weights soon repeats itself too."""
    path = deepcalm.demo_path() if name == "demo" else models.packed(name, dtype="q8")
    model, offered, accepted = deepcalm.Model(path, threads=1), 0, 0
    for seed, temp in product(range(3), (0.0, 0.8)):
        ids = tiny.token_ids(200, 9, seed).tolist() * 3
        plain = text_of(model, ids, draft="off", temp=temp, seed=seed)
        for draft in (1, 4, 7, "auto"):
            tokens, scores, who = text_of(model, ids, draft=draft, drafter="ngram", temp=temp, seed=seed)
            assert (tokens, scores) == plain[:2]
            assert not who.keys() - {"ngram"}
            offered, accepted = offered + who.get("ngram", (0, 0))[0], accepted + who.get("ngram", (0, 0))[1]
    assert offered > accepted > 0


def test_names() -> None:
    model = models.model("moonlight")  # no MTP layer
    for bad in ("", "eagle", "auto,ngram", "ngram,", "MTP"):
        with pytest.raises(ValueError, match="expected auto, mtp, ngram"):
            model.session().generate([1], drafter=bad)
    with pytest.raises(SessionError, match="drafter mtp: the session keeps no MTP state"):
        model.session().generate([1], drafter="mtp")
    assert list(model.session().generate([1], drafter="mtp", draft="off", max_tokens=1))
    with_layer = models.model("v3")
    generation = with_layer.session().generate([1, 2, 1, 2, 1, 2], max_tokens=20, draft=2, eos_ids=())
    list(generation)
    assert set(generation.drafts.stats.drafters) == {"mtp"}, "a number asks the MTP layer first"


def test_a_stopped_search_leaves_the_sequence_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while matches are looked for, and the traceback is kept: the sequence grows all the same."""
    session, kept = models.model("moonlight").session(), []
    generation = session.generate([5, 6] * 9, drafter="ngram", draft=3, eos_ids=())
    next(generation)

    def interrupted(_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "flatnonzero", interrupted)
    try:
        list(generation)
    except KeyboardInterrupt as e:
        kept.append(e)
    assert kept and generation.reason == "interrupted"
    monkeypatch.undo()
    session.prefill([1, 2, 3])
