"""Searches for paths through a trellis: in PyTorch, and in C++ with vectors of every length."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from resmoe_dist.codecs.moments import inverse_root
from resmoe_dist.codecs.trellis import (
    FREE,
    search_beam_in_torch,
    search_in_torch,
)
from resmoe_dist.kernels.cpu.build import load_kernels

Search = Callable[..., Tensor]
LANES = (4, 8, 16)


def _in_cpp(name: str, lanes: int) -> Search:
    """A search with vectors of so many floats, if the machine has them; 0 for the longest ones."""
    assert load_kernels()

    def search(*tensors: Tensor, bits: int, coded: int, **width: int) -> Tensor:
        operation = getattr(torch.ops.resmoe, name)
        try:
            return operation(*tensors, bits, coded, *width.values(), lanes)
        except RuntimeError as error:
            if "does not have vectors" in str(error):
                pytest.skip(str(error).splitlines()[0])
            raise

    return search


_path = partial(_in_cpp, "search_path")
_beam = partial(_in_cpp, "search_beam")


@pytest.fixture(params=["torch", *LANES])
def search(request) -> Search:
    """Viterbi's searches."""
    return search_in_torch if request.param == "torch" else _path(request.param)


@pytest.fixture(params=["torch", *LANES])
def beam(request) -> Search:
    return search_beam_in_torch if request.param == "torch" else _beam(request.param)


def _paths(window_bits: int, bits: int, entries: int, before: int) -> Iterator[list[int]]:
    """The windows of all paths that may follow a window."""
    new_bits = window_bits - bits
    for first in range(1 << window_bits):
        if before != FREE and first % (1 << new_bits) != before >> bits:
            continue
        for symbols in itertools.product(range(1 << bits), repeat=entries - 1):
            path = [first]
            for symbol in symbols:
                path.append(path[-1] >> bits | symbol << new_bits)
            yield path


@pytest.mark.parametrize("bits", [1, 2])
def test_the_search_finds_the_best_path(search, bits):
    """Against all paths through a trellis of 16 windows."""
    torch.manual_seed(bits)
    window_bits, entries = 4, 5
    values, target = torch.randn(1 << window_bits), torch.randn(3, entries)
    before = torch.tensor([FREE, 9, 0], dtype=torch.int32)
    found = search(target, values, before, bits=bits, coded=3)
    for row in range(3):
        best = min(
            _paths(window_bits, bits, entries, int(before[row])),
            key=lambda path, row=row: float((values[path] - target[row]).square().sum()),
        )
        assert found[row].tolist() == best[:3]


# Under cross terms


@pytest.mark.parametrize("before", [FREE, 9])
def test_a_wide_beam_finds_the_best_path_under_cross_terms(beam, before):
    """Against all paths, with the quadratic form that the feedback stands for."""
    torch.manual_seed(11)
    window_bits, entries, bits = 4, 4, 2
    values, weights = torch.randn(1 << window_bits), torch.randn(1, entries)
    scales = torch.tensor([[1.0, 1.0, 0.5, 0.5]])
    moment = _moment(entries)
    # With Uᵀ U = S⁻¹, Σ (e_j / U_jj)² after feedback is Δ S Δᵀ.
    damped = (moment / moment.diagonal().mean() + 0.01 * torch.eye(entries)).double()

    found = beam(
        weights,
        scales,
        inverse_root(moment, 0.01),
        values,
        torch.tensor([before], dtype=torch.int32),
        bits=bits,
        coded=entries,
        width=4096,
    )

    def error(path: list[int]) -> float:
        delta = (weights[0] - scales[0] * values[path]).double()
        return float(delta @ damped @ delta)

    assert found.tolist() == [min(_paths(window_bits, bits, entries, before), key=error)]


