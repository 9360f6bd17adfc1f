"""deepcalm: a minimal, exact inference runtime for MLA + DeepSeekMoE + MTP models.

    import deepcalm
    print(deepcalm.generate("Once upon a time"))        # the embedded demo model

    model = deepcalm.Model("v2-lite.dcalm")
    session = model.session(ctx=4096)
    logits = session.prefill(model.encode("Hello"))     # np.float32 [vocab_size]
    for token in session.generate(max_tokens=32): ...

The names in ``__all__`` are the public ones; modules and what else is in them may change. What is not an exception is
imported when it is first used, so that a program starts as fast as what it needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, ConfigError, Error, PackedFileError, ResourceError, SessionError, UnsupportedError

if TYPE_CHECKING:
    from ._core import __version__
    from .batch import Batch, Choice, Request
    from .check.verify import verify
    from .files.pack import pack
    from .generation import Generation
    from .model import Model, demo_path, generate, stream
    from .sampling import Sampling
    from .session import Session

__all__ = [
    "Batch",
    "CheckpointError",
    "Choice",
    "ConfigError",
    "Error",
    "Generation",
    "Model",
    "PackedFileError",
    "Request",
    "ResourceError",
    "Sampling",
    "Session",
    "SessionError",
    "UnsupportedError",
    "__version__",
    "demo_path",
    "generate",
    "pack",
    "stream",
    "verify",
]
_MODULE_OF = {
    "Batch": "batch",
    "Choice": "batch",
    "Generation": "generation",
    "Model": "model",
    "Request": "batch",
    "Sampling": "sampling",
    "Session": "session",
    "__version__": "_core",
    "demo_path": "model",
    "generate": "model",
    "pack": "files.pack",
    "stream": "model",
    "verify": "check.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'deepcalm' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
