"""How a token is chosen from logits: one rule for the host, for drafts and for devices."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from . import _core
from .arguments import integer
from .errors import one_line

MAX_F32 = float(np.finfo(np.float32).max)


class Scores(NamedTuple):
    """Natural logarithms of probabilities at one position: of ``token``, and of the most probable ids, best first."""

    token: int
    logprob: float
    top: list[tuple[int, float]]

    @classmethod
    def of(cls, token: int, logits: npt.NDArray[np.float32], n_valid: int, n_top: int) -> Scores:
        """From logits [vocab_size] f32: softmax over the first ``n_valid``, at temperature 1, before any filter."""
        return cls(*_core.scores(logits, n_valid, token, n_top))


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is chosen from logits.

    ``temp`` 0 takes the most probable token, ties to the lowest id. Otherwise the token of position i is the argmax of
    log p_i + Gumbel noise keyed by (seed, i): a function of the position, not of what was drawn before. Filters apply
    to softmax(logits / temp) in the order top_k (0: off), top_p (1: off), min_p (0: off).
    """

    temp: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        t, p, m = self.temp, self.top_p, self.min_p
        for name, value in (("temp", t), ("top_p", p), ("min_p", m)):
            if not isinstance(value, numbers.Real):
                raise TypeError(f"{name}: {one_line(repr(value), 40)}, expected a number")
        for name, value, ok, want in (
            ("temp", t, 0 <= t <= MAX_F32, "a finite number >= 0"),
            ("top_p", p, 0 < p <= 1, "a number in (0, 1]"),
            ("min_p", m, 0 <= m <= 1, "a number in [0, 1]"),
        ):
            if not ok:
                raise ValueError(f"{name}: {value}, expected {want}")
        integer("top_k", self.top_k, 0, 2**31 - 1)
        integer("seed", self.seed, 0, 2**64 - 1)

    def choose(self, logits: npt.NDArray[np.float32], pos: int, n_valid: int) -> int:
        """The token at position ``pos`` for logits [vocab_size] f32; ids from ``n_valid`` on are never chosen.

        Raises:
            SessionError: the logits are not finite.
        """
        return _core.sample(logits, self, pos, n_valid)
