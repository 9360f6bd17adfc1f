"""Does a packed model compute what the original checkpoint says? Configuration, bytes, arithmetic, exactness, effect.

Texts are compared with the checkpoint's, weights by a decoder of its own (reference.py), every stage of every layer
with a numpy model fed the runtime's own input, the runtime with itself over threads, chunks and drafts, and its logits
with those of the checkpoint: what packing costs. No fixed bar judges that: the file's weights, run by the reference,
say how far the logits may be, and a model further from the checkpoint than one that ignores the text is none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import _core
from ..arguments import integer
from ..errors import CheckpointError, Error, SessionError, one_line
from ..files.checkpoint import MAX_TOKENIZER_BYTES, TOKENIZER_FILES, Checkpoint
from ..files.packed import PackedFile, Tensor
from ..files.safetensors import read_file
from ..files.text_files import LEGACY
from ..model import Model
from ..sampling import Sampling
from ..session import STAGES, cache_type
from . import reference
from .perplexity import log_softmax
from .reference import Array

MIN_TOKENS, TOKENS = 8, 32
TAP_BYTES = 256 << 20  # taps of as many layers as this holds are recorded in one pass
EFFECT_LIMIT = 20_000_000_000  # weights of a model that the reference runs from the source in some minutes
CHUNKS, DRAFTS, NEW_TOKENS, PROMPTS = (1, 3, 16), (1, 2, 3), 8, 3
LEGS = ("checksums", "texts", "weights", "arithmetic", "exactness", "effects")
CLOSE = 1e-6  # two routing scores this close may be ordered either way by f32
# How far a whole pass may be from the checkpoint: twice as far as the reference is with the file's weights, and SLACK.
# Both round activations and route near-ties apart, and a deep model of random weights amplifies that up to the size of
# the effect itself (measured: 0.8 to 1.2 times as far); the cache's type adds up to 0.05 where weights are exact.
FACTOR, SLACK = 2.0, 0.1
TEXT = (
    "Once upon a time there was a small machine that read every book in the house, and each evening it told a story "
    "about the sea, the wind and a lamp that nobody had ever seen burning."
)
# config keys without which the two models cannot be compared tensor by tensor
SHAPES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim",
    "qk_rope_head_dim", "v_head_dim", "intermediate_size", "moe_intermediate_size", "n_routed_experts",
    "n_shared_experts", "first_k_dense_replace", "vocab_size", "topk_method", "num_experts_per_tok",
    "num_nextn_predict_layers",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where the packed model first leaves what it should be, one per tensor, tap or key."""

    leg: str  # "config" | "checksum" | "texts" | "weights" | "arithmetic" | "exactness" | "effect"
    where: str  # key, tensor or tap
    index: tuple[int, ...]  # tensors: slice, packed row, column; taps: token, coordinates
    found: Any
    expected: Any
    detail: str = ""

    def __str__(self) -> str:
        at = f" at {list(self.index)}" if self.index else ""
        return f"{self.leg}: {self.where}{at}: found {_show(self.found)}, expected {_show(self.expected)}" + (
            f" ({self.detail})" if self.detail else ""
        )


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report. ``error`` of ``allowed``: relative RMS of the worst tap, or steps of the worst weight."""

    leg: str
    what: str
    items: int
    error: float
    allowed: float
    ok: bool
    at: str = ""  # the tensor or tap that is worst


@dataclass(frozen=True, slots=True)
class Report:
    """The result of ``verify``. ``not_compared`` lists what was not looked at, ``notes`` say why it is more than usual.

    ``effect``, means over tokens: ``kl`` of the runtime from the checkpoint in nats, ``kl_of_weights`` of the reference
    with the file's weights, ``kl_without_text`` of the checkpoint's average over the text; ``distance`` and
    ``distance_of_weights``: the median token's, of its logits, relative to their spread.
    """

    file: str
    against: str
    tokens: int
    kv: str
    checks: tuple[Check, ...]
    divergences: tuple[Divergence, ...]
    effect: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    not_compared: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether everything that was compared agrees."""
        return not self.divergences

    @property
    def first_divergence(self) -> Divergence | None:
        """The first in the order config, checksums, texts, weights, arithmetic (in pass order), exactness, effect; None
        if ok."""
        return self.divergences[0] if self.divergences else None

    @property
    def verdict(self) -> str:
        """One line: whether the file is right, and what packing costs."""
        if self.divergences:
            n = len(self.divergences)
            return f"NOT RIGHT, {n} difference{'s' * (n > 1)}, first: {one_line(str(self.first_divergence), 300)}"
        if not self.effect:
            return "right, as far as it was compared; what packing costs was not measured"
        e = self.effect
        return (f"right; packing costs {e['kl']:.2g} nats a token, its weights explain {e['kl_of_weights']:.2g}, "
                f"ignoring the text would cost {e['kl_without_text']:.2g}")  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; numbers that are not finite become null."""
        first = asdict(self.first_divergence) if self.first_divergence else None
        head = {"ok": self.ok, "verdict": self.verdict, "first_divergence": first}
        text = json.dumps(head | asdict(self))
        out: dict[str, Any] = json.loads(text, parse_constant=lambda _: None)
        return out


def verify(
    path: str | Path,
    against: str | Path,
    *,
    layers: Sequence[int] | None = None,
    prompt: str | None = None,
    tokens: int = TOKENS,
    isa: str | None = None,
    kv: str = "auto",
    legs: str | Sequence[str] = LEGS,
    progress: Callable[[int, int], object] | None = None,
    threads: int | None = None,
) -> Report:
    """Compares a packed file with the checkpoint folder that it was made from.

    Args:
        path: the ``.dcalm`` file.
        against: the Hugging Face folder.
        layers: only these layers' weights and arithmetic (the MTP layer is number num_hidden_layers); None: all.
        prompt: text whose first ``tokens`` tokens are run; None: a built-in one.
        tokens: positions compared, at least 8 (fewer hide errors of rope and softmax scale).
        isa: instruction set; None: the best.
        kv: cache type of the passes that are compared.
        legs: which comparisons to make besides the configuration.
        progress: called with (done, total) steps.
        threads: of the passes that are compared, and of the comparison of weights; None: as ``Model`` has them. Leg
            "exactness" compares with one thread.

    Raises:
        PackedFileError, CheckpointError, ConfigError: a file cannot be read at all.
        ValueError: an unknown leg, a layer or token count out of range.
    """
    legs = (legs,) if isinstance(legs, str) else legs
    with PackedFile(path) as file, Checkpoint(against) as ckpt:
        tokens = integer("tokens", tokens, MIN_TOKENS, int(file.config["max_position_embeddings"]) - NEW_TOKENS - 1)
        last = file.config["num_hidden_layers"] + file.config["num_nextn_predict_layers"]
        for i in layers or ():
            if not 0 <= i < last:
                raise ValueError(f"layers: {i}, expected 0..{last - 1}")
        for leg in legs:
            if leg not in LEGS:
                raise ValueError(f"legs: {leg!r}, expected one of {', '.join(LEGS)}")
        return _Verifier(file, ckpt, layers, isa, kv, legs, progress, threads).run(prompt, tokens)


# The largest difference of a slice, as a share of what its format allows, and None, or (row, column), what was found
# there, what was expected, and a detail.
Slice = tuple[float, tuple[Any, ...] | None]


class _Verifier:
    def __init__(
        self,
        file: PackedFile,
        ckpt: Checkpoint,
        layers: Sequence[int] | None,
        isa: str | None,
        kv: str,
        legs: Sequence[str],
        progress: Any,
        threads: int | None,
    ) -> None:
        self.file, self.ckpt, self.isa, self.progress, self.threads = file, ckpt, isa, progress, threads
        self.kv, self.legs = kv, legs
        self.checks: list[Check] = []
        self.divergences: list[Divergence] = []
        self.notes: list[str] = []
        self.left = [leg for leg in LEGS if leg not in legs]
        self.effect: dict[str, float] = {}
        self.n_layers = int(file.config["num_hidden_layers"])
        self.has_mtp = bool(file.config["num_nextn_predict_layers"])
        everything = range(self.n_layers + self.has_mtp)
        self.layers = sorted(set(everything if layers is None else layers))
        self.whole = self.layers == list(everything)
        self.steps, self.total = 0, 3 * len(self.layers) + 3

    def step(self) -> None:
        self.steps += 1
        if self.progress:
            self.progress(min(self.steps, self.total), self.total)

    def diverge(self, leg: str, where: str, index: Sequence[int], found: Any, expected: Any, detail: str = "") -> None:
        a, b = (v.item() if isinstance(v, np.generic) else v for v in (found, expected))
        self.divergences.append(Divergence(leg, where, tuple(int(i) for i in index), a, b, detail))

    def run(self, prompt: str | None, tokens: int) -> Report:
        comparable = self.config()
        if comparable:
            self.settings = reference.Settings.of(self.ckpt.raw_config)
            self.packed = reference.PackedWeights(self.file)
            self.source = reference.SourceWeights(self.ckpt, self.settings)
            self.model = Model(self.file, threads=self.threads, isa=self.isa)
            self.kv = cache_type(self.kv, self.model.isa)
            for leg in (leg for leg in LEGS[:3] if leg in self.legs):
                getattr(self, leg)()
            self.ids = self.tokens(prompt, tokens)
            session = self.model.session(len(self.ids) + NEW_TOKENS, self.kv, mtp=False)
            self.logits = session.prefill(self.ids, all_logits=True)
            for leg in (leg for leg in LEGS[3:] if leg in self.legs):
                getattr(self, leg)()
        else:
            self.notes.append("the two models have different shapes: nothing else was compared")
        if not self.whole:
            self.notes.append(f"only layers {_ranges(self.layers)} were compared; embedding, head and effect were not")
        n = len(self.ids) if comparable else 0
        left = [f"positions after {n}", f"caches but {self.kv}", "other instruction sets and devices", *self.left]
        if self.file.dropped:
            left.append(f"{len(self.file.dropped)} tensors that packing dropped")
        return Report(str(self.file.path), str(self.ckpt.path), n, self.kv, tuple(self.checks), tuple(self.divergences),
                      self.effect, tuple(self.notes), tuple(left if comparable else ()))  # fmt: skip

    def tokens(self, prompt: str | None, n: int) -> Array:
        vocab = self.settings.vocab
        if self.model.has_tokenizer:
            ids = self.model.encode(TEXT if prompt is None else prompt)[:n]
            if len(ids) >= MIN_TOKENS:
                return np.asarray(ids, np.int32)
        if prompt is not None:
            raise Error(f"the prompt has fewer than {MIN_TOKENS} tokens, too few to show errors of the softmax scale")
        self.notes.append("no tokenizer in the file: random token ids were run")
        return np.random.default_rng(0).integers(0, vocab, n).astype(np.int32)

    # ---- configuration, checksums, weights

    def config(self) -> bool:
        """Every key of the file's configuration against the one that the checkpoint implies; False: other shapes."""
        found, expected = self.file.config, dict(self.ckpt.config)
        if "mtp.head" in self.file.entries:
            expected["mtp_draft_head"] = 1  # the packer's choice
        bad = [k for k in {**expected, **found} if k not in found or k not in expected or found[k] != expected[k]]
        for k in bad:
            self.diverge("config", k, (), found.get(k, "nothing"), expected.get(k, "nothing"))
        self.checks.append(Check("config", "keys", len(expected), len(bad), 0, not bad))
        self.step()
        return not set(bad) & set(SHAPES)

    def texts(self) -> None:
        """The stored tokenizer, template and settings of generation against the checkpoint's files, byte for byte."""
        n, bad = 0, len(self.divergences)
        for name in TOKENIZER_FILES:
            path, found = self.ckpt.path / name, self.file.tokenizer_file(name) or b""
            expected = read_file(path, MAX_TOKENIZER_BYTES, CheckpointError) if path.is_file() else b""
            if found and not expected and name == "tokenizer.json" and (path.parent / "tiktoken.model").is_file():
                self.left.append("tokenizer.json, which was made from tiktoken.model")
                continue
            n += bool(found)
            if found != expected and (found or name not in LEGACY):  # which are stored only where they are read
                what = [f"{len(x)} bytes" if x else "nothing" for x in (found, expected)]
                at = len(os.path.commonprefix([found, expected]))  # noqa: RUF071  # bytes, no paths
                self.diverge("texts", name, (), what[0], what[1], f"they differ from byte {at} on")
        bad = len(self.divergences) - bad
        self.checks.append(Check("texts", "beside the weights", n, bad, 0, not bad))

    def checksums(self) -> None:
        bad = self.file.check()
        for name in bad:
            self.diverge("checksum", name, (), "other bytes", "those of the recorded sha256, zero padding")
        self.checks.append(Check("checksum", "tensors and files", len(self.file.entries), len(bad), 0, not bad))
        self.step()

    def weights(self) -> None:
        groups: dict[str, list[Tensor]] = {}
        for name, e in self.file.entries.items():
            if e.kind in ("tiled", "plain"):
                groups.setdefault(_prefix(name), []).append(e)
        pool = ThreadPoolExecutor(self.model.threads, "deepcalm-verify")
        try:
            compared = {
                p: [(e, self.slices(e, pool)) for e in entries] for p, entries in groups.items() if self.wanted(p)
            }
            for p, tensors in compared.items():
                worst, at = max((self.tensor(e.name, found), e.name.removeprefix(p)) for e, found in tensors)
                self.checks.append(Check("weights", p.rstrip(".") or "top", len(tensors), worst, 1.0, worst <= 1, at))
                self.step()
        finally:
            pool.shutdown(cancel_futures=True)

    def wanted(self, prefix: str) -> bool:
        """Whether the tensors of a layer, or those outside ("") are to be compared."""
        if not prefix:
            return self.whole
        return (self.n_layers if prefix == "mtp." else int(prefix.split(".")[1])) in self.layers

    def slices(self, e: Tensor, pool: ThreadPoolExecutor) -> Iterator[Slice]:
        """``slice`` of each of a tensor's, in their order, whichever thread is done first."""
        keeps = e.format in ("f8", "q8") and all(self.source.keeps_blocks(e.name, i) for i in range(e.n_slices))
        return pool.map(lambda i: self.slice(e, i, keeps), range(e.n_slices))

    def tensor(self, name: str, slices: Iterator[Slice]) -> float:
        """The largest difference of a tensor from the checkpoint, up to its first slice that is not right."""
        worst = 0.0
        for i, (share, wrong) in enumerate(slices):
            worst = max(worst, share)
            if wrong is not None:
                at, *rest = wrong
                self.diverge("weights", name, (i, *at), *rest)
                break
        return worst

    def slice(self, e: Tensor, i: int, keeps: bool) -> Slice:
        """Compares slice ``i`` with the checkpoint, up to the first element that is not right."""
        rows, cols = e.shape[-2:] if len(e.shape) > 1 else (1, *e.shape)
        worst = 0.0
        origins, transposed = self.source.origin(e.name, i)
        kinds = {self.source.weight(name, shape).kind for name, shape, _ in origins}
        pairs = zip(self.packed.slabs(e.name, i), self.source.slabs(e.name, i), strict=True)
        for (row, found, scales), (_, expected, _) in pairs:
            n = min(len(found), len(expected), rows - row)
            outside = np.abs(found[:, cols:]).max(initial=0) + np.abs(found[n:]).max(initial=0)
            f, x = found[:n, :cols], expected[:n]
            s = None if scales is None else np.repeat(scales, found.shape[1] // scales.shape[1], 1)[:n, :cols]
            share = _share(e.format, f, x, s, _exact(e.format, kinds, transposed, keeps))
            share[~np.isfinite(f)] = np.inf
            worst = max(worst, float(share.max()))
            if worst > 1:
                r, c = (int(v) for v in np.argwhere(share > 1)[0])
                detail = f"{int((share > 1).sum())} elements differ in this slab; {e.format} from "
                detail += " and ".join(name for name, _, _ in origins)
                return worst, ((row + r, c), f[r, c], x[r, c], detail)
            if outside:
                return np.inf, ((row,), "values in the padding", "zeros")
            if s is not None and (bad := _odd_scales(e, x, s)) is not None:
                r, c = bad
                detail = f"a {e.format} scale that does not fit its group's largest weight"
                largest = np.abs(x[r, c // 32 * 32 : c // 32 * 32 + 32]).max()
                expect = f"about {largest:.4g} / " + ("127" if e.format == "q8" else "6..10")
                return np.inf, ((row + r, c), s[r, c], expect, detail)
        return worst, None

    # ---- arithmetic

    def taps(self) -> Iterator[tuple[int, dict[str, Array]]]:
        """(layer, the runtime's taps of it, its input and what is outside the layers), layer after layer."""
        s, session = self.settings, self.model.session(len(self.ids), self.kv, mtp=False)
        row = 4 * (s.heads * (s.dn + s.dr + 2 * s.r) + 8 * s.d)
        group = max(1, TAP_BYTES // (row * len(self.ids)))
        main = [i for i in self.layers if i < self.n_layers]
        for begin in range(0, len(main), group):
            part = main[begin : begin + group]
            names = [f"layers.{i}.{stage}" for i in part for stage in STAGES]
            names += [f"layers.{i - 1}.layer_out" for i in part if i] + ["embed", "final_norm", "logits"]
            session.truncate(0)
            with session.trace(*names) as taps:
                session.prefill(self.ids, all_logits=True)
            for i in part:
                yield i, taps

    def arithmetic(self) -> None:
        ref = reference.Reference(self.settings, self.packed, self.kv)
        taps: dict[str, Array] = {}
        for i, taps in self.taps():
            x = taps[f"layers.{i - 1}.layer_out" if i else "embed"].astype(np.float64)
            if i == 0:
                self.compare("embed", ref.embedding(self.ids), taps)
            self.compare(f"layers.{i}", ref.layer(f"layers.{i}.", x, taps), taps)
            self.step()
        if self.whole:
            x = taps[f"layers.{self.n_layers - 1}.layer_out"].astype(np.float64)
            self.compare("head", ref.head("", x, taps), taps)
        if self.n_layers in self.layers:
            hidden, taps = self.mtp_taps()
            stages = ref.mtp_stages(self.ids[1:], hidden, taps)
            for what, ours in zip(("mtp input", "mtp", "mtp head"), stages, strict=True):
                self.compare(what, ours, taps)
            self.step()

    def mtp_taps(self) -> tuple[Array, dict[str, Array]]:
        """(main hidden states, taps of the MTP layer fed with them and the true next tokens)."""
        n = len(self.ids)
        core = _core.Session(self.model.core, n, self.kv, n, False)
        core.forward(self.ids, "none")
        hidden = core.hidden()[:-1]
        core.trace(["*"])
        core.mtp_forward(self.ids[1:], hidden, "all")
        return hidden, core.taps()

    def compare(self, what: str, ours: reference.Taps, taps: dict[str, Array]) -> None:
        """One layer's taps, in pass order, against the reference's."""
        worst, ok = (0.0, 1.0, ""), True
        for name, (expected, spread) in ours.items():
            found = taps[name]
            if name.endswith("topk_idx"):
                good = self.routing(name, found, expected, taps)
                ok &= good
                continue
            allowed = self.allowed(name)
            rows = found.reshape(len(found), -1).astype(np.float64)
            difference = rows - expected.reshape(rows.shape)
            loose = np.linalg.norm(np.reshape(spread, (len(found), -1)), axis=1) if np.ndim(spread) else spread
            excess = np.maximum(np.linalg.norm(difference, axis=1) - loose, 0)
            size = float(np.linalg.norm(expected)) or 1.0
            error = float(np.linalg.norm(excess)) / size
            error = error if np.isfinite(error) else np.inf
            if not error <= allowed:
                ok = False
                at = np.unravel_index(np.argmax(np.nan_to_num(np.abs(difference), nan=np.inf)), difference.shape)
                index = np.unravel_index(at[0] * rows.shape[1] + at[1], found.shape)
                detail = f"relative RMS {error:.1e}, allowed {allowed:.0e}"
                self.diverge("arithmetic", name, [int(i) for i in index], found[index], expected[index], detail)
            if error / allowed >= worst[0] / worst[1]:
                worst = (error, allowed, name.removeprefix(_prefix(name)))
        self.checks.append(Check("arithmetic", what, len(ours), *worst[:2], ok, worst[2]))

    def allowed(self, tap: str) -> float:
        """The largest tolerance of the formats behind a tap."""
        p, stage = _prefix(tap), tap.rpartition(".")[2]
        gate, down = "w_gate_up", "w_down"
        behind = {
            "q_a": ["wqkv_a"], "q": ["wq_b" if self.settings.rq else "wqkv_a"], "c_kv": ["wqkv_a"],
            "k_rope": ["wqkv_a"], "q_absorbed": ["w_uk"], "attn_latent": ["router?"], "attn_out": ["w_uv", "wo"],
            "gate_logits": ["router"], "routed_out": [f"experts.{gate}", f"experts.{down}"], "ffn_out": [gate, down],
            "shared_out": [f"shared.{gate}", f"shared.{down}"],
        }.get(stage, [])  # fmt: skip
        top = {"logits": self.packed.head(p), "embed": "mtp.eh_proj"} if p == "mtp." else {"logits": "head"}
        names = [top[stage]] if stage in top else [p + b for b in behind]
        formats = ["f32" if n.endswith("?") else self.file.entries[n].format for n in names]
        return max([reference.FORMATS[f].tolerance for f in formats], default=reference.ELEMENTWISE)

    def routing(self, name: str, found: Array, expected: Array, taps: dict[str, Array]) -> bool:
        """The chosen experts: those of the reference, or others whose scores are equal up to f32 rounding."""
        s, p = self.settings, _prefix(name)
        z = taps[p + "gate_logits"].astype(np.float64)
        bias = self.packed.plain(p + "router_bias") if s.bias else None
        _, u = reference.scores(s, z, bias)
        for row in np.flatnonzero((found != expected).any(axis=1)).tolist():
            chosen, best = set(found[row].tolist()), set(expected[row].tolist())
            score = [[float(u[row, e]) for e in sorted(side)] for side in (chosen - best, best - chosen)]
            if len(chosen) < s.top_k or (score[0] and not min(score[0]) >= max(score[1]) - CLOSE):
                detail = "what the reference's router chooses from the runtime's own gate_logits"
                self.diverge("arithmetic", name, (row,), found[row].tolist(), expected[row].tolist(), detail)
                return False
        return True

    # ---- exactness

    def exactness(self) -> None:
        """The same logits, to the bit, for any chunks and threads; the same tokens and logits with any drafts."""
        ctx, bad, n = len(self.ids) + NEW_TOKENS + 1, len(self.divergences), 0
        for threads in (1, max(self.model.threads, 2)):
            same = threads == self.model.threads
            model = self.model if same else Model(self.file, threads=threads, isa=self.isa)
            for rows in (*CHUNKS, len(self.ids)):
                found = model.session(ctx, self.kv, max_rows=rows, mtp=False).prefill(self.ids, all_logits=True)
                self.same(f"logits with {threads} threads, passes of {rows} tokens", found, self.logits)
                n += 1
            if self.has_mtp:
                try:
                    n += self.drafts(model)
                except SessionError as e:  # logits that are not finite
                    self.diverge("exactness", "generating", (), one_line(e, 100), "tokens")
        bad = len(self.divergences) - bad
        self.checks.append(Check("exactness", "threads, chunks" + ", drafts" * self.has_mtp, n, bad, 0, not bad))
        self.step()

    def drafts(self, model: Model) -> int:
        """Compares drafted with plain texts; returns how many."""
        n = 0
        for end in np.linspace(MIN_TOKENS, len(self.ids), PROMPTS, dtype=int):
            plain = self.generated(model, end, 0)
            for k in DRAFTS:
                drafted, what = self.generated(model, end, k), f"with {k} drafts, {model.threads} threads"
                if plain[0] != drafted[0]:
                    at = int(np.flatnonzero(np.not_equal(drafted[0], plain[0]))[0])
                    self.diverge("exactness", f"tokens {what}", (at,), drafted[0][at], plain[0][at])
                else:
                    self.same(f"logits {what}", drafted[1], plain[1])
                n += 1
        return n

    def same(self, where: str, found: Array, expected: Array) -> None:
        if found.tobytes() != expected.tobytes():
            at = np.argwhere(found.view(np.uint32) != expected.view(np.uint32))[0]
            self.diverge("exactness", where, at, found[tuple(at)], expected[tuple(at)], "not the same bits")

    def generated(self, model: Model, end: int, k: int) -> tuple[list[int], Array]:
        """Greedy (tokens, their logits) after the first ``end`` ids, ``k`` drafts a round."""
        session = model.session(end + NEW_TOKENS + 8, self.kv, mtp=True)
        session.prefill(self.ids[: end - 1], all_logits=False)
        token, out, logits = int(self.ids[end - 1]), list[int](), []
        while len(out) < NEW_TOKENS:
            r = session.draft_round(token, k, Sampling(), model.n_valid, want_logits=True)
            out += [int(t) for t in r["tokens"]]
            logits.append(r["logits"])
            token = out[-1]
        return out[:NEW_TOKENS], np.concatenate(logits)[:NEW_TOKENS]

    # ---- effect

    def effects(self) -> None:
        """What packing costs: the runtime against the checkpoint's weights in float64 on the same tokens."""
        s = self.settings
        if not self.whole:
            return
        size = sum(int(np.prod(t.shape)) for t in self.ckpt.tensors.values())
        if size > EFFECT_LIMIT:
            self.notes.append(f"effect not measured: {size / 1e9:.0f} G weights, the reference runs up to "
                              f"{EFFECT_LIMIT / 1e9:.0f} G; see `deepcalm perplexity --kl-against`")  # fmt: skip
            return
        ref, same, chosen = reference.Reference(s, self.source), 0, 0
        session = self.model.session(len(self.ids), self.kv, mtp=False)
        with session.trace("topk_idx") as ours:
            session.prefill(self.ids, all_logits=True)
        head, routed = self.whole_pass(ref)
        for name, theirs in routed.items():
            pairs = zip(ours[name].tolist(), theirs.tolist(), strict=True)
            same += sum(len(set(a) & set(b)) for a, b in pairs)
            chosen += ours[name].size
        self.truth = head["logits"][0]
        self.effect |= _distance(self.logits, self.truth)
        if chosen:
            self.effect["router_agreement"] = same / chosen
        self.judge(self.whole_pass(reference.Reference(s, self.packed))[0]["logits"][0])
        if self.has_mtp:
            _, taps_mtp = self.mtp_taps()
            *_, mtp_head = ref.mtp_stages(self.ids[1:], head["final_norm"][0][:-1])
            found, expected = taps_mtp["mtp.logits"], mtp_head["mtp.logits"][0]
            self.effect["mtp_argmax_agreement"] = float((found.argmax(-1) == expected.argmax(-1)).mean())
        self.step()

    def whole_pass(self, ref: reference.Reference) -> tuple[reference.Taps, dict[str, Array]]:
        """The head's taps of a pass over all layers, and the experts that each chose."""
        taps, chosen = reference.Taps(), dict[str, Array]()
        for taps in ref.stages(self.ids):
            chosen |= {name: t[0] for name, t in taps.items() if name.endswith("topk_idx")}
        return taps, chosen

    def judge(self, implied: Array) -> None:
        """Whether the runtime's logits are what the file's weights imply, and these still a model of the checkpoint."""
        e, found, weights = self.effect, _median(self.logits, self.truth), _median(implied, self.truth)
        e |= {"distance": found, "distance_of_weights": weights}
        e |= {"kl_of_weights": _distance(implied, self.truth)["kl"], "kl_without_text": _without_text(self.truth)}
        if not found <= (allowed := FACTOR * weights + SLACK):
            self.diverge("effect", "logits", (), found, f"at most {allowed:.3g}",
                         f"distance from the checkpoint; the file's weights explain {weights:.3g}")  # fmt: skip
        if not e["kl"] <= e["kl_without_text"] + 1e-3:  # a model to which the text says nothing is still rounded
            self.diverge("effect", "kl", (), e["kl"], f"less than {e['kl_without_text']:.3g}",
                         "further from the checkpoint than its average over the text: pack it wider")  # fmt: skip


# ---- pieces


def _exact(fmt: str, kinds: set[str], transposed: bool, keeps: bool) -> bool:
    """Whether a format must hold the source's values unchanged."""
    if fmt in ("f8", "q4"):
        return kinds == ({"f8"} if fmt == "f8" else {"i4"}) and (keeps if fmt == "f8" else not transposed)
    if fmt == "q8":
        return kinds <= {"i8", "fp4"} and keeps
    return fmt == "f32" or kinds == {fmt}


def _share(fmt: str, f: Array, x: Array, s: Array | None, exact: bool) -> Array:
    """|found - expected| as a share of what the format allows; infinite where nothing is."""
    if exact:  # in f32 a source of two factors was rounded once
        return np.where(f == (x.astype(np.float32) if fmt == "f32" else x), 0.0, np.inf)
    if fmt in ("q8", "q4"):
        assert s is not None
        low, high = (-127, 127) if fmt == "q8" else (-8, 7)
        a, b = low * s, high * s
        target, half = np.clip(x, np.minimum(a, b), np.maximum(a, b)), np.abs(s) / 2
    elif fmt == "f8":
        assert s is not None
        exponent = np.frexp(x / np.where(s == 0, 1, s))[1]
        target, half = x, np.ldexp(1.0, np.maximum(exponent, -5) - 5) * s
    else:
        exponent, bits = np.frexp(x)[1], 9 if fmt == "bf16" else 12
        target, half = x, np.ldexp(1.0, (exponent if bits == 9 else np.maximum(exponent, -13)) - bits)
    return np.abs(f - target) / (half * (1 + 1e-5) + np.abs(x) * 2.0**-22 + 1e-40)


def _odd_scales(e: Tensor, x: Array, s: Array) -> tuple[int, int] | None:
    """(row, column) of a q8 or q4 scale that no quantiser would choose for these weights."""
    if e.format not in ("q8", "q4") or e.source_dtype in ("I4", "I8", "FP4"):
        return None
    groups = np.pad(np.abs(x), [(0, 0), (0, -x.shape[1] % 32)]).reshape(len(x), -1, 32).max(-1)
    scale = np.abs(s[:, ::32])
    low, high = (126.9, 127.6) if e.format == "q8" else (5.5, 10.5)
    bad = np.argwhere((groups > high * (scale + 2.0**-24)) | (groups < low * (scale - 2.0**-24)))
    return (int(bad[0][0]), int(bad[0][1]) * 32) if len(bad) else None


def _distance(found: Array, expected: Array) -> dict[str, float]:
    p, q = log_softmax(expected), log_softmax(found)
    spread = ((expected - expected.mean(-1, keepdims=True)) ** 2).sum()
    nmse = ((found - expected) ** 2).sum() / max(spread, 1e-30)
    return {
        "kl": float((np.exp(p) * (p - q)).sum(-1).mean()),
        "nmse": float(nmse),
        "max_abs": float(np.abs(found - expected).max()),
        "argmax_agreement": float((found.argmax(-1) == expected.argmax(-1)).mean()),
    }


def _median(found: Array, expected: Array) -> float:
    """The median token's distance between logits [n, vocab_size], relative to their spread: 1 is another model.

    A few tokens may route differently for reasons of rounding, and be anywhere.
    """
    spread = np.linalg.norm(expected - expected.mean(-1, keepdims=True), axis=1)
    spread = np.maximum(spread, 1e-6 * np.linalg.norm(expected, axis=1) + 1e-30)  # equal logits are rounded, too
    return float(np.median(np.linalg.norm(found - expected, axis=1) / spread))


def _without_text(logits: Array) -> float:
    """Mean KL in nats of the distributions of logits [n, vocab_size] from their own average: what the text tells."""
    p = log_softmax(logits)
    average = np.logaddexp.reduce(p, axis=0) - np.log(len(p))
    return float((np.exp(p) * (p - average)).sum(-1).mean())


def _prefix(name: str) -> str:
    """ "layers.3." of "layers.3.experts.w_down", "mtp." or ""."""
    parts = name.split(".")
    return "mtp." if parts[0] == "mtp" else f"layers.{parts[1]}." if parts[0] == "layers" else ""


def _ranges(values: Sequence[int]) -> str:
    out: list[list[int]] = []
    for v in values:
        if out and out[-1][1] == v - 1:
            out[-1][1] = v
        else:
            out.append([v, v])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in out)


def _show(value: Any) -> str:
    return f"{value:.7g}" if isinstance(value, float) else str(value)
