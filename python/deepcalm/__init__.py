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
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, ConfigError, Error, PackedFileError, ResourceError, SessionError, UnsupportedError

if TYPE_CHECKING:
    from .check.perplexity import perplexity
    from .check.verify import Report, verify
    from .files.pack import pack
    from .files.packed import unpack
    from .generation import Generation, Sampling, generate
    from .measure.bench import bench
    from .model import Model, demo_path
    from .session import Session

_MODULE_OF = {
    "Generation": "generation",
    "Model": "model",
    "Report": "check.verify",
    "Sampling": "generation",
    "Session": "session",
    "bench": "measure.bench",
    "demo_path": "model",
    "generate": "generation",
    "pack": "files.pack",
    "perplexity": "check.perplexity",
    "unpack": "files.packed",
    "verify": "check.verify",
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
