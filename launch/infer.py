"""Generate text with a compressed model on an expert x tensor parallel grid.

    deepspeed launch/infer.py --ep 4 --tp 2 [--model DIR] [--prompt TEXT …]

Without --model the embedded tiny model is used: trained and compressed on first use, then cached.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from resmoe_dist.checkpoints.format import STORED_DTYPES
from resmoe_dist.checkpoints.tensor_files import write_json
from resmoe_dist.cli import add_execution_arguments, execution_of
from resmoe_dist.errors import UserError
from resmoe_dist.evaluation.perplexity import load_tokenizer
from resmoe_dist.evaluation.report import human_bytes, text_table
from resmoe_dist.parallel.launcher import (
    add_grid_arguments,
    launched_rank,
    quiet_libraries,
    run_entry_point,
    start_grid,
)
from resmoe_dist.parallel.topology import Topology
from resmoe_dist.runtime.generation import GenerationOptions, LaneOutput, generate_on_lane
from resmoe_dist.runtime.loading import check_grid, load_model
from resmoe_dist.runtime.rank_memory import RankMemory, rank_memory
from resmoe_dist.testing.embedded import DEMO_PROMPTS, embedded_checkpoint


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_grid_arguments(parser)
    parser.add_argument("--model", type=Path, help="compressed folder (default: embedded model)")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="may be repeated")
    prompts.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt per line")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, help="sample; without it, greedy")
    parser.add_argument("--top-p", type=float, help="nucleus, with --temperature")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--dtype", choices=sorted(STORED_DTYPES), help="default: the checkpoint's")
    add_execution_arguments(parser)
    parser.add_argument("--json", type=Path, metavar="F", help="write completions and figures here")
    return parser.parse_args()


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of the command line, of a file, or the demo's.

    Raises UserError for a file that cannot be read or holds none, or an empty prompt.
    """
    prompts = args.prompt
    if args.prompts:
        try:
            lines = args.prompts.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{args.prompts}: not a readable UTF-8 file ({error})") from error
        prompts = [line for line in lines if line.strip()]
    if prompts is None:
        prompts = DEMO_PROMPTS
    if not prompts or not all(prompts):
        raise UserError("a prompt is empty; give text to continue")
    return prompts


def generation_options(args: argparse.Namespace) -> GenerationOptions:
    """Validated options. Raises UserError for values outside their range."""
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {args.max_new_tokens}: must be 1 or more")
    if args.temperature is not None and args.temperature <= 0:
        raise UserError(f"--temperature {args.temperature}: must be above 0; omit it for greedy")
    if args.top_p is not None and (args.temperature is None or not 0 < args.top_p <= 1):
        raise UserError(f"--top-p {args.top_p}: must lie in (0, 1] and needs --temperature")
    return GenerationOptions(args.max_new_tokens, args.temperature, args.top_p, args.seed)


def main() -> None:
    """One rank: join the grid, load this rank's shard, generate this lane's share, report."""
    args = parse_arguments()
    quiet_libraries()
    prompts, options = read_prompts(args), generation_options(args)
    execution = execution_of(args)
    if args.model:
        check_grid(args.model, args.ep, args.tp)
    elif launched_rank() == 0:
        # Before there are ranks to share the cores with; they find it in the cache.
        check_grid(embedded_checkpoint(args.ep), args.ep, args.tp)
    topology = start_grid(args.ep, args.tp, sys.argv[0], sys.argv[1:])
    folder = args.model or embedded_checkpoint(args.ep)
    tokenizer = load_tokenizer(folder)
    dtype = STORED_DTYPES[args.dtype] if args.dtype else None
    model = load_model(folder, dtype=dtype, topology=topology, execution=execution)
    output = generate_on_lane(model, tokenizer, prompts, topology, options)
    reports = gather((topology, output, rank_memory(model)))
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    completions = {i: text for _, lane, _ in reports for i, text in lane.completions.items()}
    for i, prompt in enumerate(prompts):
        print(f"--- {i + 1}: {prompt!r}\n{prompt}{completions[i]}")
    print(rank_table(reports))
    if args.json:
        write_json(args.json, as_json(prompts, completions, reports))


Report = tuple[Topology, LaneOutput, RankMemory]


def gather(report: tuple[Topology, LaneOutput, RankMemory]) -> list[Report]:
    """Every rank's report, in rank order; process groups do not travel."""
    topology, output, memory = report
    place = replace(topology, ep_group=None, tp_group=None)
    if not torch.distributed.is_initialized():
        return [(place, output, memory)]
    reports: list[Report] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(reports, (place, output, memory))
    return reports


def rank_table(reports: list[Report]) -> str:
    """Per rank: its place, what it owns and holds, and its lane's speed; below, the whole grid."""
    header = ["rank", "lane", "tp", "experts", "groups", "centre", "residuals", "other", "tokens/s"]
    rows = []
    for rank, (place, output, memory) in enumerate(reports):
        experts = place.owned_experts(memory.num_experts)
        speed = f"{output.new_tokens / output.seconds:.1f}" if output.new_tokens else "-"
        rows.append(
            [
                str(rank),
                str(place.lane),
                str(place.tp_rank),
                f"{experts.start}-{experts.stop - 1}",
                str(memory.groups),
                human_bytes(memory.center_bytes),
                human_bytes(memory.residual_bytes),
                human_bytes(memory.other_bytes),
                speed,
            ]
        )
    tokens = sum(output.new_tokens for place, output, _ in reports if place.tp_rank == 0)
    seconds = max(output.seconds for _, output, _ in reports)
    place = reports[0][0]
    held = sum(memory.expert_bytes for place, _, memory in reports if place.dp_rank == 0)
    dense = reports[0][2].dense_expert_bytes
    return (
        f"{text_table(header, rows, left=0)}\n"
        f"experts on all ranks together {human_bytes(held)}, dense {human_bytes(dense)}: "
        f"{held / dense if dense else 0:.1%}\n"
        f"ep {place.ep} x tp {place.tp} x dp {place.dp}: {tokens} tokens in {seconds:.2f} s, "
        f"{tokens / seconds:.1f} tokens/s in all"
    )


def as_json(prompts: list[str], completions: dict[int, str], reports: list[Report]) -> dict:
    """Completions and figures for --json."""
    ranks = [
        {
            "rank": rank,
            "lane": place.lane,
            "ep_rank": place.ep_rank,
            "tp_rank": place.tp_rank,
            "experts": list(place.owned_experts(memory.num_experts)),
            "groups": memory.groups,
            "center_bytes": memory.center_bytes,
            "residual_bytes": memory.residual_bytes,
            "other_bytes": memory.other_bytes,
            "new_tokens": output.new_tokens,
            "seconds": output.seconds,
        }
        for rank, (place, output, memory) in enumerate(reports)
    ]
    texts = [{"prompt": p, "completion": completions[i]} for i, p in enumerate(prompts)]
    dense = reports[0][2].dense_expert_bytes
    return {"completions": texts, "ranks": ranks, "dense_expert_bytes": dense}


if __name__ == "__main__":
    run_entry_point(main)
