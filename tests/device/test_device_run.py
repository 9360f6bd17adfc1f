"""The CUDA pass, on a simulated GPU and on a real one where there is one.

Against the oracle stage by stage, against itself bit for bit (law L1), and decoding on the device against the same
tokens passed from the host.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import deepcalm
import device_cases
import models
import tiny
from deepcalm import _core
from deepcalm.errors import ResourceError, SessionError, UnsupportedError
from deepcalm.sampling import Sampling
from stage_oracle import check_stages

# (preset, dtype of the checkpoint, options of the packer, cache type): every format, cache type and router
pytestmark = pytest.mark.exhaustive
CASES = [
    ("v3", "bf16", {"dtype": "bf16"}, "bf16"),
    ("v3", "bf16", {"dtype": "q4", "attn_dtype": "q8"}, "q8"),
    ("v2_lite", "bf16", {"dtype": "q8"}, "f16"),
    ("v2_grouped", "fp8", {"dtype": "source"}, "f16"),
    ("glm4_moe_lite", "bf16", {"dtype": "f16"}, "f32"),
    ("kimi_k2", "int4", {"dtype": "source"}, "f16"),
    ("mistral4", "fp8", {"dtype": "source"}, "f16"),
]
IDS = ["-".join([p, s, *o.values(), kv]) for p, s, o, kv in CASES]
PROMPT = 11
# Relative RMS of a stage by weight format. Measured: 7e-5 with a bf16 cache (a chunk's probabilities are rounded
# relative to the chunk's own maximum, the oracle's to the running one); f16 weights take activations in f16, the
# oracle's in f32; with int8 activations a value that no tap shows may round to the other side.
TOLERANCE = {"f16": 1e-3, "q8": 3e-4}


@pytest.fixture(params=device_cases.DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    device_cases.need(request.param)
    return str(request.param)


def packed_case(preset: str, source: str, options: dict[str, str]) -> Any:
    return models.pack(models.checkpoint(preset, source), **options)


def session(core: Any, kv: str, ctx: int = 128, mtp: bool = False) -> Any:
    return _core.Session(core, ctx, kv, 96, mtp)


# ---- passes


@pytest.mark.parametrize(("preset", "source", "options", "kv"), CASES, ids=IDS)
def test_device_stages_equal_oracle(preset: str, source: str, options: dict[str, str], kv: str, device: str) -> None:
    file = packed_case(preset, source, options)
    # a long pass and a short one that crosses an attention chunk (64)
    check_stages(file, device_cases.open_core(file, device), kv, 66, (60, 6), TOLERANCE.get(options["dtype"], 1e-4))


@pytest.mark.parametrize(("preset", "source", "options", "kv"), CASES, ids=IDS)
def test_device_bits_do_not_depend_on_grouping(
    preset: str, source: str, options: dict[str, str], kv: str, device: str
) -> None:
    file = packed_case(preset, source, options)
    core = device_cases.open_core(file, device)
    ids = tiny.token_ids(file.config["vocab_size"], 66, 3)  # crosses an attention chunk, in one pass and between two
    truth = models.Run(core, ids, kv, 66)
    for sizes, taps in (([40, 16, 1, 3, 4, 2], None), ([57, 2, 7], ["final_norm"])):
        other = models.Run(core, ids, kv, sizes, taps, session(core, kv))
        for name in ("logits", "hidden", "cache"):
            models.assert_same_bits(f"{sizes} {name}", getattr(other, name), getattr(truth, name))
    if file.config["num_nextn_predict_layers"]:
        for name, x, y in zip(("MTP logits", "MTP hidden", "MTP cache"), truth.mtp(65), other.mtp(24), strict=True):
            models.assert_same_bits(name, y, x)


def test_device_agrees_with_the_cpu_in_f32(device: str) -> None:
    for preset in ("v3", "v2_lite", "moonlight"):
        file = models.pack(models.checkpoint(preset, "f32"), dtype="f32")
        ids = tiny.token_ids(file.config["vocab_size"], 40, 2)
        cpu = models.Run(models.open_model(file, models.ISAS[0]), ids, "f32", 40)
        ours = models.Run(device_cases.open_core(file, device), ids, "f32", [37, 1, 2])
        assert float(np.abs(ours.logits - cpu.logits).max()) < 1e-4  # of logits with a standard deviation near 1
        assert (ours.logits.argmax(1) == cpu.logits.argmax(1)).all()


# ---- decoding


def decode(
    core: Any, ks: list[int], prompt: models.Array, kv: str = "f16", n: int = 12, **options: Any
) -> tuple[list[int], Any, list[dict[str, Any]]]:
    """A device text of n tokens after the argmax of the prompt's logits: (tokens, session at rest, rounds)."""
    o: dict[str, Any] = {"sampling": Sampling(), "eos": [], "ctx": 128, "mtp": any(ks)} | options
    s = session(core, kv, o["ctx"], o["mtp"])
    logits = s.forward(prompt)[0]
    token = _core.sample(logits, o["sampling"], s.pos, len(logits))
    s.decode_start(token, o["sampling"], len(logits), n - 1, o["eos"])
    rounds: list[dict[str, Any]] = []
    for k in itertools.cycle(ks):
        s.decode_step(k)
        rounds += s.decode_poll()
        if rounds and rounds[-1]["stop"]:
            break
    s.decode_step(ks[0])  # one behind the stop: to no effect
    s.decode_finish()
    return [token, *(t for r in rounds for t in r["tokens"])], s, rounds


