"""The one family of exceptions that deepcalm raises for bad input and environment failures.

The extension module raises these classes by name; programming errors surface as ordinary ``TypeError``/``ValueError``.
Every message is one line: which file, tensor or key, what was found, what was expected.
"""

from __future__ import annotations


class Error(Exception):
    """Base of all deepcalm errors."""


class CheckpointError(Error):
    """A Hugging Face checkpoint folder cannot be read or is not supported."""


class ConfigError(CheckpointError):
    """A value of the model configuration is missing, unknown or out of range."""


class PackedFileError(Error):
    """A packed ``.dcalm`` file is damaged, truncated or of an unknown version."""


class SessionError(Error):
    """A session call does not fit the session's state (context full, bad token id, wrong saved session)."""


class ResourceError(Error):
    """The machine cannot do it: memory, disk, instruction set, device."""


class UnsupportedError(Error):
    """A well-formed request for something this build does not do."""


def one_line(message: object, limit: int = 300) -> str:
    """``message`` on one line of at most ``limit`` characters, without control characters."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(message)).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def utf8(text: str) -> str:
    """``text`` of a file name, a command line or the environment, which need not be UTF-8: other bytes as \\udcNN."""
    return text.encode("utf-8", "backslashreplace").decode()


def show(value: object, limit: int = 80) -> str:
    """A stranger's value for a one-line message: escaped and cut."""
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."
