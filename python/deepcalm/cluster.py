"""Lines over the machines of a Ray cluster, for ``deepcalm batch --ray``; ``generate`` for datasets of Ray.

One worker a node, an actor with a model and a ``Batch``, answers blocks of lines; what it returns are result lines of
``deepcalm batch``. Law L1 makes a block's bytes the same wherever it is computed, so that those of a worker that died
are computed again elsewhere. What must be equal for that (file, versions, instruction set) is compared before any work.

Plain actors and not ``Dataset.map_batches``: there an actor that exits can leave a job waiting for ever, one that
cannot start is tried for ever or ends the job with a page of traceback, and nobody is told what was computed again.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from . import _core
from .arguments import integer
from .batch_file import record
from .batch_lines import AHEAD, Line, Lines, Result, Settings, unique
from .closing import Closing
from .errors import Error, ResourceError, UnsupportedError, one_line
from .model import Model, demo_path
from .names import ISAS
from .sampling import Sampling

BLOCK = 8  # lines that go to a worker, and come back, together
WINDOW = 4  # blocks that are read and not written, for each that the workers may have
DEATHS = 3  # of workers in a row that a node, or the block that they had, may see
BEAT = 5.0  # seconds between two questions whether a worker lives
RECRUIT = 30.0  # seconds between two looks for nodes that joined
SILENCE = 900.0  # seconds that a worker may take for a pass, for its start, or for an answer to that question


@dataclass(frozen=True)
class Setup:
    """What every worker opens: path of the packed file (None: the demo model's), arguments of Model and its batch."""

    path: str | None
    model: Mapping[str, Any]  # threads
    batch: Mapping[str, Any]  # max_sequences, ctx, kv, cache_bytes, draft
    lock: bool = False

    @property
    def blocks(self) -> int:
        """That a worker has at a time."""
        return -(-AHEAD * int(self.batch["max_sequences"]) // BLOCK)


class Worker:
    """The actor of a node. Calls of ``answer`` run in threads of their own and share passes, which one more runs.

    What fails is returned, as the line to show, not raised: Ray would make a page of it.
    """

    def __init__(self) -> None:
        self._news = threading.Condition()
        self._lines: Lines | None = None
        self._steps, self._failure = 0, ""

    def isas(self) -> dict[str, bool]:
        """Instruction sets that the node has; True: emulated."""
        return {k["name"]: k["emulated"] for k in _core.isas() if k["supported"]}

    def open(self, setup: Setup, isa: str) -> dict[str, Any] | str:
        """Opens the model; all that its answers depend on."""
        try:
            model = Model(setup.path or demo_path(), isa=isa, **setup.model)
            if setup.lock:
                model.lock()
            self._batch = model.batch(**setup.batch)
        except (Error, OSError, MemoryError, RuntimeError, ValueError) as e:
            return _reason(e)
        threading.Thread(target=self._run, daemon=True).start()
        return record(self._batch)

    def _run(self) -> None:
        while not self._failure:
            self._batch.wait()
            try:
                self._batch.step()
            except Exception as e:  # else whoever waits would wait on
                self._failure = _reason(e)
            with self._news:
                self._steps += 1
                self._news.notify_all()

    def steps(self) -> int:
        """Passes so far: whoever asks learns that the worker lives, and works."""
        return self._steps

    def answer(self, settings: Settings, lines: list[Line]) -> list[Result] | str:
        """Results of lines."""
        with self._news:
            self._lines = work = self._lines or Lines(self._batch, settings)
        try:
            started = [work.start(line) for line in lines]
            with self._news:
                self._news.wait_for(lambda: self._failure or all(s.done for s in started))
            return self._failure or [work.result(s) for s in started]
        except (Error, OSError, MemoryError) as e:
            return _reason(e)


def _reason(e: BaseException) -> str:
    return one_line(str(e) or type(e).__name__)


@dataclass(eq=False)
class _Block:
    """Lines on their way."""

    lines: list[Line]
    results: list[Result] | None = None
    deaths: int = 0  # of workers that had it


@dataclass(eq=False)
class _Member:
    """A worker as the driver sees it."""

    node: str
    name: str  # of the node, for people
    actor: Any
    calls: dict[Any, Callable[[Any], None] | _Block] = field(default_factory=dict)  # by reference of the result
    isas: dict[str, bool] | None = None  # name -> emulated, once it has said so
    ready: bool = False
    steps: int = -1
    heard: float = 0.0  # when it got on, last
    asked: float = 0.0  # whether it lives; inf: and has not answered

    @property
    def blocks(self) -> list[_Block]:
        """That it is working on."""
        return [b for b in self.calls.values() if isinstance(b, _Block)]


class Crew(Closing):
    """A worker on every node of a cluster that has the run's instruction set.

    Args:
        address: HOST:PORT of the cluster's head; None: RAY_ADDRESS, the cluster that runs on this machine, else one of
            this machine alone, for the time of the run.
        setup: what the workers open.
        isa: instruction set; None: DEEPCALM_ISA, else the best one that every node has and none emulates.
        say: is told, in one line each, what is remarkable.

    Attributes:
        record: all that results depend on, the same on every node.

    Raises:
        UnsupportedError: Ray is not installed.
        Error: no cluster; a node on which the model cannot be opened, or which has another file or version.
        ResourceError: workers died again and again.
    """

    def __init__(self, address: str | None, setup: Setup, isa: str | None, say: Callable[[str], None]) -> None:
        self._ray, self._own = _connect(address)
        self._setup, self._say = setup, say
        self.isa = isa or os.environ.get("DEEPCALM_ISA") or None
        self.record: dict[str, Any] = {"deepcalm": _core.__version__}
        self._members: list[_Member] = []
        self._unfit: set[str] = set()  # nodes without the instruction set
        self._deaths: Counter[str] = Counter()  # by node, since its last result
        self._again: deque[_Block] = deque()  # whose workers died
        self._recruited = 0.0
        self._settings: Settings | None = None
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        self._recruit()
        while any(m.isas is None for m in self._members):
            self._turn()
        own = ({isa for isa, emulated in (m.isas or {}).items() if not emulated} for m in self._members)
        self.isa = self.isa or max(set.intersection(*own), key=ISAS.index)
        for m in list(self._members):
            self._open(m)
        while not all(m.ready for m in self._members):
            self._turn()
        nodes = "1 node" if len(self._members) == 1 else f"{len(self._members)} nodes"
        self._say(f"Ray: {nodes}, instruction set {self.isa}")

    def run(self, settings: Settings, lines: Iterable[Line]) -> Iterator[Result]:
        """Results of ``lines``, in their order.

        Raises:
            ResourceError: want of memory on a node, or workers died again and again.
            Error: a node that joined has another file or version.
        """
        self._settings = settings
        source, window = iter(lines), deque[_Block]()
        while True:
            self._deal(source, window)
            if not window:
                return
            results = window[0].results
            if results is None:
                self._turn()
            else:
                window.popleft()
                yield from results

    def _deal(self, source: Iterator[Line], window: deque[_Block]) -> None:
        """Gives blocks to workers that have room, those first that have least."""
        most = self._setup.blocks
        while free := [m for m in self._members if m.ready and len(m.blocks) < most]:
            member = min(free, key=lambda m: len(m.blocks))
            if self._again:
                block = self._again.popleft()
            elif len(window) < WINDOW * most * len(self._members) and (read := list(islice(source, BLOCK))):
                block = _Block(read)
                window.append(block)
            else:
                return
            if not member.blocks:
                member.heard = time.monotonic()
            member.calls[member.actor.answer.remote(self._settings, block.lines)] = block

    # ---- workers

    def _recruit(self) -> None:
        """A worker for every node that has none."""
        self._recruited = time.monotonic()
        known = {m.node for m in self._members} | self._unfit
        for node in self._ray.nodes():
            if node["Alive"] and node["NodeID"] not in known:
                affinity = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
                    node["NodeID"], soft=False
                )
                actor = self._ray.remote(Worker).options(
                    num_cpus=0, max_restarts=0, max_concurrency=self._setup.blocks + 2, scheduling_strategy=affinity
                )
                name = f"node {node['NodeManagerAddress']} ({node['NodeID'][:8]})"
                member = _Member(node["NodeID"], name, actor.remote(), heard=time.monotonic())
                member.calls[member.actor.isas.remote()] = partial(self._has, member)
                self._members.append(member)
        if not self._members:
            raise ResourceError("no node of the Ray cluster is left to work on")

    def _has(self, m: _Member, isas: dict[str, bool]) -> None:
        m.isas = isas
        if self.record.keys() != {"deepcalm"}:  # it joined late
            self._open(m)

    def _open(self, m: _Member) -> None:
        if self.isa in (isas := m.isas or {}):
            if isas[self.isa]:
                self._say(f"note: {m.name} emulates {self.isa}: the same bits, slower")
            m.calls[m.actor.open.remote(self._setup, self.isa)] = partial(self._opened, m)
            return
        self._say(f"note: {m.name} has no {self.isa}, the run's instruction set: it gets no work")
        self._unfit.add(m.node)
        self._dismiss(m)
        if not self._members:
            raise Error(f"no node of the Ray cluster has the instruction set {self.isa}; --isa names another")

    def _opened(self, m: _Member, found: dict[str, Any] | str) -> None:
        if isinstance(found, str):
            raise Error(f"{m.name}: {found}")
        for key, value in found.items():
            if (known := self.record.setdefault(key, value)) != value:
                raise Error(f"{m.name} has {key} {one_line(value, 40)}, the run {one_line(known, 40)}: every node "
                            "needs the same packed file, deepcalm and libraries")  # fmt: skip
        m.ready = True
        if self._settings is not None:
            self._say(f"note: {m.name} works, too")

    def _dismiss(self, m: _Member) -> None:
        self._members.remove(m)
        with contextlib.suppress(Exception):  # it may be gone already
            self._ray.kill(m.actor)

    # ---- waiting

    def _turn(self) -> None:
        """Waits a second at most for something to happen."""
        calls = {ref: m for m in self._members for ref in m.calls}
        ready, _ = self._ray.wait(list(calls), timeout=1.0)
        if ready:
            ready, _ = self._ray.wait(list(calls), num_returns=len(calls), timeout=0)
        for ref in ready:
            if (member := calls[ref]) in self._members:
                self._returned(member, member.calls.pop(ref), ref)
        now = time.monotonic()
        for m in list(self._members):
            if now - m.heard > SILENCE:
                self._lost(m, f"nothing was heard of it for {SILENCE:.0f} s")
            elif m.ready and now - m.asked > BEAT:
                m.asked = math.inf
                m.calls[m.actor.steps.remote()] = partial(self._lives, m)
        if now - self._recruited > RECRUIT:
            self._recruit()

    def _returned(self, m: _Member, call: Callable[[Any], None] | _Block, ref: Any) -> None:
        try:
            value = self._ray.get(ref)
        except self._ray.exceptions.RayTaskError:
            raise
        except self._ray.exceptions.RayError as e:
            if isinstance(call, _Block):
                m.calls[ref] = call
            why = one_line(str(e).strip().rpartition("\n")[2], 160)
            if "creation task" in str(e):  # its class cannot be imported: no use to try again
                raise Error(f"{m.name}: {why}") from None
            self._lost(m, why)
            return
        if not isinstance(call, _Block):
            call(value)
            return
        if isinstance(value, str):
            raise ResourceError(f"{m.name}: {value}")
        call.results, m.heard = value, time.monotonic()
        self._deaths[m.node] = 0

    def _lives(self, m: _Member, steps: int) -> None:
        m.asked = time.monotonic()
        if steps != m.steps or not m.blocks:
            m.heard, m.steps = m.asked, steps

    def _lost(self, m: _Member, why: str) -> None:
        """Another worker in the place of one that died; its blocks go to whoever has room."""
        self._dismiss(m)
        self._deaths[m.node] += 1
        for block in reversed(m.blocks):
            block.deaths += 1
            self._again.appendleft(block)
            if block.deaths > DEATHS:
                first, last = block.lines[0].number, block.lines[-1].number
                raise ResourceError(f"{block.deaths} workers died with lines {first} to {last}, the last on {m.name}: "
                                    f"{why}")  # fmt: skip
        if self._deaths[m.node] > DEATHS:
            raise ResourceError(f"{m.name}: {self._deaths[m.node]} workers in a row died there: {why}")
        lines = sum(len(b.lines) for b in m.blocks)
        again = f"; {lines} lines are computed again" if lines else ""
        self._say(f"note: {m.name}: its worker died: {why}{again}")
        self._recruit()

    def close(self) -> None:
        """Ends the workers, and the connection if it was made here."""
        for m in list(self._members):
            self._dismiss(m)
        if self._own:
            self._ray.shutdown()


def _connect(address: str | None) -> tuple[Any, bool]:
    """The module ``ray``, connected, and whether that was done here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to anybody
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")  # of 40 s, if what listens there is not Ray
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError:
        raise UnsupportedError("Ray is not installed: pip install 'deepcalm[ray]'") from None
    if ray.is_initialized():
        return ray, False
    before = signal.getsignal(signal.SIGTERM)
    address = address or os.environ.get("RAY_ADDRESS")
    try:
        host, _, port = (address or "").rpartition(":")
        if port.isdigit():  # Ray itself would try for a quarter of an hour
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address, log_to_driver=False, logging_level="error", include_dashboard=False)
    except (RuntimeError, ValueError, OSError, OverflowError) as e:
        raise Error(
            f"Ray cluster {address or 'of this machine'}: {_reason(e)}; expected HOST:PORT of its head node"
        ) from None
    finally:
        ray._private.worker._worker_logs_enabled = False  # what it says of nodes goes to stdout, where results may go
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, before)
    return ray, True


ADDED = ("generated_text", "finish_reason", "seed", "prompt_tokens", "completion_tokens", "__inference_error__")
MODEL, BATCH = ("threads",), ("max_sequences", "ctx", "kv", "cache_bytes", "draft")
SAMPLING = ("temp", "top_p", "top_k", "min_p")


def generate(
    dataset: Any, model: str | os.PathLike[str] | None = None, *, id_column: str, column: str = "prompt", **options: Any
) -> Any:
    """Answers to the rows of a dataset, on every node of the cluster that it is on.

    Rows are computed at once, not when the result is read. A row's answer is that of ``deepcalm batch`` to a line with
    its id: it depends on nothing else in the dataset.

    Args:
        dataset: ray.data.Dataset; its rows pass through this process, 1024 at a time.
        model: packed file, under the same path on every node; None: the demo model.
        id_column: of strings or integers, each once; seeds are made from them.
        column: of prompts: texts, lists of token ids, or lists of messages.
        options: threads, isa of ``Model``; max_sequences, ctx, kv, cache_bytes, draft of ``Model.batch``; max_tokens
            (256), stop, seed (0), and temp, top_p, top_k, min_p (the checkpoint's) for all rows; say, a function that
            is told what is remarkable.

    Returns:
        A materialised dataset: the rows in their order, with columns generated_text (of a message its content),
        finish_reason, seed, prompt_tokens, completion_tokens, and __inference_error__, null unless the row is in error:
        then they are null.

    Raises:
        Error: as ``Crew``; a column that is not there, or one that would be there twice.
        TypeError: an option that is not known.
    """
    known = {"isa", "say", "max_tokens", "stop", "seed", *MODEL, *BATCH, *SAMPLING}
    if unknown := options.keys() - known:
        raise TypeError(f"unknown option {min(unknown)}; expected one of {', '.join(sorted(known))}")
    import ray

    columns = dataset.columns() or []
    for name in (id_column, column):
        if name not in columns:
            raise Error(f"the dataset has no column {name}, but {one_line(', '.join(columns), 200)}")
    if twice := set(columns) & set(ADDED):
        raise Error(f"the dataset has a column {min(twice)} already; rename it, for the answers get it")
    batch = {"max_sequences": 8, **{k: options[k] for k in BATCH if k in options}}
    setup = Setup(None if model is None else str(Path(model).absolute()), {k: options.get(k) for k in MODEL}, batch)
    stop, limit = options.get("stop", ()), options.get("max_tokens", 256)
    sampling = {k: options[k] for k in SAMPLING if k in options}
    Sampling(seed=options.get("seed", 0), **sampling), integer("max_tokens", limit, 1)  # or what is wrong with them
    date = datetime.now().isoformat(timespec="seconds")
    settings = Settings(
        "", date, options.get("seed", 0), limit, (stop,) if isinstance(stop, str) else tuple(stop), sampling
    )
    tables, blocks, done = deque[Any](), list[Any](), list[Result]()
    with Crew(None, setup, options.get("isa"), options.get("say", lambda _: None)) as crew:
        for result in crew.run(settings, unique(_rows(dataset, id_column, column, tables))):
            done.append(result)
            if len(done) == tables[0].num_rows:
                blocks.append(ray.put(_answered(tables.popleft(), done)))
                done = []
    return ray.data.from_arrow_refs(blocks) if blocks else dataset.materialize()


def _rows(dataset: Any, id_column: str, column: str, tables: deque[Any]) -> Iterator[Line]:
    """A line for every row; ``tables`` gets what they come from."""
    number = 0
    for table in dataset.iter_batches(batch_size=1024, batch_format="pyarrow"):
        tables.append(table)
        for name, prompt in zip(table[id_column].to_pylist(), table[column].to_pylist(), strict=True):
            chat = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)
            if chat:  # a struct has every field of any message of the column
                prompt = [{k: v for k, v in message.items() if v is not None} for message in prompt]  # noqa: PLW2901
            number += 1
            value = {"id": name, "messages" if chat else "prompt": prompt}
            yield Line.parse(json.dumps(value, default=str).encode(), number)


def _answered(table: Any, results: list[Result]) -> Any:
    """A table with its answers."""
    import pyarrow as pa

    rows = []
    for result in results:
        value = json.loads(result.data)
        text = value.get("text", value.get("message", {}).get("content"))
        counts, error = value.get("usage", {}), value.get("error", {}).get("message")
        rows.append((text, value.get("finish_reason"), value.get("seed"), *map(counts.get, ADDED[3:5]), error))
    types = (pa.string(), pa.string(), pa.uint64(), pa.int64(), pa.int64(), pa.string())
    for name, kind, values in zip(ADDED, types, zip(*rows, strict=True), strict=True):
        table = table.append_column(name, pa.array(values, kind))
    return table
