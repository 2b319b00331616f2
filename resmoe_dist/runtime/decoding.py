"""How a model's logits become text: what generation_config.json may decide, and where a text ends.

Legend: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StopStringCriteria,
)

from resmoe_dist.errors import UserError

# Special tokens, where a text ends, and how logits are changed. Everything else in a folder's
# generation_config.json (beams, sampling, caches, what `generate` returns) is the caller's choice:
# it would change the number of sequences or of forward passes, which lanes must have in common.
_FROM_FOLDER = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "stop_strings"),
    *("forced_bos_token_id", "forced_eos_token_id", "min_length", "min_new_tokens"),
    *("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size"),
    *("encoder_no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"),
    "sequence_bias",
)


def greedy_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The model's generation config, for greedy decoding of one sequence for each prompt.

    The padding token is always one that the model has an embedding for.
    """
    found = model.generation_config
    chosen = {name: getattr(found, name, None) for name in _FROM_FOLDER}
    config = GenerationConfig(**chosen, do_sample=False, num_beams=1, num_return_sequences=1)
    config.pad_token_id = _padding(model, tokenizer, config)
    return config


def vocabulary_of(model: PreTrainedModel) -> int:
    """Number of tokens that a model has an embedding for, also if this rank holds some of them."""
    return model.get_input_embeddings().num_embeddings


def ending_tokens(config: GenerationConfig) -> list[int]:
    """The tokens that end a text."""
    eos = config.eos_token_id
    return [] if eos is None else eos if isinstance(eos, list) else [eos]


def _padding(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: GenerationConfig
) -> int:
    known = (
        *(config.pad_token_id, *ending_tokens(config)),
        *(tokenizer.pad_token_id, tokenizer.eos_token_id),
    )
    vocabulary = vocabulary_of(model)
    return next((id for id in known if isinstance(id, int) and 0 <= id < vocabulary), 0)


class TextEnds(StoppingCriteria):
    """Ends each row at an ending token or a stop string, and notes where.

    lengths: by row, tokens up to the end of its text, prompt and end included; None while it goes
    on.
    """

    def __init__(self, config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        # transformers pads rows that have ended only if a criterion has this attribute.
        self.eos_token_id = torch.tensor(ending_tokens(config), dtype=torch.long)
        self._strings = list(_stop_strings(config, tokenizer))
        # transformers must not look for them too: it would ask for the tokenizer.
        config.stop_strings = None
        self.lengths: list[int | None] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        """Whether each row of input_ids [B, S] has ended: [B]."""
        self.eos_token_id = self.eos_token_id.to(input_ids.device)
        ended = torch.isin(input_ids[:, -1], self.eos_token_id)
        for string in self._strings:
            ended = ended | string(input_ids, scores)
        self.lengths = self.lengths or [None] * len(input_ids)
        for row in ended.nonzero().flatten().tolist():
            if self.lengths[row] is None:
                self.lengths[row] = input_ids.shape[1]
        return ended

    @property
    def can_end(self) -> bool:
        """Whether a text can end before the last step."""
        return bool(len(self.eos_token_id) or self._strings)

    @property
    def all_ended(self) -> bool:
        """Whether no row goes on."""
        return bool(self.lengths) and None not in self.lengths

    def texts(self, output_BS: Tensor, start: int) -> list[list[int]]:
        """The new tokens of each row, from `start` to the end of its text."""
        lengths = self.lengths or [None] * len(output_BS)
        return [row[start:end] for row, end in zip(output_BS.tolist(), lengths, strict=True)]


def _stop_strings(
    config: GenerationConfig, tokenizer: PreTrainedTokenizerBase
) -> Iterator[StopStringCriteria]:
    """One criterion for each stop string. Raises UserError if one is not text, or empty."""
    given = config.stop_strings or []
    for string in [given] if isinstance(given, str) else given:
        if not isinstance(string, str) or not string:
            raise UserError(f"generation_config.json: stop_strings has {string!r}; it must be text")
        try:
            yield StopStringCriteria(tokenizer, [string])
        except ValueError:
            # The tokenizer cannot write the string, so the model cannot either.
            continue


class NoNaN(LogitsProcessor):
    """Ends the run if a logit is NaN, from which no token can be chosen."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The logits [B, V] unchanged. Raises UserError."""
        if bool(scores.isnan().any()):
            raise UserError(
                "the model's logits are NaN; its values overflow or its files are damaged: choose "
                "another --dtype, or run resmoe-dist verify"
            )
        return scores
