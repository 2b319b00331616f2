"""Generate text with a compressed model on an expert x tensor parallel grid.

    deepspeed launch/infer.py --ep 4 --tp 2 [--model DIR] [--prompt TEXT …]

Without --model the embedded tiny model is used: trained and compressed on first use, then cached.
"""

from __future__ import annotations

from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from transformers import PreTrainedTokenizerBase

from resmoe_dist.checkpoints.format import STORED_DTYPES, read_index
from resmoe_dist.checkpoints.tensor_files import write_json
from resmoe_dist.config.arguments import parse
from resmoe_dist.config.commands import InferConfig
from resmoe_dist.errors import UserError
from resmoe_dist.evaluation.perplexity import load_tokenizer
from resmoe_dist.families.models import load_config
from resmoe_dist.launch.execution import execution_of
from resmoe_dist.launch.rank_report import as_json, gather_reports, rank_table
from resmoe_dist.parallel.entry_point import launched_rank, quiet_libraries, run_entry_point
from resmoe_dist.parallel.lanes import LayerSizes, Workload, fastest_topology
from resmoe_dist.parallel.launcher import start_grid
from resmoe_dist.parallel.topology import Topology
from resmoe_dist.runtime.generation import GenerationOptions, generate_on_lane
from resmoe_dist.runtime.loading import check_grid, load_model
from resmoe_dist.runtime.rank_memory import rank_memory
from resmoe_dist.testing.embedded import DEMO_PROMPTS, embedded_checkpoint


def main() -> None:
    """One rank, from the command line."""
    run_entry_point(_main)


def _main() -> None:
    """Join the grid, load this rank's shard, generate this lane's share, report."""
    # 1. What is asked for, checked before ranks are started.
    config = parse(InferConfig, InferConfig.__doc__ or "")
    quiet_libraries()
    prompts = read_prompts(config)
    options = GenerationOptions(
        config.max_new_tokens, config.temperature, config.top_p, config.seed
    )
    execution = execution_of(config)
    if config.model:
        check_grid(config.model, config.ep, config.tp)
    elif launched_rank() == 0:
        # Made by one process, which has all cores; the ranks find it in the cache.
        check_grid(embedded_checkpoint(config.ep), config.ep, config.tp)
    # 2. The grid.
    topology = start_grid(config.ep, config.tp, lanes=config.lanes, sequences=len(prompts))
    folder = config.model or embedded_checkpoint(config.ep)
    tokenizer = load_tokenizer(folder)
    if config.lanes is None and topology.ep > 1:
        topology = _with_fastest_lanes(topology, folder, tokenizer, prompts, config)
    # 3. This rank's shard of the model.
    dtype = STORED_DTYPES[config.dtype] if config.dtype else None
    model = load_model(
        folder, dtype=dtype, topology=topology, execution=execution, dispatch=config.dispatch
    )
    # 4. This lane's prompts.
    output = generate_on_lane(model, tokenizer, prompts, topology, options)
    # 5. Rank 0 reports for all.
    reports = gather_reports(topology, output, rank_memory(model))
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    completions = {i: text for each in reports for i, text in each.output.completions.items()}
    for i, prompt in enumerate(prompts):
        print(f"--- {i + 1}: {prompt!r}\n{prompt}{completions[i]}")
    print(rank_table(reports))
    if config.json_file:
        write_json(config.json_file, as_json(prompts, completions, reports))


def _with_fastest_lanes(
    place: Topology,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    config: InferConfig,
) -> Topology:
    """The grid with the number of lanes that suits these prompts. Collective over the world."""
    text = load_config(str(folder)).get_text_config()
    layer = read_index(folder).layers[0]
    sizes = LayerSizes(
        layer.hidden,
        layer.stored_experts,
        getattr(text, "num_experts_per_tok", 1),
        STORED_DTYPES[config.dtype] if config.dtype else text.dtype or torch.float32,
    )
    longest = max(len(ids) for ids in tokenizer(prompts)["input_ids"])
    load = Workload(len(prompts), longest, config.max_new_tokens)
    device = torch.device(get_accelerator().current_device_name())
    return fastest_topology(place, sizes, load, device)


def read_prompts(config: InferConfig) -> list[str]:
    """The prompts of the command line, of a file, or the demo's.

    Raises UserError for a file that cannot be read or has no prompts.
    """
    if config.prompts is None:
        return config.prompt or DEMO_PROMPTS
    try:
        lines = config.prompts.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{config.prompts}: not a readable UTF-8 file ({error})") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{config.prompts}: has no prompts; write one per line")
    return prompts


if __name__ == "__main__":
    main()
