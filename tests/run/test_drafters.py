"""Drafters beside the MTP layer: whoever drafts, tokens and logits are those without drafts."""

from __future__ import annotations

import functools
import gc
import shutil
from array import array
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import deepcalm
import device_cases
import models
import tiny
from deepcalm import _core
from deepcalm.cluster import Setup
from deepcalm.drafters import MATCHES, Ngram, continuation
from deepcalm.drafting import LIMIT, LIMIT_TOKENS, Controller, CostModel, Text
from deepcalm.errors import SessionError, UnsupportedError
from deepcalm.files.packed import PackedFile
from deepcalm.sampling import Sampling
from ref import packed as ref_packed

N_VALID = tiny.N_TOKENS


@given(st.lists(st.sampled_from([0, 1, 256, 65536]), min_size=1, max_size=60), st.integers(0, 7))
def test_the_longest_match_goes_on_as_the_text_did(ids: list[int], n: int) -> None:
    length, start = 0, 0
    for more, end in product(MATCHES, range(len(ids))):
        if end >= more and ids[end - more : end] == ids[-more:] and end < len(ids):
            length, start = more, end
    longer = [*ids]
    for _ in range(n if length else 0):
        longer.append(longer[len(longer) - (len(ids) - start)])
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


def test_on_a_device() -> None:
    """Drafts that are given go through the host there; a copy of the model is always right."""
    device_cases.need("sim")
    file = models.small().path
    model = deepcalm.Model(file, device="sim")
    plain = model.session(32).generate([5, 6, 7], max_tokens=8, draft="off", eos_ids=())
    copied = model.session(32).generate([5, 6, 7], max_tokens=8, draft=3, drafter=f"model:{file}", eos_ids=())
    assert list(copied) == list(plain)
    assert copied.drafts.stats.accepted == copied.drafts.stats.drafted > 0
    layer = model.session(32).generate([5, 6, 7], max_tokens=8, draft=2, eos_ids=())
    assert list(layer) == list(plain.tokens) and layer.drafts.stats.drafted > 0
    assert layer._device, "a number of drafts is the layer's there, which does not wait for the host"


def test_names() -> None:
    model = models.model("moonlight")  # no MTP layer
    for bad in ("", "eagle", "auto,eagle", "ngram,", "MTP", "model:", None):
        for draft in ("auto", "off"):
            with pytest.raises(ValueError, match="expected auto, mtp, ngram or model:FILE"):
                model.session().generate([1], draft=draft, drafter=bad)  # type: ignore[arg-type]
    with pytest.raises(SessionError, match="drafter mtp: the session keeps no MTP state"):
        model.session().generate([1], drafter="mtp")
    assert list(model.session().generate([1], drafter="mtp", draft="off", max_tokens=1))
    with_layer = models.model("v3")
    generation = with_layer.session().generate([1, 2, 1, 2, 1, 2], max_tokens=20, draft=2, eos_ids=())
    list(generation)
    assert set(generation.drafts.stats.drafters) == {"mtp"}, "a number asks the MTP layer first"


def test_files_are_named_for_processes_in_other_folders() -> None:
    setup = Setup.of("main.dcalm", 2, {"drafter": "ngram,model:a,b.dcalm,model:/c"})
    here = Path.cwd()
    assert setup.path == f"{here}/main.dcalm"
    assert setup.batch["drafter"] == f"ngram,model:{here}/a,b.dcalm,model:/c"
    assert Setup.of(None, None, {}).batch == {"drafter": "auto"}


# ---- another model


@functools.cache
def pair() -> tuple[deepcalm.Model, str]:
    """A model without MTP layer in f32, and the file of one that is less deep and has the same first layers, in q4."""
    deep, flat = (models.checkpoint("v2_lite", "bf16", num_hidden_layers=n) for n in (5, 4))
    return deepcalm.Model(models.pack(deep, dtype="f32").path, threads=1), str(models.pack(flat, dtype="q4").path)


@functools.cache
def demo_and_deeper() -> tuple[deepcalm.Model, str]:
    """A deeper random model with the demo model's tokens, and the demo model."""
    folder = models.checkpoint("v3", "bf16", num_hidden_layers=12, vocab_size=4096, tokenizer="none")
    with PackedFile(deepcalm.demo_path()) as demo:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes(demo.tokenizer_file(name) or b"")
    return deepcalm.Model(models.pack(folder, dtype="q8").path, threads=1), str(deepcalm.demo_path())


@pytest.mark.parametrize("two", [pair, demo_and_deeper])
def test_another_model_drafts(two: Any) -> None:
    main, file = two()
    for seed, temp in product(range(2), (0.0, 0.9)):
        ids = tiny.token_ids(N_VALID, 30, seed).tolist()
        plain = text_of(main, ids, draft="off", temp=temp, seed=seed)
        for draft, drafter in product((1, 7, "auto"), (f"model:{file}", f"ngram,model:{file}")):
            tokens, scores, _ = text_of(main, ids, draft=draft, drafter=drafter, temp=temp, seed=seed)
            assert (tokens, scores) == plain[:2]


