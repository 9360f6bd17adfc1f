"""The Python API on tiny models: sessions, generation, saving, taps, threads, and the errors of each."""

from __future__ import annotations

import inspect
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import deepcalm
import models
import tiny
from deepcalm import _core, limits, names, sampling, session
from deepcalm.check.perplexity import log_softmax, perplexity
from deepcalm.errors import ConfigError, Error, PackedFileError, ResourceError, SessionError, UnsupportedError

F32 = npt.NDArray[np.float32]
V = tiny.PRESETS["v3"].config["vocab_size"]
IDS = tiny.token_ids(tiny.N_TOKENS, 40).tolist()


def bits(x: F32) -> npt.NDArray[np.uint32]:
    return np.ascontiguousarray(x).view(np.uint32)


@pytest.fixture
def model() -> deepcalm.Model:
    return models.model()


@pytest.fixture(scope="module")
def reference() -> F32:
    """[40, vocab_size] logits after each token of IDS, computed one token at a time."""
    s = models.model().session()
    return np.stack([s.decode(i) for i in IDS])


# ---- package and model


def test_stub_names_everything_in_the_extension_module() -> None:
    stub = (Path(deepcalm.__file__).parent / "_core.pyi").read_text()
    for name, value in inspect.getmembers(_core):
        if name.startswith("__") and name != "__version__":
            continue
        assert f"{name}:" in stub or f"def {name}(" in stub or f"class {name}:" in stub, name
        for member in vars(value) if inspect.isclass(value) else ():
            assert member.startswith("_") or f"def {member}(" in stub, f"{name}.{member}"


def test_model_describes_itself(model: deepcalm.Model) -> None:
    c = model.config
    assert (c.hidden_size, c["kv_lora_rank"], c.eos_token_ids) == (76, 42, (266,))
    assert dict(c)["vocab_size"] == V and len(c) > 20 and "bos_token_id" in c
    for change in (lambda: setattr(c, "hidden_size", 1), lambda: c.__setitem__("hidden_size", 1)):
        with pytest.raises((AttributeError, TypeError)):
            change()
    with pytest.raises(AttributeError, match="no configuration key"):
        c.missing  # noqa: B018
    assert model.isa in [i["name"] for i in _core.isas()] and model.threads == 1 and model.device == "cpu"
    assert model.n_valid == tiny.N_TOKENS < V
    assert model.active_bytes_per_token(100) > model.active_bytes_per_token(1) > 0
    assert model.encode("the<eos>") == [265, 257, 266] or model.encode("the<eos>") == [257, 266]
    assert model.decode([257, 266, 32, 257]) == "the the"


def test_chat_template_of_a_checkpoint(model: deepcalm.Model) -> None:
    text = model.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert text == "<bos><|user|>Hi<|assistant|>"
    assert model.encode(text, bos=False)[:2] == [265, 268]


def test_open_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = models.packed()
    with pytest.raises((UnsupportedError, ResourceError), match="mmx"):
        deepcalm.Model(path, isa="mmx")
    for options in ({"device": "tpu"}, {"threads": 0}, {"threads": 2**40}):
        with pytest.raises(ValueError, match="expected"):
            deepcalm.Model(path, **options)  # type: ignore[arg-type]
    with pytest.raises(PackedFileError, match=r"missing\.dcalm"):
        deepcalm.Model(tmp_path / "missing.dcalm")
    for text in ("two", "0", "-1", "9" * 30, "٣"):
        monkeypatch.setenv("DEEPCALM_THREADS", text)
        with pytest.raises(Error, match=rf"DEEPCALM_THREADS: '{text}', expected 1\.\.1024"):
            deepcalm.Model(path)


def test_environment_is_read_and_arguments_win(monkeypatch: pytest.MonkeyPatch) -> None:
    path = models.packed()
    monkeypatch.setenv("DEEPCALM_THREADS", "2")
    monkeypatch.setenv("DEEPCALM_ISA", "scalar")
    m = deepcalm.Model(path)
    assert (m.threads, m.isa) == (2, "scalar")
    best = next(i["name"] for i in _core.isas() if i["supported"])
    m = deepcalm.Model(path, threads=1, isa=best)
    assert (m.threads, m.isa) == (1, best)