def assert_same_session(core: Any, s: Any, kv: str) -> None:
    """A session that decoded on the device is, to the bit, one that was given the same tokens."""
    given = session(core, kv, mtp=s.mtp_pos > 0)
    given.forward(s.tokens)
    ours, theirs = s.state(), given.state()
    models.assert_same_bits("cache", ours["cache"], theirs["cache"])
    m = min(s.mtp_pos, given.mtp_pos)
    models.assert_same_bits("MTP cache", ours["mtp_cache"][:, :m], theirs["mtp_cache"][:, :m])
    k = min(len(ours["hidden"]), len(theirs["hidden"]))
    if k:
        models.assert_same_bits("pending hidden rows", ours["hidden"][-k:], theirs["hidden"][-k:])
    models.assert_same_bits("logits after it", s.forward([5, 6, 7], "all"), given.forward([5, 6, 7], "all"))


SAMPLINGS = [
    Sampling(),
    Sampling(temp=1.0, seed=7),
    Sampling(temp=0.8, seed=2**63 + 5, top_k=40, top_p=0.9),
    Sampling(temp=1.3, seed=3, top_p=0.7, min_p=0.02),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "plain", "top_k-top_p", "top_p-min_p"])
def test_device_decodes_the_same_text_with_any_drafts(sampling: Sampling, device: str) -> None:
    file = models.small()
    core = device_cases.open_core(file, device)
    prompt = tiny.token_ids(file.config["vocab_size"], PROMPT, 4)
    plain, s, _ = decode(core, [0], prompt, sampling=sampling)
    assert_same_session(core, s, "f16")
    # the same from the host, one pass and one choice at a time
    host = session(core, "f16")
    tokens, logits = [], host.forward(prompt)[0]
    for _ in range(12):
        tokens.append(_core.sample(logits, sampling, host.pos, len(logits)))
        logits = host.forward([tokens[-1]])[0]
    assert plain == tokens
    for ks in ([3], [0, 7, 1]) if sampling.temp == 0 else ([2],):
        text, s, rounds = decode(core, ks, prompt, sampling=sampling)
        assert text == plain, ks
        assert sum(r["drafted"] for r in rounds) > 0
        assert_same_session(core, s, "f16")


def test_device_accepts_drafts_of_the_demo_model(device: str) -> None:
    """A trained MTP layer: its drafts are mostly right, and the text is the CPU's."""
    model = deepcalm.Model(deepcalm.demo_path(), device=device)
    ids = model.encode("Once upon a time")
    cpu = list(deepcalm.Model(deepcalm.demo_path()).session(128).generate(ids, max_tokens=12))
    generation = model.session(128, mtp=True).generate(ids, max_tokens=12, draft=1)
    assert list(generation) == cpu
    stats = generation.drafts.stats
    assert stats.tokens >= 11 and stats.acceptance > 0.4 and stats.rounds < 11


def test_device_ends_where_the_cpu_does(device: str) -> None:
    path = models.packed()
    ours, cpu = deepcalm.Model(path, device=device), deepcalm.Model(path)
    prompt = [int(i) for i in tiny.token_ids(ours.config["vocab_size"], PROMPT, 4)]
    text = list(cpu.session(64).generate(prompt, max_tokens=9, eos_ids=[]))
    cases: list[tuple[dict[str, Any], int, int]] = [  # options, context, drafts
        ({"max_tokens": 6}, 64, 2),
        ({"max_tokens": 1}, 64, 0),
        ({"max_tokens": 9, "eos_ids": [text[5]]}, 64, 3),
        ({"eos_ids": []}, PROMPT + 8, 3),
        ({"eos_ids": []}, PROMPT + 2, 1),
        ({"eos_ids": list(range(200, 240)), "max_tokens": 6}, 64, 1),  # more than a device looks for: the host does
    ]
    for options, ctx, k in cases:
        a = ours.session(ctx, mtp=True).generate(prompt, draft=k, **options)
        b = cpu.session(ctx, mtp=True).generate(prompt, draft=k, **options)
        assert (list(a), a.reason, a.session.pos) == (list(b), b.reason, b.session.pos), options


