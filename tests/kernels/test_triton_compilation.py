"""The Triton kernels without running them: compiling for a GPU, and what the host must wait for."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from resmoe_dist.kernels.reference import ReferenceBackend
from resmoe_dist.routing import RoutedTokens
from tests.kernels.problems import Case, Expert, Problem, restored
from tests.kernels.quantized_problems import QuantizedCase, QuantizedExpert
from tests.kernels.triton_runs import backend_of, lay_out, moved

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
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Assembly of the kernels that are launched: they are compiled for an H100, and not run."""
    if "nvidia" not in triton.backends.backends:
        pytest.skip("this Triton does not compile for NVIDIA GPUs")
    compiled = {}
    run = triton.JITFunction.run

    def compile_only(kernel: triton.JITFunction, *args, **options) -> None:
        binary = run(kernel, *args, **options | {"warmup": True})
        assert binary.asm["cubin"]
        compiled[kernel.__name__] = binary.asm

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
    ptx = {name: compiled[name]["ptx"] for name in names}
    assert [name for name in names if "popc.b32" not in ptx[name]] == ["combine_kernel"]
    assert not [name for name in names if re.search(r"\b(atom|red)\.", ptx[name])]
    tensor_cores = len(problem.routed.token_N) > 2 and problem.layer.dtype != torch.float32
    # Aligned rows are read and written 16 bytes at a time.
    aligned = name in ("few copies", "many copies", "float16")
    for product in names[:2]:
        assert ("mma" in ptx[product]) == tensor_cores
    assert ("st.global.v4.b32" in ptx["restore_kernel"]) == aligned


# Each token has a copy for each of two experts.
QUANTIZED = {
    "few copies": QuantizedCase(rows=5, hidden=4096, experts=(QuantizedExpert(),) * 2),
    "many copies": QuantizedCase(
        rows=5, hidden=2880, tokens=40, experts=(QuantizedExpert(copies=40),) * 2
    ),
}


@not_interpreted
@pytest.mark.parametrize("name", QUANTIZED)
def test_kernels_for_quantised_layers_compile_without_a_gpu(compiled, tmp_path, name):
    from resmoe_dist.kernels.triton.quantized_backend import QuantizedTritonBackend

    problem = QUANTIZED[name].build(torch.bfloat16)
    backend = QuantizedTritonBackend(problem.layer)
    backend.rotate(problem.routed.x_RH)
    problem.project_in(backend)
    problem.project_out(backend)
    restored(backend, problem, 0, problem.layer.hidden)

    products = ["project_in_kernel", "project_out_kernel"]
    names = ["rotate_kernel", *products, "combine_kernel", "restore_quantized_kernel"]
    assert list(compiled) == names
    for kernel in names:
        ptx = compiled[kernel]["ptx"]
        assert not re.search(r"\b(atom|red)\.", ptx)
        assert ("mma" in ptx) == (kernel in products and name == "many copies")
    for kernel in (*products, "restore_quantized_kernel"):
        # Registers hold what a program decodes: nothing is spilled to the stack.
        (tmp_path / "cubin").write_bytes(compiled[kernel]["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", tmp_path / "cubin"]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "STACK:0 " in usage


EXPERTS = (Expert(copies=9), Expert(copies=0), Expert(copies=5))
QUANTIZED_EXPERTS = (QuantizedExpert(copies=9), QuantizedExpert(), QuantizedExpert(copies=5))
every_codec = pytest.mark.parametrize(
    "case",
    [
        Case(rows=70, hidden=16, tokens=9, experts=EXPERTS),
        QuantizedCase(rows=70, hidden=16, tokens=9, experts=QUANTIZED_EXPERTS),
    ],
    ids=["pruned", "quantized"],
)


@not_interpreted
@every_codec
@pytest.mark.parametrize("share_center", [True, False], ids=["shared", "tiled"])
def test_mlps_need_no_values_on_the_host(monkeypatch, case, share_center):
    problem = case.build(torch.float32)
    routed = problem.routed
    reference = ReferenceBackend(problem.layer, product_bytes=1)
    backend = backend_of(problem.layer, product_bytes=1)
    monkeypatch.setattr(triton.JITFunction, "run", lambda *args, **options: None)
    # Fake tensors have shapes but no values.
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        tensors = (routed.x_RH, routed.token_N, routed.weight_N, routed.offsets_L)
        fake = RoutedTokens(*map(mode.from_tensor, tensors))
        # The reference reads the offsets on the host.
        with pytest.raises(DataDependentOutputException):
            reference.mlp(fake, share_center=share_center)

        assert backend.mlp(fake, share_center=share_center).shape == (9, 16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_codec
@pytest.mark.parametrize("share_center", [True, False], ids=["shared", "tiled"])
def test_mlps_do_not_synchronise_with_the_gpu(case, share_center):
    problem = moved(case.build(torch.float32), "cuda")
    backend = backend_of(problem.layer)
    # Compiles the kernels.
    expected = backend.mlp(problem.routed, share_center=share_center)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = backend.mlp(problem.routed, share_center=share_center)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    assert torch.equal(found, expected)
