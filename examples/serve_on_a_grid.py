"""Generate text with a compressed model on a grid of expert- and tensor-parallel ranks.

    deepspeed --num_gpus 4 examples/serve_on_a_grid.py COMPRESSED --ep 2 --tp 2

Each lane continues its share of the prompts; the ranks of a lane work on the same ones.
`launch/infer.py` is the complete version of this script.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoTokenizer

from resmoe_dist import load_model
from resmoe_dist.parallel.entry_point import quiet_libraries, run_entry_point
from resmoe_dist.parallel.launcher import start_grid
from resmoe_dist.runtime.generation import GenerationOptions, generate_on_lane

PROMPTS = ["def __init__(self, ", "import os\n", "class Error(", "    return self."]


def main() -> None:
    """One rank."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="compressed checkpoint with a tokenizer")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--ep", type=int, default=1, help="expert-parallel ranks")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks")
    # The `deepspeed` launcher adds it to every command line.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    args = parser.parse_args()
    quiet_libraries()

    # On a machine without accelerators this starts ep * tp ranks on the CPU.
    topology = start_grid(args.ep, args.tp)
    model = load_model(args.folder, topology=topology)
    tokenizer = AutoTokenizer.from_pretrained(args.folder, trust_remote_code=False)
    # Lanes exchange tokens in every layer, so all of them take the same number of steps.
    output = generate_on_lane(
        model, tokenizer, PROMPTS, topology, GenerationOptions(args.max_new_tokens)
    )
    if topology.lane_rank == 0:
        for number, completion in output.completions.items():
            # One write per text: the ranks share this terminal.
            text = f"{PROMPTS[number]}{completion}"
            print(f"--- lane {topology.lane}\n{text}\n", end="", flush=True)


if __name__ == "__main__":
    run_entry_point(main)
