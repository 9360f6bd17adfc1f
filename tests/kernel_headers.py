"""The kernels' structs, enums and function tables as ctypes, read from the headers: their fields are told there alone.

Read are numbers, enums, pointers, structs within structs and function pointers; on anything else this fails aloud.
"""

from __future__ import annotations

import ctypes as c
import re
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TEXT = "".join(
    re.sub(r"//.*|(?<=View)<[^>]*>|^template <class T> ", "", (ROOT / "kernels" / name).read_text(), flags=re.M)
    for name in ("format.h", "view.h", "kernels.h", "cuda/args.h")
)
NUMBERS = {"bool": c.c_bool, "int": c.c_int32, "float": c.c_float, "double": c.c_double}
NUMBERS |= {f"{sign}int{bits}_t": getattr(c, f"c_{sign}int{bits}") for sign in ("", "u") for bits in (8, 32, 64)}
QUALIFIED = r"(?:const )?([\w:]+)"  # a type's name, without const and *


def find(pattern: str) -> re.Match[str]:
    found = re.search(pattern, TEXT, re.M | re.S)
    assert found, f"kernels/*.h: no {pattern}"
    return found


@cache
def enum(name: str) -> dict[str, int]:
    """The values of an enum class, kGroupLimitedGreedy as group_limited_greedy."""
    words = re.findall(r"\bk(\w+)", find(rf"enum class {name} : \w+ {{([^}}]*)}}")[1])
    return {re.sub(r"(?<=[a-z])(?=[A-Z])", "_", word).lower(): i for i, word in enumerate(words)}


@cache
def constant(name: str) -> int:
    return int(find(rf"^inline constexpr int {name} = (\d+);")[1])


@cache
def ctype(name: str) -> Any:
    """What ctypes calls a C++ type: a number, an enum or a struct."""
    if name in NUMBERS:
        return NUMBERS[name]
    if of_enum := re.search(rf"enum class {name} : (\w+)", TEXT):
        return NUMBERS[of_enum[1]]
    body = find(rf"^struct {name} {{\n(.*?)^}};")[1]
    while "{" in body:  # inner ones first: values go, the bodies of functions end what declares them
        body = re.sub(r"(= |\b)?{[^{}]*}", lambda m: ";" if m[1] is None else "", body)
    members = [" ".join(m.split()) for m in body.split(";") if m.strip()]
    fields = [field for m in members if not re.match(r"static |[^=(]*\w\(", m) for field in _fields(m)]
    return type(name, (c.Structure,), {"_fields_": fields})


def _fields(member: str) -> list[tuple[str, Any]]:
    """(name, type) of all that a member declares: "float *m = nullptr, *l = nullptr", "void (*f[2])(int) noexcept"."""
    if function := re.fullmatch(r"(\w+) \(\*(\w+)(?:\[(\w+)\])?\)\((.*)\) noexcept", member):
        result, name, extent, args = function.groups()
        kind: Any = c.CFUNCTYPE(None if result == "void" else ctype(result), *map(_argument, args.split(", ")))
        return [(name, kind * constant(extent) if extent else kind)]
    declared = re.fullmatch(QUALIFIED + r"\s*(.+)", member)
    assert declared, member
    names = [re.fullmatch(r"(\*?) ?(\w+)(?: = .*)?", d.strip()) for d in declared[2].split(",")]
    assert all(names), f"{member}: not read as a member"
    return [(n[2], c.c_void_p if n[1] else ctype(declared[1])) for n in names if n]


def _argument(text: str) -> Any:
    declared = re.fullmatch(QUALIFIED + r"([*&]?) \w+", text)
    assert declared, f"{text}: not read as an argument"
    return c.c_void_p if declared[2] else ctype(declared[1])
