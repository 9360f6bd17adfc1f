"""What the documents and --help tell to type, typed; every option of every command is in a line that runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import click
import pytest
from click.core import ParameterSource

import commands
import models
from commands import Run
from deepcalm import cli
from deepcalm.measure import bench

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / n for n in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "python/deepcalm/demo/MODEL_CARD.md")]
DOCUMENTS += sorted((ROOT / "docs").rglob("*.md"))
PROGRAM = r"(?:\w+=\S+ +)*(?:deepcalm|pip|pytest|python3?|ruff|mypy|git|cmake|eval|tools/\w+(?:\.py)?|\.ci/run)(?= |$)"
# Words that a command begins with, and why nothing types it here.
NOT_TYPED = {
    "pip install": "needs a package index and a compiler; .ci/run installs the package and its extras so",
    "DEEPCALM_CUDA=ON pip install .": "needs nvcc; with it .ci/run compiles the library",
    "python3 -m venv": "part of an installation",
    ". .venv/bin/activate": "part of an installation",
    "pytest": "this is it; .ci/run makes the other runs",
    "DEEPCALM_TEST_SEED=7 pytest": "this is it",
    "DEEPCALM_BATCH_LINES=3000 pytest": "this is it, with few lines",
    "python tests/sim/build.py": "tests of the simulator call it",
    "tools/check_sim": "compiles the simulator with two sanitizers; .ci/run",
    "ruff": "needs the extra dev; .ci/run",
    "mypy": "needs the extra dev; .ci/run",
    "git ls-files": "needs the extra dev; .ci/run",
    "xargs": "needs the extra dev; .ci/run",
    ".ci/run": "runs all tests, from a clean clone",
    "jq": "another program",
    'eval "$(_DEEPCALM_COMPLETE=bash_source deepcalm)"': "tests/cli/test_cli.py, for every shell",
    "deepcalm COMMAND --help": "tests/cli/test_cli.py, for every command",
    "tools/make_wheel": "downloads and compiles for several Pythons",
    "tools/bench_peers.py --build": "downloads and compiles llama.cpp, and measures for hours",
    "tools/bench_rows.py --repeats": "measures for an hour",
    "tools/bench_draft.py": "measures for an hour",
    "tools/bench_drafters.py": "measures for minutes",
    "tools/bench_batch.py": "measures for minutes; tests/tools/test_bench_tools.py calls its parts",
    "tools/bench_serve.py": "measures for minutes; tests/serve calls its parts",
    "tools/quality.py": "measures whole texts and large models; tests/tools/test_bench_tools.py calls its parts",
    "tools/gpu_check.py": "needs a GPU",
}
ON_RAY = "needs Ray; tests/cluster"
# What no document and no --help has.
MORE = """
deepcalm generate -p Once -q -s 3 --temp 1 --top-k 9 --min-p 0.1 --raw --device auto -t 1 --isa scalar -c 64 --kv f32
deepcalm generate --model chat.dcalm --prompt Hi --chat --system-prompt S --chat-template-kwargs '{}' --quiet --lock
deepcalm generate -f book.txt --n-predict 3 --temperature 1 --seed 3 --threads 1 --ctx 512 --device cpu
deepcalm chat v3.dcalm -n 3 --top-p 0.9 --top-k 9 --min-p 0.1 -s 3 --stop END --draft 2 --no-history -q -t 1 --kv q8
deepcalm chat --chat-template-kwargs '{"x": 1}' --device cpu --isa scalar --ctx-size 512 --lock --history --max-tokens 3
deepcalm pack DIR new.dcalm --attn-dtype bf16 --head-dtype f16 --draft-head q8 --force --json -q
deepcalm inspect -m v3.dcalm -q
deepcalm verify -m FILE --against DIR --layers 0 --prompt "on the other hand" --tokens 8 -t 1 --isa scalar --kv f32 -q
deepcalm bench -m FILE --prompt 8 --context 4 --tokens 3 --isa scalar --json-file new.json -q
deepcalm bench --synthetic v3:2 --attn-dtype bf16 --head-dtype f16 --keep new.dcalm --contexts 0
deepcalm batch IN.jsonl out.jsonl --overwrite --cache-bytes 9999999 -c 64 --kv q8 --top-p 0.9 --top-k 9 --min-p 0.1 -s 3
deepcalm batch IN.jsonl out.jsonl --stop END --draft 1 --drafter ngram --device cpu -t 1 --isa scalar --lock -q
deepcalm serve --max-waiting 9 --cache-bytes 99999999 --grace 1 --draft 1 -t 1 --isa scalar -c 64 --kv q8 --lock -q
deepcalm serve --device cpu --drafter ngram
deepcalm chat --drafter ngram
deepcalm perplexity -m v3.dcalm book.txt --device cpu -t 1 --isa scalar -c 64 --kv q8 -q
"""
# Values of config.json that make a synthetic model small, whatever geometry is asked for.
SMALL = ("hidden_size=64", "num_attention_heads=2", "kv_lora_rank=32", "qk_nope_head_dim=32", "qk_rope_head_dim=32",
         "v_head_dim=32", "intermediate_size=96", "moe_intermediate_size=32", "n_routed_experts=16",
         "vocab_size=512", "bos_token_id=1", "eos_token_id=2")  # fmt: skip


@cache
def lines() -> list[str]:
    """Every line that somebody is told to type, without what the shell takes for a comment."""
    found = MORE.strip().splitlines()
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        blocks = re.findall(r"^```\w*\n(.*?)^```$", text, re.M | re.S) + re.findall(r"(?:^ {4}.*\n)+", text, re.M)
        spans = [s for s in re.findall(rf"`({PROGRAM} [^`]*)`", text) if not re.fullmatch(r"deepcalm \w+", s)]  # a name
        found += [*spans, *(x.strip() for b in blocks for x in b.splitlines())]
    for command in cli.cli.commands.values():
        found += re.findall(r"^  (deepcalm .*)$", command.epilog or "", re.M)
    return [re.sub(r" +#.*", "", line) for line in found if re.match(PROGRAM, line)]


def parts(line: str) -> list[str]:
    """The commands of a line."""
    return re.split(r" (?:&&|\|) ", line)


def reason(part: str) -> str | None:
    """Why a command is not typed; None: it is."""
    if "--ray" in part.split():
        return ON_RAY
    return next((why for start, why in NOT_TYPED.items() if part == start or part.startswith(start + " ")), None)


TYPED = list(dict.fromkeys(p for line in lines() for p in parts(line) if reason(p) is None))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with checkpoints, and a folder in it with all files that the lines name."""
    home = tmp_path_factory.mktemp("home")
    lite = models.checkpoint("v2_lite", "f32", max_position_embeddings=20_000)
    large = models.checkpoint("v3", "f32", num_hidden_layers=61, first_k_dense_replace=60)
    base = models.checkpoint("v3", "f32")
    for name, folder in (("DeepSeek-V2-Lite", lite), ("DeepSeek-V3", large)):
        (home / "models").mkdir(exist_ok=True)
        (home / "models" / name).symlink_to(folder)
    here = home / "here"
    (here / "python/deepcalm/demo").mkdir(parents=True)
    for name in ("DIR", "CHECKPOINT"):
        (here / name).symlink_to(base)
    for name, folder, dtype in (
        ("v2-lite", lite, "q8"), ("v2-lite-chat", lite, "q8"), ("chat", lite, "q8"), ("v2-lite-q4", lite, "q4"),
        ("v2-lite-bf16", lite, "bf16"), ("v2", lite, "f32"), ("v3", large, "q8"),
    ):  # fmt: skip
        (here / f"{name}.dcalm").symlink_to(models.pack(folder, dtype=dtype).path)
    (here / "FILE").symlink_to(models.pack(base, dtype="q8").path)
    for name in ("IN", "in", "prompts", "questions"):
        (here / f"{name}.jsonl").write_text('{"prompt": "the", "max_tokens": 2}\n' * 3)
    (here / "key.txt").write_text("secret\n")
    for name in ("book.txt", "question.txt"):
        (here / name).write_text("the other thing in the air and the hour " * 20)
    return here


