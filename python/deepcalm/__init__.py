"""deepcalm: a minimal, exact inference runtime for MLA + DeepSeekMoE + MTP models.

    import deepcalm
    print(deepcalm.generate("Once upon a time"))        # the embedded demo model

    model = deepcalm.Model("v2-lite.dcalm")
    session = model.session(ctx=4096)
    logits = session.prefill(model.encode("Hello"))     # np.float32 [vocab_size]
    for token in session.generate(max_tokens=32): ...

What is not an exception is imported when it is first used, so that a program starts as fast as what it needs.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .errors import (
    CheckpointError,
    ConfigError,
    Error,
    PackedFileError,
    ResourceError,
    SessionError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from .bench import bench
    from .generate import Generation, Sampling, generate
    from .model import Model, demo_path
    from .pack import pack
    from .packed import unpack
    from .perplexity import perplexity
    from .session import Session
    from .verify import Report, verify

_MODULE_OF = {
    "Generation": "generate",
    "Model": "model",
    "Report": "verify",
    "Sampling": "generate",
    "Session": "session",
    "bench": "bench",
    "demo_path": "model",
    "generate": "generate",
    "pack": "pack",
    "perplexity": "perplexity",
    "unpack": "packed",
    "verify": "verify",
}
__all__ = [
    "CheckpointError",
    "ConfigError",
    "Error",
    "Generation",
    "Model",
    "PackedFileError",
    "Report",
    "ResourceError",
    "Sampling",
    "Session",
    "SessionError",
    "UnsupportedError",
    "bench",
    "demo_path",
    "generate",
    "pack",
    "perplexity",
    "unpack",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'deepcalm' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Importing the module ``deepcalm.pack`` must not hide the function ``deepcalm.pack``."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