def test_model_without_tokenizer(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "hf", "moonlight", dtype="f32", tokenizer="none")
    deepcalm.pack(folder, tmp_path / "m.dcalm")
    m = deepcalm.Model(tmp_path / "m.dcalm")
    assert m.n_valid == m.config.vocab_size and m.eos_ids == {266, 267}
    assert len(list(m.session().generate([1, 2], max_tokens=3))) <= 3
    with pytest.raises(PackedFileError, match="no tokenizer"):
        m.encode("x")


# ---- passes


@pytest.mark.parametrize("max_rows", [1, 7, 64])
@pytest.mark.parametrize("mtp", [False, True])
def test_logits_do_not_depend_on_how_rows_are_grouped(reference: F32, max_rows: int, mtp: bool) -> None:
    s = models.model().session(max_rows=max_rows, mtp=mtp)
    assert (bits(s.prefill(IDS[:11])) == bits(reference[10])).all()
    assert (bits(s.decode_many(IDS[11:14])) == bits(reference[11:14])).all()
    assert (bits(s.decode(IDS[14])) == bits(reference[14])).all()
    assert (bits(s.prefill(np.array(IDS[15:], np.int64), all_logits=True)) == bits(reference[15:])).all()
    assert s.pos == 40 and s.tokens.tolist() == IDS


@pytest.mark.parametrize("mtp", [False, True])
def test_truncate_forgets(reference: F32, mtp: bool) -> None:
    s = models.model().session(max_rows=8, mtp=mtp)
    s.prefill([5, 6, 7])
    s.truncate(0)
    s.prefill([*IDS[:20], 1, 2, 3])
    s.truncate(21)
    s.truncate(20)
    assert s.last_logits is None
    assert (bits(s.prefill(IDS[20:])) == bits(reference[-1])).all()
    for n in (-1, 41):
        with pytest.raises(SessionError, match="holds 40"):
            s.truncate(n)


def test_reuse_keeps_the_common_prefix(model: deepcalm.Model) -> None:
    s = model.session()
    assert s.reuse([1, 2, 3]) == 0
    s.prefill([1, 2, 3, 4])
    assert (s.reuse([1, 2, 9, 4]), s.pos) == (2, 2)
    s.prefill([3, 4])
    assert (s.reuse([1, 2, 3, 4]), s.pos) == (3, 3)  # one token is left to process
    assert (s.reuse([1]), s.pos) == (0, 0)


def test_session_refuses(model: deepcalm.Model) -> None:
    s = model.session(ctx=8)
    with pytest.raises(SessionError, match="no tokens"):
        s.prefill([])
    for bad in (-1, V, 2**40):
        with pytest.raises(SessionError, match=rf"token id {bad}, expected 0\.\.{V - 1}"):
            s.prefill([1, bad])
    with pytest.raises(SessionError, match="9 tokens after 0 do not fit the context of 8"):
        s.prefill([1] * 9)
    for odd in ([1.5], [[1, 2]], "ab"):
        with pytest.raises(TypeError, match="flat sequence of integers"):
            s.prefill(odd)  # type: ignore[arg-type]
    assert s.pos == 0
    s.prefill([1] * 8)
    with pytest.raises(SessionError, match="1 tokens after 8"):
        s.decode(1)
    for options in ({"ctx": 0}, {"ctx": 1281}, {"ctx": 2**40}, {"max_rows": 0}):
        with pytest.raises(SessionError, match="expected 1"):
            model.session(**options)
    with pytest.raises(ValueError, match="kv: 'f8'"):
        model.session(kv="f8")
    with pytest.raises(UnsupportedError, match="MTP"):
        models.model("moonlight").session(mtp=True)


def test_cache_beyond_memory_is_refused_with_the_numbers(
    model: deepcalm.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "available_memory", lambda: 100_000)
    with pytest.raises(ResourceError, match=r"cache of 1280 positions in f32 takes 0\.\d\d GB, 0\.00 GB"):
        model.session(kv="f32")


def test_available_memory_is_read() -> None:
    free = limits.available_memory()
    assert free is None or free > 1 << 20


