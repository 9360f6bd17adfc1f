"""Text in columns, for terminals."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence


def columns(rows: Iterable[tuple[str, ...]]) -> str:
    """Left-aligned columns, two spaces between them."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "".join("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() + "\n" for r in rows)


def wrapped(rows: Iterable[tuple[str, str]], width: int) -> str:
    """A label and a value a line; a value that does not fit into ``width`` columns goes on under itself."""
    rows = list(rows)
    indent = max(len(label) for label, _ in rows) + 2
    lines = []
    for label, value in rows:
        parts = textwrap.wrap(value, max(width - indent, 20), break_on_hyphens=False) or [""]
        lines += [((label if i == 0 else "").ljust(indent) + part).rstrip() for i, part in enumerate(parts)]
    return "".join(line + "\n" for line in lines)


def table(title: str, *rows: Sequence[str]) -> str:
    """A title, then rows under the first one, the header; the first column is a name, the others are numbers.

    An empty row is an empty line. The title wraps where it is wider than the rows.
    """
    widths = [max(map(len, column)) for column in zip(*filter(None, rows), strict=True)]
    lines = []
    for row in rows:
        cells = (c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=bool(row))))
        lines.append("  ".join(cells).rstrip())
    width = sum(widths) + 2 * len(widths) - 2
    return "\n".join([*textwrap.wrap(title, width), lines[0], "\u2500" * width, *lines[1:]]) + "\n"