def test_a_copy_in_fewer_bits_is_nearly_always_right() -> None:
    """And its bytes are counted."""
    main, file = (
        deepcalm.Model(models.packed("v2_lite", dtype="f32"), threads=1),
        models.packed("v2_lite", dtype="bf16"),
    )
    offered = accepted = 0
    for seed, temp in product(range(2), (0.0, 0.9)):
        session = main.session()
        generation = session.generate([*range(9)], max_tokens=80, draft=3, drafter=f"model:{file}", temp=temp,
                                      seed=seed, eos_ids=())  # fmt: skip
        list(generation)
        stats = generation.drafts.stats
        offered, accepted = offered + stats.drafted, accepted + stats.accepted
        own = main.second(str(file)).model.core.weight_bytes
        assert stats.draft_bytes > 0.9 * stats.drafted * (own["fixed"] + own["head"])
        assert session.stats.decode_bytes > stats.bytes - 1e6
    assert accepted > 0.9 * offered > 0


def drafts(second: Any, text: Text) -> Any:
    """Five drafts for a text."""
    text.offer, text.k = second.offer(text, 5), 5
    second.make([text], Counter())
    return text.drafts


def test_the_other_model_follows_the_sequence(rng: np.random.Generator, tmp_path: Path) -> None:
    """Through truncation, restoring, prompts, texts that end early and forks it drafts what it would have drafted."""
    main, file = pair()
    second = main.second(file)
    session, plain = main.session(200), main.session(200)
    for i in range(25):
        kind = rng.choice(["prefill", "generate", "truncate", "restore"])
        n = int(rng.integers(1, 12))
        if session.pos + n + 12 > session.ctx or kind == "truncate":
            n = int(rng.integers(session.pos + 1))
            session.truncate(n)
            plain.truncate(n)
        elif kind == "prefill" or session.pos == 0:
            ids = rng.integers(0, N_VALID, n).tolist()
            models.assert_same_bits("logits", session.prefill(ids), plain.prefill(ids))
        elif kind == "restore":
            session.save(tmp_path / "s")
            session.restore(tmp_path / "s")
        else:
            how: dict[str, Any] = {"max_tokens": 40, "temp": float(rng.choice([0, 0.9])), "seed": i, "eos_ids": ()}
            drafted = session.generate(draft=int(rng.integers(1, 8)), drafter=f"model:{file}", **how)
            made = [token for token, _ in zip(drafted, range(n), strict=False)]
            assert made == [token for token, _ in zip(plain.generate(draft="off", **how), range(n), strict=False)]
        if session.pos and rng.random() < 0.5:
            text = Text(session.sequence, session.core, Sampling(temp=0.9, seed=i))
            stranger = replace(text, core=_core.Session(main.core, session.ctx, "f16", 8))
            assert drafts(second, text) == drafts(second, stranger) and len(text.drafts) == 5  # type: ignore[arg-type]


def test_caches_go_when_they_are_given_up() -> None:
    """A session's with close(), an answer's with its place, and with each the second model's."""
    main, file = pair()
    following = main.second(file)._following
    session = main.session(64)
    generation = session.generate([5, 6], draft=2, drafter=f"model:{file}")
    next(generation)
    assert next(generation) >= 0 and len(following) == 1
    session.close()
    gc.collect()
    assert not following and generation.reason == "closed"
    with main.batch(2, ctx=64, draft=2, drafter=f"model:{file}") as batch:
        request = batch.submit([5, 6], max_tokens=9)
        while not following:
            batch.step()
        batch._drop(batch._running[0])
        gc.collect()
        assert not following
        list(batch.run())
        assert request.done and len(request.choices[0].tokens) == 9
        assert batch._idle and not following, "its rows are kept, those of the other model are not"


def test_models_that_cannot_draft_are_refused() -> None:
    main, _ = pair()
    bare = models.pack(models.checkpoint("v2_lite", "bf16", tokenizer="none"), dtype="q8").path
    for path, what in ((deepcalm.demo_path(), "vocab_size is 4096"), (bare, "tokenizer.json is None")):
        with pytest.raises(UnsupportedError, match=f"{path} cannot draft for {main.path}: {what}, expected"):
            main.session().generate([1], drafter=f"model:{path}")
    with pytest.raises(deepcalm.Error, match="nowhere"):
        main.session().generate([1], drafter="model:nowhere.dcalm")


