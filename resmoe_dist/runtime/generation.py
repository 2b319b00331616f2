"""Generates text from prompts on a grid: each lane completes its share, all lanes in step.

Legend: B batch, S sequence.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from resmoe_dist.errors import UserError
from resmoe_dist.parallel.topology import Topology
from resmoe_dist.runtime.sampling import sampling_processors


@dataclass(frozen=True)
class GenerationOptions:
    """How to continue prompts.

    max_new_tokens: per prompt. temperature: None for greedy decoding. top_p: nucleus sampling, with
    a temperature. seed: of the sampling; a prompt's draws follow from it and the prompt's number.
    batch: prompts that a lane works on at a time. chat: prompts are messages of a user, put into
    the tokenizer's chat template.
    """

    max_new_tokens: int = 64
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    batch: int = 8
    chat: bool = False


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
    streamer: BaseStreamer | None = None,
) -> LaneOutput:
    """Complete this lane's prompts, a batch at a time. Collective over the grid.

    Every forward pass exchanges tokens between lanes, so all lanes must run the same number of
    passes. transformers' `synced_gpus` keeps finished lanes in step. A lane without prompts
    generates from a single token and discards the result.

    streamer: gets the tokens of a single prompt as they come.
    """
    mine = lane_share(len(prompts), topology)
    largest_share = -(-len(prompts) // topology.lanes)
    if torch.distributed.is_initialized():
        # The measured time must not include waiting for ranks that load more slowly.
        torch.distributed.barrier()
    began = time.perf_counter()
    completions: dict[int, str] = {}
    new_tokens = 0
    for first in range(0, max(1, largest_share), options.batch):
        numbers = mine[first : first + options.batch]
        inputs = _encode(tokenizer, [prompts[i] for i in numbers], options.chat, model.device)
        sampling: dict[str, object] = {"do_sample": False}
        if options.temperature is not None:
            sampling["logits_processor"] = sampling_processors(
                options.seed, numbers or [-1], options.temperature, options.top_p
            )
        output_BS = model.generate(
            **inputs,
            max_new_tokens=options.max_new_tokens if numbers else 1,
            synced_gpus=topology.lanes > 1,
            streamer=streamer,
            **sampling,
        )
        if numbers:
            start = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
            new_BS = output_BS[:, start:]
            texts = tokenizer.batch_decode(new_BS, skip_special_tokens=True)
            completions |= dict(zip(numbers, texts, strict=True))
            new_tokens += int((new_BS != tokenizer.pad_token_id).sum())
    return LaneOutput(completions, new_tokens, time.perf_counter() - began)


def check_chat(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError if a tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise UserError("--chat: the tokenizer has no chat template; leave --chat out")


def _encode(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], chat: bool, device: torch.device
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
    if chat:
        messages = [[{"role": "user", "content": text}] for text in texts]
        texts = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    # A chat template writes the special tokens itself.
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=not chat).to(
        device
    )
    return {name: batch[name] for name in ("input_ids", "attention_mask")}
