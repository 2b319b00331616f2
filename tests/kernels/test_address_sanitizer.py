"""The tests of the kernels once more, with every access to memory checked."""

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
    """A GCC with its sanitizer's library."""
    found = shutil.which(os.environ.get("CXX", "c++"))
    if found is None:
        pytest.skip("no C++ compiler")
    if not _library(found, "libasan.so").is_absolute():
        pytest.skip(f"{found} has no libasan.so")
    return found


def _library(compiler: str, name: str) -> Path:
    """Where the compiler has a library; the name alone where it has none."""
    command = [compiler, f"-print-file-name={name}"]
    return Path(subprocess.run(command, capture_output=True, text=True).stdout.strip())


@pytest.fixture
def run(compiler: str, tmp_path: Path):
    """run(*arguments): Python, with a sanitizer and kernels built for it."""
    # The compiler itself need not be checked.
    wrapper = tmp_path / Path(compiler).name
    wrapper.write_text(f'#!/bin/sh\nunset LD_PRELOAD\nexec {compiler} "$@"\n')
    wrapper.chmod(0o755)
    # Without the second the sanitizer does not find what throws exceptions.
    libraries = [_library(compiler, name) for name in ("libasan.so", "libstdc++.so")]
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
def test_the_kernels_touch_no_memory_but_their_own(run):
    files = ("test_cpu_kernels.py", "test_cpu_mlp.py")
    tests = [str(Path(__file__).with_name(name).relative_to(ROOT)) for name in files]
    # A whole layer takes most of the time, and goes no way that the others do not go.
    chosen = ["--hypothesis-profile=few", "-k", "not layer", *tests]

    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen)

    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout


OVER_READ = """
import torch
from resmoe_dist.codecs.bitmap import pack_bitmap
from resmoe_dist.kernels.cpu import operations as cpu_kernels
from resmoe_dist.kernels.cpu.build import load_kernels
from resmoe_dist.kernels.rows import CompressedRows

assert load_kernels()
cpu_kernels.use_instruction_set("portable")
bitmap, values = pack_bitmap(torch.ones(1, 11, dtype=torch.bool)), torch.ones(10)
rows = CompressedRows(None, bitmap, values, torch.tensor([0, 10]))
cpu_kernels.restore(rows, torch.empty(1, {columns}))
"""


@pytest.mark.slow
def test_it_would_be_noticed_if_they_did(run):
    # The bitmap's bits are what the kernels go by unchecked.
    assert run("-c", OVER_READ.format(columns=10)).returncode == 0

    done = run("-c", OVER_READ.format(columns=11))

    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
