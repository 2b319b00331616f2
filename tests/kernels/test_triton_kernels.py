"""Restoring and whole MLPs of the Triton backend, and compiling its kernels for a GPU."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from resmoe_dist.codecs import PrunedMatrix
from resmoe_dist.design_matrix import ExpertShape
from resmoe_dist.kernels.reference import ReferenceBackend
from resmoe_dist.routing import RoutedTokens
from tests.kernels.mlp_problems import MlpCase, assert_outputs, outputs
from tests.kernels.problems import Case, Expert, Problem, restored
from tests.kernels.triton_runs import (
    CENTER_LAYOUTS,
    CUT,
    DTYPES,
    lay_out,
    memory_of,
    mlp,
    moved,
    restore,
    with_dropped_copies,
)

triton = pytest.importorskip("triton", reason="Triton is not installed")
GPUTarget = pytest.importorskip("triton.backends.compiler").GPUTarget


# --- Restoring ---


def expected_rows(problem: Problem, columns: int, first_column: int = 0) -> torch.Tensor:
    """Restored by the reference: some columns of the used rows of the first expert."""
    return restored(ReferenceBackend(problem.layer), problem, 0, columns, first_column)


@given(
    experts=st.builds(
        Expert,
        center=st.sampled_from([None, 0]),
        share=st.sampled_from([0.0, 0.3, 1.0]),
        wide_offsets=st.booleans(),
    ),
    center=st.sampled_from(CENTER_LAYOUTS),
    whole_words=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    rows=st.tuples(st.integers(1, 9), st.sampled_from([0, 0, 5])),
    columns=st.sampled_from(
        [(7, 0, 7), (64, 0, 64), (99, 33, 65), (99, 97, 2), (160, 32, 64), (70, 5, 1)]
    ),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=20)
def test_restored_rows_equal_the_reference(
    run, experts, center, whole_words, dtype, rows, columns, seed
):
    D, first_column, count = columns
    case = Case(
        rows=rows[0],
        hidden=D // 2,
        inputs=1,
        extra=D % 2,
        experts=(experts,),
        first_row=rows[1],
        last_rows=rows[1],
        seed=seed,
    )
    problem = lay_out(case.build(dtype), (center,), (whole_words,))
    # The memory around the output has to stay as it is.
    expected = torch.full((rows[0] + 2, count + 3), 7.0, dtype=dtype)
    out = expected.clone()[1:-1, 2:-1]
    expected[1:-1, 2:-1] = expected_rows(problem, count, first_column)

    found = run(restore, problem.layer, out, 0, rows[1], first_column)

    cuts = run.is_interpreted and experts.center is not None and dtype == torch.bfloat16
    torch.testing.assert_close(
        memory_of(found).view_as(expected), expected, rtol=CUT if cuts else 0, atol=0
    )


@pytest.mark.parametrize("first_column", [0, 20, 2500])
def test_long_rows_are_restored_from_both_ends(run, first_column):
    problem = Case(rows=5, hidden=1000, extra=1).build(torch.float32)
    expected = expected_rows(problem, 3001 - first_column, first_column)

    found = run(restore, problem.layer, torch.empty_like(expected), first_column=first_column)

    assert torch.equal(found, expected)


def test_rows_are_restored_into_columns(run):
    problem = Case(rows=5, hidden=50, inputs=1).build(torch.float32)

    found = run(restore, problem.layer, torch.empty(100, 5).T)

    assert torch.equal(found, expected_rows(problem, 100))


@pytest.mark.parametrize("expert", [0, 1, 2])
def test_each_expert_is_restored_with_its_own_centre(run, expert):
    experts = (Expert(center=1), Expert(center=None), Expert(center=0))
    problem = Case(rows=3, hidden=20, experts=experts).build(torch.float32)
    expected = restored(ReferenceBackend(problem.layer), problem, expert, 60)

    assert torch.equal(run(restore, problem.layer, torch.empty(3, 60), expert), expected)


def test_both_halves_of_wide_offsets_count(run):
    case = Case(
        rows=5, hidden=38, inputs=1, extra=1, experts=(Expert(center=None, wide_offsets=True),)
    )
    problem = case.build(torch.float32)
    residual = problem.layer.residuals[0]
    # Offsets beyond 32 bits would need gigabytes of values, but negative ones also use both halves.
    tensors = residual.tensors() | {
        "values": residual.values[3:],
        "row_offsets": residual.row_offsets - 3,
    }
    shifted = PrunedMatrix((5, 77), tensors, torch.float32)

    found = run(restore, replace(problem.layer, residuals=(shifted,)), torch.empty(5, 77))

    assert torch.equal(found, expected_rows(problem, 77))


def test_restoring_no_columns_does_nothing(run):
    layer = Case(rows=3, hidden=4, inputs=1).build(torch.float32).layer

    assert run(restore, layer, torch.empty(3, 0)).shape == (3, 0)


def test_sums_are_rounded_to_the_dtype_of_the_weights_before_that_of_the_output(run):
    problem = Case(rows=5, hidden=11).build(torch.float16)

    found = run(restore, problem.layer, torch.empty(5, 33))

    assert torch.equal(found, expected_rows(problem, 33).float())


# --- Whole MLPs ---

# Experts of one centre, and of several centres or none.
ONE_CENTER = (Expert(copies=9), Expert(copies=0), Expert(copies=5))
SEVERAL_CENTERS = (*ONE_CENTER, Expert(center=None, copies=3), Expert(center=1, copies=2))


@pytest.mark.parametrize(
    ("dtype", "share_center"),
    [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)],
    ids=["float32-shared", "float32-tiled", "bfloat16-shared"],
)
@pytest.mark.parametrize("experts", [ONE_CENTER, SEVERAL_CENTERS], ids=["one", "several"])
def test_mlps_are_exact(run, dtype, share_center, experts):
    case = MlpCase(Case(rows=13, hidden=50, tokens=9, experts=experts, gap=3))
    problem = with_dropped_copies(case.build(dtype), 4)

    found = run(mlp, problem, share_center)

    assert_outputs(found, outputs(case.build(dtype), share_center=share_center))


def test_bfloat16_mlps_add_centre_and_residual(run):
    if run.is_interpreted:
        pytest.skip("the interpreter cuts off bits instead of rounding")
    problem = MlpCase(Case(rows=80, hidden=50, tokens=9, experts=ONE_CENTER)).build(torch.bfloat16)

    found = run(mlp, problem, share_center=False)

    assert_outputs(found, outputs(problem, share_center=False))


@pytest.mark.parametrize("share_center", [True, False], ids=["shared", "tiled"])
def test_many_rows_are_multiplied_in_blocks(run, share_center):
    case = MlpCase(Case(rows=70, hidden=9, inputs=1, tokens=4, experts=(Expert(copies=4),)))
    problem = case.build(torch.float32)

    found = run(mlp, problem, share_center, product_bytes=1)

    assert_outputs(found, outputs(problem, share_center=share_center))


@pytest.mark.parametrize("share_center", [True, False], ids=["shared", "tiled"])
def test_row_biases_are_added(run, share_center):
    problem = Case(rows=5, hidden=20, extra=2, tokens=9, experts=SEVERAL_CENTERS).build(
        torch.float32
    )
    problem = problem._replace(
        layer=replace(problem.layer, shape=ExpertShape(5, 20, row_bias=True))
    )
    expected = ReferenceBackend(problem.layer).mlp(problem.routed, share_center=share_center)

    found = run(mlp, problem, share_center)

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("share_center", [True, False], ids=["shared", "tiled"])
def test_mlps_without_copies_give_zeros(run, share_center, tokens):
    experts = (Expert(copies=0), Expert(copies=0))
    problem = Case(rows=4, hidden=20, tokens=tokens, experts=experts).build(torch.float32)

    assert torch.equal(run(mlp, problem, share_center), torch.zeros(tokens, 20))


def test_equal_mlps_give_equal_bits(run):
    # Each token has several copies with the same centre.
    experts = tuple(Expert(copies=6) for _ in range(4))
    problem = Case(rows=9, hidden=20, tokens=6, experts=experts).build(torch.float32)

    assert torch.equal(run(mlp, problem, True), run(mlp, problem, True))


# --- Compiling, without a GPU ---


class H100:
    """As much of a driver as Triton needs in order to compile."""

    # Triton keeps compiled kernels by device. This number is no real one.
    get_current_device = staticmethod(lambda: 1000)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))


not_interpreted = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="Triton interprets in this process"
)


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


def problem_to_compile(
    *copies: int,
    hidden: int = 64,
    inputs: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    center: str | None = "dense",
    wide_offsets: bool = False,
    whole_words: bool = True,
) -> Problem:
    experts = tuple(
        Expert(None if center is None else 0, wide_offsets=wide_offsets, copies=count)
        for count in copies
    )
    case = Case(rows=5, hidden=hidden, inputs=inputs, tokens=max(copies), experts=experts)
    return lay_out(case.build(dtype), (center or "dense",), (whole_words,))


TO_COMPILE = {
    "few copies": problem_to_compile(1, 1),
    "many copies": problem_to_compile(9, 3),
    "unaligned": problem_to_compile(
        1, hidden=33, center="columns", wide_offsets=True, whole_words=False
    ),
    "float16": problem_to_compile(40, dtype=torch.float16),
    "float32": problem_to_compile(
        3, hidden=1, inputs=1, dtype=torch.float32, center=None, whole_words=False
    ),
}


@not_interpreted
@pytest.mark.parametrize("name", TO_COMPILE)
def test_kernels_compile_without_a_gpu(compiled, name):
    from resmoe_dist.kernels.triton.backend import TritonBackend

    problem = TO_COMPILE[name]
    backend = TritonBackend(problem.layer)
    problem.project_in(backend)
    problem.project_out(backend)
    restored(backend, problem, 0, problem.layer.hidden)

    names = ["project_in_kernel", "project_out_kernel", "combine_kernel", "restore_kernel"]
    assert list(compiled) == names
    # The kernels rely on this: one instruction counts bits, and sums are in a fixed order.
    assert [name for name in names if "popc.b32" not in compiled[name]] == ["combine_kernel"]
    assert not [name for name in names if re.search(r"\b(atom|red)\.", compiled[name])]
    tensor_cores = len(problem.routed.token_N) > 2 and problem.layer.dtype != torch.float32
    # Aligned rows are read and written 16 bytes at a time.
    aligned = name in ("few copies", "many copies", "float16")
    for product in names[:2]:
        assert ("mma" in compiled[product]) == tensor_cores
    assert ("st.global.v4.b32" in compiled["restore_kernel"]) == aligned


@not_interpreted
@pytest.mark.parametrize("share_center", [True, False], ids=["shared", "tiled"])
def test_mlps_need_no_values_on_the_host(monkeypatch, share_center):
    from resmoe_dist.kernels.triton.backend import TritonBackend

    problem = Case(rows=70, hidden=20, tokens=9, experts=ONE_CENTER).build(torch.float32)
    routed = problem.routed
    reference, backend = (
        kind(problem.layer, product_bytes=1) for kind in (ReferenceBackend, TritonBackend)
    )
    monkeypatch.setattr(triton.JITFunction, "run", lambda *args, **options: None)
    # Fake tensors have shapes but no values.
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        tensors = (routed.x_RH, routed.token_N, routed.weight_N, routed.offsets_L)
        fake = RoutedTokens(*map(mode.from_tensor, tensors))
        # The reference reads the offsets on the host.
        with pytest.raises(DataDependentOutputException):
            reference.mlp(fake, share_center=share_center)

        assert backend.mlp(fake, share_center=share_center).shape == (9, 20)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("share_center", [True, False], ids=["shared", "tiled"])
def test_mlps_do_not_synchronise_with_the_gpu(share_center):
    from resmoe_dist.kernels.triton.backend import TritonBackend

    problem = moved(
        Case(rows=70, hidden=20, tokens=9, experts=ONE_CENTER).build(torch.float32), "cuda"
    )
    backend = TritonBackend(problem.layer)
    # Compiles the kernels.
    expected = backend.mlp(problem.routed, share_center=share_center)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = backend.mlp(problem.routed, share_center=share_center)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    assert torch.equal(found, expected)
