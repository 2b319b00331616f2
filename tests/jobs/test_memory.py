"""Sizes as users write them, and room for a group's experts under a bound."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from resmoe_dist.errors import UserError
from resmoe_dist.jobs import memory_budget as memory
from resmoe_dist.jobs.memory_budget import ExpertStore, GroupMemory, resident_bytes
from resmoe_dist.sizes import parse_size

SIZES = {
    "1": 1,
    "1B": 1,
    "8GB": 8 * 10**9,
    "8gb": 8 * 10**9,
    "8G": 8 * 10**9,
    "512MiB": 512 * 2**20,
    "512mib": 512 * 2**20,
    "512Mi": 512 * 2**20,
    "3 KiB": 3 * 2**10,
    " 7 kB ": 7000,
    "1.5T": 1.5 * 10**12,
    "0.5TiB": 2**39,
    ".5K": 500,
    "2e9": 2 * 10**9,
    "2E9": 2 * 10**9,
    "2e3MB": 2 * 10**9,
}
NOT_SIZES = [
    "",
    " ",
    "0",
    "0GB",
    "0.4",
    "-1GB",
    "GB",
    "eight GB",
    "8XB",
    "8iB",
    "8GBs",
    "8 G B",
    "1..5GB",
    ".",
    "1,5GB",
    "8GB 8GB",
    "8e",
    "nan",
    "inf",
    "1e999",
    "1e308TB",
]


@pytest.mark.parametrize("text", SIZES)
def test_sizes_are_read_as_they_are_written(text):
    assert parse_size(text) == SIZES[text]


@pytest.mark.parametrize("text", NOT_SIZES)
def test_anything_else_is_a_user_error_that_repeats_it(text):
    with pytest.raises(UserError, match=re.escape(f"--max-memory {text}: not a size")):
        parse_size(text)


def test_what_is_allocated_counts_as_resident():
    before = resident_bytes()

    held = torch.ones(64 * 2**20, dtype=torch.uint8)

    assert held.nbytes * 0.9 <= resident_bytes() - before <= held.nbytes * 1.5


def test_a_group_takes_its_experts_and_an_expert_more_than_is_stored():
    need = GroupMemory.of(8, 100, 300, 2, stored=10**9, solves=False)

    assert need.experts == 8 * 100 * 300 * 2
    assert need.beside >= 10**9 + 10**9 / 8


def test_aligning_takes_the_matrix_of_a_solver_and_the_sum_of_the_experts():
    rows, columns = 20_000, 10_000

    need = GroupMemory.of(8, rows, columns, 2, stored=0, solves=True)

    assert need.beside >= 8 * rows * rows + 4 * rows * columns


def _bound(need: GroupMemory, room: float, monkeypatch: pytest.MonkeyPatch) -> int:
    """A bound that leaves the share `room` of the experts' bytes beside all else."""
    monkeypatch.setattr(memory, "resident_bytes", lambda: 10**9)
    return 10**9 + need.beside + int(room * need.experts)


SHAPE = (4, 50, 60)
NEED = GroupMemory.of(4, 50, 60, 2, stored=1000, solves=True)


def _is_in_a_file(tensor: torch.Tensor) -> bool:
    """Whether the kernel maps its memory from a file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split(maxsplit=5)
        start, stop = (int(end, 16) for end in span.split("-"))
        if start <= tensor.data_ptr() < stop:
            return ".experts-" in name
    raise AssertionError("not mapped")


@pytest.mark.parametrize("room", [None, 1.0, 2.0])
def test_where_there_is_memory_experts_are_held_in_it(monkeypatch, tmp_path, room):
    at_most = None if room is None else _bound(NEED, room, monkeypatch)

    found = ExpertStore(tmp_path, at_most).room(NEED, SHAPE, torch.bfloat16)

    assert (found.shape, found.dtype) == (SHAPE, torch.bfloat16)
    assert not _is_in_a_file(found)


@pytest.mark.parametrize("room", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_under_a_tight_bound_experts_are_held_in_a_file(monkeypatch, tmp_path, room, dtype):
    found = ExpertStore(tmp_path, _bound(NEED, room, monkeypatch)).room(NEED, SHAPE, dtype)

    assert (found.shape, found.dtype) == (SHAPE, dtype)
    assert _is_in_a_file(found)


def test_a_file_is_gone_from_its_folder_while_its_values_live(monkeypatch, tmp_path):
    store = ExpertStore(tmp_path, _bound(NEED, 0.5, monkeypatch))
    experts = torch.randn(SHAPE)

    found = [store.room(NEED, SHAPE, torch.float32) for _ in range(2)]
    for tensor, sign in zip(found, (1, -1), strict=True):
        tensor.copy_(sign * experts)

    assert not list(tmp_path.iterdir())
    assert torch.equal(found[0], experts)
    assert torch.equal(found[1], -experts)


def test_what_lies_in_a_file_does_not_count_as_resident(tmp_path):
    shape = (4, 4096, 4096)
    need = GroupMemory(experts=4 * 4096 * 4096, beside=0)
    store = ExpertStore(tmp_path, resident_bytes() + need.experts // 2)

    found = store.room(need, shape, torch.uint8)

    before = resident_bytes()
    found.fill_(1)
    assert resident_bytes() - before < need.experts / 10


def test_a_bound_that_not_even_a_file_meets_is_a_user_error_with_a_bound_that_would(
    monkeypatch, tmp_path
):
    least = _bound(NEED, 0.0, monkeypatch)

    with pytest.raises(UserError, match=r"--max-memory: a group of 4 experts takes") as caught:
        ExpertStore(tmp_path, least - 1).room(NEED, SHAPE, torch.bfloat16)

    assert not list(tmp_path.iterdir())
    figure = re.search(r"takes ([0-9.]+) (GiB) on each rank", str(caught.value))
    told = parse_size(figure[1] + figure[2])
    assert told == pytest.approx(least, rel=0.1)
    # Whoever does as told succeeds.
    ExpertStore(tmp_path, told).room(NEED, SHAPE, torch.bfloat16)
