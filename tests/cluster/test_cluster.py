"""``deepcalm batch --ray`` on clusters of this machine: the same bytes as without, whoever dies."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import commands
import deepcalm
import models
from deepcalm.cluster import _line

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]
LINES = int(os.environ.get("DEEPCALM_RAY_LINES", "250"))  # 500: ten workers are killed


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster whose head is its only node at first."""
    with new_cluster() as found:
        yield found


@contextlib.contextmanager
def new_cluster() -> Iterator[Any]:
    os.environ["PYTHONPATH"] = commands.PACKAGE_PARENT  # workers inherit it
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_AUTH_MODE"] = "disabled"  # whatever token the user has
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  (of 15: a busy machine would starve them)
    testing = pytest.importorskip("ray.cluster_utils")
    found = testing.Cluster(initialize_head=True, head_node_args={"include_dashboard": False, "num_cpus": 1})
    try:
        yield found
    finally:
        found.shutdown()


def with_nodes(cluster: Any, n: int) -> None:
    while len(cluster.worker_nodes) + 1 < n:
        cluster.add_node(num_cpus=2)
    settle(cluster)


def settle(cluster: Any) -> None:
    """Waits until Ray knows which nodes are gone."""
    deadline = time.monotonic() + 60
    while sum(n["Alive"] for n in cluster.global_state.node_table()) != len(cluster.worker_nodes) + 1:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts, sampled and greedy; lines in error; an id twice."""
    rng, path = random.Random(5), tmp_path_factory.mktemp("lines") / "in.jsonl"
    rows: list[str] = []
    for i in range(LINES):
        row: dict[str, Any] = {"id": f"line {i}", "prompt": rng.choice(["Once", "The cat", "One day"])}
        row |= {"max_tokens": rng.randint(1, 60), "temperature": rng.choice([0, 0.8, 1.0])}
        rows.append(json.dumps(row))
    rows[17], rows[40], rows[111] = "{", rows[39], '{"custom_id": "o", "body": {"prompt": ["a", "b"], "n": 2}}'
    path.write_text("\n".join(rows) + "\n")
    return path


def answer(source: Path, out: Path, *options: str, **more: Any) -> tuple[int, bytes, str]:
    """``deepcalm batch``: exit code, what OUT has, stderr."""
    code, shown, err = commands.run("batch", source, out, *options, **more)
    assert not shown
    return code, out.read_bytes() if out.exists() else b"", err


@pytest.fixture(scope="module")
def want(lines: Path) -> bytes:
    """The result without Ray."""
    code, data, _ = answer(lines, lines.with_name("want.jsonl"))
    assert code == 0 and data.count(b"\n") == LINES
    return data


def command(cluster: Any, source: Path, out: Path, *options: str, code: str = "") -> list[Any]:
    """The command, whose process runs ``code`` first."""
    code = f"import os, sys, time\nfrom deepcalm import cli, cluster\n{code}\nsys.exit(cli.main())"
    return [sys.executable, "-c", code, "batch", source, out, "--ray", cluster.address, *options]


@contextlib.contextmanager
def started(cluster: Any, source: Path, out: Path, *options: str, code: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """The command at work."""
    line = command(cluster, source, out, *options, code=code)
    with subprocess.Popen(line, env=commands.environment(), stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def workers(node: Any = None) -> list[int]:
    """Processes of the actors, on one node or all."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (path / "cmdline").read_bytes().startswith(b"ray::Worker"):
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                processes = [] if node is None else [p.process.pid for p in node.all_processes["raylet"]]
                if node is None or parent in processes:
                    found.append(int(path.name))
    return found


def grown(out: Path, size: int, process: subprocess.Popen[bytes]) -> bool:
    """Waits until OUT is longer; False if the process ended before."""
    deadline = time.monotonic() + 60
    while not (out.exists() and out.stat().st_size > size):
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return True


def test_rows_have_the_same_bytes_on_one_two_and_three_nodes_and_without_ray(
    cluster: Any, lines: Path, want: bytes, tmp_path: Path
) -> None:
    for n in (1, 2, 3):
        with_nodes(cluster, n)
        code, data, err = answer(lines, tmp_path / f"{n}.jsonl", "--ray", cluster.address)
        assert (code, data) == (0, want), err
        assert f"Ray: {n} node" in err and "complete" in err
    paths = (lines.with_name("want.jsonl.run"), tmp_path / "3.jsonl.run")
    first, third = ({**json.loads(p.read_text()), "date": ""} for p in paths)
    assert first == third


