"""Lines over the machines of a Ray cluster, for ``deepcalm batch --ray``; ``generate`` for datasets of Ray.

One worker a node, an actor with a model and a ``Batch``, answers blocks of lines; what it returns are result lines of
``deepcalm batch``. Law L1 makes a block's bytes the same wherever it is computed, so that those of a worker that died
are computed again elsewhere. What must be equal for that (file, versions, instruction set) is compared before any work.

Plain actors and not a pool of Ray Data's: there an actor that exits can leave a job waiting for ever, one that cannot
start is tried for ever or ends the job with a page of traceback, and nobody is told what was computed again.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import json
import os
import signal
import socket
import sys
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
from .batch_lines import AHEAD, Line, Lines, Result, Settings
from .closing import Closing
from .drafters import absolute
from .errors import Error, ResourceError, UnsupportedError, one_line
from .model import Model, demo_path
from .names import ISAS
from .sampling import Sampling

BLOCK = 8  # lines that go to a worker, and come back, together
WINDOW = 4  # blocks that are read and not written, for each that the workers may have
DEATHS = 3  # of workers in a row that a node, or the block that they had, may see
BEAT = 5.0  # seconds in which a worker says that it lives
RECRUIT = 10.0  # seconds between two looks for nodes that joined
HEAD = 30.0  # seconds that the cluster's head may take for an answer
SILENCE = 900.0  # seconds that a worker may take for a pass or for its start
ROWS = 256  # of a dataset, that are answered, and handed on, together
TABLES = 8  # of so many rows that are answered at a time


@dataclass(frozen=True)
class Setup:
    """What every worker opens: path of the packed file (None: the demo model's), arguments of Model and its batch."""

    path: str | None
    model: Mapping[str, Any]  # threads
    batch: Mapping[str, Any]  # max_sequences, ctx, kv, cache_bytes, draft, drafter
    lock: bool = False

    @classmethod
    def of(
        cls, model: str | os.PathLike[str] | None, threads: int | None, batch: Mapping[str, Any], lock: bool = False
    ) -> Setup:
        """Of files named as in this process, which workers find from whatever folder they are in."""
        path = None if model is None else str(Path(model).absolute())
        return cls(path, {"threads": threads}, {**batch, "drafter": absolute(batch.get("drafter", "auto"))}, lock)

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

    def open(self, setup: Setup, isa: str | None) -> dict[str, Any] | list[str] | str:
        """Opens the model; all that its answers depend on, and "emulated". Instruction sets, if it has not this one."""
        known = {k["name"]: k["emulated"] for k in _core.isas() if k["supported"]}
        if isa not in known:
            return [name for name, emulated in known.items() if not emulated]
        try:
            model = Model(setup.path or demo_path(), isa=isa, **setup.model)
            if setup.lock:
                model.lock()
            self._batch = model.batch(**setup.batch)
        except (Error, OSError, MemoryError, RuntimeError, ValueError) as e:
            return _reason(e)
        threading.Thread(target=self._run, daemon=True).start()
        return record(self._batch) | {"emulated": known[isa]}

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

    def steps(self, seconds: float) -> int:
        """Passes until so many seconds from now: whoever asks learns that the worker lives, and works."""
        time.sleep(seconds)
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
class Block:
    """Lines on their way; ``results`` once they are there."""

    settings: Settings
    lines: list[Line]
    results: list[Result] | None = None
    deaths: int = 0  # of workers that had it


@dataclass(eq=False)
class _Member:
    """A worker as the driver sees it."""

    node: str
    name: str  # of the node, for people
    actor: Any
    heard: float  # when it got on, last
    calls: dict[Any, Callable[[Any], None] | Block] = field(default_factory=dict)  # by reference of the result
    isas: list[str] | None = None  # once it was asked for none of them
    ready: bool = False
    steps: int = -1

    @property
    def blocks(self) -> list[Block]:
        """That it is working on."""
        return [b for b in self.calls.values() if isinstance(b, Block)]


class Crew(Closing):
    """A worker on every node of a cluster that has the run's instruction set.

    Args:
        address: HOST:PORT of the cluster's head; None: RAY_ADDRESS, the cluster that runs on this machine, else one of
            this machine alone, for the time of the run.
        setup: what the workers open.
        isa: instruction set; None: DEEPCALM_ISA, else the best one that every node has and none emulates.
        say: is told, in one line each, what is remarkable.

    ``record`` is all that results depend on, the same on every node.

    Raises:
        Error: no Ray, no cluster; a node on which the model cannot be opened, or which has another file or version.
        ResourceError: workers died again and again, or want memory; the head cannot be reached.
    """

    def __init__(self, address: str | None, setup: Setup, isa: str | None, say: Callable[[str], None]) -> None:
        self._ray, self._own = _connect(address)
        self._head = self._ray.get_runtime_context().gcs_address
        self._setup, self._say = setup, say
        self._isa = isa or os.environ.get("DEEPCALM_ISA") or None
        self.record: dict[str, Any] = {"deepcalm": _core.__version__}
        self._members: list[_Member] = []
        self._unfit: set[str] = set()  # nodes without the instruction set
        self._deaths: Counter[str] = Counter()  # by node, since its last result
        self._todo: deque[Block] = deque()  # that no worker has
        self._recruited, self._begun = 0.0, False
        try:
            self._recruit()
            while not all(m.ready for m in self._members):
                self.turn()
                if self._isa is None and all(m.isas for m in self._members):
                    common = set.intersection(*(set(m.isas or ()) for m in self._members))
                    self._isa = max(common, key=ISAS.index)
                    for m in self._members:
                        self._open(m)
        except BaseException:
            self.close()
            raise
        self._begun = True
        nodes = "1 node" if len(self._members) == 1 else f"{len(self._members)} nodes"
        self._say(f"Ray: {nodes}, instruction set {self._isa}")

    def run(self, settings: Settings, lines: Iterable[Line]) -> Iterator[Result]:
        """Results of ``lines``, in their order. Raises as the class does."""
        source, window = iter(lines), deque[Block]()
        while True:
            most = WINDOW * self._setup.blocks * len(self._members)
            while len(window) < most and (read := list(islice(source, BLOCK))):
                window.append(self.submit(Block(settings, read)))
            if not window:
                return
            results = window[0].results
            if results is None:
                self.turn()
            else:
                window.popleft()
                yield from results

    def submit(self, block: Block) -> Block:
        """Has it answered, by ``turn``."""
        self._todo.append(block)
        self._deal()
        return block

    def _deal(self) -> None:
        """Gives blocks to workers that have room, those first that have least."""
        while self._todo and (free := [m for m in self._members if m.ready and len(m.blocks) < self._setup.blocks]):
            member, block = min(free, key=lambda m: len(m.blocks)), self._todo.popleft()
            member.calls[member.actor.answer.remote(block.settings, block.lines)] = block

    # ---- workers

    def _recruit(self) -> None:
        """A worker for every node that has none."""
        if not (answers := _limited(self._ray.nodes)):
            raise ResourceError(f"the Ray cluster's head, {self._head}, has not answered within {HEAD:.0f} s")
        self._recruited = time.monotonic()
        known = {m.node for m in self._members} | self._unfit
        there = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        how = {"num_cpus": 0, "max_restarts": 0, "max_concurrency": self._setup.blocks + 1}
        for node in answers[0]:
            if node["Alive"] and (key := node["NodeID"]) not in known:
                actor = self._ray.remote(Worker).options(**how, scheduling_strategy=there(key, soft=False)).remote()
                member = _Member(key, f"node {node['NodeManagerAddress']} ({key[:8]})", actor, self._recruited)
                self._members.append(member)
                self._open(member)
        if not self._members:
            raise ResourceError("no node of the Ray cluster is left to work on")

    def _open(self, m: _Member) -> None:
        m.calls[m.actor.open.remote(self._setup, self._isa)] = partial(self._opened, m)

    def _opened(self, m: _Member, found: dict[str, Any] | list[str]) -> None:
        if isinstance(found, list):
            m.isas = found
            if self._isa is not None:
                self._say(f"note: {m.name} has no {self._isa}, the run's instruction set: it gets no work")
                self._unfit.add(m.node)
                self._dismiss(m)
                if not self._members:
                    raise Error(f"no node of the Ray cluster has the instruction set {self._isa}; --isa names another")
            return
        if found.pop("emulated"):
            self._say(f"note: {m.name} emulates {self._isa}: the same bits, slower")
        for key, value in found.items():
            if (known := self.record.setdefault(key, value)) != value:
                raise Error(f"{m.name} has {key} {one_line(value, 40)}, the run {one_line(known, 40)}: every node "
                            "needs the same packed file, deepcalm and libraries")  # fmt: skip
        m.ready = True
        self._lives(m, m.steps)
        if self._begun:
            self._say(f"note: {m.name} works, too")

    def _lives(self, m: _Member, steps: int) -> None:
        if steps != m.steps or not m.blocks:
            m.heard, m.steps = time.monotonic(), steps
        m.calls[m.actor.steps.remote(BEAT)] = partial(self._lives, m)

    def _dismiss(self, m: _Member) -> None:
        self._members.remove(m)
        with contextlib.suppress(Exception):  # it may be gone already
            self._ray.kill(m.actor)

    # ---- waiting

    def turn(self) -> None:
        """Waits a second at most for something to happen, and does what follows from it."""
        calls = {ref: m for m in self._members for ref in m.calls}
        ready, _ = self._ray.wait(list(calls), timeout=1.0)
        for ref in ready:
            self._returned(calls[ref], ref)
        now = time.monotonic()
        for m in list(self._members):
            if now - m.heard > SILENCE:
                self._lost(m, f"nothing was heard of it for {SILENCE:.0f} s")
        if now - self._recruited > RECRUIT:
            self._recruit()
        self._deal()

    def _returned(self, m: _Member, ref: Any) -> None:
        try:
            value = self._ray.get(ref, timeout=SILENCE)
        except self._ray.exceptions.RayError as e:
            why = one_line(str(e).strip().rpartition("\n")[2], 160)
            if isinstance(e, self._ray.exceptions.RayTaskError) or "creation task" in str(e):  # no use to try again
                raise Error(f"{m.name}: {why}") from None
            self._lost(m, why)
            return
        call = m.calls.pop(ref)
        if isinstance(value, str):
            raise ResourceError(f"{m.name}: {value}")
        if isinstance(call, Block):
            call.results, m.heard = value, time.monotonic()
            self._deaths[m.node] = 0
        else:
            call(value)

    def _lost(self, m: _Member, why: str) -> None:
        """Another worker in the place of one that died; its blocks go to whoever has room."""
        self._dismiss(m)
        self._deaths[m.node] += 1
        for block in m.blocks:
            block.deaths += 1
        if lines := [line for block in m.blocks if block.deaths > DEATHS for line in block.lines]:
            first, last = (line.number or line.id for line in (lines[0], lines[-1]))
            raise ResourceError(f"{DEATHS + 1} workers died with lines {first} to {last}, the last on {m.name}: {why}")
        if self._deaths[m.node] > DEATHS:
            raise ResourceError(f"{m.name}: {DEATHS + 1} workers in a row died there: {why}")
        self._todo.extendleft(reversed(m.blocks))
        n = sum(len(b.lines) for b in m.blocks)
        self._say(f"note: {m.name}: its worker died: {why}" + f"; {n} lines are computed again" * (n > 0))
        self._recruit()

    def close(self) -> None:
        """Ends the workers, and the connection if it was made here."""
        for m in list(self._members):
            self._dismiss(m)
        if self._own and not _limited(self._ray.shutdown):
            atexit.register(os._exit, 1)  # before Ray's own hook there, which would wait, too


def _limited(call: Callable[[], Any]) -> list[Any]:
    """[What it returns]; [] if the head takes too long: Ray waits a minute and ends the process, or waits for ever."""
    found: list[Any] = []

    def ask() -> None:
        with contextlib.suppress(Exception):
            found.append(call())

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HEAD)
    return found


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
        cluster = f"Ray cluster {address or 'of this machine'}"
        raise Error(f"{cluster}: {_reason(e)}; expected HOST:PORT of its head node, and its token if it asks") from None
    finally:
        ray._private.worker._worker_logs_enabled = False  # what it says of nodes goes to stdout, where results may go
        signal.signal(signal.SIGTERM, before)
    return ray, True


