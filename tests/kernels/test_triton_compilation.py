"""The Triton kernels without running them: compiling for a GPU, and what the host must wait for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from resmoe_dist.kernels.reference import ReferenceBackend
from resmoe_dist.routing import RoutedTokens
from tests.kernels.problems import Case, Expert, Problem, restored
from tests.kernels.triton_runs import lay_out, moved

triton = pytest.importorskip("triton", reason="Triton is not installed")
GPUTarget = pytest.importorskip("triton.backends.compiler").GPUTarget


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


EXPERTS = (Expert(copies=9), Expert(copies=0), Expert(copies=5))


@not_interpreted
@pytest.mark.parametrize("share_center", [True, False], ids=["shared", "tiled"])
def test_mlps_need_no_values_on_the_host(monkeypatch, share_center):
    from resmoe_dist.kernels.triton.backend import TritonBackend

    problem = Case(rows=70, hidden=20, tokens=9, experts=EXPERTS).build(torch.float32)
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
        Case(rows=70, hidden=20, tokens=9, experts=EXPERTS).build(torch.float32), "cuda"
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
