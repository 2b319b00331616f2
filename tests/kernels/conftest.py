"""Fixtures for the C++ kernels (built, on a chosen instruction set, with a number of threads), and
for the Triton kernels (interpreted, or on a GPU)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch

from resmoe_dist.kernels.cpu.backend import instruction_sets, use_instruction_set
from resmoe_dist.kernels.cpu.build import load_kernels
from tests.kernels.problems import INSTRUCTION_SETS
from tests.kernels.triton_runs import Run, gpu, interpreter


@pytest.fixture(scope="module")
def kernels() -> Iterator[None]:
    """The kernels are built; afterwards they use their fastest instruction set again."""
    if os.environ.get("RESMOE_KERNELS") == "reference":
        pytest.skip("RESMOE_KERNELS=reference leaves the kernels out")
    assert load_kernels(), "the kernels cannot be built"
    yield
    use_instruction_set(instruction_sets()[0])


@pytest.fixture(scope="module", params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest, kernels: None) -> str:
    """Each instruction set that this machine supports, in use."""
    if request.param not in instruction_sets():
        pytest.skip(f"this machine does not support {request.param}")
    use_instruction_set(request.param)
    return request.param


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """threads(n) sets PyTorch's number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session", params=["interpreted", *["compiled"] * torch.cuda.is_available()])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Runs functions of `triton_runs` in Triton's interpreter, or on the GPU."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if request.param == "compiled":
        yield gpu()
        return
    with interpreter() as interpreted:
        yield interpreted
