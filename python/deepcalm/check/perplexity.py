"""How well a packed model predicts a text, and how far a format is from another: the quality cost of quantisation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .. import _core
from ..errors import Error
from ..session import MAX_ROWS

if TYPE_CHECKING:
    from ..model import Model

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
MAX_LOGITS_BYTES = 64 << 20  # of one block of rows, as float64


@dataclass(frozen=True, slots=True)
class Divergence:
    """Distance from another packed file of the same model: KL(other || this) in nats, over the scored tokens."""

    against: str
    kl_mean: float
    kl_standard_error: float
    argmax_agreement: float  # share of positions whose most probable tokens agree


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Negative log-likelihood of a text, in nats per token.

    The text is cut into consecutive windows of ``ctx`` positions, the first of which is bos where the tokenizer adds
    one (``bos``); every token with a position before it in its window is scored. Standard errors take the tokens as
    independent, which makes them somewhat too small.
    """

    ctx: int
    bos: bool
    n_tokens: int  # of the text
    n_windows: int
    n_scored: int
    nll_mean: float
    nll_standard_error: float
    divergence: Divergence | None = None

    @property
    def perplexity(self) -> float:
        """exp(nll_mean)."""
        return math.exp(self.nll_mean)

    @property
    def standard_error(self) -> float:
        """Standard error of ``perplexity``, to first order."""
        return self.perplexity * self.nll_standard_error


def perplexity(
    model: Model,
    text: str,
    ctx: int | None = None,
    kv: str = "auto",
    against: Model | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Scores ``text``.

    Args:
        ctx: window length; None: as ``Model.session``.
        against: a second packed file of the same model; adds ``divergence``.
        progress: called with (positions done, positions in all).

    Raises:
        Error: nothing to score, or ``against`` has another tokenizer.
    """
    ids = model.encode(text, bos=False)
    bos = model.vocabulary.bos_id
    start = [bos] if bos is not None and model.vocabulary.adds_bos else []
    sessions = [model.session(ctx, kv, mtp=False)]
    if against is not None:
        if against.tokenizer.to_str() != model.tokenizer.to_str():
            raise Error(f"{against.path} has another tokenizer than {model.path}: their logits cannot be compared")
        sessions.append(against.session(sessions[0].ctx, sessions[0].kv, mtp=False))
    width = sessions[0].ctx - len(start)
    windows = [start + ids[i : i + width] for i in range(0, len(ids), max(width, 1))] if width > 0 else []
    windows = [w for w in windows if len(w) > 1]
    if not windows:
        raise Error(f"nothing to score: {len(ids)} tokens of text in windows of {sessions[0].ctx} positions")

    total, done = sum(map(len, windows)) * len(sessions), 0
    vocab = int(model.config["vocab_size"])
    step = max(1, min(MAX_ROWS, MAX_LOGITS_BYTES // (8 * vocab)))
    nll: list[F64] = []
    kl: list[F64] = []
    agree = 0

    def blocks(window: list[int]) -> Iterator[tuple[I64, list[F32]]]:
        """(next tokens [n], logits [n, vocab_size] of each session) for the positions that have a next token."""
        for s in sessions:
            s.truncate(0)
        for i in range(0, len(window) - 1, step):
            rows = window[i : min(i + step, len(window) - 1)]
            yield np.asarray(window[i + 1 : i + 1 + len(rows)]), [s.prefill(rows, all_logits=True) for s in sessions]

    for window in windows:
        for following, logits in blocks(window):
            own = log_softmax(logits[0])
            nll.append(-own[np.arange(len(following)), following])
            if against is not None:
                other = log_softmax(logits[1])
                kl.append((np.exp(other) * (other - own)).sum(axis=1))
                agree += int((logits[0].argmax(axis=1) == logits[1].argmax(axis=1)).sum())
            done += len(following) * len(sessions)
            if progress is not None:
                progress(done, total)
        done += len(sessions)  # the last token of a window is only scored
    values = np.concatenate(nll)
    if not np.isfinite(values).all():
        raise Error(f"{model.path}: {_core.not_finite()}")
    divergence = None
    if against is not None:
        kls = np.concatenate(kl)
        divergence = Divergence(str(against.path), float(kls.mean()), standard_error(kls), agree / len(kls))
    return Perplexity(
        ctx=sessions[0].ctx,
        bos=bool(start),
        n_tokens=len(ids),
        n_windows=len(windows),
        n_scored=len(values),
        nll_mean=float(values.mean()),
        nll_standard_error=standard_error(values),
        divergence=divergence,
    )


def log_softmax(logits: F32 | F64) -> F64:
    """Log-probabilities of each row [n, vocab_size], in double precision."""
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
    return x


def standard_error(values: F64) -> float:
    """Of the mean of ``values`` [n]; 0 for a single one."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
