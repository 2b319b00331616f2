"""Fixtures of the checkpoint tests: copies of models to damage."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints.damage import copy_of, sharded_copy


@pytest.fixture
def folder(pristine, tmp_path):
    """A copy of `pristine`."""
    return copy_of(pristine, tmp_path / "c")


@pytest.fixture
def mixtral(family_folder, tmp_path) -> Path:
    """A Mixtral with one tensor per projection of each expert."""
    return copy_of(family_folder("mixtral"), tmp_path / "source")


@pytest.fixture
def fused_mixtral(family_folder, tmp_path) -> Path:
    """A Mixtral with fused expert tensors."""
    return copy_of(family_folder("mixtral", fused=True), tmp_path / "source")


@pytest.fixture
def shards(family_folder, tmp_path) -> Path:
    """A Mixtral in two shards with an index."""
    return sharded_copy(family_folder("mixtral"), tmp_path / "source")
