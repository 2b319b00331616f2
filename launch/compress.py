"""`resmoe-dist compress` spread over ranks: the same options, for a launcher.

mpirun -n 4 python launch/compress.py SOURCE OUTPUT --ep 4
deepspeed --num_gpus 4 launch/compress.py SOURCE OUTPUT --ep 4
"""

from __future__ import annotations

import argparse

from resmoe_dist.cli import add_compress_arguments, run_compress
from resmoe_dist.parallel.launcher import (
    add_launcher_arguments,
    quiet_libraries,
    run_entry_point,
)


def main() -> int:
    """One rank."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_launcher_arguments(parser)
    add_compress_arguments(parser)
    args = parser.parse_args()
    quiet_libraries()
    return run_compress(args)


if __name__ == "__main__":
    run_entry_point(main)
