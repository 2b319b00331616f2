"""Mean negative log-likelihood of text under a model, in one process or on a grid."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from resmoe_dist.checkpoints.tensor_files import read_json, read_json_object
from resmoe_dist.errors import UserError, first_line
from resmoe_dist.model_paths import check_model_folder, is_plain_name
from resmoe_dist.parallel.topology import SINGLE_PROCESS, Topology
from resmoe_dist.tokens import token_ids_of

DEFAULT_CONTEXT = 512
_TOKENS_PER_BATCH = 4096


@dataclass(frozen=True)
class Evaluation:
    """nll: mean over predicted tokens, in nats. tokens: how many were predicted."""

    nll: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(nll); infinite if it exceeds the largest float."""
        try:
            return math.exp(self.nll)
        except OverflowError:
            return math.inf

    def as_dict(self) -> dict[str, float | None]:
        """For JSON, which has no infinity: a perplexity beyond the largest float is None."""
        perplexity = self.perplexity if math.isfinite(self.perplexity) else None
        return {"perplexity": perplexity, "nll": self.nll, "tokens": self.tokens}


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. Raises UserError if the folder has no tokenizer.

    Code that the folder brings along is never run.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a model folder")
    check_model_folder(folder)
    config = folder / "tokenizer_config.json"
    named = _other_files(config, read_json_object(config)) if config.exists() else {}
    try:
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, **named
        )
    except Exception as error:  # the tokenizer libraries' errors have no common class
        raise UserError(
            f"{folder}: no tokenizer could be loaded ({first_line(error)}); add its files, or give "
            "token ids"
        ) from error


def _other_files(path: Path, config: dict[str, Any]) -> dict[str, None]:
    """What to give a tokenizer instead of the paths in its tokenizer_config.json.

    Many released models keep a path of the machine that wrote them, which is not to be read.
    transformers finds the folder's own files without it. Raises UserError for paths that
    transformers would read all the same.
    """
    if config.get("init_inputs"):
        raise UserError(f"{path}: 'init_inputs' is not supported; remove it")
    versions = config.get("fast_tokenizer_files") or []
    if not isinstance(versions, list) or not all(map(is_plain_name, versions)):
        raise UserError(f"{path}: 'fast_tokenizer_files' must name files of the folder")
    return {
        name: None
        for name, value in config.items()
        if name.endswith(("_file", "_path")) and isinstance(value, str)
    }