def damaged(folder: Path) -> str:
    """A model whose logits are not finite behind token 77."""
    source = models.pack(models.checkpoint("v2_lite", "f32"))
    path = Path(shutil.copy(source.path, folder / "nan.dcalm"))
    table = ref_packed.core_tensors(source, _core.expected_tensors(source.config))
    embed = next(t for t in table if t["name"] == "embed")
    row = embed["bytes"] // embed["rows"]
    with path.open("r+b") as f:
        f.seek(embed["offset"] + 77 * row)
        f.write(np.full(row // 4, np.nan, np.float32).tobytes())
    return str(path)


def test_a_model_that_fails_drafts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main, file = pair()
    for ids in ([5, 77, 9], [5, 6, 9]):
        plain = text_of(main, ids, draft="off")
        tokens, scores, who = text_of(main, ids, draft=3, drafter=f"model:{damaged(tmp_path)}")
        assert (tokens, scores) == plain[:2] and (77 not in ids or not who)

    def no_memory(*_: Any) -> Any:
        raise MemoryError

    main.second(file)
    generation = main.session(96).generate(ids, max_tokens=9, eos_ids=(), draft=3, drafter=f"model:{file}")
    with monkeypatch.context() as patch:
        patch.setattr("deepcalm.limits.available_memory", lambda: 0)
        assert len(list(generation)) == 9 and not generation.drafts.stats.drafters
    monkeypatch.setattr(_core, "Batch", no_memory)
    assert text_of(main, ids, draft=3, drafter=f"model:{file}") == (*plain[:2], {})


# ---- a batch


def test_a_text_without_memory_stops_no_drafts_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    main, file = pair()
    left = iter([0])
    with main.batch(8, 64, draft=2, drafter=f"model:{file}", cache_bytes=10**8) as batch:
        requests = [batch.submit([5, 6, 9 + i], max_tokens=12, eos_ids=()) for i in range(3)]
        monkeypatch.setattr("deepcalm.limits.available_memory", lambda: next(left, None))
        while batch.step():
            pass
        assert all(r.choices[0].reason == "length" for r in requests)
        assert batch.drafted[f"model:{file}"][0] > 12


@pytest.mark.parametrize("name", ["v2_lite", "v3"])
def test_a_batch_with_drafters(name: str, rng: np.random.Generator) -> None:
    """Answers that share prompts, end early, are cancelled; tokens are those without drafts."""
    main = pair()[0] if name == "v2_lite" else models.model(name)
    second = pair()[1] if name == "v2_lite" else str(models.packed(name, dtype="q8"))
    prompts = [rng.integers(0, N_VALID, int(n)).tolist() * int(m) for n, m in ((40, 1), (7, 5), (3, 9), (70, 1))]
    want: list[Any] = []
    for draft, drafter in (("off", "auto"), ("auto", "auto"), (2, "ngram"), (3, f"model:{second}"),
                           ("auto", f"auto,model:{second}")):  # fmt: skip
        with main.batch(4, ctx=200, draft=draft, drafter=drafter) as batch:
            requests = [
                batch.submit(ids, sampling=Sampling(temp=0.7 * (i % 2), seed=i), max_tokens=40, n=2, eos_ids=())
                for i, ids in enumerate(prompts)
            ]
            for step in range(200):
                if step == 9:
                    requests[1].cancel()
                batch.step()
            got = [[(c.tokens, c.reason) for c in r.choices] for r in requests]
            cancelled = [tokens for tokens, _ in got.pop(1)]
            want = want or got
            assert got == want and all(r == "length" for answers in got for _, r in answers)
            assert all(len(tokens) < 40 for tokens in cancelled)
            offered, accepted = (sum(n[i] for n in batch.drafted.values()) for i in (0, 1))
            assert (offered, accepted) == (batch.stats.drafts_offered, batch.stats.drafts_accepted)
            assert draft != 3 or set(batch.drafted) == {drafter}


# ---- what it brings


@pytest.mark.parametrize(
    ("again", "least"), [(0, 0.98), (1, 1.3)], ids=["stories", "stories and their first half again"]
)
def test_auto_drafts_from_texts_that_repeat_themselves(again: int, least: float) -> None:
    """Bytes of rounds over a text that is known, routed at random, as a model of 26 MoE layers would read them."""
    cost = CostModel(plain=2600, expert=9, mtp_step=180, mtp_expert=9, layers=26, top_k=6, n_experts=64)
    model = deepcalm.Model(deepcalm.demo_path(), threads=1)
    ids = model.encode((Path(__file__).parents[1] / "data" / "stories.txt").read_text()[:6000])
    begin = len(ids) if again else 60
    ids += ids[: again * len(ids) // 2]
    text = Text(array("i", ids[:begin]), model.session(8).core, Sampling())
    control, drafter, read = Controller(cost, "auto"), Ngram(cost), 0.0
    while (n := len(text.ids)) < len(ids) - 1:
        text.left = len(ids) - n
        offer = drafter.offer(text, min(7, text.left - 1))
        control.choose([text], [[offer] if offer else []], 1, 7, tuple)
        text.drafts = ()
        drafter.make([text] if text.k else [], Counter())
        assert not isinstance(text.drafts, int)
        k = len(text.drafts)
        accepted = next((i for i, d in enumerate(text.drafts) if d != ids[n + i]), k)
        verify = cost.verify_bytes(k)
        step = {"rows": 1 + k, "experts_verify": cost.union(k + 1), "draft_bytes": 0, "mtp_bytes": 0,
                "verify_bytes": verify, "draft_seconds": 0, "verify_seconds": verify}  # fmt: skip
        control.observe([(text, {"drafted": k, "accepted": accepted})], step, prefill=False, others=True)
        text.ids.extend(ids[n : n + accepted + 1])
        read += verify
        assert read <= (1 + LIMIT) * cost.plain * max(len(text.ids) - begin, LIMIT_TOKENS)
    assert (len(text.ids) - begin) * cost.plain > least * read
