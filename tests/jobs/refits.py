"""Runs of compression that refit the routers, on models of three MoE layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from resmoe_dist.checkpoints.format import CheckpointIndex
from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.jobs.calibration import measure_activations
from resmoe_dist.jobs.pipeline import Compression
from resmoe_dist.jobs.router_refit import RouterRefit
from resmoe_dist.jobs.workers import Workers
from tests.checkpoints.damage import edit_tensors
from tests.compress_settings import compression_settings
from tests.models import FAMILIES, random_sequences, save_family

SEQUENCES = random_sequences(*[20] * 48)
# Three MoE layers: the last routers read what two compressed layers made of the tokens.
SIZES: dict[str, dict[str, int]] = {
    "mixtral": {"num_hidden_layers": 3},
    "qwen3_moe": {"num_hidden_layers": 3},
    "deepseek_v3": {"num_hidden_layers": 4},
    "gpt_oss": {"num_hidden_layers": 3},
    "switch": {"num_layers": 4, "num_decoder_layers": 4, "num_sparse_encoder_layers": 2},
}
# The weight of a router, in the block around the experts.
WEIGHTS = {
    "mixtral": "gate.weight",
    "qwen3_moe": "gate.weight",
    "deepseek_v3": "gate.weight",
    "gpt_oss": "router.weight",
    "switch": "router.classifier.weight",
}


def compress(
    source: Path,
    output: Path,
    workers: Workers | None = None,
    *,
    refit: bool = True,
    resume: bool = False,
    measured: list[list[int]] = SEQUENCES,
    **options: Any,
) -> CheckpointIndex:
    """Compress with a calibration, and refit the routers. measured: tokens of the calibration."""
    checkpoint = SourceCheckpoint(source)
    values = {"groups": 1, "layers": list(range(len(checkpoint.sites)))} | options
    settings = compression_settings(calibration="0" * 64, recalibrate_router=refit, **values)
    run = Compression(
        checkpoint,
        output,
        settings,
        workers,
        measure=lambda samples: measure_activations(checkpoint, measured, samples=samples),
        routers=RouterRefit(checkpoint, SEQUENCES) if refit else None,
    )
    return run.run(resume=resume)


def _bias_choices(tensors: dict[str, Tensor]) -> None:
    """Give a bias to the choices of routers that have one (DeepSeek-V3)."""
    for name in tensors:
        if name.endswith("e_score_correction_bias"):
            tensors[name] = torch.linspace(-0.1, 0.1, len(tensors[name]))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder outside its group files."""
    files = folder.glob("model*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def router_names(folder: Path, family: str) -> list[str]:
    """The routers' names in the files, in the order of the layers."""
    ending = f".{WEIGHTS[family]}"
    names = [name for name in tensors_of(folder) if name.endswith(ending)]
    return sorted(names, key=lambda name: ("decoder" in name, name))


def save_source(family: str, folder: Path) -> None:
    """Write a model of three MoE layers."""
    save_family(FAMILIES[family], folder, **SIZES[family])
    edit_tensors(folder / "model.safetensors", _bias_choices)
