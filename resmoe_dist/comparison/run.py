"""`resmoe-dist compare`: all contenders on one model, row by row, kept and resumed."""

from __future__ import annotations

import hashlib
import json
import sys
from contextlib import suppress
from dataclasses import astuple
from typing import Any

from tqdm import tqdm

from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.comparison.contenders import Contender, contenders_named
from resmoe_dist.comparison.finished_rows import FinishedRows
from resmoe_dist.comparison.measuring import (
    FIGURES,
    SOURCE_FIGURES,
    Budget,
    Row,
    Scoring,
    measure_row,
    source_row,
)
from resmoe_dist.comparison.report import NO_PLOT, can_plot, table, write_report
from resmoe_dist.config.commands import CompareConfig, EvaluateConfig
from resmoe_dist.evaluation.perplexity import load_tokenizer
from resmoe_dist.evaluation.tables import human_bytes
from resmoe_dist.jobs.settings import check_groups, parse_layers
from resmoe_dist.launch.compress import calibration_of
from resmoe_dist.launch.evaluate import read_model, read_sequences, read_tasks
from resmoe_dist.parallel.entry_point import quiet_libraries
from resmoe_dist.runtime.loading import load_model
from resmoe_dist.version import __version__


def run_compare(config: CompareConfig) -> int:
    """Measure every contender at every budget and write the report; exit code 0."""
    quiet_libraries()
    contenders = contenders_named(config.methods)
    scored = EvaluateConfig(
        model=config.source, text=config.text, token_ids=config.token_ids, context=config.context
    )
    sequences, tasks = read_sequences(scored, read_model(scored)), read_tasks(config)
    source = SourceCheckpoint(config.source)
    parse_layers(config.layers, len(source.sites))
    if config.calibration is None:
        calibration = None
    else:
        calibration, _ = calibration_of(source, config.calibration)
    cases = _cases(contenders, _budgets(config))
    if not all(each.whole_layer for each in contenders.values()):
        check_groups(source.sites, config.ep)
    common = {
        "source": source.fingerprint(),
        "data": _digest(sequences),
        "layers": config.layers,
        "ep": config.ep,
        "dtype": config.dtype,
        "version": __version__,
    }
    if tasks is not None:
        common |= {"tasks": list(tasks.names), "task_limit": tasks.limit}
    with FinishedRows(config.report, common, resume=config.resume) as rows:
        scoring = Scoring(
            sequences,
            load_model(config.source),
            tasks,
            load_tokenizer(config.source) if tasks else None,
        )
        baseline = {
            "expert_bytes": _expert_bytes(source),
            "checkpoint_bytes": _weight_bytes(source),
        }
        baseline |= rows.get("source", lambda: source_row(scoring), SOURCE_FIGURES)
        facts = _facts(config, source, sequences)
        done: list[Row] = []
        work = config.report / "work"
        # disable=None: tqdm shows the bar only on a terminal.
        for name, contender, budget in tqdm(cases, desc="comparing", unit="row", disable=None):

            def measure(
                name: str = name, contender: Contender = contender, budget: Budget = budget
            ) -> Row:
                folder = work / f"{name}-{budget.folder_name}"
                return measure_row(config, contender, budget, scoring, folder)

            seeds = config.seeds if contender.seeded else 1
            used = calibration if contender.calibrated else None
            key = _digest([contender.needs, astuple(budget), seeds, used])
            row = rows.get(key, measure, FIGURES)
            done.append({"contender": name, "budget": str(budget)} | row)
            write_report(config.report, facts, baseline, done)
            if not sys.stderr.isatty():
                print(_progress(done[-1]), flush=True)
        with suppress(OSError):  # of an earlier run, models may be kept
            work.rmdir()
    print("\n".join(table(baseline, done)))
    if not can_plot():
        print(NO_PLOT)
    print(f"{config.report / 'report.md'}: written")
    return 0


def _budgets(config: CompareConfig) -> list[Budget]:
    if config.target_bytes is not None:
        return [Budget("target_bytes", share) for share in dict.fromkeys(config.target_bytes)]
    return [Budget("keep", share) for share in dict.fromkeys(config.keep or [0.25])]


def _cases(
    contenders: dict[str, Contender], budgets: list[Budget]
) -> list[tuple[str, Contender, Budget]]:
    """Every contender at every budget; at the end, once, those whose size is fixed."""
    found = [
        (name, each, budget)
        for budget in budgets
        for name, each in contenders.items()
        if not each.fixed_size
    ]
    return found + [(name, each, Budget()) for name, each in contenders.items() if each.fixed_size]


def _facts(
    config: CompareConfig, source: SourceCheckpoint, sequences: list[list[int]]
) -> dict[str, Any]:
    experts = sum(site.num_experts for site in source.sites)
    return {
        "model": f"{config.source.resolve().name} ({source.config.model_type})",
        "experts": f"{experts} in {len(source.sites)} layers, {human_bytes(_expert_bytes(source))}",
        "compressed layers": config.layers,
        "stored dtype": config.dtype or "the source's",
        "groups per layer": config.ep,
        "text": f"{sum(map(len, sequences))} tokens in {len(sequences)} sequences",
        "calibration text": config.calibration.name if config.calibration else "none",
        "resmoe-dist": __version__,
    }


def _expert_bytes(source: SourceCheckpoint) -> int:
    return sum(
        site.num_experts
        * (site.shape.entries + (site.shape.hidden if site.shape.output_bias else 0))
        * source.dtype(i).itemsize
        for i, site in enumerate(source.sites)
    )


def _weight_bytes(source: SourceCheckpoint) -> int:
    files = set(source.files.locations.values())
    return sum((source.folder / name).stat().st_size for name in files)


def _progress(row: Row) -> str:
    name = f"{row['contender']}, {row['budget']}"
    if "reason" in row:
        return f"{name}: {row['reason']}"
    return (
        f"{name}: {row['expert_share']:.1%} of the bytes, error {row['relative_error']:.4f}, "
        f"perplexity {row['perplexity']:.4f}, divergence {row['divergence']:.2e}"
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:20]
