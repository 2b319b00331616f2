"""One row of a comparison: compress, load, score, and measure bytes, errors and times."""

from __future__ import annotations

import math
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from resmoe_dist.checkpoints.compressed import CompressedCheckpoint
from resmoe_dist.comparison.contenders import Contender
from resmoe_dist.comparison.operations import flops_per_token
from resmoe_dist.config.commands import CompareConfig, CompressConfig
from resmoe_dist.errors import UserError
from resmoe_dist.evaluation.perplexity import evaluate, likeness
from resmoe_dist.evaluation.report import describe
from resmoe_dist.evaluation.tasks import Tasks
from resmoe_dist.launch.compress import compress
from resmoe_dist.runtime.loading import load_model
from resmoe_dist.runtime.rank_memory import resident_bytes

Row = dict[str, Any]
# Of a contender's row, and of the source's.
FIGURES = (
    *("error", "relative_error", "values_kept", "expert_bytes", "expert_share"),
    *("checkpoint_bytes", "resident_bytes", "flops_per_token", "compress_seconds"),
    *("score_seconds", "perplexity", "nll", "divergence"),
)
SOURCE_FIGURES = ("score_seconds", "resident_bytes", "flops_per_token", "perplexity", "nll")


@dataclass(frozen=True)
class Budget:
    """The field of `compress` that says how much to keep, and its value.

    No option: of contenders whose size is fixed.
    """

    option: str = ""
    value: float = 0.0

    @property
    def options(self) -> dict[str, float]:
        """As options of `compress`."""
        return {self.option: self.value} if self.option else {}

    @property
    def folder_name(self) -> str:
        """For a folder's name."""
        return f"{self.option}-{self.value}" if self.option else "fixed"

    def __str__(self) -> str:
        return f"{self.option.replace('_', '-')} {self.value:g}" if self.option else "fixed size"


@dataclass(frozen=True)
class Scoring:
    """What every model is scored on.

    sequences: of token ids, and the source's predictions to compare with. tasks: with their
    tokenizer; None for no tasks.
    """

    sequences: list[list[int]]
    reference: PreTrainedModel
    tasks: Tasks | None = None
    tokenizer: PreTrainedTokenizerBase | None = None

    def task_scores(self, model: PreTrainedModel) -> Row:
        """`{"tasks": {"piqa acc": 0.79}}`, or nothing without tasks."""
        if self.tasks is None or self.tokenizer is None:
            return {}
        return {"tasks": self.tasks.score(model, self.tokenizer)}


def measure_row(
    config: CompareConfig, contender: Contender, budget: Budget, scoring: Scoring, folder: Path
) -> Row:
    """The figures of a contender: the mean over seeds, and `_sd` where there are several.

    folder: for the compressed model; it is removed unless the config keeps models. A contender that
    cannot compress this model, or not to this budget, gives a row with the `reason`.
    """
    seeds = range(config.seeds if contender.seeded else 1)
    found = []
    try:
        for seed in seeds:
            _remove(folder)
            found.append(_measure(config, contender, budget, seed, scoring, folder))
    except UserError as error:
        return {"reason": str(error)}
    finally:
        if not config.keep_models:
            _remove(folder)
    row: Row = {name: statistics.fmean(each[name] for each in found) for name in FIGURES}
    if scoring.tasks is not None:
        names = found[0]["tasks"]
        row["tasks"] = {n: statistics.fmean(each["tasks"][n] for each in found) for n in names}
    if len(found) > 1:
        row |= {f"{name}_sd": statistics.stdev(each[name] for each in found) for name in FIGURES}
    return row


def _remove(folder: Path) -> None:
    """Remove a compressed model, and what an interrupted run of `compress` left of it."""
    for each in (folder, folder.with_name(f"{folder.name}.partial")):
        shutil.rmtree(each, ignore_errors=True)


def source_row(scoring: Scoring) -> Row:
    """The figures of the model that is compressed."""
    reference, sequences = scoring.reference, scoring.sequences
    began = time.perf_counter()
    quality = evaluate(reference, sequences)
    row = {
        "score_seconds": time.perf_counter() - began,
        "resident_bytes": resident_bytes(reference),
        "flops_per_token": flops_per_token(reference, sequences),
        "perplexity": quality.perplexity,
        "nll": quality.nll,
    }
    _check_finite(row)
    return row | scoring.task_scores(reference)


def _measure(
    config: CompareConfig,
    contender: Contender,
    budget: Budget,
    seed: int,
    scoring: Scoring,
    folder: Path,
) -> Row:
    if contender.calibrated and config.calibration is None:
        raise UserError("needs --calibration TEXT")
    if contender.needs_target and budget.option != "target_bytes":
        raise UserError("only for a size: give --target-bytes")
    options = contender.compress_options(seed, config.ep) | budget.options
    if contender.calibrated:
        options["calibration"] = config.calibration
    began = time.perf_counter()
    compress(
        CompressConfig(
            source=config.source,
            output=folder,
            layers=config.layers,
            dtype=config.dtype,
            **options,
        )
    )
    seconds = time.perf_counter() - began
    described = describe(CompressedCheckpoint(folder))
    experts = described["experts"]
    compressed = [layer for layer in described["layers"] if layer["compressed"]]
    # As it is served: in the source's dtype, --dtype would show neither in bytes nor in quality.
    model = load_model(folder)
    scored = likeness(model, scoring.reference, scoring.sequences)
    row = {
        "error": statistics.fmean(layer["error"] for layer in compressed),
        "relative_error": experts["relative_error"],
        "values_kept": _values_kept(described),
        "expert_bytes": experts["stored_bytes"],
        "expert_share": experts["stored_bytes"] / experts["dense_bytes"],
        "checkpoint_bytes": _file_bytes(folder),
        "resident_bytes": resident_bytes(model),
        "flops_per_token": flops_per_token(model, scoring.sequences),
        "compress_seconds": seconds,
        "score_seconds": scored.seconds,
        "perplexity": scored.evaluation.perplexity,
        "nll": scored.evaluation.nll,
        "divergence": scored.divergence,
    }
    _check_finite(row)
    return row | scoring.task_scores(model)


def _check_finite(row: Row) -> None:
    for name, value in row.items():
        if not math.isfinite(value):
            raise UserError(f"{name.replace('_', ' ')} is {value}: values overflow")


def _file_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _values_kept(described: dict[str, Any]) -> float:
    """Stored values as a share of the source's, centres included and indices not."""
    experts = described["experts"]
    return (experts["center_bytes"] + experts["residual_bytes"]["values"]) / experts["dense_bytes"]
