"""The runtime with every weight format and cache type, stage by stage against the reference (stage_oracle.py)."""

from __future__ import annotations

import pytest

import models
from stage_oracle import check_stages

# (preset, dtype of the checkpoint, options of the packer): every weight format in every role it may have.
CASES = [
    ("v3", "bf16", {"dtype": "bf16"}),
    ("v3", "bf16", {"dtype": "q8"}),
    ("v3", "bf16", {"dtype": "q4"}),
    ("moonlight", "f16", {"dtype": "source"}),
    ("v2_lite", "bf16", {"dtype": "q4", "attn_dtype": "q4", "head_dtype": "q4"}),
    ("v2_grouped", "fp8", {"dtype": "source"}),
    ("gigachat3", "fp8", {"dtype": "source"}),
    ("glm4_moe_lite", "bf16", {"dtype": "f8"}),
    ("kimi_k2", "int4", {"dtype": "source"}),
    ("mistral4", "fp8", {"dtype": "source"}),
    ("minicpm3", "bf16", {"dtype": "q4"}),
    ("axk1", "bf16", {"dtype": "bf16"}),
]
IDS = ["-".join([p, s, *o.values()]) for p, s, o in CASES]


@pytest.mark.by_turns("isa", len(models.ISAS))
@pytest.mark.parametrize("isa", models.ISAS)
@pytest.mark.parametrize(("preset", "source", "options"), CASES, ids=IDS)
def test_stages_equal_oracle(preset: str, source: str, options: dict[str, str], isa: str) -> None:
    # the cache type only matters to attention, the weight format to the rest: no need for every pair
    for kv in models.CACHES if options == {"dtype": "q8"} else ("f16",):
        file = models.pack(models.checkpoint(preset, source), **options)
        check_stages(file, models.open_model(file, isa), kv)


def test_every_format_occurs() -> None:
    seen = set()
    for preset, source, options in CASES:
        file = models.pack(models.checkpoint(preset, source), **options)
        seen |= {(e.format, e.scale) for e in file.entries.values() if e.kind == "tiled"}
    expected = {("f32", ""), ("bf16", ""), ("f16", ""), ("f8", "f32"), ("q8", "f16"), ("q4", "f16"), ("q4", "bf16")}
    assert seen == expected
