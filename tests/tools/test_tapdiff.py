"""tools/tapdiff.py: records are complete and in pass order, and the first difference is the one that is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import models
import tapdiff

IDS = "5,17,80,3,200,44,9,101,64,250"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("taps")
    for name, options in (("a", []), ("b", ["--threads", "2", "--rows", "3"]), ("c", ["--kv", "f32"])):
        assert tapdiff.main(["--record", str(path / f"{name}.npz"), str(models.packed()), "--ids", IDS, *options]) == 0
    return path


def test_runs_that_must_agree_agree(folder: Path, capsys: Any) -> None:
    assert tapdiff.main([str(folder / "a.npz"), str(folder / "b.npz")]) == 0
    assert "no difference" in capsys.readouterr().out


def test_the_first_difference_is_named(folder: Path, capsys: Any) -> None:
    assert tapdiff.main([str(folder / "a.npz"), str(folder / "c.npz")]) == 1  # the cache's rounding shows in attention
    out = capsys.readouterr().out
    assert out.startswith("layers.0.attn_latent at [") and "more taps differ" in out
    assert tapdiff.main([str(folder / "a.npz"), str(folder / "c.npz"), "--tol", "0.1"]) == 0


def test_a_planted_difference_is_located(folder: Path, tmp_path: Path, capsys: Any) -> None:
    with np.load(folder / "a.npz") as z:
        taps = {k: z[k] for k in z.files}
    assert {"embed", "layers.2.topk_idx", "logits", "mtp.embed", "mtp.logits"} <= set(taps)
    assert tapdiff.in_order(reversed(list(taps))) == list(taps)
    assert next(iter(taps)) == "embed" and list(taps).index("logits") < list(taps).index("mtp.embed")
    for name, at in (("layers.1.q", (2, 3, 1)), ("layers.2.topk_idx", (4, 0)), ("mtp.c_kv", (8, 5))):
        changed = {k: v.copy() for k, v in taps.items()}
        changed[name][at] += 1
        changed["mtp.logits"][0, 0] += 1
        np.savez(tmp_path / "x.npz", **changed)
        assert tapdiff.main([str(tmp_path / "x.npz"), str(folder / "a.npz")]) == 1
        assert capsys.readouterr().out.startswith(f"{name} at {list(at)}: ")
    changed = {k: v.copy() for k, v in taps.items() if k != "layers.1.c_kv"}
    changed["layers.0.q"][1, 0, 0] = np.nan
    np.savez(tmp_path / "x.npz", **changed)
    assert tapdiff.main([str(tmp_path / "x.npz"), str(folder / "a.npz"), "--all", "--tol", "0.5"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("layers.0.q at [1, 0, 0]: found nan") and "layers.1.c_kv: only in the second" in lines[1]


def test_bad_input_is_one_line(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "x.npz").write_bytes(b"nothing")
    assert tapdiff.main([str(tmp_path / "x.npz"), str(tmp_path / "x.npz")]) == 2
    assert capsys.readouterr().err.startswith("tapdiff: ")
    assert tapdiff.main(["--record", str(tmp_path / "y.npz"), str(tmp_path / "x.npz")]) == 2
    with pytest.raises(SystemExit):
        tapdiff.main([str(tmp_path / "x.npz")])
