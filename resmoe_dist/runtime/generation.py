"""Generates text from prompts on a grid: each lane completes its share, all lanes in step.

Legend: B batch, S sequence.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from transformers import (
    LogitsProcessorList,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from resmoe_dist.errors import UserError, first_line
from resmoe_dist.parallel.topology import Topology
from resmoe_dist.runtime.decoding import NoNaN, TextEnds, greedy_config, vocabulary_of
from resmoe_dist.runtime.lane_steps import LaneSteps
from resmoe_dist.runtime.sampling import sampling_processors
from resmoe_dist.tokens import token_ids_of


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

    completions: by the prompt's number. new_tokens: of all completions, padding aside. seconds: of
    generating.
    """

    completions: dict[int, str]
    new_tokens: int
    seconds: float


@dataclass(frozen=True)
class GeneratedBatch:
    """What a lane generated of one batch.

    texts: the new tokens of each prompt. moments: when each step ended, also those that other lanes
    needed; in seconds of `time.perf_counter`.
    """

    texts: list[list[int]]
    moments: list[float]


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

    All lanes run the same number of steps (`LaneSteps`). A lane without prompts generates from a
    single token and discards the result. Of the model's generation config, special tokens, stop
    strings and changes of logits count (`greedy_config`).

    streamer: gets the tokens of a single prompt as they come.
    """
    if torch.distributed.is_initialized():
        # The measured time must not include waiting for ranks that load more slowly.
        torch.distributed.barrier()
    began = time.perf_counter()
    completions: dict[int, str] = {}
    new_tokens = 0
    for numbers in lane_batches(len(prompts), topology, options.batch):
        found = generate_batch(model, tokenizer, prompts, numbers, topology, options, streamer)
        for number, text in zip(numbers, found.texts, strict=True):
            completions[number] = tokenizer.decode(text, skip_special_tokens=True)
        new_tokens += sum(map(len, found.texts))
    return LaneOutput(completions, new_tokens, time.perf_counter() - began)


def lane_batches(count: int, topology: Topology, batch: int) -> list[range]:
    """The numbers of the prompts of each batch of this rank's lane.

    All lanes have as many batches; some may be empty.
    """
    mine = range(topology.lane, count, topology.lanes)
    largest_share = max(1, -(-count // topology.lanes))
    return [mine[first : first + batch] for first in range(0, largest_share, batch)]


@torch.no_grad()
def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    numbers: range,
    topology: Topology,
    options: GenerationOptions,
    streamer: BaseStreamer | None = None,
) -> GeneratedBatch:
    """Complete the prompts with these numbers, as one batch. Collective over the replica."""
    ids = token_ids(tokenizer, [prompts[i] for i in numbers], options.chat)
    processors = LogitsProcessorList([NoNaN()])
    if options.temperature is not None:
        processors += sampling_processors(
            options.seed, numbers or [-1], options.temperature, options.top_p
        )
    return _generate(model, tokenizer, ids, options.max_new_tokens, processors, topology, streamer)


@torch.no_grad()
def try_generation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, topology: Topology
) -> None:
    """Generate two tokens from one. Collective over the grid.

    Raises whatever the folder's config, tokenizer or generation config makes transformers raise.
    """
    start = [[_any_token(model, tokenizer)]]
    _generate(model, tokenizer, start, 2, LogitsProcessorList([NoNaN()]), topology)


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_new_tokens: int,
    processors: LogitsProcessorList,
    topology: Topology,
    streamer: BaseStreamer | None = None,
) -> GeneratedBatch:
    """The new tokens of each prompt's tokens; there may be no prompts."""
    config = greedy_config(model, tokenizer)
    ends = TextEnds(config, tokenizer)
    steps = LaneSteps(ends, max_new_tokens, topology, bool(prompts))
    given = prompts or [[_any_token(model, tokenizer)]]
    padding = config.pad_token_id
    assert isinstance(padding, int)
    # Left-padded: the new tokens follow the prompt directly.
    length = max(map(len, given))
    ids_BS = torch.tensor([[padding] * (length - len(ids)) + ids for ids in given])
    mask_BS = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in given])
    # `generate` fills gaps of the config that it is given from the model's.
    of_folder, model.generation_config = model.generation_config, config
    try:
        output_BS = model.generate(
            input_ids=ids_BS.to(model.device),
            attention_mask=mask_BS.to(model.device),
            max_new_tokens=max_new_tokens if prompts else 1,
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([ends, steps]),
            # Not transformers' all-reduce over the world after every step: see `LaneSteps`.
            synced_gpus=False,
            streamer=streamer,
        )
    finally:
        model.generation_config = of_folder
    steps.wait_for_lanes(model)
    texts = ends.texts(output_BS, 1 if model.config.is_encoder_decoder else length)
    return GeneratedBatch(texts[: len(prompts)], steps.moments)


def check_chat(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError if a tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise UserError("--chat: the tokenizer has no chat template; leave --chat out")


def token_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], chat: bool
) -> list[list[int]]:
    """The tokens of each prompt.

    Raises UserError if the chat template refuses a prompt, or a prompt has no tokens.
    """
    if not prompts:
        return []
    texts = prompts
    if chat:
        messages = [[{"role": "user", "content": text}] for text in prompts]
        try:
            texts = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # templates are programs
            raise UserError(
                f"--chat: the tokenizer's chat template fails ({first_line(error)}); leave --chat "
                "out"
            ) from error
    # A chat template writes the special tokens itself.
    ids = token_ids_of(tokenizer, texts, add_special_tokens=not chat)
    for prompt, tokens in zip(prompts, ids, strict=True):
        if not tokens:
            raise UserError(f"prompt {_shortened(prompt)}: the tokenizer finds no tokens in it")
    return ids


def check_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    config: PretrainedConfig,
    chat: bool = False,
) -> None:
    """Raise UserError if a model cannot continue a prompt.

    It may be too long for the model's context, or have tokens that the model does not know.
    """
    text = config.get_text_config()
    context = getattr(text, "max_position_embeddings", None)
    vocabulary = getattr(text, "vocab_size", None)
    for prompt, ids in zip(prompts, token_ids(tokenizer, prompts, chat), strict=True):
        if isinstance(context, int) and len(ids) > context:
            raise UserError(
                f"prompt {_shortened(prompt)}: has {len(ids)} tokens, the model's context is "
                f"{context}; shorten it"
            )
        if isinstance(vocabulary, int) and max(ids) >= vocabulary:
            raise UserError(
                f"prompt {_shortened(prompt)}: has token id {max(ids)}, the model's end at "
                f"{vocabulary - 1}; use the tokenizer of this model"
            )


def _shortened(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 30 else f"{prompt[:30]}…")


def _any_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """A token that a model can start from."""
    known = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return next((i for i in known if i is not None and 0 <= i < vocabulary_of(model)), 0)
