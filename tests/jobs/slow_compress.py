"""launch/compress.py with a pause of RESMOE_TEST_PAUSE milliseconds before each task.

The pause runs in compiled code, which no signal handler in Python can interrupt. Each rank writes
its process id to a file in the folder RESMOE_TEST_PIDS first.
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


def _pause(_):
    (Path(os.environ["RESMOE_TEST_PIDS"]) / str(launched_rank())).write_text(str(os.getpid()))
    ctypes.CDLL(None).usleep(pause * 1000)


before_each_task(pytest.MonkeyPatch(), _pause)
runpy.run_path(str(Path(__file__).parents[2] / "launch" / "compress.py"), run_name="__main__")
