"""The number of lanes that suits the prompts of a command."""

from __future__ import annotations

from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from transformers import PreTrainedTokenizerBase

from resmoe_dist.checkpoints.format import STORED_DTYPES, read_index
from resmoe_dist.config.commands import InferConfig
from resmoe_dist.families.models import load_config
from resmoe_dist.parallel.lanes import LayerSizes, Workload, fastest_topology
from resmoe_dist.parallel.topology import Topology


def with_fastest_lanes(
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
    load = Workload(len(prompts), longest, config.max_new_tokens, config.batch_size)
    device = torch.device(get_accelerator().current_device_name())
    return fastest_topology(place, sizes, load, device)
