"""``deepcalm batch --ray`` on clusters of this machine: the same bytes as without, whoever dies."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import commands
import deepcalm
import models

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]
Batch = Callable[..., tuple[int, bytes, str]]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster whose head is its only node at first."""
    os.environ["PYTHONPATH"] = commands.PACKAGE_PARENT  # workers inherit it
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    testing = pytest.importorskip("ray.cluster_utils")
    found = testing.Cluster(initialize_head=True, head_node_args={"include_dashboard": False, "num_cpus": 1})
    try:
        yield found
    finally:
        found.shutdown()


def with_nodes(cluster: Any, n: int) -> None:
    while len(cluster.worker_nodes) + 1 < n:
        cluster.add_node()
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
    for i in range(300):
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
    assert code == 0 and data.count(b"\n") == 300
    return data


@contextlib.contextmanager
def started(cluster: Any, source: Path, out: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """The command at work."""
    command = [*commands.COMMAND, "batch", str(source), str(out), "--ray", cluster.address, *options]
    with subprocess.Popen(command, env=commands.environment(), stderr=subprocess.PIPE) as process:
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
    rng, killed, out = random.Random(seed), 0, tmp_path / "out.jsonl"
    with started(cluster, lines, out, "--max-sequences", "4") as process:
        while killed < 4 and grown(out, out.stat().st_size if out.exists() else 0, process):
            time.sleep(rng.uniform(0, 0.3))
            if (found := workers()) and out.read_bytes().count(b"\n") < 250:
                os.kill(rng.choice(found), signal.SIGKILL)
                killed += 1
        assert process.stderr is not None
        err = process.stderr.read().decode()
        assert process.wait(60) == 0, err
    assert killed >= 2 and err.count("its worker died") >= 2, err
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


def test_silence_has_an_end(cluster: Any, lines: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from deepcalm import cluster, cli; cluster.SILENCE, cluster.BEAT = 4.0, 1.0; sys.exit(cli.main())"
    )
    command = [sys.executable, "-c", code, "batch", str(lines), str(tmp_path / "out.jsonl"), "--ray", cluster.address]
    stopped: list[int] = []
    with subprocess.Popen(command, env=commands.environment(), stderr=subprocess.PIPE) as process:
        assert grown(tmp_path / "out.jsonl", 0, process)
        for pid in workers()[:1]:
            os.kill(pid, signal.SIGSTOP)
            stopped.append(pid)
        assert process.stderr is not None
        err = process.stderr.read().decode()
        assert process.wait(60) == 0, err
    assert stopped and "nothing was heard of it for 4 s" in err


def test_a_node_that_joins_works_too(cluster: Any, lines: Path, want: bytes, tmp_path: Path) -> None:
    code = "import sys; from deepcalm import cluster, cli; cluster.RECRUIT = 0.5; sys.exit(cli.main())"
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-c", code, "batch", lines, out, "--max-sequences", "1", "--ray", cluster.address]
    with subprocess.Popen(command, env=commands.environment(), stderr=subprocess.PIPE) as process:
        assert grown(out, 0, process)
        odd = odd_node(cluster, tmp_path, "")
        with odd:
            assert process.stderr is not None
            err = process.stderr.read().decode()
            assert process.wait(60) == 0, err
    assert "works, too" in err and out.read_bytes() == want


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


def test_a_dataset_of_parquet_gets_the_answers_that_batch_gives(cluster: Any, tmp_path: Path) -> None:
    with_nodes(cluster, 2)
    code = """if True:
    import sys, pyarrow as pa, pyarrow.parquet as pq, ray
    from deepcalm import cluster, errors
    ray.init(sys.argv[1], log_to_driver=False, include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    ids = [f"row {i}" for i in range(40)]
    table = pa.table({"name": ids[:-1] + ids[:1], "prompt": ["Once", "The cat", "One day", ""] * 10, "more": range(40)})
    pq.write_table(table, sys.argv[2])
    dataset = ray.data.read_parquet(sys.argv[2])
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
    out = cluster.generate(dataset, id_column="name", max_tokens=12, seed=3, temp=0.9)
    pq.write_table(pa.concat_tables(ray.get(out.to_arrow_refs())), "out.parquet")
    """
    done = subprocess.run(
        [sys.executable, "-c", code, cluster.address, tmp_path / "in.parquet"], cwd=tmp_path,
        env=commands.environment(), capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    pq = pytest.importorskip("pyarrow.parquet")
    given, rows = (pq.read_table(tmp_path / f"{n}.parquet").to_pylist() for n in ("in", "out"))
    assert [{k: r[k] for k in given[0]} for r in rows] == given
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"id": r["name"], "prompt": r["prompt"]}) + "\n" for r in given)
    )
    _, data, _ = answer(tmp_path / "in.jsonl", tmp_path / "o.jsonl", "-n", "12", "-s", "3", "--temp", "0.9")
    for row, line in zip(rows, map(json.loads, data.splitlines()), strict=True):
        if error := line.get("error"):
            assert row["__inference_error__"] == error["message"] and row["generated_text"] is None
        else:
            assert (row["generated_text"], row["seed"], row["finish_reason"], row["__inference_error__"]) == (
                line["text"], line["seed"], line["finish_reason"], None
            )  # fmt: skip
            assert {k: row[k] for k in line["usage"]} == line["usage"]
    assert sum(r["__inference_error__"] is not None for r in rows) == 1