ADDED = {
    "generated_text": "string", "finish_reason": "string", "seed": "uint64", "prompt_tokens": "int64",
    "completion_tokens": "int64", "__inference_error__": "string",
}  # fmt: skip
BATCH, SAMPLING = ("max_sequences", "ctx", "kv", "cache_bytes", "draft", "drafter"), ("temp", "top_p", "top_k", "min_p")


def generate(
    dataset: Any, model: str | os.PathLike[str] | None = None, *, id_column: str, column: str = "prompt", **options: Any
) -> Any:
    """Answers to the rows of a dataset, on every node of the cluster that it is on.

    A row's answer is that of ``deepcalm batch`` to a line with its id: it depends on nothing else in the dataset. Rows
    are computed when the result is read or written, those not that its ``CheckpointConfig`` knows to be written.

    Args:
        dataset: ray.data.Dataset.
        model: packed file, under the same path on every node; None: the demo model.
        id_column: of strings or integers, each once; seeds are made from them.
        column: of prompts: texts, lists of token ids, or lists of messages.
        options: threads, isa of ``Model``; max_sequences, ctx, kv, cache_bytes, draft, drafter of ``Model.batch``;
            max_tokens (256), stop, seed (0), and temp, top_p, top_k, min_p (the checkpoint's) for all rows.

    Returns:
        A dataset: the rows in their order, with columns generated_text (of a message its content), finish_reason, seed,
        prompt_tokens, completion_tokens, and __inference_error__, null unless the row is in error: then they are null.
        What ends a run of ``Crew`` ends its execution, as Ray does that.

    Raises:
        Error: a column that is not there, or one that would be there twice.
        TypeError: an option that is not known.
        ValueError: one that is out of range.
    """
    from ray.data import ActorPoolStrategy

    known = {"isa", "max_tokens", "stop", "seed", "threads", *BATCH, *SAMPLING}
    if unknown := options.keys() - known:
        raise TypeError(f"unknown option {min(unknown)}; expected one of {', '.join(sorted(known))}")
    columns = dataset.columns() or []
    if missing := {id_column, column} - {*columns}:
        raise Error(f"the dataset has no column {min(missing)}, but {one_line(', '.join(columns), 200)}")
    if twice := set(columns) & ADDED.keys():
        raise Error(f"the dataset has a column {min(twice)} already; rename it, for the answers get it")
    batch = {"max_sequences": 8, **{k: options[k] for k in BATCH if k in options}}
    setup = Setup.of(model, options.get("threads"), batch)
    seed, stop, limit = options.get("seed", 0), options.get("stop", ()), options.get("max_tokens", 256)
    sampling = {k: options[k] for k in SAMPLING if k in options}
    Sampling(seed=seed, **sampling), integer("max_tokens", limit, 1)  # or what is wrong with them
    date = datetime.now().isoformat(timespec="seconds")
    settings = Settings("", date, seed, limit, (stop,) if isinstance(stop, str) else tuple(stop), sampling)
    crew = partial(Crew, None, setup, options.get("isa"), partial(print, file=sys.stderr, flush=True))
    answers = dataset.repartition(target_num_rows_per_block=ROWS).map_batches(
        _Answers, fn_constructor_args=(crew, settings, (id_column, column)),
        batch_size=None, batch_format="pyarrow", num_cpus=0,
        compute=ActorPoolStrategy(size=1, max_concurrent_calls_per_actor=TABLES),
    )  # fmt: skip
    answers.context.execution_options.preserve_order = True
    return answers


