"""Perplexity of a compressed model on an expert x tensor parallel grid.

deepspeed launch/evaluate.py MODEL --ep 4 --tp 2 (--text F | --token-ids F.json) [--json F]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from resmoe_dist.cli import add_evaluate_arguments, report_evaluation, run_evaluate
from resmoe_dist.parallel.launcher import (
    add_grid_arguments,
    quiet_libraries,
    run_entry_point,
    start_grid,
)
from resmoe_dist.runtime.loading import check_grid


def main() -> None:
    """One rank; rank 0 reports."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    add_grid_arguments(parser)
    add_evaluate_arguments(parser)
    args = parser.parse_args()
    quiet_libraries()
    check_grid(args.model, args.ep, args.tp)
    topology = start_grid(args.ep, args.tp, sys.argv[0], sys.argv[1:])
    result = run_evaluate(args, topology)
    if topology.lane == topology.tp_rank == 0:
        report_evaluation(result, args.json)


if __name__ == "__main__":
    run_entry_point(main)