def test_interrupted_prefill_keeps_complete_passes(reference: F32, monkeypatch: pytest.MonkeyPatch) -> None:
    s = models.model().session(max_rows=8)
    passes = 0
    one_pass = s._pass

    def interrupted(*args: Any) -> F32:
        nonlocal passes
        passes += 1
        if passes == 3:
            raise KeyboardInterrupt
        return one_pass(*args)

    monkeypatch.setattr(s, "_pass", interrupted)
    with pytest.raises(KeyboardInterrupt):
        s.prefill(IDS)
    monkeypatch.undo()
    assert s.tokens.tolist() == IDS[:16] and s.last_logits is None
    assert (bits(s.prefill(IDS[16:])) == bits(reference[-1])).all()


def test_several_sessions_and_threads(reference: F32) -> None:
    m, out = models.model(), {}

    def work(n: int) -> None:
        s = m.session(max_rows=4)
        out[n] = s.prefill(IDS[: 10 * n])

    threads = [threading.Thread(target=work, args=(n,)) for n in (1, 2, 3, 4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for n in (1, 2, 3, 4):
        assert (bits(out[n]) == bits(reference[10 * n - 1])).all()
    shared = m.session()
    threads = [threading.Thread(target=shared.prefill, args=([7] * 16,)) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert shared.tokens.tolist() == [7] * 64


def test_stats_count_bytes(model: deepcalm.Model) -> None:
    s = model.session(mtp=False)
    s.prefill(IDS[:10])
    before = s.stats
    s.decode(1)
    s.decode_many([2, 3])
    done = s.stats - before
    assert (before.prefill_tokens, before.decode_tokens, before.passes, before.rows) == (10, 0, 1, 10)
    assert (done.prefill_tokens, done.decode_tokens, done.passes, done.rows) == (0, 3, 2, 3)
    assert done.decode_bytes == done.weight_bytes + done.cache_bytes > 0
    assert done.decode_rate > 0 and done.decode_bandwidth > 0 and before.prefill_rate > 0
    assert session.Stats().decode_rate == session.Stats().decode_bandwidth == session.Stats().prefill_rate == 0
    assert {name: v.calls for name, v in done.stages.items()}["head"] == 2 and "eh_proj" not in done.stages
    assert sum(v.bytes for v in done.stages.values()) == done.decode_bytes
    assert sum(v.seconds for v in done.stages.values()) == pytest.approx(done.pass_seconds)
    one = model.session(mtp=False)
    one.prefill(IDS[:10])
    start = one.stats
    one.decode(1)
    assert abs((one.stats - start).decode_bytes / model.active_bytes_per_token(10) - 1) < 0.05


# ---- taps


def test_trace_records_what_is_asked_for(reference: F32) -> None:
    s = models.model().session(max_rows=8, mtp=False)
    with s.trace("layers.1.c_kv", "topk_idx", "logits") as taps:
        logits = s.prefill(IDS[:20])
    assert sorted(taps) == ["layers.1.c_kv", "layers.1.topk_idx", "layers.2.topk_idx", "logits"]
    assert taps["layers.1.c_kv"].shape == (20, 42) and taps["layers.1.c_kv"].dtype == np.float32
    assert taps["layers.2.topk_idx"].shape == (20, 5) and taps["layers.2.topk_idx"].dtype == np.int32
    assert (bits(logits) == bits(reference[19])).all()
    with s.trace() as everything:
        s.decode(IDS[20])
    assert {"embed", "final_norm", "layers.0.ffn_out", "layers.2.gate_logits", "layers.2.layer_out"} <= set(everything)
    with s.trace("embed") as taps:
        list(s.generate(IDS[21:24], max_tokens=5, eos_ids=[]))
    assert taps["embed"].shape == (3 + 4, 76)  # the last token is not processed
    assert everything["embed"].shape == (1, 76)
    for name in ("c_kw", "layers.3.c_kv", "layers.x.c_kv", "c_kv.", "3.c_kv", ""):
        with pytest.raises(ValueError, match="no tap"), s.trace(name):
            pass


# ---- generation


def greedy(ids: list[int], n: int) -> list[int]:
    """n greedy tokens by plain full recomputation."""
    m, out = models.model(), []
    for _ in range(n):
        logits = m.session().prefill([*ids, *out])[: m.n_valid]
        out.append(int(logits.argmax()))
    return out


def test_generate_is_greedy_decoding(model: deepcalm.Model) -> None:
    want = greedy(IDS[:5], 8)
    g = model.session().generate(IDS[:5], max_tokens=8, eos_ids=[])
    assert list(g) == g.tokens == want and g.reason == "length"
    s = model.session()
    s.prefill(IDS[:5])
    assert list(s.generate(max_tokens=8, eos_ids=[])) == want  # goes on from the last logits
    assert s.pos == 5 + 8 and s.tokens.tolist() == [*IDS[:5], *want]


def test_generate_reasons(model: deepcalm.Model) -> None:
    want = greedy(IDS[:5], 4)
    eos = model.session().generate(IDS[:5], max_tokens=9, eos_ids=[want[3]])
    assert (list(eos), eos.reason) == (want[: want.index(want[3])], "eos")
    full = model.session(ctx=8).generate(IDS[:5], eos_ids=[])
    assert (list(full), full.reason) == (want[:3], "context")  # eight tokens in all
    assert full.session.pos == 8
    none_left = model.session(ctx=5).generate(IDS[:5])
    assert (list(none_left), none_left.reason, none_left.session.pos) == ([], "context", 5)
    assert next(none_left, None) is None  # stays ended


def test_generate_refuses(model: deepcalm.Model) -> None:
    s = model.session(ctx=8, mtp=False)
    with pytest.raises(SessionError, match="prefill some tokens first"):
        s.generate()
    with pytest.raises(SessionError, match="do not fit"):
        s.generate(IDS[:9])
    with pytest.raises(SessionError, match="drafter mtp: the session keeps no MTP state"):
        s.generate(IDS[:2], draft=2, drafter="mtp")
    for options in ({"temp": -1}, {"draft": 8}, {"draft": -1}, {"draft": "on"}, {"drafter": "on"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            s.generate(IDS[:2], **options)  # type: ignore[arg-type]


ARGUMENTS: list[tuple[str, type[Exception], str]] = [
    *((f"s.{call}([1.5])", TypeError, "integers") for call in ("generate", "prefill", "decode_many", "reuse")),
    *((f"s.{call}('text')", TypeError, "model.encode") for call in ("generate", "prefill", "decode_many", "reuse")),
    *((f"s.{call}([])", SessionError, "no tokens") for call in ("generate", "prefill", "decode_many", "reuse")),
    *((f"s.{call}([-1])", SessionError, "token id -1") for call in ("generate", "prefill", "decode_many", "reuse")),
    *((f"s.generate(max_tokens={n})", ValueError, f"max_tokens: {n}, expected a number >= 1") for n in (0, -1)),
    *((f"s.generate(max_tokens={n})", TypeError, "max_tokens") for n in ("2.0", "'3'", "True")),
    *((f"s.generate(temp={t})", ValueError, "temp") for t in ("float('nan')", -1, "1e39")),
    *((f"s.generate(top_p={p})", ValueError, "top_p") for p in (0, 1.5, "float('nan')")),
    *((f"s.generate({k}={v})", TypeError, k) for k in ("top_k", "seed", "temp") for v in ("'1'", "None")),
    *((f"s.generate({k}=1.5)", TypeError, k) for k in ("top_k", "seed")),
    ("s.generate(eos_ids=[311])", SessionError, "token id 311"),
    ("s.generate(eos_ids='<eos>')", TypeError, "integers"),
    ("s.generate(draft=True)", ValueError, "draft"),
    *((f"s.decode({t})", TypeError, "token id") for t in ("1.5", "None", "[1]")),
    *((f"s.decode({t})", SessionError, f"token id: {t}, expected 0..310") for t in (-1, 311, 2**70)),
    ("s.draft_round(1, 8, sampling.Sampling(), 270)", SessionError, "draft: 8, expected 0..7"),
    ("s.truncate(1.0)", TypeError, "n_tokens"),
    ("models.model('moonlight').session(8).trace('mtp.c_kv')", ValueError, "no MTP layer"),
    *((f"model.session({k}={v})", TypeError, k) for k in ("ctx", "max_rows") for v in ("8.0", "'8'")),
    ("model.session(mtp='yes')", TypeError, "mtp"),
    *((f"model.decode([{i}])", SessionError, f"token id {i}, expected 0..310") for i in (99999, -1)),
    ("model.decode('ab')", TypeError, "integers"),
    *((f"model.encode({t})", TypeError, "expected a str") for t in (5, "b'x'", "None")),
    *((f"model.apply_chat_template({m})", TypeError, "messages") for m in ("'Hi'", "{'role': 'user'}", "['Hi']")),
    ("model.apply_chat_template([{'content': 'x'}])", TypeError, "messages"),
    ("model.active_bytes_per_token(-1)", ValueError, "pos: -1"),
    ("deepcalm.Model(model.path, threads='2')", TypeError, "threads"),
    ("deepcalm.generate('a', model, max_tokens=0)", ValueError, "max_tokens: 0"),
    ("deepcalm.generate('a', model, stop=['', 'b'])", ValueError, "stop string"),
    ("deepcalm.generate('a', model, stop=[5])", TypeError, "stop string"),
    ("deepcalm.generate('a', model, draft='on')", ValueError, "draft"),
    ("deepcalm.generate(b'a', model)", TypeError, "expected a str"),
]


def test_models_and_sessions_can_be_closed() -> None:
    with deepcalm.Model(models.packed(), threads=1) as model, model.session(64) as s:
        want = list(s.generate(IDS[:5], max_tokens=6))
        assert repr(s) == f"Session(Model({str(model.path)!r}, device='cpu'), kv='f16', pos=11)"
        with model.session(64) as other:
            running = other.generate(IDS[:5])
            next(running)
        assert running.reason == "closed" and running.tokens == want[:1]
        resume = other.generate()
        for call in (lambda: other.prefill(IDS), lambda: other.truncate(0), lambda: other.stats, lambda: next(resume)):
            with pytest.raises(SessionError, match="the session is closed"):
                call()
        other.close()
        model.close()  # a session goes on
        s.prefill(IDS[:3])
        for ask in (lambda: model.session(8), lambda: model.isa):
            with pytest.raises(SessionError, match="the model is closed"):
                ask()


@pytest.mark.parametrize(("call", "error", "says"), ARGUMENTS, ids=[a[0] for a in ARGUMENTS])
def test_arguments_are_checked_by_the_call(model: deepcalm.Model, call: str, error: type[Exception], says: str) -> None:
    s = model.session(16)
    s.prefill([1, 2, 3])
    with pytest.raises(error, match=re.escape(says)):
        eval(call, {"s": s, "model": model, "deepcalm": deepcalm, "sampling": sampling, "models": models})
    assert s.tokens.tolist() == [1, 2, 3]


def test_one_stop_string_is_not_its_letters(model: deepcalm.Model) -> None:
    whole = deepcalm.generate("the", model, max_tokens=30)
    stops = (whole[i : i + 3] for i in range(4, 20))
    stop = next(s for s in stops if min(whole.index(c) for c in s) < whole.index(s))
    for given in (stop, [stop]):
        assert deepcalm.generate("the", model, max_tokens=30, stop=given) == whole[: whole.index(stop)]


def test_sampled_text_depends_on_seed_and_position_only(model: deepcalm.Model) -> None:
    options: dict[str, Any] = {"temp": 1.2, "top_p": 0.95, "eos_ids": [], "max_tokens": 12}
    whole = list(model.session().generate(IDS[:5], seed=3, **options))
    assert whole == list(model.session(max_rows=2).generate(IDS[:5], seed=3, **options))
    assert whole != list(model.session().generate(IDS[:5], seed=4, **options))
    # Cut anywhere and go on: the same tokens, because noise is keyed by position.
    s = model.session()
    s.prefill(IDS[:5])
    s.prefill(whole[:6])
    assert list(s.generate(seed=3, **(options | {"max_tokens": 6}))) == whole[6:]
    assert max(whole) < model.n_valid


def test_text_generation_stops_at_strings_and_flushes(model: deepcalm.Model) -> None:
    def text(tokens: list[int], stop: tuple[str, ...] = (), interrupt: bool = False) -> tuple[str, str | None]:
        g = model.session().generate([1], eos_ids=[])
        feed = iter(tokens)

        def step() -> int:
            token = next(feed, None)
            if token is None:
                g.reason = "length"
                raise StopIteration
            g._tokens.append(token)
            return token

        t = g.text(stop)
        g.__class__ = type("Scripted", (type(g),), {"__next__": lambda _self: step()})
        out = "".join(t) if not interrupt else "".join([next(t)]) + t.interrupt()
        assert out == t.text
        return out, t.reason

    the = [257]  # "the"
    assert text([*the, 32, *the]) == ("the the", "length")
    assert text([*the, *b" th", *b"at"], ("e th",)) == ("th", "stop")
    assert text([*b"abc\xf0\x9f"]) == ("abc\ufffd", "length")
    assert text([*b"abc\xf0\x9f"], ("c\ufffd",)) == ("ab", "stop")
    # the text of a special token: at that token, where it shows as nothing, or where it is spelled out
    user = model.tokenizer.token_to_id("<|user|>")
    assert text([*b"ab", user, *b"cd"], ("<|user|>", "x")) == ("ab", "stop")
    assert text([*b"ab x", user, *b"y"], ("xy", "<|user|>")) == ("ab x", "stop")
    assert text([*b"ab<|user|>c"], ("<|user|>",)) == ("ab", "stop")
    with pytest.raises(SessionError, match=r"'<\|user\|>' is a special token"):
        text([*b"ab"], ("\n<|user|>",))
    assert text([*b"xST\xc3"], ("STOP",)) == ("xST\ufffd", "length")
    assert text([*b"aSTx"], ("STOP",), interrupt=True) == ("a", "interrupted")


def test_drafted_text_ends_where_plain_text_does(model: deepcalm.Model) -> None:
    want = greedy(IDS[:5], 9)
    for draft in ("off", 1, 3, 7):
        s = model.session(mtp=True)
        eos = s.generate(IDS[:5], eos_ids=[want[6]], draft=draft)
        n = want.index(want[6])
        assert (list(eos), eos.reason) == (want[:n], "eos")
        assert s.tokens.tolist() == [*IDS[:5], *want[:n]]  # accepted drafts behind the end have left the cache
        full = model.session(ctx=12, mtp=True).generate(IDS[:5], eos_ids=[], draft=draft)
        assert (list(full), full.reason) == (want[:7], "context")
        text = model.session(mtp=True).generate(IDS[:5], max_tokens=9, eos_ids=[], draft=draft).text()
        assert "".join(text) == model.decode(want) and text.reason == "length"


def test_module_generate(model: deepcalm.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    text = deepcalm.generate("the", model, max_tokens=6)
    ids = list(model.session().generate(model.encode("the"), max_tokens=6))
    assert text == model.decode(ids) == deepcalm.generate("the", models.packed(), max_tokens=6)
    assert deepcalm.generate("the", model, max_tokens=6, stop=[text[0]]) == ""
    monkeypatch.setattr("deepcalm.model.demo_path", models.packed)
    assert deepcalm.generate("the", max_tokens=6) == text


# ---- saving


@pytest.mark.parametrize("isa", ["avx512x", "amx"])
def test_auto_is_the_cache_type_that_fits_the_instruction_set(
    isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any and where there is one: what was chosen is named, and saved as if it had been asked for."""
    monkeypatch.setattr(deepcalm.Model, "isa", isa)
    m, kv = models.model(), ("bf16", "f16") if isa == "amx" else ("f16", "bf16")
    for s in (m.session(), m.session(kv="auto"), m.session(kv=kv[0])):
        assert s.kv == kv[0] and f"kv='{kv[0]}'" in repr(s)
        s.prefill(IDS[:3])
        s.save(tmp_path / s.kv)
    m.session().restore(tmp_path / kv[0])
    with pytest.raises(SessionError, match=f"kv is '{kv[0]}', this session has '{kv[1]}'"):
        m.session(kv=kv[1]).restore(tmp_path / kv[0])
    assert m.batch().kv == m.batch(kv="auto").kv == kv[0]
    assert m.active_bytes_per_token(9) == m.active_bytes_per_token(9, kv[0])


@pytest.mark.parametrize("kv", names.KV_TYPES)
@pytest.mark.parametrize("mtp", [False, True])
def test_restored_session_goes_on_with_the_same_bits(tmp_path: Path, kv: str, mtp: bool) -> None:
    m = models.model()
    a = m.session(kv=kv, mtp=mtp)
    a.prefill(IDS[:30])
    a.save(tmp_path / "s")
    b = m.session(ctx=64, kv=kv, mtp=mtp, max_rows=3)
    b.prefill([1, 2])
    b.restore(tmp_path / "s")
    assert b.tokens.tolist() == IDS[:30] and b.last_logits is None
    assert (bits(a.prefill(IDS[30:], all_logits=True)) == bits(b.prefill(IDS[30:], all_logits=True))).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]  # no temporary file is left


def test_mtp_state_is_saved_and_rebuilt(tmp_path: Path) -> None:
    m = models.model()
    plain, kept = m.session(mtp=False), m.session(max_rows=8, mtp=True)
    ids = tiny.token_ids(tiny.N_TOKENS, 300, seed=2).tolist()
    for i in range(0, 300, 50):
        kept.prefill(ids[i : i + 50])
    for n in (290, 100, 99):  # the last cut loses h_{n-1}, which is computed again
        kept.truncate(n)
        kept.save(tmp_path / "s")
        again = m.session(mtp=True)
        again.restore(tmp_path / "s")
        kept.prefill(ids[n : n + 5])
        again.prefill(ids[n : n + 5])
        for name, x in kept._core.state().items():
            assert (x == again._core.state()[name]).all(), (n, name)
    plain.restore(tmp_path / "s")  # without the MTP part
    assert plain.pos == 99
    plain.save(tmp_path / "plain")
    with pytest.raises(SessionError, match="saved without MTP state"):
        kept.restore(tmp_path / "plain")
    m.session(mtp=True).save(tmp_path / "empty")
    kept.restore(tmp_path / "empty")
    assert kept.pos == 0


def test_restore_refuses_another_identity(tmp_path: Path) -> None:
    m = models.model()
    s = m.session()
    s.prefill(IDS[:10])
    s.save(tmp_path / "s")
    other_isa = next((i["name"] for i in _core.isas() if i["supported"] and i["name"] != m.isa), None)
    other_file = deepcalm.Model(models.packed(dtype="q8")).session()
    with pytest.raises(SessionError, match=r"model is '.*', this session has '.*'; force=True accepts it"):
        other_file.restore(tmp_path / "s")
    other_file.restore(tmp_path / "s", force=True)
    assert other_file.pos == 10
    if other_isa is not None:
        with pytest.raises(SessionError, match=f"isa is '{m.isa}', this session has '{other_isa}'"):
            deepcalm.Model(m.path, isa=other_isa).session().restore(tmp_path / "s")
    for force in (False, True):
        with pytest.raises(SessionError, match="kv is 'f16', this session has 'bf16'"):
            m.session(kv="bf16").restore(tmp_path / "s", force=force)
        with pytest.raises(SessionError, match="10 tokens, this session's context holds 9"):
            m.session(ctx=9).restore(tmp_path / "s", force=force)
        with pytest.raises(SessionError):
            models.model("gigachat3").session().restore(tmp_path / "s", force=force)  # other cache rows


def hostile_sessions(good: Path) -> dict[str, Any]:
    """Name -> what to write: bytes, or (tensors, metadata)."""
    with safe_open(good, framework="numpy") as f:
        tensors, metadata = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()  # noqa: SIM118
    raw, n = good.read_bytes(), len(tensors["tokens"])

    def changed(**parts: Any) -> Any:
        return {k: v for k, v in (tensors | parts).items() if v is not None}, metadata

    return {
        "empty": b"",
        "text": b"not a session at all" * 9,
        "truncated": raw[:-1],
        "long header": (2**63).to_bytes(8, "little") + raw[8:],
        "no metadata": (tensors, None),
        "packed model": models.packed().read_bytes(),
        "version": (tensors, metadata | {"version": "2"}),
        "no cache": changed(cache=None),
        "token ids": changed(tokens=np.full(n, V, np.int32)),
        "negative ids": changed(tokens=np.full(n, -1, np.int32)),
        "token dtype": changed(tokens=tensors["tokens"].astype(np.int64)),
        "token rank": changed(tokens=tensors["tokens"].reshape(1, -1)),
        "one more token": changed(tokens=np.zeros(n + 1, np.int32)),
        "layers": changed(cache=tensors["cache"][1:].copy()),
        "row bytes": changed(cache=tensors["cache"][:, :, 1:].copy()),
        "cache dtype": changed(cache=tensors["cache"].astype(np.int8)),
        "mtp rows": changed(mtp_cache=np.zeros((1, 3, tensors["mtp_cache"].shape[2]), np.uint8)),
        "mtp rank": changed(mtp_cache=tensors["mtp_cache"][0].copy()),
        "hidden width": changed(hidden=tensors["hidden"][:, 1:].copy()),
        "hidden count": changed(hidden=np.concatenate([tensors["hidden"]] * 2)),
        "hidden dtype": changed(hidden=tensors["hidden"].astype(np.float64)),
    }


def test_hostile_session_files_are_refused_and_change_nothing(tmp_path: Path) -> None:
    m = models.model()
    s = m.session(mtp=True)
    s.prefill(IDS[:10])
    s.save(tmp_path / "good")
    s.prefill(IDS[10:12])
    before = s._core.state()
    for name, content in hostile_sessions(tmp_path / "good").items():
        path = tmp_path / "bad"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            save_file(content[0], path, content[1])
        for force in (False, True):
            with pytest.raises(SessionError) as e:
                s.restore(path, force=force)
                pytest.fail(f"{name}: accepted")
            assert "\n" not in str(e.value)
    with pytest.raises(SessionError, match="missing"):
        s.restore(tmp_path / "missing")
    for name, x in s._core.state().items():
        assert (x == before[name]).all()


def test_session_that_cannot_be_written(tmp_path: Path) -> None:
    s = models.model().session()
    s.prefill(IDS[:3])
    with pytest.raises(ResourceError, match="cannot be written"):
        s.save(tmp_path / "no" / "such" / "folder")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ResourceError, match="cannot be written"):
        s.save(tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


# ---- perplexity


def test_perplexity_is_the_definition(model: deepcalm.Model) -> None:
    text = "the other thing is in the air over a town" * 3
    ids = model.encode(text, bos=False)
    r = perplexity(model, text, ctx=16, kv="f32")
    start = [265] if r.bos else []
    width, nll = 16 - len(start), []
    for i in range(0, len(ids), width):
        window = start + ids[i : i + width]
        if len(window) > 1:
            logits = model.session(kv="f32").prefill(window, all_logits=True)
            nll += [-log_softmax(logits[j : j + 1])[0, window[j + 1]] for j in range(len(window) - 1)]
    assert (r.n_tokens, r.n_scored, r.ctx) == (len(ids), len(nll), 16)
    assert r.nll_mean == pytest.approx(np.mean(nll), rel=1e-12)
    assert r.nll_standard_error == pytest.approx(np.std(nll, ddof=1) / len(nll) ** 0.5, rel=1e-9)
    assert r.perplexity == pytest.approx(np.exp(np.mean(nll)))
    assert r.standard_error == pytest.approx(r.perplexity * r.nll_standard_error)


def test_divergence_between_formats(model: deepcalm.Model) -> None:
    text = "the other thing is in the air over a town"
    same = perplexity(model, text, ctx=32, against=model).divergence
    assert same is not None and (same.kl_mean, same.argmax_agreement) == (0.0, 1.0)
    seen: list[tuple[int, int]] = []
    q8 = deepcalm.Model(models.packed(dtype="q8"), threads=1)
    r = perplexity(q8, text, 32, against=model, progress=lambda *x: seen.append(x))
    assert r.divergence is not None
    assert 0 < r.divergence.kl_mean < 0.5 and r.divergence.argmax_agreement > 0.5
    assert [d for d, _ in seen] == sorted(d for d, _ in seen) and seen[-1][0] <= seen[-1][1]


def test_perplexity_refuses(model: deepcalm.Model) -> None:
    with pytest.raises(Error, match="nothing to score"):
        perplexity(model, "")
    with pytest.raises(Error, match="nothing to score"):
        perplexity(model, "the town", ctx=1)
    with pytest.raises(Error, match="another tokenizer"):
        kimi = tiny.write(models.root() / "other", "kimi_k2", dtype="f32", tokenizer="tiktoken")
        deepcalm.pack(kimi, models.root() / "other.dcalm")
        perplexity(model, "the town", against=deepcalm.Model(models.root() / "other.dcalm"))


def test_demo_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("deepcalm.model.__file__", str(tmp_path / "model.py"))
    with pytest.raises(ResourceError, match="no demo model"):
        deepcalm.demo_path()


def test_config_errors_are_checkpoint_errors() -> None:
    assert issubclass(ConfigError, Error)
