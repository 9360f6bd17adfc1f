"""One sequence on a model: passes over tokens, truncation, taps, saving and restoring.

``Session`` owns the sequence: every token that was passed or returned. The C++ session owns what passes left of it
(cache rows, with ``mtp`` also MTP rows and hidden rows not yet used; see runtime/session.h). The cache may lack the
sequence's last tokens, which are passed before whatever comes next, and may be ahead of it while drafts are verified or
after an interrupt, which is cut off first: logits follow from the sequence alone. A call that fails, for want of
memory too, or is interrupted leaves the sequence as it was after the last complete pass.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
import weakref
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from . import _core, limits
from .arguments import integer, token_ids
from .closing import Closing
from .drafting import MAX_DRAFT
from .errors import Error, ResourceError, SessionError, one_line
from .files.safetensors import File, whole_file
from .generation import Generation
from .names import ISAS, KV_TYPES

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from .generation import Options
    from .model import Model
    from .sampling import Sampling

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
Progress = Callable[[int, int], object]  # called with (done, in all)
MAX_ROWS = 256  # rows whose logits are asked for at a time
SESSION_VERSION = "1"
STAGES = (
    *("embed", "attn_norm", "q_a", "q", "c_kv", "k_rope", "q_absorbed", "attn_latent", "attn_out", "ffn_norm"),
    *("gate_logits", "topk_idx", "topk_weight", "routed_out", "shared_out", "moe_out", "ffn_out", "layer_out"),
    *("final_norm", "logits"),
)


def cache_type(kv: str, isa: str) -> str:
    """The type that ``kv`` asks for; "auto": what attention of this instruction set multiplies fastest.

    Raises:
        ValueError: it names none.
    """
    if kv not in KV_TYPES:
        raise ValueError(f"kv: {kv!r}, expected one of {', '.join(KV_TYPES)}")
    return kv if kv != "auto" else "bf16" if isa == "amx" else "f16"


class SessionLock:
    """A reentrant lock that knows ``os.fork()``: held by another thread then, it would stay locked in the child.

    Raises:
        SessionError: in such a child.
    """

    def __init__(self) -> None:
        self._lock, self._pid = threading.RLock(), os.getpid()

    def __enter__(self) -> None:
        pid = os.getpid()
        while not self._lock.acquire(blocking=self._pid == pid):
            if self._pid != pid:
                raise SessionError("this process was forked while another thread was using the session; make a new one")
        self._pid = pid

    def __exit__(self, *_: object) -> None:
        self._lock.release()


@dataclass(frozen=True, slots=True)
class StageStats:
    """Sums of one stage over passes: all threads together, every weight or cache byte of a pass counted once.

    ``calls``: once per layer and pass; ``seconds``: wall time, waiting included; ``wait_sum``: seconds at barriers of
    all threads, ``wait_max``: of the thread that waited most, pass by pass.
    """

    calls: int = 0
    bytes: int = 0
    seconds: float = 0.0
    wait_sum: float = 0.0
    wait_max: float = 0.0

    def plus(self, other: StageStats, sign: int = 1) -> StageStats:
        """Both together; sign -1: what was done since ``other``."""
        return StageStats(*(getattr(self, f) + sign * getattr(other, f) for f in self.__dataclass_fields__))


@dataclass(frozen=True, slots=True)
class Stats:
    """Sums over a session's calls. Bytes are counted by the passes from what they touched, not estimated.

    ``prefill_*``: rows of ``prefill``; ``decode_*``: rows of ``decode``, ``decode_many`` and of drafting rounds;
    ``drafts_*``: drafts that rounds verified, and those of them that counted. ``passes`` and ``rows``
    include MTP passes; ``experts_touched`` sums distinct (layer, expert) pairs over passes. ``stages``: the stages of
    the passes in their order, "mtp." before those of MTP passes; their bytes and seconds add up to those of all passes,
    ``weight_bytes`` + ``cache_bytes`` and ``pass_seconds``.
    """

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    prefill_bytes: int = 0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    decode_bytes: int = 0
    drafts_offered: int = 0
    drafts_accepted: int = 0
    passes: int = 0
    rows: int = 0
    weight_bytes: int = 0
    cache_bytes: int = 0
    experts_touched: int = 0
    pass_seconds: float = 0.0
    stages: dict[str, StageStats] = field(default_factory=dict)

    def __sub__(self, before: Self) -> Self:
        """What was done since ``before``."""
        return self._plus(before, -1)

    def __add__(self, other: Self) -> Self:
        """Both together."""
        return self._plus(other, 1)

    def _plus(self, other: Self, sign: int) -> Self:
        none, sums = StageStats(), (f for f in self.__dataclass_fields__ if f != "stages")
        stages = {n: self.stages.get(n, none).plus(other.stages.get(n, none), sign) for n in self.stages | other.stages}
        return type(self)(**{f: getattr(self, f) + sign * getattr(other, f) for f in sums},
                     stages={n: s for n, s in stages.items() if s.calls})  # fmt: skip

    @property
    def decode_rate(self) -> float:
        """Tokens per second of ``decode``; 0 before the first."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def prefill_rate(self) -> float:
        """Tokens per second of ``prefill``; 0 before the first."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def acceptance(self) -> float:
        """Accepted over offered drafts; 0 before the first."""
        return self.drafts_accepted / self.drafts_offered if self.drafts_offered else 0.0

    @property
    def decode_bandwidth(self) -> float:
        """GB/s (1e9 bytes) that ``decode`` read; 0 before the first."""
        return self.decode_bytes / self.decode_seconds / 1e9 if self.decode_seconds else 0.0


class Session(Closing):
    """A sequence with its cache. Made by ``Model.session``.

    The sequence is every token given and every token that ``generate`` returned: ``tokens``, ``pos`` of them. Any call
    goes on after the last one. One generation runs at a time: a call that changes the sequence ends it
    (``Generation.reason`` "taken"); ``save``, ``trace`` and what only reads do not.

    Calls from several threads are serialised: while a pass of any session of the model runs, others wait for it, and
    the interpreter runs on. ``prefill`` runs in passes of ``max_rows`` tokens; Ctrl-C is served between them, and on
    the CPU between their layers. Logits do not depend on how the rows are grouped. Arrays returned are copies that
    stay as they are.
    """

    def __init__(self, model: Model, ctx: int, kv: str, max_rows: int, mtp: bool) -> None:
        self.model = model
        self.kv = kv = cache_type(kv, model.isa)
        self._core: _core.Session | None = _core.Session(model.core, ctx, kv, max_rows, mtp)
        available = limits.available_memory() if model.device == "cpu" else None  # a device has refused by itself
        if available is not None and self.core.cache_bytes > available:  # reserved, not touched yet
            raise ResourceError(
                f"a cache of {ctx} positions in {kv} takes {self.core.cache_bytes / 1e9:.2f} GB, "
                f"{available / 1e9:.2f} GB of memory are available; use a smaller ctx or another kv type"
            )
        self._mtp = mtp
        self._vocab = int(model.config["vocab_size"])
        self._empty = self.core.state()  # shapes for restore()
        self._taps: dict[str, npt.NDArray[Any]] | None = None
        self.lock = SessionLock()  # held by every call, and for each token of a generation
        self._sums: defaultdict[str, float] = defaultdict(int)
        self._tokens = array("i")  # the sequence
        self._last_logits: F32 | None = None
        self._running: weakref.ref[Generation] | None = None
        self.decoding = False  # rounds are running on the device
        self._before: tuple[float, int, int] = (0.0, 0, 0)

    def __repr__(self) -> str:
        return f"Session({self.model!r}, kv={self.kv!r}, pos={self.pos})"

    def close(self) -> None:
        """Ends a generation and frees the cache; what is asked of the session afterwards is a SessionError."""
        with self.lock:
            if running := self._running and self._running():
                running.close("closed")
            self._core = None

    @property
    def core(self) -> _core.Session:
        """The C++ session; whoever calls it keeps the order that runtime/session.h asks for. SessionError if closed."""
        if self._core is None:
            raise SessionError("the session is closed")
        return self._core

    @property
    def tracing(self) -> bool:
        """Whether taps are being recorded."""
        return self._taps is not None

    # ---- the sequence and the cache

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """The session at rest, for a call that changes the sequence: a generation ends, unless the call is its own."""
        with self.lock:
            running = self._running and self._running()
            if not (running and running.stepping):
                self._running = None
                if running:
                    running.close("taken")
            self._rest()
            yield

    def _rest(self, n: int | None = None) -> None:
        """Ends rounds on the device; leaves at most the first ``n`` tokens (None: the sequence) in the cache."""
        if self.decoding:
            self._decode_finish()
        n = len(self._tokens) if n is None else n
        if self.core.pos > n:
            self._last_logits = None
            self.core.truncate(n)

    def _pause(self) -> None:
        """The session at rest for a call that only reads; a generation goes on from what it has returned."""
        if running := self._running and self._running():
            running.forget()
        self._rest()

    def _catch_up(self, n: int | None = None) -> None:
        """Brings exactly the first ``n`` tokens (None: the sequence) into the cache."""
        self._rest(n)
        if missing := self._tokens[self.core.pos : n]:
            self._feed("decode", missing.tolist(), 0)

    def attach(self, generation: Generation) -> None:
        """``generation`` makes the next tokens of the sequence."""
        with self._changing():
            self._running = weakref.ref(generation)

    def detach(self) -> None:
        """No generation runs; the session is at rest."""
        with self.lock:
            self._running = None
            self._rest()

    @property
    def sequence(self) -> array[int]:
        """The sequence itself, for those who only read it; a call that does more than append may put another there."""
        return self._tokens

    def since(self, n: int) -> list[int]:
        """The sequence from position ``n`` on, a copy."""
        return self._tokens[n:].tolist()

    def returned(self, token: int) -> None:
        """``token`` was handed to the caller: it belongs to the sequence, whether in the cache or not."""
        self._tokens.append(token)

    # ---- passes

    def prefill(
        self, ids: Sequence[int] | npt.NDArray[np.integer[Any]], all_logits: bool = False,
        progress: Progress | None = None,
    ) -> F32:  # fmt: skip
        """Appends tokens.

        Args:
            ids: [n] token ids, n >= 1.
            all_logits: every row's logits instead of the last one's.
            progress: called with (tokens done, tokens in all) before each pass.

        Returns:
            Logits after the last token [vocab_size], or after each [n, vocab_size]; f32, owned by the caller.

        Raises:
            SessionError: no tokens, an id outside the vocabulary, or more tokens than the context has room for.
            TypeError: not a flat sequence of integers.
        """
        return self._run("prefill", ids, all_logits, progress)

    def decode(self, token: int) -> F32:
        """Appends one token; returns the logits after it, [vocab_size] f32. Raises as ``prefill``."""
        return self._run("decode", [integer("token id", token, 0, self._vocab - 1, SessionError)], False)

    def decode_many(self, tokens: Sequence[int]) -> F32:
        """Appends k tokens in as few passes as possible; returns [k, vocab_size] f32. Raises as ``prefill``."""
        return self._run("decode", tokens, True)

    def draft_round(
        self, token: int, k: int, sampling: Sampling, n_valid: int, min_confidence: float = 0.0, **options: Any
    ) -> dict[str, Any]:
        """One round of drafting after ``token``, which becomes part of the sequence (k = 0: a plain step).

        Args:
            token: its id.
            k: MTP drafts, 0..7; fewer near the end of the context.
            sampling, n_valid: how tokens, and drafts likewise, are chosen.
            min_confidence: a draft less probable than this under its own distribution ends the chain unverified.
            options: want_logits=True adds "logits"; drafts=[n <= 7]: ids to verify, whoever made them (beside k: [k],
                they replace the MTP layer's after it has run, for measurements); chosen: ids that are taken for the
                model's choices (for measurements).

        Returns:
            dict: tokens (accepted drafts, part of the sequence, and the next token, which is not: it is what the next
            round is given), drafted, accepted, experts_verify, draft_bytes, verify_bytes, draft_seconds,
            verify_seconds; logits [len(tokens), vocab_size] f32 if wanted.

        Raises:
            SessionError: the context is full, or k > 0 in a session that keeps no MTP state.
        """
        token = integer("token id", token, 0, self._vocab - 1, SessionError)
        k = integer("draft", k, 0, MAX_DRAFT, SessionError)
        with self._changing():
            own = self._running is not None  # a generation's own round: it has returned ``token``
            self._catch_up(len(self._tokens) - own)
            self._last_logits = None
            r = self.core.draft_round(token, k, sampling, n_valid, min_confidence, **options)
            if not own:
                self._tokens.extend([token, *r["tokens"][:-1]])
            seconds, read = r["draft_seconds"] + r["verify_seconds"], r["draft_bytes"] + r["verify_bytes"]
            self.count("decode", len(r["tokens"]), seconds, read)
            self.count_drafts(r)
            self._collect_taps()
            return r

    def checked(self, ids: Any) -> I32:
        """``ids`` [n >= 1] that fit behind the sequence."""
        rows = token_ids(ids, self._vocab)
        if not rows.size:
            raise SessionError("no tokens to process")
        if self.pos + len(rows) > self.ctx:
            raise SessionError(
                f"{len(rows)} tokens after {self.pos} do not fit the context of {self.ctx}; the model allows up to "
                f"{self.model.config['max_position_embeddings']}"
            )
        return rows

    def _run(self, kind: str, ids: Any, all_logits: bool, progress: Progress | None = None) -> F32:
        with self._changing():
            rows = self.checked(ids)
            todo = self._tokens[self.core.pos :].tolist() + rows.tolist()
            logits = self._feed(kind, todo, len(rows) if all_logits else 1, progress)
            self._last_logits = logits[-1].copy()
            self._last_logits.flags.writeable = False
            return logits if all_logits else logits[0]

    def _feed(self, kind: str, rows: list[int], n_logits: int, progress: Progress | None = None) -> F32:
        """Passes ``rows``, which follow what is in the cache; logits [n_logits, vocab_size] of the last of them."""
        out = np.empty((n_logits, self._vocab), np.float32)
        skip, step = len(rows) - n_logits, self.core.max_rows
        for i in range(0, len(rows), step):
            if progress is not None:
                progress(i, len(rows))
            chunk = np.array(rows[i : i + step], np.int32)
            end = i + len(chunk)
            want = "none" if end <= skip else "last" if n_logits == 1 else "all"
            logits = self._pass(kind, chunk, want)
            if end > skip:
                out[max(i - skip, 0) : end - skip] = logits[-(end - max(i, skip)) :]
        return out

    def _pass(self, kind: str, ids: I32, logits: str) -> F32:
        """One forward pass, counted under ``kind``; its taps are collected."""
        self._last_logits = None
        before, start, pos = self._read_bytes(), time.perf_counter(), self.core.pos
        out = self.core.forward(ids, logits)
        self._tokens[pos : pos + len(ids)] = array("i", ids.tolist())
        self.count(kind, len(ids), time.perf_counter() - start, self._read_bytes() - before)
        self._collect_taps()
        return out

    def _collect_taps(self) -> None:
        if self._taps is not None:
            for name, rows in self.core.taps().items():
                old = self._taps.get(name)
                self._taps[name] = rows if old is None else np.concatenate([old, rows])

    # ---- decoding on a device

    def decode_start(self, sampling: Sampling, n_valid: int, max_tokens: int, eos: Sequence[int]) -> None:
        """Starts a generation's rounds on the device, after the sequence's last token; they end when the session rests.

        Raises:
            UnsupportedError: the session runs on the CPU.
        """
        with self._changing():
            self._catch_up(len(self._tokens) - 1)
            self._last_logits = None
            self._before = (time.perf_counter(), self.core.pos, self._read_bytes())
            self.core.decode_start(self._tokens[-1], sampling, n_valid, max_tokens, eos)
            self.decoding = True

    def _decode_finish(self) -> None:
        """Waits for the rounds that are queued."""
        self.decoding = False
        self.core.decode_finish()
        start, pos, read = self._before
        self.count("decode", self.core.pos - pos, time.perf_counter() - start, self._read_bytes() - read)

    def count(self, kind: str, tokens: int, seconds: float, n_bytes: int) -> None:
        """Adds to the sums of ``stats``."""
        for key, value in (("tokens", tokens), ("seconds", seconds), ("bytes", n_bytes)):
            self._sums[f"{kind}_{key}"] += value

    def count_drafts(self, r: Mapping[str, Any]) -> None:
        """Adds the drafts of a round."""
        self._sums["drafts_offered"] += r["drafted"]
        self._sums["drafts_accepted"] += r["accepted"]

    def _read_bytes(self) -> int:
        stats = self.core.stats()
        return int(stats["weight_bytes"] + stats["cache_bytes"])

    # ---- state

    @property
    def pos(self) -> int:
        """Tokens of the sequence: the position of the next one."""
        return len(self._tokens)

    @property
    def ctx(self) -> int:
        """Positions the cache has room for."""
        return self.core.ctx

    @property
    def cache_bytes(self) -> int:
        """Bytes reserved for cache rows and buffers."""
        return self.core.cache_bytes

    @property
    def keeps_mtp(self) -> bool:
        """Whether the session maintains the MTP layer's state, which drafting needs."""
        return self._mtp

    @property
    def mtp_pending(self) -> int:
        """Tokens whose MTP rows the next draft computes, the one it is given included."""
        with self.lock:
            return self.core.pos - self.core.mtp_pos

    @property
    def expert_union(self) -> list[tuple[int, int]]:
        """[j-1]: (windows, distinct (layer, expert) pairs in them) of j adjacent tokens, j = 1..8."""
        return self.core.expert_union()

    @property
    def tokens(self) -> I32:
        """The sequence: every token id given or returned, [pos] int32, a copy."""
        return np.array(self._tokens, np.int32)

    @property
    def last_logits(self) -> F32 | None:
        """Logits after the last token, [vocab_size] f32; None where the last call did not compute them: before the
        first pass, and after generate, draft_round, truncate and restore. ``generate()`` goes on all the same.

        A read-only array of its own, which later passes leave alone.
        """
        return self._last_logits

    @property
    def stats(self) -> Stats:
        """What the session has done so far."""
        with self.lock:
            core = self.core.stats()
            counted = {k: v for k, v in core.items() if k in Stats.__dataclass_fields__}
            stages = {row[0]: StageStats(*row[1:]) for row in self.core.stage_stats()}
            return Stats(**counted, **self._sums, pass_seconds=core["seconds"], stages=stages)  # type: ignore[arg-type]

    def truncate(self, n_tokens: int) -> None:
        """Forgets all but the first ``n_tokens`` tokens. Raises SessionError if there are fewer."""
        with self._changing():
            try:
                n = integer("n_tokens", n_tokens, 0, self.pos)
            except ValueError:
                raise SessionError(f"cannot truncate to {n_tokens} tokens: the session holds {self.pos}") from None
            if n < self.pos:
                del self._tokens[n:]
                self._last_logits = None
                self._rest()

    def reuse(self, ids: Sequence[int]) -> int:
        """Truncates to the longest common prefix with ``ids``, less than all of them; returns its length.

        One token at least is left to process, because its logits are wanted. Raises as ``prefill`` for ids that are
        none.
        """
        wanted = token_ids(ids, self._vocab)
        if not wanted.size:
            raise SessionError("no tokens to process")
        with self._changing():
            n = min(self.pos, len(wanted) - 1)
            differ = np.flatnonzero(self.tokens[:n] != wanted[:n])
            n = int(differ[0]) if len(differ) else n
            self.truncate(n)
            return n

    def load_rows(self, tokens: I32, rows: npt.NDArray[np.uint8]) -> None:
        """Replaces the state by tokens [n] int32 and their cache rows [num_hidden_layers, n, bytes of a row] uint8.

        For measurements: rows that no pass has written. Raises SessionError if they do not fit, or the session keeps
        MTP state.
        """
        self.load_state({**self._empty, "tokens": tokens, "cache": rows})

    def load_state(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Replaces the state by what ``saved`` returned."""
        with self._changing():
            before, self._tokens = self._tokens, array("i")  # if interrupted: nothing, not other rows for these tokens
            held, tokens = self.core.pos, np.array(state["tokens"])
            new = array("i", tokens.astype(np.int32).tobytes())
            try:
                self.core.load_state(**{**state, "tokens": tokens})
            except (Error, MemoryError):
                if self.core.pos == held:  # or a device failed while it took the rows, and holds none
                    self._tokens = before
                raise
            self._tokens, self._last_logits = new, None

    # ---- taps

    def trace(self, *names: str) -> contextlib.AbstractContextManager[dict[str, npt.NDArray[Any]]]:
        """Records intermediates while the block runs; the logits are the same bits with and without.

            with session.trace("layers.3.c_kv", "topk_idx") as taps:
                session.prefill(ids)
            taps["layers.1.topk_idx"]       # int32 [n, num_experts_per_tok]

        Args:
            names: "layers.3.c_kv"; a stage alone ("c_kv") means every layer; "mtp.c_kv"; "embed", "final_norm",
                "logits"; none at all means everything.

        Returns:
            A context manager that yields name -> array [rows, ...], f32 (topk_idx: int32), copies; rows of consecutive
            passes are joined, those of rejected drafts too. One recording at a time.

        Raises:
            ValueError: an unknown name.
            SessionError: on entering, while another recording runs.
        """
        for name in names:
            match = re.fullmatch(r"(?:mtp\.|layers\.(\d+)\.)?(\w+)", name)
            layers = self.model.config["num_hidden_layers"]
            if match is None or match[2] not in STAGES or int(match[1] or 0) >= layers:
                raise ValueError(f"no tap {name!r}; after 'layers.N.' or 'mtp.' come {', '.join(STAGES)}")
            if name.startswith("mtp.") and not self.model.config["num_nextn_predict_layers"]:
                raise ValueError(f"no tap {name!r}: the model has no MTP layer")
        return self._recording(list(names) or ["*"])

    @contextlib.contextmanager
    def _recording(self, names: list[str]) -> Iterator[dict[str, npt.NDArray[Any]]]:
        with self.lock:
            if self._taps is not None:
                raise SessionError("trace: a recording is running already; leave its block first")
            self._pause()
            self.core.trace(names)
            taps: dict[str, npt.NDArray[Any]] = {}
            self._taps = taps
        try:
            yield taps
        finally:
            with self.lock:
                self.core.trace(None)
                self._taps = None

    # ---- generation

    def generate(self, ids: Sequence[int] | None = None, **options: Unpack[Options]) -> Generation:
        """An iterator over new token ids after ``ids``, which are appended (None: after the sequence as it is).

        Args:
            options: see ``generation.Options``.

        Raises:
            SessionError: nothing to go on from, ids that are none or do not fit, or drafts of the MTP layer asked for
                in a session without MTP state (``Model.session(mtp=True)``).
            TypeError, ValueError: another argument that is wrong.
        """
        return Generation(self, ids, **options)

    # ---- saving

    def _identity(self) -> dict[str, str]:
        model = self.model
        return {
            "format": "deepcalm-session",
            "version": SESSION_VERSION,
            "model": model.header_sha256,
            "backend": model.device,
            "isa": model.isa,
            "kv": self.kv,
        }

    def save(self, path: str | os.PathLike[str], **notes: str) -> None:
        """Writes the sequence and its cache to ``path`` (a safetensors file), through a temporary file and a rename.

        A token that no pass has seen yet is passed first. A running generation goes on afterwards.

        Args:
            notes: texts that are saved beside it, for ``saved``.

        Raises:
            ResourceError: the file cannot be written.
        """
        import safetensors
        from safetensors.numpy import save_file

        path = Path(path)
        with self.lock:
            self._pause()
            self._catch_up()
            state = self.core.state()
        with whole_file(path) as name:
            try:
                save_file(state, name, notes | self._identity())
            except safetensors.SafetensorError as e:
                raise ResourceError(f"{path}: cannot be written: {one_line(e)}") from None

    def restore(self, path: str | os.PathLike[str], force: bool = False) -> None:
        """Replaces the session's state by a saved one; the following logits are the same bits as before.

        Args:
            force: accept a session of another packed file, backend or instruction set whose cache has the same shape;
                the bits may then differ. The cache type must agree in any case.

        Raises:
            SessionError: not a saved session, or one that does not fit; the message says what was found.
        """
        self.load_state(self.saved(path, force)[0])

    def saved(
        self, path: str | os.PathLike[str], force: bool = False
    ) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
        """The state saved in ``path``, checked but not taken (``load_state`` does), and the notes beside it.

        Raises as ``restore``.
        """
        import safetensors

        path = Path(path)
        try:
            with File(path, SessionError), safetensors.safe_open(path, framework="numpy") as f:  # a pipe would block
                return self._fitting(path, f, force), f.metadata()
        except (OSError, safetensors.SafetensorError) as e:
            raise SessionError(f"{path}: cannot be read as a saved session: {one_line(e)}") from None

    def _fitting(self, path: Path, f: Any, force: bool) -> dict[str, npt.NDArray[Any]]:
        """The tensors of an open saved session that fits this one."""
        found, wanted = f.metadata() or {}, self._identity()
        for key in ("format", "version", "kv") if force else wanted:
            if found.get(key) != wanted[key]:
                here = f", --isa {found[key]} goes on with it" if key == "isa" and found.get(key) in ISAS else ""
                raise SessionError(
                    f"{path}: {key} is {one_line(found.get(key), 80)!r}, this session has {wanted[key]!r}{here}"
                    + ("" if key in ("format", "version", "kv") else "; force=True accepts it, the bits may differ")
                )
        names = {"tokens": "I32", "cache": "U8", "mtp_cache": "U8", "hidden": "F32"}
        shapes = {name: self._shape(path, f, name, dtype) for name, dtype in names.items()}
        n = shapes["tokens"][0]
        if n > self.ctx:
            raise SessionError(f"{path}: {n} tokens, this session's context holds {self.ctx}")
        state = {name: f.get_tensor(name) for name in names}
        if not self._mtp:
            state |= {name: self._empty[name] for name in ("mtp_cache", "hidden")}
        elif shapes["mtp_cache"][1] + shapes["hidden"][0] + 1 < n:
            reason = "saved without MTP state; a session with mtp=False goes on with it"
            raise SessionError(f"{path}: {reason}")
        return state

    def _shape(self, path: Path, f: Any, name: str, dtype: str) -> tuple[int, ...]:
        """Shape of a tensor whose rank and fixed dimensions are right; load_state() checks the rest."""
        if name not in f.keys():  # noqa: SIM118  # a safe_open object, no dict
            raise SessionError(f"{path}: no tensor {name!r}")
        piece = f.get_slice(name)
        shape = tuple(piece.get_shape())
        if piece.get_dtype() != dtype or len(shape) != self._empty[name].ndim:
            raise SessionError(
                f"{path}: {name} is {piece.get_dtype()} {list(shape)}, expected {dtype} with {self._empty[name].ndim} "
                "dimensions"
            )
        return shape
