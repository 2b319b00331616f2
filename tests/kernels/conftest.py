"""The C++ kernels, as the tests of them take them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch

from resmoe_dist.kernels.cpu import operations as cpu_kernels
from resmoe_dist.kernels.cpu.build import load_kernels
from tests.kernels.problems import INSTRUCTION_SETS


@pytest.fixture(scope="module")
def kernels() -> Iterator[None]:
    """The kernels are there, and run on their best instruction set afterwards."""
    if os.environ.get("RESMOE_KERNELS") == "reference":
        pytest.skip("RESMOE_KERNELS=reference leaves the kernels out")
    assert load_kernels(), "the kernels cannot be built"
    yield
    cpu_kernels.use_instruction_set(cpu_kernels.instruction_sets()[0])


@pytest.fixture(scope="module", params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest, kernels: None) -> str:
    """Each one that this machine has, in use."""
    if request.param not in cpu_kernels.instruction_sets():
        pytest.skip(f"this machine has no {request.param}")
    cpu_kernels.use_instruction_set(request.param)
    return request.param


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """threads(n): PyTorch on n threads, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
