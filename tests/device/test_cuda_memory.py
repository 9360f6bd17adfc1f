"""Shared memory of a block: every stage, at the shapes of real models, on every kind of device."""

from __future__ import annotations

from typing import Any

import pytest

import cuda_stages as cs
import device_cases

KB = 1024
# dynamic shared memory of a block -> column blocks that share a weight in passes of more than 8 rows
DEVICES = {99 * KB: 2, 163 * KB: 2, 227 * KB: 4}  # sm_86, sm_89, sm_120; sm_80; sm_90, sm_100
CHUNK, PARTIAL, SHORT = 64, 8, 8192  # kChunk, kPartialChunks, kShortContext
# heads, routed experts, experts per token, groups; all: kv_lora_rank 512, qk_rope_head_dim 64
MODELS = {"V2-Lite": (16, 64, 6, 1), "V3": (128, 256, 8, 8), "Kimi-K2": (64, 384, 8, 1)}
NB = (4, 2, 2, 1, 1, 1, 1, 1)  # of kFits


def stage_args(model: str, n: int, ctx: int, cache: str) -> dict[str, Any]:
    """The fields of every stage's arguments that shared memory depends on, as a pass fills them."""
    heads, experts, topk, groups = MODELS[model]
    rows = cs.Rows(n)
    routing = cs.Routing(cs.RouterArgs(n_routed_experts=experts, num_experts_per_tok=topk, n_group=groups))
    single = n <= 8 and ctx <= SHORT
    chunks = 1 if single else PARTIAL
    units = -(-ctx // (CHUNK * chunks))
    part = cs.Partials(heads, 512, chunks, units)
    more = {
        "attend": {"cache": cs.LatentCache(cs.CACHE[cache], ctx, 512, 64), "part": part},
        "value": {"part": part},
        "route": {"routing": routing},
        "experts": {"routing": routing},
        "down": {"routing": routing, "experts": cs.Matrix(rows=16)},
    }
    return {name: kind(**({"rows": rows} | more.get(name, {}))) for name, kind in cs.ARGS.items()}


@pytest.fixture(scope="module")
def stages() -> cs.Stages:
    return cs.Stages(device_cases.library("sim"))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("smem", DEVICES)
def test_every_stage_fits_every_device(stages: cs.Stages, smem: int, model: str) -> None:
    for n in (1, 8, 512):
        for ctx in (4 * KB, 8 * KB, 160 * KB):
            for cache in cs.CACHE:
                for name, args in stage_args(model, n, ctx, cache).items():
                    index, need = stages.fit(name, args, n > 8, smem)
                    assert need <= smem, (name, n, ctx, cache)
                    if name in ("product", "absorb", "ffn_in", "experts", "down", "head"):
                        assert NB[index] == (1 if n <= 8 else DEVICES[smem]), (name, n, ctx, "reads weights more often")


def test_a_large_device_uses_what_it_has(stages: cs.Stages) -> None:
    """Whole copies, whole chunks, eight rows of latents; on 99 KB a long context takes fewer rows at once."""
    for model in MODELS:
        for smem in (163 * KB, 227 * KB):
            for n in (1, 8):
                args = stage_args(model, n, 160 * KB, "f16")
                assert {stages.fit(name, a, False, smem)[0] for name, a in args.items()} == {3}
    assert stages.fit("value", stage_args("V3", 8, 4 * KB, "f16")["value"], False, 99 * KB)[0] == 4
    assert stages.fit("value", stage_args("V3", 8, 160 * KB, "f16")["value"], False, 99 * KB)[0] == 5


def test_what_fits_nowhere_is_told(stages: cs.Stages) -> None:
    args = stage_args("V3", 8, 4 << 20, "f16")["value"]
    index, need = stages.fit("value", args, False, 99 * KB)
    assert index == len(NB) - 1 and need > 99 * KB
