"""One stage of training that an interruption does not lose: it goes on from its last checkpoint."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.harness import logger
from resmoe_dist.errors import UserError
from resmoe_dist.testing.recipes import Recipe
from resmoe_dist.testing.training import optimizers_of, train_step

STEPS_PER_CHECKPOINT = 100


@dataclass(frozen=True)
class Stage:
    """What to train, and where to keep its state.

    path: of the checkpoint. made_from: all that decides the result; a checkpoint of something else
    is refused. factors: of the recipe's learning rates, one per step. muon_experts: as of
    `optimizers_of`.
    """

    name: str
    path: Path
    made_from: str
    recipe: Recipe
    factors: list[float]
    muon_experts: bool = False


def train_stage(
    stage: Stage, model: PreTrainedModel, corpus: Tensor, *, every: int = STEPS_PER_CHECKPOINT
) -> float:
    """Train `model` in place, in eval mode after it; its CPU seconds, with earlier runs'.

    every: steps between checkpoints. An interrupted stage ends with the same weights as one that
    was not. It draws from the caller's random state. Raises UserError for another stage's
    checkpoint.
    """
    optimizers = optimizers_of(model, stage.recipe, muon_experts=stage.muon_experts)
    done, seconds, loss = 0, 0.0, float("nan")
    if stage.path.exists():
        state = torch.load(stage.path, weights_only=True)
        if state["made_from"] != stage.made_from:
            raise UserError(
                f"{stage.path}: a checkpoint of other options; remove it or choose another --work"
            )
        done, seconds = state["done"], state["seconds"]
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        torch.set_rng_state(state["random"])
    began = time.process_time() - seconds
    steps = len(stage.factors)
    model.train()
    for step in range(done, steps):
        loss = train_step(model, stage.recipe, corpus, optimizers, stage.factors[step])
        if (step + 1) % every == 0 or step + 1 == steps:
            seconds = time.process_time() - began
            state = {
                "made_from": stage.made_from,
                "done": step + 1,
                "seconds": seconds,
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "random": torch.get_rng_state(),
            }
            _save(stage.path, state)
            logger.info(
                "%s: step %d of %d, loss %.3f, %.0f s", stage.name, step + 1, steps, loss, seconds
            )
    model.eval()
    return seconds


def _save(path: Path, state: dict[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    torch.save(state, partial)
    os.replace(partial, path)
