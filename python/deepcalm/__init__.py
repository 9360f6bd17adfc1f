"""deepcalm: a minimal, exact inference runtime for MLA + DeepSeekMoE + MTP models."""

from __future__ import annotations

from .errors import (
    CheckpointError,
    ConfigError,
    Error,
    PackedFileError,
    ResourceError,
    SessionError,
    UnsupportedError,
)

__all__ = [
    "CheckpointError",
    "ConfigError",
    "Error",
    "PackedFileError",
    "ResourceError",
    "SessionError",
    "UnsupportedError",
]
