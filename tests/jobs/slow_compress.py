"""launch/compress.py with a pause before each task, in compiled code that no signal ends.

Each rank notes its process id in the folder that RESMOE_TEST_PIDS names, when its first task comes.
"""

from __future__ import annotations

import ctypes
import os
import runpy
from pathlib import Path

import pytest

from resmoe_dist.parallel.entry_point import launched_rank
from tests.jobs.runs import before_each_task

pause = int(os.environ["RESMOE_TEST_PAUSE"])


def _wait(_):
    (Path(os.environ["RESMOE_TEST_PIDS"]) / str(launched_rank())).write_text(str(os.getpid()))
    ctypes.CDLL(None).usleep(pause * 1000)


before_each_task(pytest.MonkeyPatch(), _wait)
runpy.run_path(str(Path(__file__).parents[2] / "launch" / "compress.py"), run_name="__main__")
