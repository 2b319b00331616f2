"""Generate text with a compressed model on an expert x tensor parallel grid.

    deepspeed launch/infer.py --ep 4 --tp 2 [--model DIR] [--prompt TEXT …]

Without --model the embedded tiny model is used: trained and compressed on first use, then cached.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from resmoe_dist.checkpoints.entries import STORED_DTYPES
from resmoe_dist.checkpoints.tensor_files import check_writable, write_json
from resmoe_dist.config.arguments import parse
from resmoe_dist.config.commands import InferConfig
from resmoe_dist.errors import UserError
from resmoe_dist.evaluation.perplexity import load_tokenizer
from resmoe_dist.launch.execution import execution_of
from resmoe_dist.launch.facts import facts_of
from resmoe_dist.launch.rank_report import as_json, gather_reports, rank_table
from resmoe_dist.parallel.dispatch import SharedBatchDispatcher
from resmoe_dist.parallel.entry_point import launched_rank, quiet_libraries, run_entry_point
from resmoe_dist.parallel.launcher import start_grid
from resmoe_dist.parallel.topology import lane_choices
from resmoe_dist.runtime.checking import check_steps
from resmoe_dist.runtime.folder_checks import refusing
from resmoe_dist.runtime.generation import (
    GenerationOptions,
    check_chat,
    check_prompts,
    generate_on_lane,
    try_generation,
)
from resmoe_dist.runtime.lanes import OnLanes, Prompts, fastest_lanes
from resmoe_dist.runtime.loading import load_model, warn_of_whole_parts
from resmoe_dist.runtime.loading_cost import LoadingCost, loading_cost
from resmoe_dist.runtime.rank_memory import rank_memory
from resmoe_dist.runtime.served_folder import ServedFolder
from resmoe_dist.testing.embedded import DEMO_PROMPTS, embedded_checkpoint


def main() -> None:
    """One rank, from the command line."""
    run_entry_point(run)


def run() -> None:
    """Join the grid, load this rank's shard, generate this lane's share, report."""
    # 1. What is asked for, checked before ranks are started.
    config = parse(InferConfig, InferConfig.__doc__ or "")
    quiet_libraries()
    prompts = read_prompts(config)
    options = GenerationOptions(
        config.max_new_tokens,
        config.temperature,
        config.top_p,
        config.seed,
        config.batch_size,
        config.chat,
    )
    execution = execution_of(config)
    if config.json_file and not launched_rank():
        check_writable(config.json_file)
    served, tokenizer = None, None
    if config.model:
        served, tokenizer = read_model(config.model, config, prompts)
    elif launched_rank() == 0:
        # Made by one process, which has all cores; the ranks find it in the cache.
        ServedFolder.read(embedded_checkpoint(config.ep)).check_grid(config.ep, config.tp)
    # 2. The grid.
    topology = start_grid(
        config.ep,
        config.tp,
        lanes=config.lanes,
        sequences=len(prompts),
        rank_timeout=config.rank_timeout,
        facts=facts_of(config, served, prompts),
    )
    if served is None or tokenizer is None:
        served, tokenizer = read_model(embedded_checkpoint(config.ep), config, prompts)
    # 3. This rank's shard of the model.
    dtype = STORED_DTYPES[config.dtype] if config.dtype else None
    load = partial(
        load_model, served, dtype=dtype, execution=execution, dispatch=config.dispatch, quiet=True
    )
    with loading_cost() as loading:
        model = load(topology=topology, verify=config.verify)
    loading.kept_bytes = rank_memory(model).all_bytes
    with refusing(served.path, "cannot generate"):
        try_generation(model, tokenizer, topology)
    choosing: LoadingCost | None = None
    several = len(lane_choices(topology.ep, topology.dp)) > 1
    if config.lanes is None and several and config.dispatch != SharedBatchDispatcher.name:
        with loading_cost() as choosing:
            chosen = fastest_lanes(
                OnLanes(model, topology),
                lambda place, held: load(topology=place, experts_of=held),
                Prompts(tokenizer, prompts, options),
            )
        model, topology = chosen.model, chosen.place
    warn_of_whole_parts(model, topology)
    if config.check:
        check_steps(model, topology)
    # 4. This lane's prompts. A single one is printed as it is completed.
    is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    streamer = None
    if is_first and len(prompts) == 1 and sys.stdout.isatty():
        print(f"--- 1: {prompts[0]!r}\n{prompts[0]}", end="", flush=True)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = generate_on_lane(model, tokenizer, prompts, topology, options, streamer)
    # 5. Rank 0 reports for all.
    reports = gather_reports(topology, output, rank_memory(model), loading, choosing)
    if not is_first:
        return
    completions = {i: text for each in reports for i, text in each.output.completions.items()}
    for i, prompt in enumerate(prompts if streamer is None else []):
        print(f"--- {i + 1}: {prompt!r}\n{prompt}{completions[i]}")
    print(rank_table(reports))
    if config.json_file:
        write_json(config.json_file, as_json(prompts, completions, reports))


def read_model(
    folder: Path, config: InferConfig, prompts: list[str]
) -> tuple[ServedFolder, PreTrainedTokenizerBase]:
    """The folder and its tokenizer.

    Raises UserError if the model cannot be served on the grid, or cannot continue a prompt.
    """
    served = ServedFolder.read(folder)
    served.check_grid(config.ep, config.tp)
    served.check_language_model()
    tokenizer = load_tokenizer(folder)
    if config.chat:
        check_chat(tokenizer)
    check_prompts(tokenizer, prompts, served.config, config.chat)
    return served, tokenizer


def read_prompts(config: InferConfig) -> list[str]:
    """The prompts of the command line, of a file, or the demo's.

    Raises UserError for a file that cannot be read or has no prompts.
    """
    if config.prompts is None:
        return config.prompt or DEMO_PROMPTS
    try:
        # Not splitlines, for which form feeds and U+2028 end lines too.
        lines = config.prompts.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{config.prompts}: not a readable UTF-8 file ({error})") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{config.prompts}: has no prompts; write one per line")
    return prompts


if __name__ == "__main__":
    main()
