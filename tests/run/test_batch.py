"""Many sequences that share passes: each gets what it would get alone, bit for bit, whatever the schedule."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import deepcalm
import models
import tiny
from deepcalm import ResourceError, SessionError, _core, batch
from deepcalm.batch import Batch, Choice, Request
from deepcalm.generation import TextGeneration
from deepcalm.sampling import Sampling

SAMPLED = Sampling(temp=1.0, top_k=50, top_p=0.95, seed=2**64 - 2)
IDS = tiny.token_ids(tiny.N_TOKENS, 600).tolist()


@pytest.fixture
def model() -> deepcalm.Model:
    return models.model()


def alone(
    model: deepcalm.Model, ids: list[int], how: Sampling, stop: Any = (), kv: str = "f16", ctx: int | None = None,
    **options: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """Tokens, text, scores and reason of a session that has the model to itself."""
    with model.session(ctx, kv, mtp=False) as session:
        generation = session.generate(ids, **dataclasses.asdict(how), **options)
        text = "".join(answer := TextGeneration(generation, stop))
        return generation.tokens, text, generation.scores, answer.reason


def made(choice: Choice) -> tuple[Any, ...]:
    assert len(choice.accepted) == len(choice.tokens)
    return choice.tokens, choice.text, choice.scores, choice.reason


def check(model: deepcalm.Model, request: Request, ids: list[int], how: Sampling, **options: Any) -> None:
    """Every choice of ``request`` is what a session alone makes."""
    assert request.done
    for i, choice in enumerate(request.choices):
        assert choice.seed == (how.seed + i) % 2**64 and choice.index == i and choice.request is request
        assert made(choice) == alone(model, ids, dataclasses.replace(how, seed=choice.seed), **options)


# ---- what a request gets


def test_answers_are_those_of_sessions_alone(model: deepcalm.Model) -> None:
    cases: list[tuple[list[int], Sampling, dict[str, Any]]] = [
        (IDS[:1], Sampling(), {"max_tokens": 30}),
        (IDS[:70], SAMPLED, {"max_tokens": 40}),
        (IDS[5:300], Sampling(temp=0.7, min_p=0.01, seed=4), {"max_tokens": 1}),
        (IDS[7:90], SAMPLED, {"max_tokens": 25, "logprobs": 3}),
        (IDS[9:20], Sampling(temp=1.5, seed=9), {"max_tokens": 60, "eos_ids": range(0, 270, 4)}),
        (IDS[:3], Sampling(), {"max_tokens": 9, "logprobs": 0}),
        (IDS[40:45], SAMPLED, {"max_tokens": 30, "eos_ids": ()}),
    ]
    with model.batch(max_sequences=4) as batch:
        requests = [batch.submit(ids, sampling=how, **options) for ids, how, options in cases]
        assert (batch.waiting, batch.running, batch.idle) == (len(cases), 0, False)
        while not batch.idle:
            for choice in batch.step():
                assert choice.tokens or choice.reason
        assert batch.stats.steps > 30
        for request, (ids, how, options) in zip(requests, cases, strict=True):
            check(model, request, ids, how, **options)


def test_special_tokens_that_are_asked_for_show(model: deepcalm.Model) -> None:
    shown, hidden = (model.vocabulary.special_ids([t]) for t in ("<eos>", "<|im_end|>"))
    how = Sampling(temp=5.0, seed=1)
    with model.batch() as batch:
        choice = batch.submit(IDS[:5], sampling=how, max_tokens=300, eos_ids=(), shown=shown).choices[0]
        assert [*batch.run()] and shown | hidden <= {*choice.tokens}
    decoder = model.vocabulary.decoder(shown)
    assert choice.text == "".join(map(decoder.feed, choice.tokens)) + decoder.flush()
    assert "<eos>" in choice.text and "<|im_end|>" not in choice.text


def test_stop_strings_end_an_answer_where_they_end_a_text(model: deepcalm.Model) -> None:
    ids, how = IDS[:12], Sampling(temp=1.0, seed=3)
    text = alone(model, ids, how, max_tokens=60)[1]
    stops = [(text[10:13],), (text[20:24], text[15:17]), "never this", ("<|user|>",), (text[-2:] + "x",)]
    with model.batch() as batch:
        requests = [batch.submit(ids, sampling=how, stop=stop, max_tokens=60) for stop in stops]
        for choice in batch.run():
            assert text.startswith(choice.text)
        for request, stop in zip(requests, stops, strict=True):
            check(model, request, ids, how, stop=stop, max_tokens=60)
        assert [r.choices[0].reason for r in requests][:3] == ["stop", "stop", "length"]


def test_choices_differ_by_seed_and_share_a_prefill(model: deepcalm.Model) -> None:
    with model.batch(max_sequences=3, draft="off") as batch:
        request = batch.submit(IDS[:150], sampling=SAMPLED, max_tokens=12, n=5)
        assert [c.seed for c in request.choices] == [2**64 - 2, 2**64 - 1, 0, 1, 2]
        list(batch.run())
        check(model, request, IDS[:150], SAMPLED, max_tokens=12)
        assert len({tuple(c.tokens) for c in request.choices}) > 1
        assert (request.prompt_tokens, request.cached_tokens) == (150, 0)
        rows = sum(len(c.tokens) for c in request.choices)
        assert batch.stats.rows <= 150 + rows and batch.stats.cached_tokens == 4 * 149


def test_the_end_of_the_context_is_a_session_s(model: deepcalm.Model) -> None:
    with model.batch(ctx=40) as batch:
        requests = [batch.submit(IDS[:n], eos_ids=(), max_tokens=m) for n, m in ((30, None), (40, 5), (39, 1), (39, 2))]
        list(batch.run())
        assert [r.choices[0].reason for r in requests] == ["context", "context", "length", "context"]
        for request, (n, m) in zip(requests, ((30, None), (40, 5), (39, 1), (39, 2)), strict=True):
            check(model, request, IDS[:n], Sampling(), ctx=40, max_tokens=m, eos_ids=())


def test_requests_that_can_never_run_are_refused_at_once(model: deepcalm.Model) -> None:
    with model.batch(ctx=64, cache_bytes=30_000) as batch:
        first = batch.submit(IDS[:5], max_tokens=4)
        for ids, options, error, match in (
            ([], {}, SessionError, "a prompt of 0 tokens, expected 1..64, the context"),
            (IDS[:65], {}, SessionError, "a prompt of 65 tokens"),
            ([311], {}, SessionError, "token id 311, expected 0..310"),
            (["a"], {}, TypeError, "token ids"),
            (IDS[:5], {"max_tokens": 0}, ValueError, "max_tokens: 0"),
            (IDS[:5], {"n": 0}, ValueError, "n: 0"),
            (IDS[:5], {"logprobs": -1}, ValueError, "logprobs: -1"),
            (IDS[:5], {"stop": ("",)}, ValueError, "stop string must not be empty"),
            (IDS[:5], {"stop": "a<|user|>"}, SessionError, "special token"),
            (IDS[:5], {"eos_ids": [-1]}, SessionError, "token id -1"),
            (IDS[:64], {}, ResourceError, r"64 positions in f16 take \d+ bytes, cache_bytes is 30000; use a smaller"),
        ):
            with pytest.raises(error, match=match):
                batch.submit(ids, **options)
        list(batch.run())
        check(model, first, IDS[:5], Sampling(), max_tokens=4)
    for options, error in (
        ({"max_sequences": 0}, ValueError), ({"max_sequences": 65}, ValueError), ({"ctx": 0}, SessionError),
        ({"kv": "f8"}, ValueError), ({"draft": 8}, ValueError), ({"cache_bytes": -1}, ValueError),
    ):  # fmt: skip
        with pytest.raises(error):
            model.batch(**options)
    with pytest.raises(SessionError, match="closed"):
        batch.submit(IDS[:5], max_tokens=1)
    with pytest.raises(SessionError, match="closed"):
        batch.step()


# ---- other threads


def test_cancelled_requests_end_between_steps(model: deepcalm.Model) -> None:
    with model.batch(max_sequences=2) as batch:
        requests = [batch.submit(IDS[:n], eos_ids=(), max_tokens=50) for n in (8, 9, 10)]
        for _ in range(5):
            batch.step()
        requests[0].cancel()
        requests[2].cancel()
        ended = [c for c in batch.step() if c.reason]
        assert {c.request for c in ended} == {requests[0], requests[2]} and batch.running == 1
        tokens = alone(model, IDS[:8], Sampling(), eos_ids=(), max_tokens=50)[0]
        assert requests[0].choices[0].tokens == tokens[:5] and requests[2].choices[0].tokens == []
        assert {c.reason for c in ended} == {"cancelled"}
        list(batch.run())
        check(model, requests[1], IDS[:9], Sampling(), eos_ids=(), max_tokens=50)
        requests[1].cancel()
        assert batch.idle and requests[1].choices[0].reason == "length"


def test_threads_submit_while_another_steps(model: deepcalm.Model) -> None:
    batch, requests, n = model.batch(max_sequences=3), {}, 12

    def submit(i: int) -> None:
        requests[i] = batch.submit(IDS[i : 2 * i + 5], sampling=Sampling(temp=1.0, seed=i), max_tokens=10)

    threads = [threading.Thread(target=submit, args=(i,)) for i in range(n)]
    assert batch.wait(0.01) is False
    threading.Timer(0.05, lambda: [t.start() for t in threads]).start()
    while len(requests) < n or not batch.idle:
        assert batch.wait(10)
        batch.step()
    for i, request in requests.items():
        check(model, request, IDS[i : 2 * i + 5], Sampling(temp=1.0, seed=i), max_tokens=10)
    threading.Timer(0.05, batch.close).start()
    assert batch.wait(10)
    with pytest.raises(SessionError, match="the batch is closed"):
        batch.step()


def test_a_batch_and_a_session_work_on_one_model(model: deepcalm.Model) -> None:
    texts: list[Any] = []
    expected = alone(model, IDS[:100], SAMPLED, max_tokens=40)
    thread = threading.Thread(target=lambda: texts.extend(alone(model, IDS[:100], SAMPLED, max_tokens=40)))
    with model.batch() as batch:
        request = batch.submit(IDS[:100], sampling=SAMPLED, max_tokens=40, n=2)
        thread.start()
        list(batch.run())
        thread.join()
        check(model, request, IDS[:100], SAMPLED, max_tokens=40)
        assert tuple(texts) == expected


# ---- rows that are there already, and memory


def rows_of(batch: Batch, *requests: tuple[list[int], int]) -> int:
    """Rows that passes compute for prompts of which so many tokens are wanted, all at once."""
    before = batch.stats.rows
    for ids, max_tokens in requests:
        batch.submit(ids, max_tokens=max_tokens, eos_ids=())
    list(batch.run())
    return batch.stats.rows - before


def test_a_shared_prompt_is_computed_once() -> None:
    model = deepcalm.Model(models.endless())
    system = tiny.token_ids(tiny.N_TOKENS, 1500, 5).tolist()
    prompts = [system + tiny.token_ids(tiny.N_TOKENS, 20, 100 + i).tolist() for i in range(8)]
    with model.batch(draft="off") as batch:
        assert rows_of(batch, *((p, 4) for p in prompts)) == 1500 + 8 * (20 + 3)
        assert batch.stats.cached_tokens == 7 * 1500
        turn = prompts[3] + alone(model, prompts[3], Sampling(), max_tokens=4)[0] + IDS[:500]
        request = batch.submit(turn, max_tokens=2)
        before = batch.stats.rows
        list(batch.run())
        assert request.cached_tokens == 1523 and batch.stats.rows - before == 501 + 1
        check(model, request, turn, Sampling(), max_tokens=2)


def test_prompts_that_share_little_do_not_wait(model: deepcalm.Model) -> None:
    with model.batch(draft="off") as batch:
        assert rows_of(batch, (IDS[:63], 1), ([*IDS[:63], 1], 1)) == 63 + 64
        assert rows_of(batch, (IDS[100:200], 1), (IDS[100:200], 1)) == 100 + 1


def test_small_budgets_drop_and_recompute_the_youngest(model: deepcalm.Model) -> None:
    with model.batch(max_sequences=4, draft="off") as batch:
        row = batch.cache_bytes // (4 * batch.ctx)
    with model.batch(max_sequences=4, draft="off", cache_bytes=260 * row) as batch:
        large = batch.submit(IDS[:150], max_tokens=20, eos_ids=())
        shares = batch.submit([*IDS[:140], 5], max_tokens=30, eos_ids=())  # waits for rows of the first
        small = batch.submit(IDS[300:320], max_tokens=60, eos_ids=())  # and this one overtakes it
        batch.step()
        assert (batch.running, batch.waiting) == (2, 1)
        tokens = 0
        while not small.done:
            batch.step()
            dropped = batch.running == 1 and len(small.choices[0].tokens) > 0
            tokens = max(tokens, dropped and len(small.choices[0].tokens))
        assert 0 < tokens < 60, "it had to give way"
        list(batch.run())
        check(model, large, IDS[:150], Sampling(), max_tokens=20, eos_ids=())
        check(model, shares, [*IDS[:140], 5], Sampling(), max_tokens=30, eos_ids=())
        check(model, small, IDS[300:320], Sampling(), max_tokens=60, eos_ids=())


def test_kept_rows_give_way_the_least_recently_used_first(model: deepcalm.Model) -> None:
    with model.batch(draft="off") as batch:
        row = batch.cache_bytes // (8 * batch.ctx)
    a, b, c = IDS[:80], IDS[100:180], IDS[200:280]
    with model.batch(draft="off", cache_bytes=200 * row) as batch:
        assert [rows_of(batch, (ids, 2)) for ids in (a, b)] == [81, 81]
        assert rows_of(batch, (a, 2)) == 2  # from its rows, which are the most recently used now
        assert rows_of(batch, (c, 2)) == 81  # b gives way
        assert rows_of(batch, (a, 2)) == 2
        assert rows_of(batch, (b, 2)) == 81


# ---- fairness


def test_answers_go_on_while_prompts_are_computed(model: deepcalm.Model) -> None:
    with model.batch(max_sequences=8, draft="off") as batch:
        first = batch.submit(IDS[:10], max_tokens=100, eos_ids=())
        batch.step()
        prompts = [batch.submit(IDS[i : i + 300 - i], max_tokens=1, eos_ids=()) for i in range(1, 6)]
        steps = 0
        while not all(r.done for r in prompts):
            before = batch.stats.prefill_tokens
            assert first.choices[0] in batch.step()
            assert batch.stats.prefill_tokens - before <= 64
            steps += 1
        assert steps == -(-sum(300 - i for i in range(1, 6)) // 64)


def test_a_long_prompt_gets_rows_at_least_every_fourth_step(model: deepcalm.Model) -> None:
    """Though a shorter one comes with every step."""
    with model.batch(max_sequences=64, draft="off") as batch:
        batch.submit(IDS[:10], max_tokens=200, eos_ids=())
        batch.step()
        batch.submit(IDS[:500], max_tokens=1)
        batch.step()
        (long,) = (s for s in batch._running if len(s.ids) == 500)
        done = [long.pos]
        while long.pos < 500:
            batch.submit(IDS[len(done) : len(done) + 64], max_tokens=1)
            batch.step()
            done.append(long.pos)
        assert all(b > a for a, b in zip(done, done[4:], strict=False)), done
        assert any(b == a for a, b in itertools.pairwise(done)), "others did not come first"


def test_prompts_take_whole_passes_where_no_answer_waits(model: deepcalm.Model) -> None:
    with model.batch(draft="off") as batch:
        for i in range(3):
            batch.submit(IDS[i : i + 300], max_tokens=20, eos_ids=())
        steps = []
        while not batch.idle:
            before = batch.stats.prefill_tokens
            batch.step()
            steps.append(batch.stats.prefill_tokens - before)
        assert steps[:2] == [256, 256] and sum(steps) == 900 and max(steps[2:]) <= 64


# ---- failures


def test_a_sequence_that_fails_ends_alone(tmp_path: Path) -> None:
    """A token whose embedding is NaN, which no packer writes, among the prompts of others."""
    path = tmp_path / "nan.dcalm"
    path.write_bytes(models.packed().read_bytes())
    model, bad = deepcalm.Model(models.packed()), 77
    entry = model.entries["embed"]
    with path.open("r+b") as f:
        f.seek(entry.offset + bad * model.config.hidden_size * 4)
        f.write(np.full(model.config.hidden_size, np.nan, np.float32).tobytes())
    prompts = [[i for i in IDS[9 * n : 9 * n + 8 + n] if i != bad] for n in range(7)]
    with deepcalm.Model(path).batch() as batch:
        others = [batch.submit(p, max_tokens=20, eos_ids=range(bad, bad + 1)) for p in prompts]
        early = batch.submit([*IDS[:70], bad, *IDS[:9]], max_tokens=20)
        while not early.done:
            batch.step()
        late = batch.submit([bad], max_tokens=20)
        list(batch.run())
        for request in (early, late):
            choice = request.choices[0]
            assert (choice.tokens, choice.reason, type(choice.error)) == ([], "failed", SessionError)
            assert "logits are not finite" in str(choice.error)
        for request, prompt in zip(others, prompts, strict=True):
            check(model, request, prompt, Sampling(), max_tokens=20, eos_ids=range(bad, bad + 1))


def test_a_sequence_that_finds_no_memory_ends_alone(model: deepcalm.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with model.batch() as batch:
        first = batch.submit(IDS[:8], max_tokens=12)
        batch.step()
        make = batch._session

        def refused(_ctx: int) -> Any:
            monkeypatch.setattr(batch, "_session", make)
            raise ResourceError("cache: cannot reserve")

        monkeypatch.setattr(batch, "_session", refused)
        second, third = (batch.submit(IDS[n : n + 8], max_tokens=12) for n in (20, 30))
        assert second.choices[0] in batch.step()
        assert (second.choices[0].reason, str(second.choices[0].error)) == ("failed", "cache: cannot reserve")
        list(batch.run())
        check(model, first, IDS[:8], Sampling(), max_tokens=12)
        check(model, third, IDS[30:38], Sampling(), max_tokens=12)


def test_a_step_that_is_interrupted_is_as_if_it_had_not_been(model: deepcalm.Model) -> None:
    """The pass has run, its results are lost."""
    with model.batch(draft=2) as batch:
        requests = [batch.submit(IDS[n : 80 * n + 9], max_tokens=12) for n in range(3)]
        passes: Any = batch._passes

        class Interrupted:
            def __getattr__(self, name: str) -> Any:
                return getattr(passes, name)

            def step(self, work: list[Any]) -> Any:
                passes.step(work)
                raise KeyboardInterrupt

        for i in range(9):
            batch._passes = passes if i % 3 else Interrupted()  # type: ignore[assignment]
            with contextlib.suppress(KeyboardInterrupt):
                batch.step()
        batch._passes = passes
        list(batch.run())
        for i in range(3):
            check(model, requests[i], IDS[i : 80 * i + 9], Sampling(), max_tokens=12)


def test_an_interrupt_at_any_line_of_a_step_changes_no_answer(model: deepcalm.Model) -> None:
    """Ctrl-C at every line, where it is reached for the n-th time; for an even n a second one before all is settled."""
    files = {str(inspect.getsourcefile(m)) for m in (batch, deepcalm.text)}
    with model.batch(ctx=240, draft=2) as b:
        row = b._row_bytes
    stop = alone(model, IDS[:12], SAMPLED, max_tokens=20)[1][-2:]
    asked: list[tuple[list[int], dict[str, Any]]] = [
        (IDS[:150], {"max_tokens": 9, "logprobs": 1, "eos_ids": ()}),
        ([*IDS[:140], 5], {"max_tokens": 30, "eos_ids": range(0, 270, 9)}),  # waits for rows of the first
        (IDS[:12], {"max_tokens": 70, "eos_ids": (), "stop": stop}),  # overtakes it, and has to give way
        (IDS[:140], {"max_tokens": 5}),
    ]
    expected = [alone(model, ids, SAMPLED, ctx=240, **options) for ids, options in asked]
    for n in range(1, 4):
        reached: Counter[tuple[str, int]] = Counter()

        def trace(frame: Any, event: str, _: object, reached: Counter[Any] = reached, n: int = n) -> Any:
            if event == "line":
                reached[line := (frame.f_code.co_filename, frame.f_lineno)] += 1
                if reached[line] == n:
                    raise KeyboardInterrupt
            return trace if frame.f_code.co_filename in files else None

        with model.batch(max_sequences=3, draft=2, cache_bytes=245 * row, ctx=240) as b:
            settle = b._settle
            if n % 2 == 0:
                b._settle = lambda settle=settle: settle() if sys.gettrace() else None  # type: ignore[method-assign]
            requests = [b.submit(ids, sampling=SAMPLED, **options) for ids, options in 4 * asked]
            for _ in range(999):
                sys.settrace(trace)
                with contextlib.suppress(KeyboardInterrupt):
                    b.step()
                sys.settrace(None)
                if all(r.done for r in requests):
                    break
            assert [made(c) for r in requests for c in r.choices] == 4 * expected
            assert len(reached) > 180, reached


# ---- any schedule


@functools.cache
def opened(preset: str, dtype: str, threads: int, isa: str | None) -> deepcalm.Model:
    return deepcalm.Model(models.packed(preset, dtype=dtype), threads=threads, isa=isa)


class Schedule:
    """Requests that arrive and are cancelled at random, in a batch of random limits; every one is what it is alone."""

    def __init__(
        self, rng: np.random.Generator, isa: str | None = None, kv: str | None = None, dtype: str = ""
    ) -> None:
        self.rng, self.seen = rng, Counter[str]()
        preset = str(rng.choice(["v3", "v3", "glm4_moe_lite", "v2_lite"]))
        dtype = dtype or str(rng.choice(["f32", "bf16", "q8", "q4"]))
        self.kv = kv or str(rng.choice(models.CACHES))
        self.model = opened(preset, dtype, int(rng.integers(1, 4)), isa)
        self.ctx = int(rng.choice([60, 120, 200]))
        drafts = ["auto", "off"] if preset == "v2_lite" else ["auto", "off", 1, 3]
        self.draft = drafts[rng.integers(len(drafts))]
        row = self.model.batch(ctx=self.ctx, kv=self.kv, draft=self.draft)._row_bytes
        self.batch = self.model.batch(
            max_sequences=int(rng.integers(1, 9)), ctx=self.ctx, kv=self.kv, draft=self.draft,
            cache_bytes=int(row * self.ctx * rng.choice([1, 1, 1.5, 3, 20])),
        )  # fmt: skip
        self.made: list[tuple[Request, list[int], dict[str, Any]]] = []
        self.texts = [tiny.token_ids(tiny.N_TOKENS, self.ctx, int(rng.integers(1 << 30))).tolist() for _ in range(3)]
        self.what = f"{preset} {dtype} {isa} {self.kv} ctx {self.ctx} draft {self.draft}"

    def submit(self) -> None:
        """A prompt that begins as others do, or goes on from an answer."""
        rng, room = self.rng, self.ctx - 1
        ids = self.texts[rng.integers(3)][: rng.integers(1, room)]
        ended = [(r, i) for r, i, _ in self.made if r.done and r.choices[0].tokens]
        if ended and rng.random() < 0.3:
            request, ids = ended[rng.integers(len(ended))]
            ids = ids + request.choices[0].tokens
        ids = (ids + tiny.token_ids(tiny.N_TOKENS, int(rng.integers(9)), len(self.made)).tolist())[:room]
        temp = float(rng.choice([0, 0, 0.7, 1.5]))
        how = Sampling(temp=temp, top_k=int(rng.choice([0, 40])), seed=int(rng.integers(1 << 40)))
        options: dict[str, Any] = {"sampling": how, "max_tokens": int(rng.integers(1, 30)), "n": 1}
        if rng.random() < 0.3:
            options["logprobs"] = int(rng.integers(4))
        if rng.random() < 0.3:
            options["eos_ids"] = rng.integers(0, tiny.N_TOKENS, 8).tolist()
        if rng.random() < 0.3:
            options["stop"] = ["e", "th", "<|user|>"]
        if rng.random() < 0.2:
            options["n"] = int(rng.integers(2, 5))
        self.made.append((self.batch.submit(ids, **options), ids, options))

    def run(self) -> Counter[str]:
        arrivals = int(self.rng.integers(4, 9))
        while arrivals or not self.batch.idle:
            if arrivals and (self.batch.idle or self.rng.random() < 0.3):
                self.submit()
                arrivals -= 1
            if self.rng.random() < 0.02:
                self.made[self.rng.integers(len(self.made))][0].cancel()
            running = [s for s in self.batch._running if s.pos]
            self.batch.step()
            self.seen["dropped"] += sum(s in self.batch._waiting for s in running)
        for request, ids, options in self.made:
            for choice in request.choices:
                self.check(choice, ids, options)
        stats = self.batch.stats
        self.seen["cached"] += stats.cached_tokens > 0
        self.seen["accepted"] += stats.drafts_accepted
        self.check_rows()
        return self.seen

    def check(self, choice: Choice, ids: list[int], options: dict[str, Any]) -> None:
        own = {k: v for k, v in options.items() if k not in ("sampling", "n")}
        how = dataclasses.replace(options["sampling"], seed=choice.seed)
        if choice.reason == "cancelled":
            own["max_tokens"] = len(choice.tokens) or 1
        tokens, text, scores, reason = alone(self.model, ids, how, kv=self.kv, ctx=self.ctx, **own)
        n = len(choice.tokens)
        assert choice.tokens == tokens[:n] and choice.scores == scores[:n], self.what
        assert choice.reason == "cancelled" or (choice.text, choice.reason, n) == (text, reason, len(tokens)), self.what
        self.seen[str(choice.reason)] += 1

    def check_rows(self) -> None:
        """What is kept in the caches is what a session of its own computes, and so are the logits after it."""
        for s in self.batch._idle:
            fresh = _core.Session(self.model.core, self.ctx, self.kv, self.ctx)
            fresh.forward(np.array(s.ids[: s.pos], np.int32), "none")
            assert s.core is not None and s.core.pos == s.pos
            models.assert_same_bits(self.what, s.core.read_cache(False), fresh.read_cache(False))
            if s.pos < self.ctx:
                rows = [c.forward(np.array([7], np.int32)) for c in (s.core, fresh)]
                models.assert_same_bits(self.what, *rows)


def test_any_schedule_gives_what_sequences_get_alone(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[str] = Counter()
    wanted = ("dropped", "cached", "accepted", "eos", "stop", "length", "context", "cancelled")
    for n in range(60):
        if n >= 10 and all(seen[what] for what in wanted):
            break
        monkeypatch.setattr(batch, "CHUNK", int(rng.choice([1, 7, 64])))
        monkeypatch.setattr(batch, "SHARED", int(rng.choice([1, 16, 64])))
        seen += Schedule(rng).run()
    assert all(seen[what] for what in wanted), seen


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", "f8", "q8", "q4"])
@pytest.mark.parametrize("kv", models.CACHES)
@pytest.mark.parametrize("isa", models.ISAS)
def test_any_schedule_on_every_instruction_set(isa: str, kv: str, dtype: str) -> None:
    for seed in range(2):
        Schedule(np.random.default_rng(seed), isa, kv, dtype).run()
