"""The memory that a group takes, and where its experts are held under a bound."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from resmoe_dist.errors import UserError
from resmoe_dist.jobs import memory_budget
from resmoe_dist.jobs.memory_budget import ExpertStore, GroupMemory, resident_bytes
from resmoe_dist.sizes import parse_size


def test_allocated_memory_is_resident():
    before = resident_bytes()

    tensor = torch.ones(64 * 2**20, dtype=torch.uint8)

    assert tensor.nbytes * 0.9 <= resident_bytes() - before <= tensor.nbytes * 1.5


def test_encoding_takes_the_experts_and_one_more_than_is_stored():
    need = GroupMemory.estimate(8, 100, 300, 2, stored_bytes=10**9, aligns=False)

    assert need.expert_bytes == 8 * 100 * 300 * 2
    assert need.working_bytes >= 10**9 + 10**9 / 8


def test_aligning_takes_a_solver_matrix_and_the_sum_of_the_experts():
    rows, columns = 20_000, 10_000

    need = GroupMemory.estimate(8, rows, columns, 2, stored_bytes=0, aligns=True)

    assert need.working_bytes >= 8 * rows * rows + 4 * rows * columns


RESIDENT = 10**9


def _bound(need: GroupMemory, share: float) -> int:
    """A bound that leaves room for `share` of the experts' bytes."""
    return RESIDENT + need.working_bytes + int(share * need.expert_bytes)


@pytest.fixture
def fixed_resident_bytes(monkeypatch):
    """Let this process appear to use `RESIDENT` bytes of memory."""
    monkeypatch.setattr(memory_budget, "resident_bytes", lambda: RESIDENT)


SHAPE = (4, 50, 60)
NEED = GroupMemory.estimate(4, 50, 60, 2, stored_bytes=1000, aligns=True)


def _is_mapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor's memory is mapped from a file of the store."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split(maxsplit=5)
        start, stop = (int(end, 16) for end in span.split("-"))
        if start <= tensor.data_ptr() < stop:
            return ".experts-" in name
    raise AssertionError("the tensor is in no mapping")


@pytest.mark.usefixtures("fixed_resident_bytes")
@pytest.mark.parametrize("share", [None, 1.0, 2.0])
def test_experts_are_in_memory_if_they_fit(tmp_path, share):
    max_bytes = None if share is None else _bound(NEED, share)

    found = ExpertStore(tmp_path, max_bytes).allocate(NEED, SHAPE, torch.bfloat16)

    assert (found.shape, found.dtype) == (SHAPE, torch.bfloat16)
    assert not _is_mapped(found)


@pytest.mark.usefixtures("fixed_resident_bytes")
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_experts_are_in_a_file_under_a_tight_bound(tmp_path, share, dtype):
    found = ExpertStore(tmp_path, _bound(NEED, share)).allocate(NEED, SHAPE, dtype)

    assert (found.shape, found.dtype) == (SHAPE, dtype)
    assert _is_mapped(found)


@pytest.mark.usefixtures("fixed_resident_bytes")
def test_file_is_unlinked_while_its_values_remain(tmp_path):
    store = ExpertStore(tmp_path, _bound(NEED, 0.5))
    experts = torch.randn(SHAPE)

    found = [store.allocate(NEED, SHAPE, torch.float32) for _ in range(2)]
    for tensor, sign in zip(found, (1, -1), strict=True):
        tensor.copy_(sign * experts)

    assert not list(tmp_path.iterdir())
    assert torch.equal(found[0], experts)
    assert torch.equal(found[1], -experts)


def test_mapped_experts_are_not_resident(tmp_path):
    shape = (4, 4096, 4096)
    need = GroupMemory(expert_bytes=4 * 4096 * 4096, working_bytes=0)
    store = ExpertStore(tmp_path, resident_bytes() + need.expert_bytes // 2)

    found = store.allocate(need, shape, torch.uint8)

    before = resident_bytes()
    found.fill_(1)
    assert resident_bytes() - before < need.expert_bytes / 10


@pytest.mark.usefixtures("fixed_resident_bytes")
def test_bound_that_is_too_small_even_with_a_file_is_refused_with_one_that_suffices(tmp_path):
    least = _bound(NEED, 0.0)

    with pytest.raises(UserError, match=r"--max-memory: a group of 4 experts takes") as caught:
        ExpertStore(tmp_path, least - 1).allocate(NEED, SHAPE, torch.bfloat16)

    assert not list(tmp_path.iterdir())
    figure = re.search(r"takes ([0-9.]+) (GiB) on each rank", str(caught.value))
    suggested = parse_size(figure[1] + figure[2])
    assert suggested == pytest.approx(least, rel=0.1)
    # The suggested bound works.
    ExpertStore(tmp_path, suggested).allocate(NEED, SHAPE, torch.bfloat16)
