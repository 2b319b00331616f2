"""Text to token ids, by the tokenizer of a model folder."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from resmoe_dist.errors import UserError, first_line


def token_ids_of(
    tokenizer: PreTrainedTokenizerBase, text: Any, *, add_special_tokens: bool = True
) -> Any:
    """The token ids of a text, or of each text of a list.

    Raises UserError if the tokenizer fails.
    """
    try:
        return tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    except Exception as error:  # of its config's values, some are first used here
        raise UserError(
            f"the tokenizer fails ({type(error).__name__}: {first_line(error)}); fetch its files "
            "again"
        ) from error
