"""Fixtures for the launch scripts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import compress


@pytest.fixture(scope="package")
def compressed(embedded_source, tmp_path_factory) -> Path:
    """The embedded model, compressed for four expert-parallel ranks."""
    folder = tmp_path_factory.mktemp("launch") / "c"
    compress(embedded_source, folder, groups=4)
    return folder