def _moment(hidden: int) -> Tensor:
    """Of inputs that are far from independent."""
    inputs = torch.randn(400, hidden) @ torch.randn(hidden, hidden)
    return inputs.T @ inputs / 400


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("width", [1, 5, 23, 64])
def test_the_beam_is_the_reference_s(lanes, bits, width):
    """Among integers nothing is rounded, and many costs are equal."""
    for seed in range(6):
        torch.manual_seed(seed)
        entries, rows = int(torch.randint(1, 45, ())), 3
        integers = partial(torch.randint, -6, 7)
        windows = 1 << (bits + 1 + seed)
        tensors = (
            integers((rows, entries)).float(),
            (torch.rand(rows, entries) < 0.8).float(),  # scales
            (integers((entries, entries)) / 6).trunc().triu(1) + torch.eye(entries),  # U
            integers((windows,)).float(),  # values
            torch.randint(FREE, windows, (rows,)).int(),  # windows before
        )
        options = {"bits": bits, "coded": (entries + 1) // 2, "width": width}
        expected = search_beam_in_torch(*tensors, **options)
        assert torch.equal(_beam(lanes)(*tensors, **options), expected)


def _correlated_rows(rows: int, entries: int) -> tuple[Tensor, ...]:
    """Noise, scales, U, values of 2^10 windows, and no windows before."""
    values = torch.randn(1 << 10)
    return (
        torch.randn(rows, entries),
        torch.rand(rows, 1).expand(-1, entries) + 0.5,
        inverse_root(_moment(entries), 0.01),
        values,
        torch.full((rows,), FREE, dtype=torch.int32),
    )


def _cost(tensors: tuple[Tensor, ...], path_RC: Tensor) -> Tensor:
    """[R] Σ (e_j / U_jj)² of whole rows, in float64."""
    weights_RC, scales_RC, root_CC, values, _ = (tensor.double() for tensor in tensors)
    delta_RC = weights_RC - scales_RC * values[path_RC.long()]
    return torch.linalg.solve_triangular(root_CC, delta_RC, upper=True, left=False).square().sum(1)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_beam_loses_what_the_reference_loses(bits):
    """Rounding may part the paths of a few rows."""
    torch.manual_seed(bits)
    tensors = _correlated_rows(24, 70)
    options = {"bits": bits, "coded": 70, "width": 32}
    found = _cost(tensors, _beam(0)(*tensors, **options))
    expected = _cost(tensors, search_beam_in_torch(*tensors, **options))
    assert ((found - expected).abs() < 1e-4 * expected).float().mean() > 0.8
    torch.testing.assert_close(found.mean(), expected.mean(), rtol=0.02, atol=0)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("threads", [1, 3])
def test_all_vectors_and_threads_give_the_same_codes(bits, lanes, threads):
    torch.manual_seed(bits)
    tensors = _correlated_rows(40, 90)
    target, values, before = tensors[0], *tensors[3:]
    options = {"bits": bits, "coded": 80}
    path = _path(4)(target, values, before, **options)
    beam = _beam(4)(*tensors, **options, width=48)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(_path(lanes)(target, values, before, **options), path)
        assert torch.equal(_beam(lanes)(*tensors, **options, width=48), beam)
    finally:
        torch.set_num_threads(threads_before)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("number", [float("nan"), float("inf"), 3e38])
def test_the_beam_survives_numbers_that_are_not_finite(lanes, number):
    tensors = _correlated_rows(4, 40)
    tensors[0][:, 17] = number
    found = _beam(lanes)(*tensors, bits=2, coded=40, width=16)
    assert 0 <= int(found.min()) <= int(found.max()) < 1 << 10


def test_the_beam_refuses_what_it_cannot_do():
    tensors = _correlated_rows(2, 8)
    with pytest.raises(RuntimeError, match="no search for 5 bits"):
        _beam(0)(*tensors, bits=5, coded=8, width=4)
    with pytest.raises(RuntimeError, match="too many paths: 65536"):
        _beam(0)(*tensors, bits=2, coded=8, width=1 << 16)
    with pytest.raises(RuntimeError, match="shapes contradict"):
        _beam(0)(*tensors, bits=2, coded=9, width=4)
    with pytest.raises(RuntimeError, match="vectors of 5 floats"):
        torch.ops.resmoe.search_beam(*tensors, 2, 8, 4, 5)
    with pytest.raises(RuntimeError, match="power of two"):
        _beam(0)(*tensors[:3], tensors[3][:1000], tensors[4], bits=2, coded=8, width=4)
