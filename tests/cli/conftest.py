"""A tiny packed model."""

from __future__ import annotations

from pathlib import Path

import pytest

import models


@pytest.fixture
def path() -> Path:
    return models.packed()
