"""Builds the C++ kernels at first use and keeps the library in the user's cache.

Environment variables:

- `RESMOE_KERNELS=reference`: do not build or load the kernels.
- `RESMOE_KERNELS_FLAGS`: more flags for the compiler and the linker, for example
  `-fsanitize=address -g -O1`. Each set of flags has a separate library in the cache.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch

from resmoe_dist.errors import first_line
from resmoe_dist.user_cache import cache_root

logger = logging.getLogger(__name__)

_SOURCE_FOLDER = Path(__file__).parent
_LIBRARY_NAME = "resmoe_kernels"
# -fopenmp is for ATen's parallel_for, which is in a header. The linker does not get the flag: a
# second OpenMP library besides PyTorch's would start a second pool of threads.
_COMPILER_FLAGS = ["-O3", "-std=c++20", "-fopenmp", "-Wno-psabi"]


@cache
def load_kernels() -> bool:
    """Make `torch.ops.resmoe` available; builds the library if it is not in the cache.

    Returns False if the kernels are switched off, or, after one warning, if they cannot be built
    or loaded. Several processes may call this at the same time: one builds, the others wait.
    """
    if os.environ.get("RESMOE_KERNELS") == "reference":
        return False
    try:
        torch.ops.load_library(_cached_library())
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        logger.warning(
            "the C++ kernels cannot be built or loaded, so slow reference code is used (%s); "
            "they need a C++20 compiler and ninja",
            first_line(error),
        )
        return False
    return True


def fingerprint() -> str:
    """Digest of everything the library depends on: sources, flags, PyTorch and platform."""
    flags = _COMPILER_FLAGS + _extra_flags()
    parts = [torch.__version__, platform.machine(), sys.platform, *flags]
    digest = hashlib.sha256("\n".join(parts).encode())
    for source in sorted(p for p in _SOURCE_FOLDER.iterdir() if p.suffix in (".cpp", ".h")):
        digest.update(source.name.encode())
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _cached_library() -> Path:
    """Path of the library; builds it if it is not in the cache."""
    root = cache_root()
    root.mkdir(parents=True, exist_ok=True)
    folder = root / f"kernels-{fingerprint()}"
    library = folder / f"{_LIBRARY_NAME}.so"
    # PyTorch's cpp_extension has a lock too, but its file stays behind if the process is killed.
    # The system releases this one.
    with open(root / f"{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _build(folder)
    return library


def _build(folder: Path) -> None:
    """Build next to `folder`, then rename, so that `folder` never holds an unfinished library."""
    # Imported only here, because the import searches for compilers.
    from torch.utils import cpp_extension

    unfinished = folder.with_name(folder.name + ".building")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    logger.info("building the C++ kernels once into %s", folder)
    cpp_extension.load(
        _LIBRARY_NAME,
        [str(source) for source in sorted(_SOURCE_FOLDER.glob("*.cpp"))],
        extra_cflags=_COMPILER_FLAGS + _extra_flags(),
        extra_ldflags=_extra_flags(),
        build_directory=str(unfinished),
        is_python_module=False,
    )
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def _extra_flags() -> list[str]:
    return shlex.split(os.environ.get("RESMOE_KERNELS_FLAGS", ""))
