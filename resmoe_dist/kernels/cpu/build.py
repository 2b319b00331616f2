"""The C++ kernels: built at first use, kept in the user's cache.

Set RESMOE_KERNELS=reference to do without them, and RESMOE_KERNELS_FLAGS to give the compiler and
the linker more flags (`-fsanitize=address -g -O1`), for a library of their own in the cache.
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

_SOURCES = Path(__file__).parent
_NAME = "resmoe_kernels"
# -fopenmp as ATen's parallel_for is a header; no such flag for the linker, as PyTorch brings the
# OpenMP library along and a second one would be a second pool of threads.
_FLAGS = ["-O3", "-std=c++20", "-fopenmp", "-Wno-psabi"]


@cache
def load_kernels() -> bool:
    """Make `torch.ops.resmoe` available; False, with one warning, where they cannot be built.

    Processes may call this at the same time: one builds, the others wait for it.
    """
    if os.environ.get("RESMOE_KERNELS") == "reference":
        return False
    try:
        torch.ops.load_library(_built())
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        logger.warning(
            "the C++ kernels cannot be built or loaded, so slow reference code is used (%s); "
            "they need a C++20 compiler and ninja",
            first_line(error),
        )
        return False
    return True


def _built() -> Path:
    """The library, built unless it is in the cache."""
    root = cache_root()
    root.mkdir(parents=True, exist_ok=True)
    folder = root / f"kernels-{fingerprint()}"
    library = folder / f"{_NAME}.so"
    # The lock of cpp_extension outlives a process that is killed; this one does not.
    with open(root / f"{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _build(folder)
    return library


def _build(folder: Path) -> None:
    """Build beside `folder`, then rename: a library is there whole or not at all."""
    # Imported here, as it looks for compilers.
    from torch.utils import cpp_extension

    unfinished = folder.with_name(folder.name + ".building")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    logger.info("building the C++ kernels once into %s", folder)
    cpp_extension.load(
        _NAME,
        [str(source) for source in sorted(_SOURCES.glob("*.cpp"))],
        extra_cflags=_FLAGS + _extra_flags(),
        extra_ldflags=_extra_flags(),
        build_directory=str(unfinished),
        is_python_module=False,
    )
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def fingerprint() -> str:
    """Of all that the kernels depend on."""
    flags = _FLAGS + _extra_flags()
    parts = [torch.__version__, platform.machine(), sys.platform, *flags]
    digest = hashlib.sha256("\n".join(parts).encode())
    for source in sorted(p for p in _SOURCES.iterdir() if p.suffix in (".cpp", ".h")):
        digest.update(source.name.encode())
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _extra_flags() -> list[str]:
    return shlex.split(os.environ.get("RESMOE_KERNELS_FLAGS", ""))