def sequences_from_text(
    path: Path, tokenizer: PreTrainedTokenizerBase, context: int
) -> list[list[int]]:
    """Consecutive windows of at most `context` tokens of a text file.

    Raises UserError for a file that is missing, not UTF-8, or has fewer than two tokens.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable UTF-8 text file ({error})") from error
    ids = token_ids_of(tokenizer, text)
    windows = [ids[i : i + context] for i in range(0, len(ids), context)]
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise UserError(f"{path}: too short; two tokens or more are needed")
    return windows


def sequences_from_json(path: Path) -> list[list[int]]:
    """Sequences of token ids from a JSON list of lists.

    Raises UserError for anything else, and for sequences of fewer than two ids.
    """
    sequences = read_json(path)
    if not isinstance(sequences, list) or not sequences:
        raise UserError(f"{path}: must be a JSON list of sequences of token ids")
    for i, sequence in enumerate(sequences):
        valid = isinstance(sequence, list) and all(
            type(token) is int and token >= 0 for token in sequence
        )
        if not valid or len(sequence) < 2:
            raise UserError(
                f"{path}: sequence {i} must be a list of two or more token ids, from 0 on"
            )
    return sequences


def check_vocabulary(path: Path, sequences: list[list[int]], vocabulary: int) -> None:
    """Raise UserError if a token id of the sequences in `path` is outside the vocabulary."""
    for i, sequence in enumerate(sequences):
        if max(sequence) >= vocabulary:
            raise UserError(
                f"{path}: sequence {i} has token id {max(sequence)}, the model's end at "
                f"{vocabulary - 1}; use the tokenizer of this model"
            )


@torch.no_grad()
def evaluate(
    model: PreTrainedModel, sequences: list[list[int]], topology: Topology = SINGLE_PROCESS
) -> Evaluation:
    """Mean NLL of each token given the tokens before it. Collective over the grid.

    Lanes take batches in turn. A lane without a batch runs a dummy forward pass, because all lanes
    must run the same number of passes.
    An encoder-decoder model reads the first half of a sequence and is scored on all of the second.
    """
    batches = _equal_length_batches(sequences)
    rounds = -(-len(batches) // topology.lanes)
    total = torch.zeros(2, dtype=torch.float64)
    for i in range(rounds):
        number = i * topology.lanes + topology.lane
        idle = number >= len(batches)
        batch = [sequences[0][:2]] if idle else batches[number]
        nll, tokens = _batch_nll(model, torch.tensor(batch, device=model.device))
        if not idle and topology.lane_rank == 0:
            total += torch.tensor([nll, tokens], dtype=torch.float64)
    if topology.lanes * topology.lane_size > 1:
        shared = total.to(model.device)
        torch.distributed.all_reduce(shared)
        total = shared.cpu()
    return Evaluation(nll=float(total[0] / total[1]), tokens=int(total[1]))


@dataclass(frozen=True)
class Likeness:
    """How a model predicts, beside a reference.

    divergence: mean Kullback-Leibler divergence of its next-token distributions from the
    reference's, in nats per predicted token. seconds: of the model's own forward passes.
    """

    evaluation: Evaluation
    divergence: float
    seconds: float


def divergence(
    model: PreTrainedModel, reference: PreTrainedModel, sequences: list[list[int]]
) -> float:
    """Mean divergence of a model's predictions from the reference's (see `Likeness`).

    It shows every change that compression makes, whereas a perplexity can improve by chance.
    """
    return likeness(model, reference, sequences).divergence


@torch.no_grad()
def likeness(
    model: PreTrainedModel, reference: PreTrainedModel, sequences: list[list[int]]
) -> Likeness:
    """Score a model and compare its predictions with a reference's, in one process."""
    nll, diverged, tokens, seconds = 0.0, 0.0, 0, 0.0
    for batch in _equal_length_batches(sequences):
        ids_BS = torch.tensor(batch)
        began = time.perf_counter()
        found, labels = _predictions(model, ids_BS.to(model.device))
        nll += _summed_nll(found, labels)
        seconds += time.perf_counter() - began
        expected, _ = _predictions(reference, ids_BS.to(reference.device))
        terms = F.kl_div(
            found.double().log_softmax(-1).to(expected.device),
            expected.double().log_softmax(-1),
            reduction="sum",
            log_target=True,
        )
        diverged += float(terms)
        tokens += labels.numel()
    return Likeness(Evaluation(nll / tokens, tokens), diverged / tokens, seconds)


def _batch_nll(model: PreTrainedModel, ids_BS: torch.Tensor) -> tuple[float, int]:
    """Summed NLL and number of predicted tokens."""
    logits, labels = _predictions(model, ids_BS)
    return _summed_nll(logits, labels), labels.numel()


def _summed_nll(logits: torch.Tensor, labels: torch.Tensor) -> float:
    nll = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
    return float(nll.double().sum())


def _predictions(model: PreTrainedModel, ids_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the tokens that are predicted, and those tokens."""
    if model.config.is_encoder_decoder:
        half = ids_BS.shape[1] // 2
        labels = ids_BS[:, half:].contiguous()  # T5 models flatten the labels
        return model(input_ids=ids_BS[:, :half], labels=labels).logits, labels
    return model(input_ids=ids_BS, use_cache=False).logits[:, :-1], ids_BS[:, 1:]


def _equal_length_batches(sequences: list[list[int]]) -> list[list[list[int]]]:
    """Batches of consecutive sequences of equal length, so that nothing is padded."""
    batches: list[list[list[int]]] = []
    for sequence in sequences:
        last = batches[-1] if batches else []
        fits = bool(last) and len(last[0]) == len(sequence)
        if fits and (len(last) + 1) * len(sequence) <= _TOKENS_PER_BATCH:
            last.append(sequence)
        else:
            batches.append([sequence])
    return batches
