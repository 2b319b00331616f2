"""`resmoe-dist compare`: all contenders on one model, row by row, kept and resumed."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.checkpoints.tensor_files import check_writable, read_json_object, write_json
from resmoe_dist.comparison.contenders import Contender, contenders_named
from resmoe_dist.comparison.measuring import Budget, Row, measure_row, source_row
from resmoe_dist.comparison.report import table, write_report
from resmoe_dist.config.commands import CompareConfig, EvaluateConfig
from resmoe_dist.errors import UserError
from resmoe_dist.evaluation.tables import human_bytes
from resmoe_dist.jobs.settings import parse_layers
from resmoe_dist.launch.evaluate import check, read_sequences
from resmoe_dist.parallel.entry_point import quiet_libraries
from resmoe_dist.runtime.loading import load_model
from resmoe_dist.version import __version__

logger = logging.getLogger(__name__)


def run_compare(config: CompareConfig) -> int:
    """Measure every contender at every budget and write the report; exit code 0."""
    quiet_libraries()
    contenders = contenders_named(config.methods)
    scored = EvaluateConfig(
        model=config.source, text=config.text, token_ids=config.token_ids, context=config.context
    )
    check(scored)
    sequences = read_sequences(scored)
    source = SourceCheckpoint(config.source)
    parse_layers(config.layers, len(source.sites))
    cases = [
        (name, each, budget) for budget in _budgets(config) for name, each in contenders.items()
    ]
    common = {
        "source": source.fingerprint(),
        "data": _digest(sequences),
        "calibration": None if config.calibration is None else _content(config.calibration),
        "layers": config.layers,
        "ep": config.ep,
        "dtype": config.dtype,
        "version": __version__,
    }
    rows = _Rows(config.report, common, resume=config.resume)
    reference = load_model(config.source)
    baseline = rows.get("source", lambda: source_row(reference, sequences))
    facts = _facts(config, source, sequences)
    done: list[Row] = []
    # disable=None: tqdm shows the bar only on a terminal.
    for name, contender, budget in tqdm(cases, desc="comparing", unit="row", disable=None):

        def measure(contender: Contender = contender, budget: Budget = budget) -> Row:
            folder = config.report / "work" / _digest([vars(contender), str(budget)])
            return measure_row(config, contender, budget, sequences, reference, folder)

        seeds = config.seeds if contender.seeded else 1
        key = _digest([vars(contender), str(budget), seeds])
        done.append({"contender": name, "budget": str(budget)} | rows.get(key, measure))
        write_report(config.report, facts, baseline, done)
        if not sys.stderr.isatty():
            print(_progress(done[-1]), flush=True)
    print("\n".join(table(baseline, done)))
    print(f"{config.report / 'report.md'}: written")
    return 0


class _Rows:
    """Finished rows of a report folder, each in a file.

    common: what all rows of the folder have in common. Raises UserError if the folder cannot be
    written, or holds a comparison and may not be resumed.
    """

    def __init__(self, folder: Path, common: dict[str, Any], *, resume: bool) -> None:
        self._folder = folder / "rows"
        made = folder / "comparison.json"
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: cannot be made ({error.strerror})") from error
        check_writable(made)
        if made.exists():
            if not resume:
                raise UserError(f"{folder}: holds a comparison; give --resume or another --report")
            if read_json_object(made) != common:
                raise UserError(f"{folder}: holds a comparison of other options; choose another")
        self._folder.mkdir(parents=True, exist_ok=True)
        write_json(made, common)

    def get(self, key: str, measure: Any) -> Row:
        """The row of an earlier run, or a new one. Rows with a reason are measured again."""
        path = self._folder / f"{key}.json"
        row = read_json_object(path) if path.exists() else {"reason": "not measured"}
        if "reason" in row:
            row = measure()
            write_json(path, row)
        return row


def _budgets(config: CompareConfig) -> list[Budget]:
    if config.target_bytes is not None:
        return [Budget("target_bytes", share) for share in config.target_bytes]
    return [Budget("keep", share) for share in config.keep or [0.25]]


def _facts(
    config: CompareConfig, source: SourceCheckpoint, sequences: list[list[int]]
) -> dict[str, Any]:
    experts = sum(site.num_experts for site in source.sites)
    bytes_of_experts = sum(
        site.num_experts * site.shape.entries * source.dtype(i).itemsize
        for i, site in enumerate(source.sites)
    )
    return {
        "model": f"{config.source.name} ({source.config.model_type})",
        "experts": f"{experts} in {len(source.sites)} layers, {human_bytes(bytes_of_experts)}",
        "compressed layers": config.layers,
        "groups per layer": config.ep,
        "text": f"{sum(map(len, sequences))} tokens in {len(sequences)} sequences",
        "resmoe-dist": __version__,
    }


def _progress(row: Row) -> str:
    name = f"{row['contender']}, {row['budget']}"
    if "reason" in row:
        return f"{name}: {row['reason']}"
    return (
        f"{name}: {row['expert_share']:.1%} of the bytes, error {row['relative_error']:.4f}, "
        f"perplexity {row['perplexity']:.4f}, divergence {row['divergence']:.2e}"
    )


def _content(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:20]
