"""Fixtures of the checkpoint tests: a compressed Mixtral, and a copy to damage."""

from __future__ import annotations

import pytest

from tests.checkpoints.damage import copy_of
from tests.models import compress


@pytest.fixture(scope="session")
def pristine(family_folder, tmp_path_factory):
    """A Mixtral in two groups per layer. Not to be changed."""
    folder = tmp_path_factory.mktemp("pristine") / "c"
    compress(family_folder("mixtral"), folder, groups=2)
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    """A copy of `pristine`."""
    return copy_of(pristine, tmp_path / "c")
