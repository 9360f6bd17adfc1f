"""Checks of what callers pass, made when it is passed: a wrong type is a TypeError, a wrong value a ValueError."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import SessionError, one_line


def integer(name: str, value: Any, low: int, high: int | None = None, error: type[Exception] = ValueError) -> int:
    """``value`` as an int in low..high (None: no upper limit); numpy's integers count, bools and floats do not.

    Raises:
        TypeError: not an integer.
        ValueError: out of range (another class if ``error`` says so).
    """
    want = f"expected {low}..{high}" if high is not None else f"expected a number >= {low}"
    try:
        if isinstance(value, bool):
            raise TypeError
        n = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: {one_line(repr(value), 40)}, {want}") from None
    if n < low or (high is not None and n > high):
        raise error(f"{name}: {n}, {want}")
    return n


def token_ids(ids: Any, vocab_size: int) -> npt.NDArray[np.int32]:
    """``ids`` as [n] int32, a copy.

    Raises:
        TypeError: no flat sequence of integers.
        SessionError: an id outside the vocabulary.
    """
    if isinstance(ids, (str, bytes)):
        raise TypeError("token ids: expected a flat sequence of integers, found a text; model.encode() gives its ids")
    rows = np.asarray(ids)
    if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iu"):
        raise TypeError(f"token ids: expected a flat sequence of integers, found {rows.dtype} {list(rows.shape)}")
    if rows.size and not 0 <= int(rows.min()) <= int(rows.max()) < vocab_size:
        bad = next(int(i) for i in rows if not 0 <= i < vocab_size)
        raise SessionError(f"token id {bad}, expected 0..{vocab_size - 1}")
    return rows.astype(np.int32)
