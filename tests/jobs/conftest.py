"""Fixtures for tests of whole compress runs: a source of two shards, and its expected output."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.checkpoints.damage import edit_text, sharded_copy
from tests.jobs.refits import save_source
from tests.jobs.runs import contents, run


@pytest.fixture
def one_thread():
    """Set torch to one thread: on matrices this small, more threads only slow a test down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def sharded_source(family_folder, tmp_path_factory):
    """A Mixtral in two shards with tokenizer files beside it."""
    folder = sharded_copy(family_folder("mixtral"), tmp_path_factory.mktemp("sharded") / "source")
    edit_text(folder / "tokenizer.json", "{}")
    edit_text(folder / "merges.txt", "#")
    return folder


@pytest.fixture(scope="session")
def expected(sharded_source, tmp_path_factory):
    """Name -> content of all files that an uninterrupted run on `sharded_source` writes."""
    folder = tmp_path_factory.mktemp("expected") / "c"
    run(sharded_source, folder)
    return contents(folder)


@pytest.fixture(scope="session")
def three_layers(tmp_path_factory):
    """three_layers(family): a model of three MoE layers, made once."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            save_source(family, made[family])
        return made[family]

    return make
