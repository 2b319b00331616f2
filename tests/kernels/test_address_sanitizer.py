"""Runs the tests of the C++ kernels again with AddressSanitizer, which checks memory accesses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = "-fsanitize=address -O1 -g1"


@pytest.fixture(scope="module")
def compiler() -> str:
    """Path of a GCC that has the AddressSanitizer library."""
    found = shutil.which(os.environ.get("CXX", "c++"))
    if found is None:
        pytest.skip("no C++ compiler")
    if not library_path(found, "libasan.so").is_absolute():
        pytest.skip(f"{found} has no libasan.so")
    return found


def library_path(compiler: str, name: str) -> Path:
    """Path of one of the compiler's libraries; only `name` if the compiler does not have it."""
    command = [compiler, f"-print-file-name={name}"]
    return Path(subprocess.run(command, capture_output=True, text=True).stdout.strip())


@pytest.fixture
def run(compiler: str, tmp_path: Path):
    """run(*arguments): run Python with AddressSanitizer and with kernels built for it."""
    # LD_PRELOAD is unset for the compiler, which need not be checked.
    wrapper = tmp_path / Path(compiler).name
    wrapper.write_text(f'#!/bin/sh\nunset LD_PRELOAD\nexec {compiler} "$@"\n')
    wrapper.chmod(0o755)
    # The sanitizer intercepts exceptions only if it finds libstdc++ when it starts.
    libraries = [library_path(compiler, name) for name in ("libasan.so", "libstdc++.so")]
    environment = os.environ | {
        "CXX": str(wrapper),
        "RESMOE_KERNELS": "",
        "RESMOE_KERNELS_FLAGS": FLAGS,
        "LD_PRELOAD": " ".join(map(str, libraries)),
        "ASAN_OPTIONS": "detect_leaks=0",
    }

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )

    return run


@pytest.mark.slow
@pytest.mark.timeout(1500)  # building with the sanitizer alone takes minutes
def test_kernels_access_only_valid_memory(run):
    files = ("test_cpu_kernels.py", "test_cpu_mlp.py", "test_quantized_kernels.py")
    tests = [f"tests/kernels/{name}" for name in files] + ["tests/codecs/test_trellis.py"]
    # These tests take most of the time and cover no additional code.
    repeated = "layer or (test_quantized_kernels and (large or nan or magnitude or arguments))"
    chosen = ["--hypothesis-profile=few", "-k", f"not ({repeated})", *tests]

    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen)

    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout


OVER_READ = """
import torch
from resmoe_dist.codecs.bitmap import pack_bitmap
from resmoe_dist.kernels.cpu.backend import use_instruction_set
from resmoe_dist.kernels.cpu.build import load_kernels

assert load_kernels()
use_instruction_set("portable")
bitmap, values = pack_bitmap(torch.ones(1, 11, dtype=torch.bool)), torch.ones(10)
offsets = torch.tensor([0, 10])
layer = torch.classes.resmoe.Layer([bitmap], [values], [offsets], [], [-1], 5, 1, "")
torch.ops.resmoe.restore(layer, 0, torch.empty(1, {columns}), 0, 0)
"""


@pytest.mark.slow
def test_sanitizer_detects_an_over_read(run):
    # The bitmap has one more bit than there are values; the kernels do not check its contents.
    assert run("-c", OVER_READ.format(columns=10)).returncode == 0

    done = run("-c", OVER_READ.format(columns=11))

    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
