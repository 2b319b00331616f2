"""Python's standard library as bytes, and the tokenizer that reads them.

The token id of a byte is its value. The special tokens come after the 256 bytes.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from resmoe_dist.errors import UserError

BOS_ID, EOS_ID, PAD_ID = 256, 257, 258
VOCABULARY_SIZE = 259

# Not in the corpus: tests, tables of numbers, and packages that some systems lack.
_SKIPPED_FOLDERS = frozenset(
    [
        "__pycache__",
        "encodings",
        "idle_test",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "turtledemo",
        "tkinter",
        "idlelib",
        "ensurepip",
    ]
)
_HELD_OUT_EVERY = 20  # one file in this many is held out


def read_corpus() -> tuple[Tensor, Tensor]:
    """The standard library's source as token ids: (training files, held-out files), each [tokens].

    A file's bytes are followed by EOS_ID. Raises UserError if this Python has no .py sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
    ]
    if len(files) < _HELD_OUT_EVERY:
        raise UserError(f"no Python source in {root}: use a Python that has its .py files")

    def tokens(paths: list[Path]) -> Tensor:
        parts = []
        for path in paths:
            parts += [torch.frombuffer(bytearray(path.read_bytes() + b"\n"), dtype=torch.uint8)]
            parts += [torch.tensor([EOS_ID])]
        return torch.cat(parts)

    held_out = files[_HELD_OUT_EVERY // 2 :: _HELD_OUT_EVERY]
    return tokens([path for path in files if path not in set(held_out)]), tokens(held_out)


def byte_tokenizer(padding_side: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose ids are BOS_ID and the bytes of the text's UTF-8."""
    vocabulary = {symbol: byte for byte, symbol in bytes_to_unicode().items()}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<pad>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side=padding_side,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,  # "</s>" in a text is four characters, not a special token
        model_input_names=["input_ids", "attention_mask"],
    )
