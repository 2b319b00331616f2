"""Problems for the Triton backend, and running them in Triton's interpreter or on a GPU.

Triton decides when it is imported whether it interprets. So the interpreter gets its own process.

Legend: N routed copies, S rows, D columns, G centres, P bytes of a bitmap row.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from resmoe_dist.codecs import DenseMatrix, EncodedMatrix, PrunedMatrix, QuantizedMatrix
from resmoe_dist.kernels import LayerWeights
from resmoe_dist.kernels.half_products import PRODUCT_BYTES, HalfProductBackend
from tests.kernels.problems import (
    ROUNDING,
    Problem,
    assert_sums,
    pruned,
    sums_in,
    sums_out,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# The interpreter cuts off bits where it rounds a sum to bfloat16: up to one unit in the last place.
CUT = 2**-7


# --- What runs in the interpreter or on the GPU ---


def backend_of(layer: LayerWeights, product_bytes: int = PRODUCT_BYTES) -> HalfProductBackend:
    """The Triton backend for the layer's codec, on any device."""
    from resmoe_dist.kernels.triton.backend import TritonBackend
    from resmoe_dist.kernels.triton.quantized_backend import QuantizedTritonBackend

    is_quantized = isinstance(layer.residuals[0], QuantizedMatrix)
    return (QuantizedTritonBackend if is_quantized else TritonBackend)(layer, product_bytes)


def half_products(problem: Problem, part: str) -> tuple[Tensor, Tensor]:
    backend = backend_of(problem.layer)
    return problem.project_in(backend, part), problem.project_out(backend, part)


def mlp(problem: Problem, share_center: bool, product_bytes: int = PRODUCT_BYTES) -> Tensor:
    backend = backend_of(problem.layer, product_bytes)
    return backend.mlp(problem.routed, share_center=share_center)


def restore(
    layer: LayerWeights, out_RC: Tensor, expert: int = 0, first_row: int = 0, first_column: int = 0
) -> Tensor:
    """`out_RC`, as a view of the same memory as the one given."""
    backend_of(layer).restore(expert, out_RC, first_row, first_column)
    return out_RC


@dataclass(frozen=True)
class Run:
    """Calls one of the functions above, and returns what it returns on the CPU.

    is_interpreted: whether Triton's interpreter runs the kernels.
    """

    call: Callable[..., Any]
    is_interpreted: bool

    def __call__(self, function: Callable[..., Any], *args: object, **options: object) -> Any:
        return self.call(function, *args, **options)


