"""Approximation error of a checkpoint's experts, method by method (001, tables 1 and 5)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.paper_methods import METHODS, papers_layers, papers_model
from benchmarks.published import published
from benchmarks.tables import Row
from resmoe_dist.checkpoints.compressed import CompressedCheckpoint
from resmoe_dist.checkpoints.format import CheckpointIndex
from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.checkpoints.tensor_files import read_json_object
from resmoe_dist.comparison.contenders import CONTENDERS
from resmoe_dist.config.commands import CompressConfig
from resmoe_dist.errors import UserError
from resmoe_dist.evaluation.report import describe
from resmoe_dist.jobs.settings import parse_layers
from resmoe_dist.launch.compress import compress

logger = logging.getLogger("benchmarks")


@dataclass(frozen=True)
class Case:
    """What to compress. layers: as `--layers`, None for the papers'. calibration: a text or None.

    scratch: a folder for compressed models, None for the system's.
    """

    model: Path
    keep: float
    layers: str | None = None
    calibration: Path | None = None
    device: str = "cpu"
    scratch: Path | None = None


def error_rows(case: Case, methods: list[str], seed: int) -> list[Row]:
    """One row per method: `mean` and `sum` over layers of the error per row, bytes, published.

    A method that cannot compress this model has the `reason` instead. Raises UserError for a folder
    without a model, or layers that it does not have.
    """
    source = SourceCheckpoint(case.model)
    layers = case.layers or papers_layers(source)
    parse_layers(layers, len(source.sites))
    model = papers_model(source.config)
    rows = []
    for name in methods:
        try:
            row = _measure(case, name, layers, seed)
        except UserError as error:
            row = {"reason": str(error)}
        figure = None
        if model:
            # Table 5 repeats rows of table 1, and has one more.
            figures = [published(f"001 table {table}", model, name) for table in (1, 5)]
            figure = next((each for each in figures if each is not None), None)
        rows.append({"method": name, "layers": layers, "published": figure} | row)
        logger.info("%s: done", name)
    return rows


def _measure(case: Case, name: str, layers: str, seed: int) -> Row:
    contender = METHODS[name]
    options = contender.compress_options(seed, ep=1)
    if contender.calibrated:
        if case.calibration is None:
            raise UserError("needs --calibration TEXT")
        options["calibration"] = case.calibration
    with TemporaryDirectory(dir=case.scratch) as scratch:
        output = Path(scratch) / "compressed"
        config = CompressConfig(
            source=case.model,
            output=output,
            layers=layers,
            keep=case.keep,
            device=case.device,
            **options,
        )
        errors = errors_per_row(compress(config))
        described = describe(CompressedCheckpoint(output))
    chosen = [layer for layer in described["layers"] if layer["compressed"]]
    stored = sum(layer["stored_bytes"] for layer in chosen)
    return {
        "mean": sum(errors) / len(errors),
        "sum": sum(errors),
        "relative_error": described["experts"]["relative_error"],
        "dense_share": stored / sum(layer["dense_bytes"] for layer in chosen),
        "errors": errors,
    }


def errors_per_row(index: CheckpointIndex) -> list[float]:
    """(1/N) Σ_k ‖T_k W_k − restored_k‖² / I of each compressed layer (001, appendix A.6).

    N: experts of the model. I: rows of an expert, the factor that tables 1 and 5 divide by.
    """
    layers = [index.layers[position] for position in index.settings.layers]
    return [
        sum(error for group in layer.groups for error in group.squared_errors)
        / layer.num_experts
        / layer.source_shape.rows
        for layer in layers
    ]


_PERPLEXITY = "WikiText perplexity"
# lm-eval's names, and the paper's.
_TASKS = {"lambada_openai acc": "LAMBADA", "piqa acc": "PIQA", "winogrande acc": "WinoGrande"}


def quality_rows(report: Path, config: Any) -> list[Row]:
    """Perplexities and accuracies that `resmoe-dist compare` measured, beside 001's table 3.

    report: its report.json. Raises UserError if it is something else.
    """
    found, model = read_json_object(report), papers_model(config)
    names = {id(contender): name for name, contender in METHODS.items()}
    rows: list[Row] = []
    try:
        for row in [found["source"] | {"contender": "Full", "budget": "-"}, *found["rows"]]:
            if "reason" in row:
                continue
            name = row["contender"]
            method = names.get(id(CONTENDERS.get(name)), name)
            for measure, figure in _qualities(row).items():
                shown = model and published("001 table 3", model, method, measure)
                rows.append(
                    {
                        "method": method,
                        "budget": row["budget"],
                        "measure": measure,
                        "published": shown,
                        "measured": figure,
                    }
                )
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{report}: not the report.json of resmoe-dist compare (no {error})"
        ) from error
    return rows


def _qualities(row: Row) -> dict[str, float]:
    """Of one row of a report, by the names of the paper; accuracies in percent."""
    scores = row.get("tasks", {})
    accuracies = {name: 100 * scores[task] for task, name in _TASKS.items() if task in scores}
    return {_PERPLEXITY: row["perplexity"], **accuracies}
