"""Triton kernels against the reference: by Triton's interpreter, and on a GPU where there is one.

Triton decides when it is imported whether it interprets. So a process of its own does that here,
and the one that runs the tests is left as it is.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from resmoe_dist.kernels.rows import CompressedRows
from torch import Tensor

from resmoe_dist.codecs.bitmap import pack_bitmap
from resmoe_dist.kernels import reference

triton = pytest.importorskip("triton", reason="Triton is not installed")
GPUTarget = pytest.importorskip("triton.backends.compiler").GPUTarget

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Error of a sum of products, relative to the sum of their magnitudes.
ROUNDING = 1e-5
# Where the interpreter makes bfloat16 of a sum, it cuts bits off: up to one unit in the last place.
CUT = 2**-7

Run = Callable[..., Tensor]


def call(name: str, *args, device: str = "cpu") -> Tensor:
    """What a kernel returns, or the memory that `restore` wrote to, from tensors on a device."""
    from resmoe_dist.kernels import triton_kernels

    args = [_moved(arg, device) for arg in args]
    result = getattr(triton_kernels, name)(*args)
    return (_memory(args[1]) if name == "restore" else result).cpu()


def _memory(view: Tensor) -> Tensor:
    """All of the memory that a tensor is a view of."""
    return view.as_strided((view.untyped_storage().nbytes() // view.itemsize,), (1,), 0)


def _moved(arg, device: str):
    if isinstance(arg, list):
        return [_moved(item, device) for item in arg]
    if isinstance(arg, CompressedRows):
        return CompressedRows(*(_moved(item, device) for item in vars(arg).values()))
    if not isinstance(arg, Tensor):
        return arg
    # With the memory around a view, which `to` would leave behind.
    return _memory(arg).to(device).as_strided(arg.shape, arg.stride(), arg.storage_offset())


def _call_pickled(message: bytes) -> bytes:
    # By value: torch's own way to send tensors needs the sender alive when they are opened.
    return pickle.dumps(call(*pickle.loads(message)))


@pytest.fixture(scope="module", params=["interpreted", *["compiled"] * torch.cuda.is_available()])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """`call`, in a process where Triton interprets, or on the GPU."""
    if request.param == "compiled":
        yield partial(call, device="cuda")
        return
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(int).result()
        yield lambda *args: pickle.loads(pool.submit(_call_pickled, pickle.dumps(args)).result())


def is_interpreted(run: Run) -> bool:
    return not isinstance(run, partial)


@dataclass(frozen=True)
class Job:
    """What the rows of a job are like.

    parts: "center", "residual" or "both". center: how it lies in memory. whole_words: the bitmap
    can be read four bytes at a time.
    """

    parts: str = "both"
    keep: float = 0.3
    wide_offsets: bool = False
    center: str = "dense"
    whole_words: bool = False

    def rows(self, S: int, D: int, dtype: torch.dtype) -> CompressedRows:
        center = bitmap = values = offsets = None
        if self.parts != "residual":
            memory = torch.randn(S + 1, 2 * D + 3).to(dtype)
            center = {
                "dense": memory.flatten()[: S * D].view(S, D),
                "columns": memory[1:, 2 : D + 2],
                "apart": memory.flatten()[: 2 * S * D].view(S, 2 * D)[:, ::2],
                "transposed": memory.flatten()[: S * D].view(D, S).T,
            }[self.center]
        if self.parts != "center":
            mask_SD = torch.rand(S, D) < self.keep
            values = torch.randn(int(mask_SD.sum())).to(dtype)
            offsets = torch.zeros(S + 1, dtype=torch.int64 if self.wide_offsets else torch.int32)
            offsets[1:] = mask_SD.sum(1).cumsum(0)
            packed = pack_bitmap(mask_SD)
            P = packed.shape[1]
            # Bits around the bitmap are set, so that who reads them finds values.
            memory = packed.new_full((S + 1, P + 2 - P % 2 + 1), 255)
            bitmap = memory[1:, 1 : P + 1].copy_(packed)
            if self.whole_words:
                bitmap = packed.new_zeros(S, math.ceil(P / 4) * 4)
                bitmap[:, :P] = packed
        return CompressedRows(center, bitmap, values, offsets)


@dataclass(frozen=True)
class Products:
    """The arguments of `project_in` and `project_out`; tensors are drawn from `seed`."""

    jobs: tuple[Job, ...]
    counts: tuple[int, ...]
    S: int = 5
    H: int = 40
    inputs: int = 2
    extra_columns: int = 0
    dtype: torch.dtype = torch.float32
    token_dtype: torch.dtype | None = None
    tokens: int = 5
    seed: int = 0

    def arguments(self) -> dict[str, tuple]:
        """By the name of the operation."""
        torch.manual_seed(self.seed)
        D = (self.inputs + 1) * self.H + self.extra_columns
        jobs = [job.rows(self.S, D, self.dtype) for job in self.jobs]
        N, counts = sum(self.counts), list(self.counts)
        token_N = torch.randint(self.tokens, (N,))
        dtype = self.token_dtype or self.dtype
        x_TH, h_NS = torch.randn(self.tokens, self.H), torch.randn(N, self.S)
        common = (token_N, counts, jobs, self.inputs)
        return {
            "project_in": (x_TH.to(dtype), *common),
            "project_out": (h_NS.to(dtype), *common, self.tokens, self.H),
        }

    def check(self, run: Run) -> None:
        """Compare both operations with the reference."""
        adds = any(job.parts == "both" for job in self.jobs)
        cut = adds and self.dtype == torch.bfloat16 and is_interpreted(run)
        for name, args in self.arguments().items():
            operation = getattr(reference, name)
            bound = (CUT if cut else ROUNDING) * operation(*(_magnitudes(arg) for arg in args))

            result = run(name, *args)

            assert result.dtype == torch.float32
            excess = (result - operation(*args)).abs() - bound
            assert (excess <= 0).all(), f"{name}: above the bound by {excess.max()}"


def _magnitudes(arg):
    """Absolute values: their products are the magnitudes of those of the arguments."""
    if isinstance(arg, list):
        return [_magnitudes(item) for item in arg]
    if isinstance(arg, CompressedRows):
        return CompressedRows(*(_magnitudes(item) for item in vars(arg).values()))
    return arg.abs() if isinstance(arg, Tensor) and arg.is_floating_point() else arg


JOBS = st.builds(
    Job,
    parts=st.sampled_from(["both", "center", "residual"]),
    keep=st.sampled_from([0.0, 0.3, 1.0]),
    wide_offsets=st.booleans(),
    center=st.sampled_from(["dense", "columns", "apart", "transposed"]),
    whole_words=st.booleans(),
)


@st.composite
def products(draw: st.DrawFn) -> Products:
    jobs = draw(st.lists(JOBS, min_size=1, max_size=4))
    most = draw(st.sampled_from([1, 2, 5]))
    return Products(
        jobs=tuple(jobs),
        counts=tuple(draw(st.integers(0, most)) for _ in jobs),
        S=draw(st.integers(1, 6)),
        H=draw(st.sampled_from([1, 5, 8, 31, 32, 33, 64, 130])),
        inputs=draw(st.integers(1, 2)),
        extra_columns=draw(st.integers(0, 2)),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


@given(products())
@settings(deadline=None, max_examples=25)
def test_products_equal_the_reference(run, products):
    products.check(run)


MIXED = (Job("center"), Job("residual"), Job("both"), Job("residual", wide_offsets=True))


BFLOAT16 = {"dtype": torch.bfloat16}
SIZES = {
    "columns in several tiles": Products(MIXED, (1, 1, 0, 2), S=3, H=1100),
    "columns in several tiles, many copies": Products(MIXED, (9, 1, 0, 2), S=3, H=550, **BFLOAT16),
    "rows in several spans": Products(MIXED[1:3], (1, 2), S=70, inputs=1, **BFLOAT16),
    "rows in several spans, many copies": Products(MIXED[1:3], (20, 7), S=70),
    "spans in several rounds": Products(MIXED[1:2], (3,), S=600, H=9, inputs=1),
    "copies in several blocks": Products(MIXED, (33, 0, 70, 3), **BFLOAT16),
    "copies in several rounds": Products(MIXED[1:3], (700, 400), S=1, H=3, inputs=1),
    "tokens without a copy": Products(MIXED, (1, 1, 1, 1), tokens=30),
    "no copies": Products(MIXED, (0, 0, 0, 0)),
}


@pytest.mark.parametrize("size", SIZES)
def test_products_of_every_size_equal_the_reference(run, size):
    SIZES[size].check(run)


@pytest.mark.parametrize("counts", [(2, 1), (9, 3)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_tokens_are_not_rounded_to_the_dtype_of_the_rows(run, counts, dtype):
    Products(MIXED[:2], counts, dtype=dtype, token_dtype=torch.float32).check(run)


@pytest.mark.parametrize("counts", [(2, 1), (9, 3)])
def test_equal_calls_give_equal_bits(run, counts):
    for name, args in Products(MIXED[1:3], counts, S=20).arguments().items():
        assert torch.equal(run(name, *args), run(name, *args))


@pytest.mark.parametrize("counts", [(2, 1), (9, 3)])
def test_no_entry_of_one_projection_reaches_another(run, counts):
    # H is no multiple of a word: entries of two projections share one.
    bounds = [49, 50, 99, 100, 149, 150]
    jobs = (Job("residual", keep=1.0), Job("both", keep=1.0))
    arguments = Products(jobs, counts, S=6, H=50, extra_columns=2).arguments()
    for rows in arguments["project_in"][3]:
        for i, column in enumerate(bounds):
            rows.values[152 * i + column] = math.inf
    for name, args in arguments.items():
        expected = getattr(reference, name)(*args)
        assert expected.isfinite().any() and not expected.isfinite().all()
        result = run(name, *args)

        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_no_jobs_have_no_products(run):
    x_TH, token_N = torch.randn(3, 8), torch.zeros(0, dtype=torch.int64)

    assert run("project_in", x_TH, token_N, [], [], 2).shape == (0, 0)
    result = run("project_out", torch.zeros(0, 4), token_N, [], [], 2, 3, 8)
    assert torch.equal(result, torch.zeros(3, 8))


@given(
    JOBS,
    st.sampled_from(DTYPES),
    st.integers(1, 9),
    st.sampled_from([(7, 0, 7), (64, 0, 64), (99, 33, 65), (99, 97, 2), (160, 32, 64), (70, 5, 1)]),
    st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=20)
def test_restored_rows_equal_the_reference(run, job, dtype, S, columns, seed):
    torch.manual_seed(seed)
    D, first_column, C = columns
    rows = job.rows(S, D, dtype)
    # What lies around the rows in memory has to stay as it is.
    expected = torch.full((S + 2, C + 3), 7.0, dtype=dtype)
    memory = expected.clone()
    reference.restore(rows, expected[1:-1, 2:-1], first_column)

    result = run("restore", rows, memory[1:-1, 2:-1], first_column).view_as(expected)

    cut = job.parts == "both" and dtype == torch.bfloat16 and is_interpreted(run)
    torch.testing.assert_close(result, expected, rtol=CUT if cut else 0, atol=0)


@pytest.mark.parametrize("first_column", [0, 20, 2500])
def test_long_rows_are_restored_from_both_ends(run, first_column):
    rows = Job().rows(5, 3001, torch.float32)
    expected = torch.empty(5, 3001 - first_column)
    reference.restore(rows, expected, first_column)

    result = run("restore", rows, torch.empty_like(expected), first_column)

    assert torch.equal(result.view_as(expected), expected)


def test_rows_are_restored_by_columns(run):
    rows = Job().rows(5, 100, torch.float32)
    expected = torch.empty(5, 100)
    reference.restore(rows, expected)

    result = run("restore", rows, torch.empty(100, 5).T)

    assert torch.equal(result.view(100, 5).T, expected)


def test_some_rows_are_restored_with_the_values_of_all(run):
    rows = Job(keep=0.5).rows(9, 77, torch.float32)
    expected = torch.empty(9, 77)
    reference.restore(rows, expected)
    some = CompressedRows(rows.center[4:7], rows.bitmap[4:7], rows.values, rows.row_offsets[4:8])

    result = run("restore", some, torch.empty(3, 77)).view(3, 77)

    assert torch.equal(result, expected[4:7])


def test_both_halves_of_wide_offsets_count(run):
    rows = Job("residual", wide_offsets=True).rows(5, 77, torch.float32)
    expected = torch.empty(5, 77)
    reference.restore(rows, expected)
    # Only a negative number has a second half that counts and no values in the gigabytes.
    shifted = CompressedRows(None, rows.bitmap, rows.values[3:], rows.row_offsets - 3)

    result = run("restore", shifted, torch.empty(5, 77)).view(5, 77)

    assert torch.equal(result, expected)


def test_nothing_is_restored_into_no_columns(run):
    assert run("restore", Job().rows(3, 8, torch.float32), torch.empty(3, 0)).numel() == 0


def test_sums_are_rounded_to_their_own_dtype_before_that_of_the_result(run):
    rows = Job().rows(5, 33, torch.float16)
    expected = torch.empty(5, 33)
    reference.restore(rows, expected)

    result = run("restore", rows, torch.empty(5, 33)).view(5, 33)

    assert torch.equal(result, expected)
    assert torch.equal(result, result.half().float())


class H100:
    """As much of a driver as Triton asks in order to compile."""

    # Kernels are kept by device: not with those of a real one.
    get_current_device = staticmethod(lambda: 1000)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """PTX of the kernels that are launched: they are compiled for an H100, and not run."""
    if "nvidia" not in triton.backends.backends:
        pytest.skip("this Triton does not compile for NVIDIA GPUs")
    compiled = {}
    run = triton.JITFunction.run

    def compile_only(kernel: triton.JITFunction, *args, **options) -> None:
        binary = run(kernel, *args, **options | {"warmup": True})
        assert binary.asm["cubin"]
        compiled[kernel.__name__] = binary.asm["ptx"]

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", H100())
    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    return compiled


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="Triton interprets in this process")
@pytest.mark.parametrize(
    "products",
    [
        Products((Job("center"), Job("residual", whole_words=True)), (1, 2), H=64, **BFLOAT16),
        Products((Job("center"), Job("residual", whole_words=True)), (9, 3), H=64, **BFLOAT16),
        Products((Job("both", center="columns", wide_offsets=True),), (1,), H=33, **BFLOAT16),
        Products((Job("both", whole_words=True),), (40,), H=64, dtype=torch.float16),
        Products((Job("residual"),), (3,), H=1, inputs=1),
    ],
    ids=["few copies", "many copies", "unaligned", "float16", "float32"],
)
def test_kernels_compile_for_a_gpu_without_one(compiled, products):
    from resmoe_dist.kernels import triton_kernels

    arguments = products.arguments()
    rows = arguments["project_in"][3][-1]
    for name, args in arguments.items():
        getattr(triton_kernels, name)(*args)
    triton_kernels.restore(rows, torch.empty(products.S, products.H, dtype=products.dtype))

    names = ["_project_in_kernel", "_project_out_kernel", "_combine_kernel", "_restore_kernel"]
    assert list(compiled) == names
    # What the kernels are built on: one instruction counts bits, and sums are in a fixed order.
    assert [name for name in names if "popc.b32" not in compiled[name]] == ["_combine_kernel"]
    assert not [name for name in names if re.search(r"\b(atom|red)\.", compiled[name])]
    tensor_cores = max(products.counts) > 2 and products.dtype != torch.float32
    # Aligned rows are read and written 16 bytes at a time.
    aligned = products.jobs[-1].whole_words
    for name in names[:2]:
        assert ("mma" in compiled[name]) == tensor_cores
    assert ("st.global.v4.b32" in compiled["_restore_kernel"]) == aligned