def test_device_session_goes_on_after_decoding(device: str, tmp_path: Path) -> None:
    """Leaving a text half-way, truncating, saving, restoring: the same bits as a session that only saw the tokens."""
    model = deepcalm.Model(models.packed(), device=device)
    prompt = [int(i) for i in tiny.token_ids(model.config["vocab_size"], PROMPT, 4)]
    s = model.session(64, mtp=True)
    generation = s.generate(prompt, draft=2, eos_ids=[])
    text = [next(generation) for _ in range(5)]
    with pytest.raises(SessionError, match="decoding on the device is not finished"):
        s.core.forward([1])
    s.save(tmp_path / "s")
    assert generation.reason is None and s.tokens.tolist() == prompt + text
    text.append(next(generation))  # goes on, in rounds of its own
    fresh = model.session(64, mtp=True)
    fresh.prefill(prompt + text)
    again = model.session(64, mtp=True)
    again.restore(tmp_path / "s")
    again.prefill(text[5:])
    results = [x.decode(7) for x in (s, fresh, again)]
    assert generation.reason == "taken"
    models.assert_same_bits("after decoding", results[0], results[1])
    models.assert_same_bits("after restore", results[2], results[1])
    s.truncate(PROMPT + 1)
    assert list(s.generate([text[1]], max_tokens=3, draft=2, eos_ids=[])) == text[2:5]
    assert s.stats.decode_tokens > 0 and s.stats.weight_bytes > 0
    cpu = deepcalm.Model(models.packed()).session(64, mtp=True)
    with pytest.raises(SessionError, match=rf"backend is '{device}', this session has 'cpu'"):
        cpu.restore(tmp_path / "s")


def test_device_refuses(device: str) -> None:
    core = device_cases.open_core(models.pack(models.checkpoint("v3", "bf16"), dtype="q8"), device)
    s = session(core, "f16")
    with pytest.raises(SessionError, match="decode: not started"):
        s.decode_step(0)
    s.forward([1, 2, 3])
    s.decode_start(4, Sampling(), 270, 5, [])
    with pytest.raises(SessionError, match=r"1 drafts, expected 0\.\.0"):
        s.decode_step(1)
    s.decode_finish()
    assert s.tokens.tolist() == [1, 2, 3]
    with pytest.raises(SessionError, match="33 end tokens, at most 32"):
        s.decode_start(4, Sampling(), 270, 5, list(range(33)))
    cpu = _core.Session(
        models.open_model(models.pack(models.checkpoint("v3", "bf16"), dtype="q8"), models.ISAS[0]), 64, "f16", 8
    )
    with pytest.raises(UnsupportedError, match="runs on the CPU"):
        cpu.decode_start(4, Sampling(), 270, 5, [])
    with pytest.raises(ResourceError, match=r"needs [\d.]+ GB of device memory, [\d.]+ GB of [\d.]+ GB are free on"):
        huge = models.pack(
            tiny.write(models.root() / "huge", "v3", dtype="f32", max_position_embeddings=1 << 24), dtype="q8"
        )
        _core.Session(device_cases.open_core(huge, device), 1 << 24, "f32", 4096, True)


def test_what_a_device_does_not_use_is_named(device: str) -> None:
    path = models.packed()
    assert deepcalm.Model(path, device=device).notes == ()
    assert deepcalm.Model(path, device=device, threads=2).notes == (
        f"threads and isa have no effect on device {device}",
    )


def test_a_batch_on_a_device_takes_turns(device: str) -> None:
    """Each answer is what a session alone gets there; a prompt that begins as another did starts from its rows."""
    model = deepcalm.Model(models.packed("v3", dtype="q8"), device=device)
    ids = tiny.token_ids(tiny.N_TOKENS, 80, 3).tolist()
    prompts = [ids[:70], ids[:70] + ids[:3], ids[5:9]]
    with model.batch(max_sequences=2, ctx=100, draft=1) as batch:
        how = Sampling(temp=1.0, seed=4)
        requests = [batch.submit(p, sampling=how, max_tokens=6, eos_ids=()) for p in prompts]
        list(batch.run())
        turn = prompts[0] + requests[0].choices[0].tokens
        requests.append(batch.submit(turn, sampling=how, max_tokens=6, eos_ids=()))
        list(batch.run())
        assert [r.cached_tokens for r in requests] == [0, 70, 0, 75]
    for request, prompt in zip(requests, [*prompts, turn], strict=True):
        with model.session(100, mtp=False) as alone:
            assert request.choices[0].tokens == list(alone.generate(prompt, temp=1.0, seed=4, max_tokens=6, eos_ids=()))
