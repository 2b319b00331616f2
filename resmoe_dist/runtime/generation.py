"""Generates text from prompts on a grid: each lane completes its share, all lanes in step.

Legend: B batch, S sequence.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from resmoe_dist.parallel.topology import Topology


@dataclass(frozen=True)
class GenerationOptions:
    """How to continue prompts.

    max_new_tokens: per prompt. temperature: None for greedy decoding. top_p: nucleus sampling, with
    a temperature. seed: of the sampling; each lane derives a different one from it.
    """

    max_new_tokens: int = 64
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class LaneOutput:
    """What one rank generated.

    completions: by the prompt's number. new_tokens: of all completions. seconds: of generating.
    """

    completions: dict[int, str]
    new_tokens: int
    seconds: float


def lane_share(count: int, topology: Topology) -> range:
    """The numbers of the prompts that this rank's lane completes; may be empty."""
    return range(topology.lane, count, topology.lanes)


@torch.no_grad()
def generate_on_lane(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    topology: Topology,
    options: GenerationOptions,
) -> LaneOutput:
    """Complete this lane's prompts. Collective over the grid.

    Every forward pass exchanges tokens between lanes, so all lanes must run the same number of
    passes. transformers' `synced_gpus` keeps finished lanes in step. A lane without prompts
    generates from a single token and discards the result.
    """
    mine = lane_share(len(prompts), topology)
    texts = [prompts[i] for i in mine]
    inputs = _encode(tokenizer, texts, model.device)
    start = inputs["input_ids"].shape[1]
    sampling: dict[str, object] = {"do_sample": options.temperature is not None}
    if options.temperature is not None:
        # The ranks of one lane must draw the same tokens.
        torch.manual_seed(options.seed * topology.lanes + topology.lane)
        sampling |= {"temperature": options.temperature, "top_p": options.top_p or 1.0}
    if torch.distributed.is_initialized():
        # The measured time must not include waiting for ranks that load more slowly.
        torch.distributed.barrier()
    began = time.perf_counter()
    output_BS = model.generate(
        **inputs,
        max_new_tokens=options.max_new_tokens if texts else 1,
        synced_gpus=topology.lanes > 1,
        **sampling,
    )
    seconds = time.perf_counter() - began
    if not texts:
        return LaneOutput({}, 0, seconds)
    new_BS = output_BS[:, 1 if model.config.is_encoder_decoder else start :]
    completions = tokenizer.batch_decode(new_BS, skip_special_tokens=True)
    pad = tokenizer.pad_token_id
    return LaneOutput(
        dict(zip(mine, completions, strict=True)), int((new_BS != pad).sum()), seconds
    )


def _encode(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], device: torch.device
) -> dict[str, torch.Tensor]:
    """A left-padded batch of token ids [B, S]; one single token if there are no texts."""
    if not texts:
        known = (tokenizer.bos_token_id, tokenizer.eos_token_id, 0)
        token = next(token for token in known if token is not None)
        ids = torch.tensor([[token]], device=device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(texts, return_tensors="pt", padding=True).to(device)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}