class _Answers:
    """What Ray Data hands tables to: one actor for the whole cluster, with the crew. Tables share its workers."""

    def __init__(self, start: Callable[[], Crew], settings: Settings, columns: tuple[str, str]) -> None:
        self._start, self._settings, self._columns = start, settings, columns
        self._crew: Crew | None = None
        self._turns = asyncio.Lock()

    async def __call__(self, table: Any) -> Any:
        lines = map(_line, *(table[name].to_pylist() for name in self._columns))
        blocks = [Block(self._settings, read) for read in iter(lambda: list(islice(lines, BLOCK)), [])]
        async with self._turns:
            crew = self._crew = self._crew or self._start()  # not in __init__, which Ray Data would try again
            deque(map(crew.submit, blocks), 0)
        while any(b.results is None for b in blocks):
            async with self._turns:
                await asyncio.to_thread(crew.turn)
        return _answered(table, [r for b in blocks for r in b.results or ()])


def _line(name: Any, prompt: Any) -> Line:
    chat = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)
    if chat:  # a struct has every field of any message of the column
        prompt = [{k: v for k, v in message.items() if v is not None} for message in prompt]
    value = {"id": False if name is None else name, "messages" if chat else "prompt": prompt}  # False is none
    return Line.parse(json.dumps(value, default=str).encode(), 0)


def _answered(table: Any, results: list[Result]) -> Any:
    """A table with its answers."""
    import pyarrow as pa

    rows = []
    for result in results:
        value = json.loads(result.data)
        text = value.get("text", value.get("message", {}).get("content"))
        error = value.get("error", {}).get("message")
        rows.append({**value, **value.get("usage", {}), "generated_text": text, "__inference_error__": error})
    answers = pa.Table.from_pylist(rows, pa.schema(ADDED))
    for name in ADDED:
        table = table.append_column(name, answers[name])
    return table
