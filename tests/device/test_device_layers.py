"""Layer by layer, a device against the CPU backend: every layer computes from the CPU's input and with its experts.

The CPU's taps are fed to the device (``trace(feed=...)``): the hidden state before each layer, and the router's logits,
from which both choose the same experts to the bit. What the taps of a layer then differ by is its arithmetic alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

import deepcalm
import device_cases
import models
import tiny
from deepcalm import _core
from deepcalm.errors import SessionError
from ref import packed

FED = ("embed", "gate_logits", "layer_out")
# Relative RMS of a tap over the nearest nine tenths of its rows: measured 4e-7 at most. In up to 4 % of the rows some
# activation is rounded to the other side, its sum having other last bits in another order: over all rows 1.5e-3.
# f16 weights take activations in f16 on a device, in f32 on the CPU: 8e-4.
TOLERANCE, F16_TOLERANCE, ALL_ROWS = 1e-4, 1.5e-3, 5e-3
GAP = 0.05  # between the two highest logits (deviation about 1) where both must choose the same token
# (preset, dtype of the checkpoint, options of the packer, cache type, rows of the passes): each architecture, every
# format and cache type. In a bf16 cache the CPU rounds a probability relative to the maximum of all positions up to its
# chunk of 64, the device to the chunk's: within one chunk they compare.
CASES = [
    ("v3", "bf16", {"dtype": "bf16"}, "bf16", (26, 6)),
    ("v3", "bf16", {"dtype": "q4", "attn_dtype": "q8"}, "q8", (60, 10)),
    ("v2_lite", "bf16", {"dtype": "q8"}, "f16", (26, 6)),
    ("v2_grouped", "fp8", {"dtype": "source"}, "f16", (26, 6)),
    ("gigachat3", "fp8", {"dtype": "source"}, "f32", (26, 6)),
    ("glm4_moe_lite", "bf16", {"dtype": "f16"}, "f32", (26, 6)),
    ("kimi_k2", "int4", {"dtype": "source"}, "f16", (26, 6)),
    ("moonlight", "f32", {"dtype": "f32"}, "f32", (26, 6)),
    ("mistral4", "f16", {"dtype": "q8"}, "f16", (26, 10)),
    ("minicpm3", "bf16", {"dtype": "q8"}, "f16", (26, 6)),
]
IDS = ["-".join([p, s, *o.values(), kv]) for p, s, o, kv, _ in CASES]
# Slow in the simulator: what a case below has in common with one of these runs where all is asked for.
FIRST = ("v3-bf16-q4-q8-q8", "gigachat3-fp8-source-f32", "kimi_k2-int4-source-f16", "mistral4-f16-q8-f16",
         "minicpm3-bf16-q8-f16")  # fmt: skip


@pytest.fixture(params=device_cases.DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    device_cases.need(request.param)
    return str(request.param)


def assert_same_layers(
    file: packed.PackedFile,
    device: str,
    ids: models.Array,
    kv: str,
    sizes: tuple[int, ...],
    tolerance: float = TOLERANCE,
) -> None:
    """Every tap of passes of `sizes` rows, the MTP layer's included; then the tokens of both without feeding."""
    cpu, ours = models.open_model(file, models.ISAS[0]), device_cases.open_core(file, device)
    run = models.Run(cpu, ids, kv, sizes, taps=["*"])
    s = _core.Session(ours, 128, kv, 96, False)
    pairs: dict[str, list[tuple[models.Array, models.Array]]] = {}

    def feed(taps: Mapping[str, models.Array]) -> None:
        s.trace(["*"], {name: value for name, value in taps.items() if name.split(".")[-1] in FED})

    def take(taps: Mapping[str, models.Array]) -> None:
        found = s.taps()
        assert set(found) == set(taps)
        for name, value in taps.items():
            pairs.setdefault(name, []).append((found[name], value))

    for part, taps in zip(run.parts, run.taps, strict=True):
        feed(taps)
        s.forward(ids[part], "all")
        take(taps)
    if file.config["num_nextn_predict_layers"]:
        run.mtp(sizes[0], taps=["*"])
        for part, taps in zip(run.mtp_parts, run.mtp_taps, strict=True):
            feed(taps)
            s.mtp_forward(ids[1:][part], run.hidden[part], "all")
            take(taps)
    assert len(pairs) > (12 if file.config["n_routed_experts"] else 11) * file.config["num_hidden_layers"]
    for name, both in pairs.items():
        got, want = (np.concatenate(side) for side in zip(*both, strict=True))
        if name.endswith(("topk_idx", "topk_weight")):
            np.testing.assert_array_equal(got, want, err_msg=name)
            continue
        rows = np.argsort(((got - want).reshape(len(want), -1) ** 2).sum(1))[: -(-len(want) * 9 // 10)]
        error, overall = models.rel_rms(got[rows], want[rows]), models.rel_rms(got, want)
        assert error <= tolerance and overall <= ALL_ROWS, f"{name}: relative RMS {error:.1e}, all rows {overall:.1e}"

    want, got = (models.Run(core, ids, kv, sizes).logits for core in (cpu, ours))
    top = np.sort(want, axis=1)[:, -2:]
    clear = top[:, 1] - top[:, 0] > GAP
    assert clear.mean() > 0.8
    np.testing.assert_array_equal(got.argmax(1)[clear], want.argmax(1)[clear])


@pytest.mark.parametrize(
    ("preset", "source", "options", "kv", "sizes"),
    [
        pytest.param(*case, id=name, marks=[] if name in FIRST else pytest.mark.exhaustive)
        for case, name in zip(CASES, IDS, strict=True)
    ],
)
def test_device_layers_equal_the_cpu_from_its_taps(
    preset: str, source: str, options: dict[str, str], kv: str, sizes: tuple[int, ...], device: str
) -> None:
    file = models.pack(models.checkpoint(preset, source), **options)
    ids = tiny.token_ids(file.config["vocab_size"], sum(sizes), 5)
    tolerance = F16_TOLERANCE if options["dtype"] == "f16" else TOLERANCE
    assert_same_layers(file, device, ids, kv, sizes, tolerance)


def test_device_layers_of_the_demo_model_equal_the_cpu(device: str) -> None:
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    ids = np.array(deepcalm.Model(deepcalm.demo_path()).encode(text), np.int32)
    assert_same_layers(packed.PackedFile(deepcalm.demo_path()), device, ids, "f16", (len(ids) - 4, 4))


def test_device_feeds_are_checked(device: str) -> None:
    file = models.pack(models.checkpoint("v3", "bf16"), dtype="q8")
    s = _core.Session(device_cases.open_core(file, device), 64, "f16", 32, False)
    d = file.config["hidden_size"]
    for name in ("layers.0.q", "mtp.embed", "layers.9.layer_out"):
        s.trace(None, {name: np.zeros((2, d), np.float32)})
        with pytest.raises(SessionError, match=rf"feed: '{name}' is no embed, gate_logits or layer_out of this pass"):
            s.forward([1, 2])
    s.trace(None, {"embed": np.zeros((3, d), np.float32)})
    with pytest.raises(SessionError, match=rf"feed: embed has {3 * d} values, expected {2 * d}"):
        s.forward([1, 2])
    before = s.forward([1, 2])
    s.truncate(0)
    s.trace(None, {"layers.1.layer_out": np.ones((2, d), np.float32)})
    assert not np.array_equal(s.forward([1, 2]), before), "it takes effect"
    s.truncate(0)
    np.testing.assert_array_equal(s.forward([1, 2]), before, err_msg="and for one pass")
    cpu = _core.Session(models.open_model(file, models.ISAS[0]), 64, "f16", 8)
    with pytest.raises(SessionError, match="feed: this session runs on the CPU"):
        cpu.trace(None, {"embed": np.zeros((1, d), np.float32)})
