"""Train a tiny model of a family: dense first, then upcycled."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from resmoe_dist.errors import UserError
from resmoe_dist.testing.corpus import BOS_ID, VOCABULARY_SIZE, byte_tokenizer, read_corpus
from resmoe_dist.testing.recipes import FAMILIES, RECIPES, Recipe, build_model
from resmoe_dist.testing.stacked_muon import StackedMuon
from resmoe_dist.testing.upcycling import balance_by_bias, choose_first_expert, imbalance, upcycle

logger = logging.getLogger(__name__)

HELD_OUT_FILE = "held-out.json"


@dataclass(frozen=True)
class TrainingReport:
    """Cost and result of training. `held_out_nll` and `unigram_nll` are in nats per byte.

    Both are measured on whole files that are not in the training data. `unigram_nll` is the loss of
    the best model without context: the byte frequencies of the training files.
    """

    family: str
    seed: int
    parameters: int
    dense_steps: int
    moe_steps: int
    seconds: float
    held_out_nll: float
    unigram_nll: float
    sample: str


def train_tiny_model(
    directory: str | os.PathLike,
    family: str = "mixtral",
    seed: int = 0,
    *,
    dense_steps: int | None = None,
    moe_steps: int | None = None,
    progress: bool = True,
) -> TrainingReport:
    """Train a tiny MoE model and write it to `directory` as a Hugging Face model folder.

    The folder also gets `training.json`, the report, and `held-out.json`, the token ids that the
    held-out loss was measured on. It is written under a temporary name and renamed at the end.
    `dense_steps` and `moe_steps` default to the family's recipe. The same seed gives the same model
    on the same machine. The caller's random state is not changed, and gradients need not be on.

    Raises UserError if the family is unknown, if `directory` exists and is not empty, or if
    this Python came without the source of its standard library.
    """
    if family not in FAMILIES:
        raise UserError(f"unknown family {family!r}: choose one of {', '.join(FAMILIES)}")
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} exists and is not empty: choose another directory")

    recipe = RECIPES[family]
    dense_steps = recipe.dense_steps if dense_steps is None else dense_steps
    moe_steps = recipe.moe_steps if moe_steps is None else moe_steps
    started = time.perf_counter()
    train_tokens, held_out_tokens = read_corpus()
    quiet = None if progress else True  # None: tqdm shows a bar only on a terminal
    with (
        whole_or_nothing(directory) as partial,
        torch.random.fork_rng(devices=[]),
        tqdm(total=dense_steps + moe_steps, desc=family, unit="step", disable=quiet) as bar,
    ):
        torch.default_generator.manual_seed(seed)
        model = build_model(family, recipe.config | recipe.one_expert)
        choose_first_expert(model)
        _train(model, recipe, train_tokens, learning_rates(dense_steps, decay=False), bar)
        model = upcycle(model, build_model(family, recipe.config))
        balance_by_bias(model)
        _train(model, recipe, train_tokens, learning_rates(moe_steps, decay=True), bar)

        tokenizer = byte_tokenizer(padding_side="right" if recipe.encoder_decoder else "left")
        report = TrainingReport(
            family=family,
            seed=seed,
            parameters=model.num_parameters(),
            dense_steps=dense_steps,
            moe_steps=moe_steps,
            held_out_nll=mean_nll(model, recipe, held_out_tokens),
            unigram_nll=unigram_nll(train_tokens, held_out_tokens),
            sample=_sample(model, tokenizer, "class "),
            seconds=time.perf_counter() - started,
        )
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / "training.json").write_text(json.dumps(asdict(report), indent=2) + "\n")
        sequences = held_out_sequences(recipe, held_out_tokens)
        (partial / HELD_OUT_FILE).write_text(json.dumps(sequences) + "\n")
    logger.info("trained %s: %.3f nats/byte on held-out files", family, report.held_out_nll)
    return report


@contextmanager
def whole_or_nothing(directory: Path) -> Iterator[Path]:
    """A folder to write to: renamed to `directory` at the end, removed on an error."""
    partial = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write to {directory.parent}: {error.strerror}") from error
    try:
        yield partial
        try:
            partial.rename(directory)  # replaces an empty folder only
        except OSError as error:
            raise UserError(f"{directory} was filled meanwhile: choose another one") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@torch.enable_grad()
def _train(
    model: PreTrainedModel, recipe: Recipe, corpus: Tensor, factors: list[float], bar: tqdm
) -> None:
    """Train one step per entry of `factors`, which multiply the recipe's learning rates."""
    optimizers = optimizers_of(model, recipe)
    model.train()
    for factor in factors:
        loss = train_step(model, recipe, corpus, optimizers, factor)
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        bar.update()
    model.eval()