@pytest.fixture
def here(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a copy of that folder, with a Hub that has one model, and a machine that is measured at once."""
    for p in home.iterdir():
        (tmp_path / p.name).symlink_to(p)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(home.parent))
    hub = type(sys)("huggingface_hub")
    hub.snapshot_download = lambda *_, **__: str(models.checkpoint("v2_lite", "f32"))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    commands.cheap_probes(monkeypatch)
    commands.ended_servers(monkeypatch)
    measure = bench.bench
    monkeypatch.setattr(bench, "bench", lambda *a, **b: measure(*a[:4], 1, *a[5:], **b))  # one repeat of each


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("part", TYPED)
def test_what_is_told_to_type_runs(part: str, run: Run) -> None:
    program, *args = shlex.split(part)
    if program != "deepcalm":
        assert subprocess.run([sys.executable, ROOT / program, *args], capture_output=True, check=False).returncode == 0
        return
    args = [re.sub("^~", str(Path.home()), a) for a in args]
    if args[0] == "pack" and len(args) > 2:
        Path(args[2]).unlink(missing_ok=True)  # which other lines find packed already
    if "--synthetic" in args:  # gigabytes in the true geometry
        args += [a for s in SMALL for a in ("--set", s)]
    code, _, err = run(*args, stdin=b"Hi\n")
    assert code == 0, err


def test_what_is_not_typed_has_a_reason_and_exists() -> None:
    left = {p for line in lines() for p in parts(line) if reason(p) is not None}
    assert {start for start in NOT_TYPED if not any(p == start or p.startswith(start + " ") for p in left)} == set()
    paths = [w for p in left for w in p.split() if re.fullmatch(r"(tests|tools|docs)/[\w/.]+|\.ci/run", w)]
    assert len(paths) > 5 and not [p for p in paths if not (ROOT / p).exists()]
    markers = {m for p in left for m in re.findall(r"pytest -m (\w+)", p)}
    assert markers and all(f'"{m}: ' in (ROOT / "pyproject.toml").read_text() for m in markers)


@pytest.mark.parametrize("name", cli.cli.commands)
def test_every_option_is_in_a_line_that_runs(name: str) -> None:
    """And every name that an option has, in a line of some command."""
    command, given = cli.cli.commands[name], set[str]()
    left = {p for line in lines() for p in parts(line)}
    for program, *args in map(shlex.split, [*TYPED, *(p for p in left if reason(p) == ON_RAY)]):
        if (program, *args[:1]) == ("deepcalm", name):
            context = command.make_context(name, args[1:])
            given |= {k for k in context.params if context.get_parameter_source(k) is ParameterSource.COMMANDLINE}
    known = [p for p in command.params if isinstance(p, click.Option)]
    assert not [p.opts for p in known if p.name not in given]
    typed = {w for part in left for w in shlex.split(part)}
    assert not [o for p in known for o in (*p.opts, *p.secondary_opts) if o not in typed]
