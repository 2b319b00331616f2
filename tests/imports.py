"""What a piece of code imports, found in a new Python process."""

from __future__ import annotations

import json
import subprocess
import sys

# Libraries that take long to import.
HEAVY = ("torch", "transformers", "deepspeed", "scipy", "ot", "safetensors", "numpy", "mpi4py")


def imported_by(code: str, names: tuple[str, ...] = HEAVY) -> tuple[list[str], str]:
    """Those of the modules `names` that code imports, and what it prints.

    The code may leave by SystemExit, with exit code 0.
    """
    program = f"""
import json, sys
try:
    exec({code!r})
except SystemExit as left:
    assert not left.code, left.code
print(json.dumps([name for name in {names} if name in sys.modules]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    *printed, modules = done.stdout.splitlines()
    return json.loads(modules), "\n".join(printed)
