"""Fixtures shared by all tests: tiny models of every family, and compressed copies of them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from resmoe_dist.parallel.entry_point import quiet_libraries
from tests.models import FAMILIES, compress, save_family

quiet_libraries()
# `--hypothesis-profile few`, for slow runs such as those under a sanitizer.
settings.register_profile("few", max_examples=20)
# Background jobs of a shell ignore SIGINT and their children inherit that. Tests send SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Tests run on several workers at a time. More threads than cores would spin while they wait for
# one another.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(workers)))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory):
    """family_folder(name, fused=False): a randomly initialised model of a family, made once."""
    made: dict[tuple[str, bool], Path] = {}

    def make(name: str, fused: bool = False) -> Path:
        if (name, fused) not in made:
            folder = tmp_path_factory.mktemp(f"{name}-{'fused' if fused else 'separate'}")
            save_family(FAMILIES[name], folder, fused=fused)
            made[name, fused] = folder
        return made[name, fused]

    return make


@pytest.fixture(scope="session")
def embedded_source() -> Path:
    """The embedded Mixtral, trained once per user (RESMOE_CACHE moves the cache)."""
    from resmoe_dist.testing import cached_tiny_model

    return cached_tiny_model()


@pytest.fixture(scope="session")
def pristine(family_folder, tmp_path_factory):
    """A Mixtral in two groups per layer. Not to be changed."""
    folder = tmp_path_factory.mktemp("pristine") / "c"
    compress(family_folder("mixtral"), folder, groups=2)
    return folder
