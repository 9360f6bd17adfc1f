"""docs/api.md: signatures and docstrings of the public names and of what they take and return, read from the source."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "python" / "deepcalm"
MODULES = ("model", "session", "generation", "batch", "sampling", "text", "template", "markup", "errors", "files/plan",
           "files/pack", "check/verify")  # fmt: skip
SECTIONS = {
    "Text in one call": ("generate", "stream", "demo_path"),
    "Models, sessions, generations": ("Model", "Session", "Generation"),
    "Many sequences": ("Batch", "Request", "Choice", "Sampling"),
    "Checkpoints": ("pack", "verify"),
    "Errors": ("Error", "CheckpointError", "ConfigError", "PackedFileError", "SessionError", "ResourceError",
               "UnsupportedError"),
    "What they take and return": ("Options", "TextGeneration", "Scores", "Config", "Decoder", "ChatTemplate", "Markup",
                                  "Answer", "Delta", "Stats", "StageStats", "BatchStats", "plan", "Plan", "Report"),
}  # fmt: skip
# Members that the package's own modules use.
INTERNAL = {
    "Model": {"core"},
    "Session": {"core", "tracing", "attach", "detach", "since", "returned", "draft_round", "checked", "decode_start",
                "decoding", "count_drafts", "load_rows", "mtp_pending", "expert_union"},
    "Generation": {"forget"},
    "Sampling": {"choose"},
    "Scores": {"of"},
    "ChatTemplate": {"from_files", "literals", "after"},
    "StageStats": {"plus"},
    "Plan": {"file_tensors"},
}  # fmt: skip
# By a call that is described.
MADE = {"Config", "Session", "Generation", "TextGeneration", "Batch", "Request", "Choice", "Decoder", "ChatTemplate",
        "Markup", "Answer", "Delta"}  # fmt: skip
INTRODUCTION = """# The Python API

Written by `tools/make_docs.py` from the docstrings. The names of `deepcalm.__all__` are public; those of the last
section are not imported from `deepcalm`, they are what the others take and return. Two programs that use it:
[chat_loop.py](examples/chat_loop.py), [routing.py](examples/routing.py).

Models and sessions are context managers: `with model.session() as session:` frees the cache at its end.
`model.config` is a `Config`, `model.path` the packed file; `model.vocabulary.decoder()` makes a `Decoder`.
"""
Definition = ast.FunctionDef | ast.ClassDef


def definitions() -> dict[str, tuple[Definition, str]]:
    """By name: every top-level class and function of the modules, and its module's text."""
    texts = [(PACKAGE / f"{m}.py").read_text(encoding="utf-8") for m in MODULES]
    return {n.name: (n, t) for t in texts for n in ast.parse(t).body if isinstance(n, Definition)}


def members(c: ast.ClassDef) -> list[ast.FunctionDef]:
    """Methods and properties for users."""
    hidden = INTERNAL.get(c.name, set())
    return [n for n in c.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_") and n.name not in hidden]


def signature(f: ast.FunctionDef, name: str) -> str:
    returns = ast.unparse(f.returns) if f.returns else ""
    if any(isinstance(d, ast.Name) and d.id in ("property", "cached_property") for d in f.decorator_list):
        return f"{name}: {returns}"
    arguments = re.sub(r"^self(, )?", "", re.sub("(?<=.)=(?=.)", " = ", ast.unparse(f.args)))
    return f"{name}({arguments})" + (f" -> {returns}" if f.name != "__init__" else "")


def described(node: Definition) -> str:
    """A docstring as Markdown: heads of sections in italics, their entries as a list."""
    out, section = [], ""
    for line in (ast.get_docstring(node) or "").replace("``", "`").splitlines():
        if re.fullmatch(r"(Args|Returns|Raises):", line):
            section = line[:-1]
            out += [f"*{section}*", ""]
        elif section and line:
            item = re.match(r"    (\w[\w, *]*): (.*)", line) if section != "Returns" else None
            out.append(f"- `{item[1]}`: {item[2]}" if item else line.removeprefix("    ").replace("    ", "  ", 1))
        else:
            out.append(line)
    return "\n".join(out) + "\n"


def entry(node: Definition, source: str) -> str:
    """A function or class: its head, what it does, and of a class what it has."""
    init, rest = [], ""
    if isinstance(node, ast.ClassDef):
        fields = [ast.unparse(n).partition(" = field(")[0] for n in node.body if isinstance(n, ast.AnnAssign)]
        init = [
            n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__" and node.name not in MADE
        ]
        head = signature(init[0], node.name) if init else "\n    ".join([f"class {node.name}", *fields])
        for what, name in re.findall(r"#: (.*)\n +self\.(\w+)", ast.get_source_segment(source, node) or ""):
            rest += f"\n**`{name}`**\n\n{what}\n"
        rest += "".join(f"\n**`{signature(f, f.name)}`**\n\n{described(f)}" for f in members(node))
    else:
        head = signature(node, node.name)
    if len(head) > 110 and "\n" not in head:
        head = "\n".join(textwrap.wrap(head, 110, subsequent_indent="    ", break_on_hyphens=False))
    return f"\n### {node.name}\n\n```\n{head}\n```\n\n{described(node)}{rest}"


def text() -> str:
    """The page."""
    known, out = definitions(), INTRODUCTION
    for title, names in SECTIONS.items():
        out += f"\n## {title}\n" + ("\n" if title == "Errors" else "")
        for node, source in map(known.__getitem__, names):
            if isinstance(node, ast.ClassDef) and title == "Errors":
                out += f"- `{node.name}({ast.unparse(node.bases[0])})`: {described(node)}"
            else:
                out += entry(node, source)
    return out