def train_step(
    model: PreTrainedModel,
    recipe: Recipe,
    corpus: Tensor,
    optimizers: list[torch.optim.Optimizer],
    factor: float,
) -> float:
    """One step on random crops of `corpus`, at `factor` times the peak learning rates; its loss."""
    starts = torch.randint(len(corpus) - recipe.crop_length, (recipe.batch_size,))
    context_length = int(torch.randint(recipe.crop_length // 8, recipe.crop_length // 2, ()))
    inputs = _model_inputs(recipe, corpus, starts, context_length)
    outputs = model(**inputs, output_router_logits=recipe.balance > 0)
    loss = outputs.loss
    if recipe.balance > 0:
        loss = loss + recipe.balance * imbalance(outputs, recipe.top_k)
    loss.backward()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.item())


def learning_rates(steps: int, decay: bool, warmup: int = 20) -> list[float]:
    """A factor in (0, 1] per step: linear warm-up, then constant or linear decay."""
    return [
        min(1.0, (step + 1) / warmup) * ((steps - step) / steps if decay else 1.0)
        for step in range(steps)
    ]


def _model_inputs(recipe: Recipe, corpus: Tensor, starts: Tensor, context_length: int) -> dict:
    """The crops of `corpus` at `starts` as one batch, each after a BOS_ID.

    An encoder reads the first `context_length` bytes and its decoder continues; a decoder-only
    model predicts every byte (transformers shifts the labels by itself).
    """
    crops = corpus[starts[:, None] + torch.arange(recipe.crop_length)].long()
    bos = torch.full((len(starts), 1), BOS_ID)
    if recipe.encoder_decoder:
        context = torch.cat([bos, crops[:, :context_length]], dim=1)
        return dict(input_ids=context, labels=crops[:, context_length:].contiguous())
    tokens = torch.cat([bos, crops], dim=1)
    return dict(input_ids=tokens, labels=tokens, use_cache=False)


# Embeddings and routers are not hidden-to-hidden maps, so AdamW trains them, not Muon.
_TABLES = re.compile(
    r"(embed_tokens|shared|lm_head|relative_attention_bias|gate|classifier)\.weight$"
)


def optimizers_of(
    model: PreTrainedModel, recipe: Recipe, *, muon_experts: bool = False
) -> list[torch.optim.Optimizer]:
    """Muon for hidden-to-hidden matrices, AdamW for everything else, including experts.

    PyTorch's Muon takes matrices only, and experts are stacked. AdamW also keeps them closer
    together; `muon_experts` takes Muon for them all the same. Each parameter group has its peak
    learning rate as `peak_lr`, which `train_step` scales.
    """
    matrices, experts, others = [], [], []
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            experts.append(parameter)
        elif parameter.ndim == 2 and not _TABLES.search(name):
            matrices.append(parameter)
        else:
            others.append(parameter)
    adamw: list[dict[str, Any]] = [{"params": others}]
    if not muon_experts:
        adamw.insert(0, {"params": experts, "lr": recipe.expert_lr})
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(
            matrices, lr=recipe.muon_lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(adamw, lr=recipe.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    if muon_experts:
        optimizers.append(StackedMuon(experts, recipe.muon_lr))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def _held_out_starts(recipe: Recipe, corpus: Tensor, crops: int = 64) -> Tensor:
    """Start positions of evenly spaced crops of `corpus`."""
    return torch.linspace(0, len(corpus) - recipe.crop_length, crops).long()


def held_out_sequences(recipe: Recipe, corpus: Tensor) -> list[list[int]]:
    """The crops that `mean_nll` scores, as token ids for `resmoe-dist evaluate --token-ids`."""
    starts = _held_out_starts(recipe, corpus).tolist()
    return [[BOS_ID, *corpus[start : start + recipe.crop_length].tolist()] for start in starts]


@torch.no_grad()
def mean_nll(model: PreTrainedModel, recipe: Recipe, corpus: Tensor) -> float:
    """The model's loss on evenly spaced crops of `corpus`, in nats per byte."""
    losses = [
        model(**_model_inputs(recipe, corpus, some, recipe.crop_length // 4)).loss
        for some in _held_out_starts(recipe, corpus).split(16)
    ]
    return torch.stack(losses).mean().item()


def unigram_nll(train_tokens: Tensor, held_out_tokens: Tensor) -> float:
    """Cross-entropy of `held_out_tokens` under the token frequencies of `train_tokens`, nats."""
    counts = torch.bincount(train_tokens.long(), minlength=VOCABULARY_SIZE).double() + 1
    return -torch.log(counts / counts.sum())[held_out_tokens.long()].mean().item()


def _sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    tokens = model.generate(
        **tokenizer(prompt, return_tensors="pt"),
        max_new_tokens=200,
        do_sample=True,
        temperature=0.7,
    )
    text = tokenizer.decode(tokens[0], skip_special_tokens=True)
    return prompt + text if model.config.is_encoder_decoder else text