@contextmanager
def interpreter() -> Iterator[Run]:
    """Runs in a process in which Triton interprets."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(int).result()

        def call(*args: object, **options: object) -> Any:
            # By value: torch's way to send tensors needs the sender alive when they are opened.
            return pickle.loads(pool.submit(_call_pickled, pickle.dumps((args, options))).result())

        yield Run(call, is_interpreted=True)


def gpu() -> Run:
    """Runs on the GPU."""
    return Run(
        lambda function, *args, **options: moved(
            function(*moved(args, "cuda"), **moved(options, "cuda")), "cpu"
        ),
        is_interpreted=False,
    )


def _call_pickled(message: bytes) -> bytes:
    (function, *args), options = pickle.loads(message)
    return pickle.dumps(function(*args, **options))


def moved(value: Any, device: str) -> Any:
    """Copies of all tensors in a value on a device, with the memory around views."""
    if isinstance(value, Tensor):
        return memory_of(value).to(device).as_strided(value.shape, *_place(value))
    if isinstance(value, EncodedMatrix):
        return type(value)((value.rows, value.columns), moved(value.tensors(), device), value.dtype)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    if is_dataclass(value):
        parts = {field.name: getattr(value, field.name) for field in fields(value)}
        return replace(value, **moved(parts, device))
    if isinstance(value, Problem):
        return Problem(*(moved(item, device) for item in value))
    if isinstance(value, tuple):
        return tuple(moved(item, device) for item in value)
    return value


def _place(view: Tensor) -> tuple[tuple[int, ...], int]:
    return view.stride(), int(view.storage_offset())


def memory_of(view: Tensor) -> Tensor:
    """All of the memory that a tensor is a view of."""
    return view.as_strided((view.untyped_storage().nbytes() // view.itemsize,), (1,), 0)


# --- Problems ---

CENTER_LAYOUTS = ("dense", "columns", "strided", "transposed")


def lay_out(
    problem: Problem, centers: tuple[str, ...] = ("dense",), whole_words: tuple[bool, ...] = ()
) -> Problem:
    """The same problem with other layouts in memory, for one centre or residual after the other.

    whole_words: whether a bitmap can be read four bytes at a time. Without layouts for bitmaps they
    stay as they are.
    """
    layer = problem.layer
    placed = tuple(
        DenseMatrix.of(_placed_center(center.decode(), centers[i % len(centers)]))
        for i, center in enumerate(layer.centers)
    )
    residuals = layer.residuals
    if whole_words:
        residuals = tuple(
            _placed_bitmap(matrix, whole_words[i % len(whole_words)])
            for i, matrix in enumerate(residuals)
        )
    return problem._replace(layer=replace(layer, centers=placed, residuals=residuals))


def _placed_center(center_SD: Tensor, layout: str) -> Tensor:
    S, D = center_SD.shape
    memory = center_SD.new_full((S + 1, 2 * D + 3), torch.nan)
    view = {
        "dense": memory.flatten()[: S * D].view(S, D),
        "columns": memory[1:, 2 : D + 2],
        "strided": memory.flatten()[: 2 * S * D].view(S, 2 * D)[:, ::2],
        "transposed": memory.flatten()[: S * D].view(D, S).T,
    }[layout]
    return view.copy_(center_SD)


def _placed_bitmap(matrix: EncodedMatrix, whole_words: bool) -> PrunedMatrix:
    assert isinstance(matrix, PrunedMatrix)
    packed = matrix.bitmap
    S, P = packed.shape
    if whole_words:
        bitmap = packed.new_zeros(S, -(-P // 4) * 4)
        bitmap[:, :P] = packed
    else:
        # Bits around the bitmap are set, so that reading them would find values.
        memory = packed.new_full((S + 1, P + 2 - P % 2 + 1), 255)
        bitmap = memory[1:, 1 : P + 1].copy_(packed)
    return PrunedMatrix(
        (matrix.rows, matrix.columns), matrix.tensors() | {"bitmap": bitmap}, matrix.dtype
    )


def with_dropped_copies(problem: Problem, count: int) -> Problem:
    """The same problem with copies after the last offset; their activations are NaN."""
    routed, S = problem.routed, problem.h_NS.shape[1]
    token_n = torch.arange(count) % max(1, len(routed.x_RH))
    return problem._replace(
        routed=replace(
            routed,
            token_N=torch.cat([routed.token_N, token_n]),
            weight_N=torch.cat([routed.weight_N, torch.zeros(count)]),
        ),
        h_NS=torch.cat([problem.h_NS, problem.h_NS.new_full((count, S), torch.nan)]),
    )


def check_half_products(run: Run, problem: Problem, part: str) -> None:
    """Compare both products with float64.

    part: "center" needs as many centres as experts. Centre i then gets expert i's copies.
    """
    exact, exact_part = problem, part
    if part == "center":
        # The same numbers as experts without residuals.
        layer = problem.layer
        G = layer.num_experts
        assert len(layer.centers) == G
        mask = np.zeros((layer.rows, layer.centers[0].columns), bool)
        empty = pruned(mask, torch.empty(0, dtype=layer.dtype))
        layer = replace(layer, residuals=(empty,) * G, center_of=tuple(range(G)))
        exact, exact_part = problem._replace(layer=layer), "whole"
    cuts = (
        run.is_interpreted
        and part == "whole"
        and problem.layer.centers
        and problem.layer.dtype == torch.bfloat16
    )

    found_in, found_out = run(half_products, problem, part)

    rounding = CUT if cuts else ROUNDING
    assert_sums(found_in, sums_in(exact, exact_part), rounding)
    assert_sums(found_out, sums_out(exact, exact_part), rounding)