def test_a_run_goes_on_behind_the_lines_that_are_there_with_ray_or_without(
    cluster: Any, lines: Path, want: bytes, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    with started(cluster, lines, out) as process:
        assert grown(out, 0, process)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        assert b"interrupted after" in process.stderr.read()
        assert process.wait() == 130
    kept = out.read_bytes()
    assert want.startswith(kept) and kept != want
    out.write_bytes(kept[:-20])
    with started(cluster, lines, out, "--max-sequences", "1") as process:
        assert grown(out, len(kept), process)
        assert "another deepcalm batch is writing it" in answer(lines, out)[2]
        process.kill()
    deadline = time.monotonic() + 30
    while workers():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    code, data, err = answer(lines, out, "--ray", cluster.address)
    assert (code, data) == (0, want) and "were there" in err
    out.write_bytes(kept)
    assert answer(lines, out)[:2] == (0, want)
    code, _, err = answer(lines, out, "--ray", cluster.address, "--isa", "scalar")
    assert code == 1 and "was begun with isa" in err


def test_workers_that_are_killed_are_replaced_and_the_bytes_are_the_same(
    cluster: Any, lines: Path, want: bytes, tmp_path: Path
) -> None:
    with_nodes(cluster, 3)
    seed = int(os.environ.get("DEEPCALM_TEST_SEED", random.randrange(2**32)))
    print(f"DEEPCALM_TEST_SEED={seed}")
    rng, killed, most, out = random.Random(seed), 0, max(4, LINES // 50), tmp_path / "out.jsonl"
    with started(cluster, lines, out, "--max-sequences", "4") as process:
        while killed < most and grown(out, out.stat().st_size if out.exists() else 0, process):
            time.sleep(rng.uniform(0, 0.3))
            if (found := workers()) and out.read_bytes().count(b"\n") < LINES - 50:
                os.kill(rng.choice(found), signal.SIGKILL)
                killed += 1
        assert process.stderr is not None
        err = process.stderr.read().decode()
        assert process.wait(60) == 0, err
    assert killed >= most // 2 and err.count("its worker died") == killed, err
    assert out.read_bytes() == want


def test_a_node_that_goes_is_done_without(cluster: Any, lines: Path, want: bytes, tmp_path: Path) -> None:
    with_nodes(cluster, 3)
    node, out = max(cluster.worker_nodes, key=lambda n: n.node_id), tmp_path / "out.jsonl"
    with started(cluster, lines, out, "--max-sequences", "4") as process:
        assert grown(out, 0, process) and workers(node)
        cluster.remove_node(node, allow_graceful=False)
        assert process.stderr is not None
        err = process.stderr.read().decode()
        assert process.wait(60) == 0, err
    assert "its worker died" in err and out.read_bytes() == want
    settle(cluster)


@contextlib.contextmanager
def odd_node(cluster: Any, folder: Path, code: str, name: str = "sitecustomize.py") -> Iterator[None]:
    """A node whose Python runs ``code`` first."""
    (folder / "odd" / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / "odd" / name).write_text(code)
    path = f"{folder / 'odd'}:{commands.PACKAGE_PARENT}"
    node = cluster.add_node(env_vars={"PYTHONPATH": path})
    try:
        yield
    finally:
        cluster.remove_node(node)
        settle(cluster)


ODD = {
    "version": ("import deepcalm._core as c\nc.__version__ = '9.9'", "has deepcalm 9.9, the run"),
    "file": ("import deepcalm.model as m\nm.demo_path = lambda: '{file}'", "has model_sha256 "),
    "memory": ("import deepcalm.model as m\ndef f(*a, **k): raise MemoryError('none')\nm.Model.batch = f", "none"),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_node_that_cannot_do_the_work_ends_the_run_in_one_line(
    cluster: Any, lines: Path, tmp_path: Path, kind: str
) -> None:
    code, why = ODD[kind]
    with odd_node(cluster, tmp_path, code.format(file=models.packed())):
        err = commands.error((*commands.run("batch", lines, tmp_path / "out.jsonl", "--ray", cluster.address),))
    assert "node " in err and why in err
    assert not (tmp_path / "out.jsonl").exists()


def test_a_node_without_the_package_ends_the_run_in_one_line(cluster: Any, lines: Path, tmp_path: Path) -> None:
    with odd_node(cluster, tmp_path, "raise ImportError('no such luck')", "deepcalm/__init__.py"):
        code, _, err = answer(lines, tmp_path / "out.jsonl", "--ray", cluster.address)
    assert code == 1 and "no such luck" in err.splitlines()[-1], err


def test_the_run_has_the_best_instruction_set_of_all_nodes(cluster: Any, lines: Path, tmp_path: Path) -> None:
    few = lines.with_name("few.jsonl")
    few.write_text("".join(lines.read_text().splitlines(keepends=True)[:20]))
    isas = "[dict(name='scalar', supported=True, emulated=False)]"
    with odd_node(cluster, tmp_path, f"import deepcalm._core as c\nc.isas = lambda: {isas}"):
        code, data, err = answer(few, tmp_path / "a.jsonl", "--ray", cluster.address)
        assert code == 0 and "instruction set scalar" in err
        assert data == answer(few, tmp_path / "b.jsonl", "--isa", "scalar")[1]
        isa = deepcalm.Model(deepcalm.demo_path()).isa
        code, data, err = answer(few, tmp_path / "c.jsonl", "--ray", cluster.address, "--isa", isa)
        assert code == 0 and f"has no {isa}" in err and f"instruction set {isa}" in err
        assert data == answer(few, tmp_path / "d.jsonl", "--isa", isa)[1]


def test_a_worker_that_stops_counts_as_dead(cluster: Any, lines: Path, want: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with started(cluster, lines, out, code="cluster.SILENCE, cluster.BEAT = 4.0, 1.0") as process:
        assert grown(out, 0, process)
        os.kill(workers()[0], signal.SIGSTOP)
        assert process.stderr is not None
        err = process.stderr.read().decode()
        assert process.wait(60) == 0, err
    assert "nothing was heard of it for 4 s" in err and out.read_bytes() == want


FAULTS = {
    "lines": ("""answer(self, settings, lines):
        if any(line.id == "line 60" for line in lines):
            os._exit(9)
        return super().answer(settings, lines)""", "4 workers died with lines"),
    "error": ("answer(self, settings, lines): raise KeyError('a fault')", "KeyError: 'a fault'"),
    "node": ("open(self, setup, isa): os._exit(9)", "4 workers in a row died there"),
    "init": ("__init__(self): raise RuntimeError('no such luck')", "no such luck"),
    "silence": ("open(self, setup, isa): time.sleep(60)", "nothing was heard of it for 2 s"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAULTS)
def test_what_fails_again_and_again_ends_the_run_in_one_line(
    cluster: Any, lines: Path, want: bytes, tmp_path: Path, kind: str
) -> None:
    with_nodes(cluster, 2)
    method, why = FAULTS[kind]
    code = f"""cluster.SILENCE = 2.0 if {kind == "silence"} else 99.0
class Faulty(cluster.Worker):
    def {method}
cluster.Worker = Faulty"""
    out = tmp_path / "out.jsonl"
    done = subprocess.run(
        command(cluster, lines, out, "--max-sequences", "2", code=code), env=commands.environment(),
        capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    *notes, last = done.stderr.decode().splitlines()
    assert done.returncode == 1 and why in last, done.stderr
    assert all(note.startswith(("Ray: ", "note: ")) for note in notes) and len(notes) <= 8
    if kind == "lines":
        first, final = map(int, re.findall(r"lines (\d+) to (\d+)", last)[0])
        assert first <= 61 <= final < 61 + 32 and "goes on from there" in last
        assert out.read_bytes() == b"".join(want.splitlines(keepends=True)[: out.read_bytes().count(b"\n")])
        assert answer(lines, out)[:2] == (0, want)


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
def test_a_head_that_is_gone_or_silent_ends_the_run_which_goes_on_elsewhere(
    cluster: Any, lines: Path, want: bytes, tmp_path: Path, sign: signal.Signals
) -> None:
    out = tmp_path / "out.jsonl"
    with new_cluster() as other:
        code = "cluster.HEAD, cluster.RECRUIT = 3.0, 0.5"
        with started(other, lines, out, "--max-sequences", "1", code=code) as process:
            assert grown(out, 0, process)
            head = other.head_node.all_processes["gcs_server"][0].process.pid
            os.kill(head, sign)
            assert process.stderr is not None
            err = process.stderr.read().decode()
            assert process.wait(60) == 1, err
        if sign == signal.SIGSTOP:
            os.kill(head, signal.SIGCONT)
    assert "has not answered within 3 s" in err and "goes on from there" in err
    kept = out.read_bytes()
    assert want.startswith(kept) and kept != want
    assert answer(lines, out, *(("--ray", cluster.address) if sign == signal.SIGKILL else ()))[:2] == (0, want)


def test_a_node_that_joins_works_too(cluster: Any, lines: Path, want: bytes, tmp_path: Path) -> None:
    out, said = tmp_path / "out.jsonl", b""
    with (
        started(cluster, lines, out, "--max-sequences", "1", code="cluster.RECRUIT = 0.5") as process,
        contextlib.ExitStack() as stack,
    ):
        assert grown(out, 0, process) and process.stderr is not None
        for pid in workers():  # else they may be done before it has joined
            os.kill(pid, signal.SIGSTOP)
            stack.callback(os.kill, pid, signal.SIGCONT)
        with odd_node(cluster, tmp_path, ""):
            while b"works, too" not in said:
                said += (line := process.stderr.readline())
                assert line, said
            stack.close()
            process.stderr.read()
            assert process.wait(60) == 0
    assert out.read_bytes() == want


def test_addresses_and_files_that_are_not_there_are_said(cluster: Any, lines: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert "Ray cluster 127.0.0.1:1: " in commands.error(commands.run("batch", lines, out, "--ray", "127.0.0.1:1"))
    missing = tmp_path / "no.dcalm"
    err = commands.error(commands.run("batch", lines, out, "-m", missing, "--ray", cluster.address))
    assert "node " in err and "no.dcalm" in err
    code, _, err = commands.run("batch", "--ray", lines, out)
    assert code == 2 and "goes to the end" in err
    code, data, err = answer(lines, out, "--cache-bytes", "1000", "--ray", cluster.address)
    assert (code, data) == (1, b"") and "cache_bytes is 1000" in err and "goes on from there" in err


DATASET = """if True:
    import os, sys, threading, time, pyarrow as pa, pyarrow.parquet as pq, ray
    from pathlib import Path
    from ray.data.checkpoint import CheckpointConfig
    from deepcalm import cluster, errors
    ray.init(sys.argv[1], log_to_driver=False, include_dashboard=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.checkpoint_config = CheckpointConfig("name", os.path.abspath("known"), delete_checkpoint_on_success=False)
    dataset = ray.data.read_parquet(os.path.abspath("in.parquet"))
    for columns in ({"id_column": "id"}, {"id_column": "name", "column": "text"}):
        try:
            cluster.generate(dataset, **columns)
            sys.exit(2)
        except errors.Error as e:
            assert "no column" in str(e)
    for wrong in ({"tmep": 1}, {"temp": -1}, {"max_tokens": 0}):
        try:
            cluster.generate(dataset, id_column="name", **wrong)
            sys.exit(2)
        except (TypeError, ValueError):
            pass
    cluster.ROWS, cluster.TABLES = 8, 1
    answers = cluster.generate(dataset, id_column="name", max_tokens=30, seed=3, temp=0.9, ctx=64)
    def end():
        while not [p for p in Path("known").glob("*") if "pending" not in p.name]:
            time.sleep(0.001)
        os._exit(5)
    if len(sys.argv) > 2:
        threading.Thread(target=end, daemon=True).start()
    answers.write_parquet(os.path.abspath("out"))
"""


def test_rows_of_parquet_get_the_answers_of_batch_those_not_that_were_written(cluster: Any, tmp_path: Path) -> None:
    with_nodes(cluster, 2)
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    prompts = [*("Once", "The cat", "One day", "") * 19, "Once", "too long " * 100, "The cat", ""]
    table = pa.table({"name": [f"row {i}" for i in range(80)], "prompt": prompts, "more": range(80)})
    pq.write_table(table, tmp_path / "in.parquet")
    first: set[str] = set()
    for more in (["end"], []):
        done = subprocess.run(
            [sys.executable, "-c", DATASET, cluster.address, *more], cwd=tmp_path, env=commands.environment(),
            capture_output=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == (5 if more else 0), done.stderr.decode()
        first = first or {p.name for p in (tmp_path / "known").glob("*") if "pending" not in p.name}
    assert 1 <= len(first) < 10 and first < {p.name for p in (tmp_path / "known").glob("*")}
    rows = sorted(pq.read_table(tmp_path / "out").to_pylist(), key=lambda r: r["more"])
    assert [{k: r[k] for k in table.column_names} for r in rows] == table.to_pylist()
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"id": r["name"], "prompt": r["prompt"]}) + "\n" for r in rows)
    )
    _, data, _ = answer(
        tmp_path / "in.jsonl", tmp_path / "o.jsonl", "-n", "30", "-s", "3", "--temp", "0.9", "--ctx", "64"
    )
    for row, line in zip(rows, map(json.loads, data.splitlines()), strict=True):
        if error := line.get("error"):
            assert row["__inference_error__"] == error["message"] and row["generated_text"] is None
        else:
            assert (row["generated_text"], row["seed"], row["finish_reason"], row["__inference_error__"]) == (
                line["text"], line["seed"], line["finish_reason"], None
            )  # fmt: skip
            assert {k: row[k] for k in line["usage"]} == line["usage"]
    assert sum(r["__inference_error__"] is not None for r in rows) == 1


def test_a_row_without_an_id_is_in_error() -> None:
    assert [str(_line(name, "Once").error) for name in (None, "", 0)] == [
        "id: expected a string or an integer", "None", "None"
    ]  # fmt: skip
