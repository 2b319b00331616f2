"""The embedded models, compressed as the papers do and in the ways of this project.

Each way at the same `--keep`, so that a lower error or perplexity is not bought with bytes: the
share of the dense expert bytes, measured on the files, stands beside them. The divergence is from
the predictions of the model as it was: where it is small, perplexities differ by chance.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.machine import timed
from resmoe_dist.checkpoints.compressed import CompressedCheckpoint
from resmoe_dist.cli import add_compress_arguments, run_compress
from resmoe_dist.errors import UserError
from resmoe_dist.evaluation.perplexity import divergence, evaluate, sequences_from_json
from resmoe_dist.evaluation.report import describe
from resmoe_dist.evaluation.tables import text_table
from resmoe_dist.runtime.loading import load_model
from resmoe_dist.testing import FAMILIES, cached_tiny_model, train_tiny_model
from resmoe_dist.testing.corpus import EOS_ID, read_corpus
from resmoe_dist.testing.training import HELD_OUT_FILE

PAPER, DEFAULT = "paper", "default"
CALIBRATED = "calibrated"
# Name: options of `compress`. The calibrated way gets its text too.
WAYS: dict[str, list[str]] = {
    PAPER: ["--preset", "paper"],
    DEFAULT: [],
    "over the model": ["--allocate", "model"],
    CALIBRATED: [],
    "calibrated over the model": ["--allocate", "model"],
}
_CALIBRATION_BYTES = 1 << 16
_CROP_BYTES = 1024

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `models`."""
    add = parser.add_argument
    add("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    add("--keeps", type=float, nargs="+", default=[0.125, 0.25, 0.5])
    add("--ep", type=int, nargs="+", default=[1, 4], help="groups per layer")
    add("--sequences", type=int, help="of the held-out text (default: all)")
    add(
        "--work",
        type=Path,
        metavar="DIR",
        help="models lie here in folders of their families' names, and are trained where missing; "
        "without it all are in the user's cache",
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One row per family, number of groups, keep and way."""
    rows, originals = [], []
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "calibration.txt"
        text.write_text(calibration_text(), encoding="utf-8")
        for family in args.families:
            source = _model_folder(family, args.work)
            sequences = sequences_from_json(source / HELD_OUT_FILE)[: args.sequences]
            reference = load_model(source, dtype=torch.float32)
            original = evaluate(reference, sequences)
            originals.append({"family": family, **original.as_dict()})
            for groups in args.ep:
                for keep in args.keeps:
                    rows += _ways(family, source, reference, groups, keep, sequences, text)
    worse = [row for row in rows if row["way"] == DEFAULT and _worse(row)]
    return {"originals": originals, "rows": rows, "default_worse": worse}


def _model_folder(family: str, work: Path | None) -> Path:
    """A trained tiny model, trained now if it is not there; the cached Mixtral serves any case."""
    if work is None or (family == "mixtral" and not (work / family).exists()):
        return cached_tiny_model(family)
    if not (work / family).exists():
        logger.info("training %s", family)
        train_tiny_model(work / family, family)
    return work / family


def calibration_text() -> str:
    """Evenly spaced pieces of the files that the tiny models were trained on, none held out."""
    train, _ = read_corpus()
    data = train[train != EOS_ID].to(torch.uint8).numpy().tobytes()
    step = len(data) // (_CALIBRATION_BYTES // _CROP_BYTES)
    pieces = (data[start : start + _CROP_BYTES] for start in range(0, len(data), step))
    return b"".join(pieces).decode("utf-8", errors="ignore")


def _ways(
    family: str,
    source: Path,
    reference: PreTrainedModel,
    groups: int,
    keep: float,
    sequences: list[list[int]],
    text: Path,
) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for name, options in WAYS.items():
        if name.startswith(CALIBRATED):
            options = [*options, "--calibration", str(text)]
        chosen = ["--ep", str(groups), "--keep", str(keep), *options]
        with tempfile.TemporaryDirectory() as scratch:
            output = Path(scratch) / "compressed"
            _, taken = timed(lambda chosen=chosen, output=output: _compress(source, output, chosen))
            experts = describe(CompressedCheckpoint(output))["experts"]
            model = load_model(output, dtype=torch.float32)
            found = evaluate(model, sequences)
            away = divergence(model, reference, sequences)
        rows[name] = {
            "family": family,
            "groups": groups,
            "keep": keep,
            "way": name,
            "relative_error": experts["relative_error"],
            "weighted_relative_error": experts["weighted_relative_error"],
            "groups_without_center": experts["groups_without_center"],
            "dense_share": experts["stored_bytes"] / experts["dense_bytes"],
            "nll": found.nll,
            "perplexity": found.perplexity,
            "divergence": away,
            "seconds": taken,
        }
        logger.info("%s, %d groups, keep %g: %s done", family, groups, keep, name)
    for row in rows.values():
        for figure in ("relative_error", "perplexity", "divergence"):
            row[f"worse_{figure}"] = row[figure] > rows[PAPER][figure]
    return list(rows.values())


def _compress(source: Path, output: Path, options: list[str]) -> None:
    """`resmoe-dist compress` in this process."""
    parser = argparse.ArgumentParser()
    add_compress_arguments(parser)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = run_compress(parser.parse_args([str(source), str(output), *options]))
    if code:
        raise UserError(f"compress {json.dumps(options)}: exit code {code}")


def table(results: dict[str, Any]) -> str:
    """The results of `measure` as text."""
    originals = [
        [row["family"], f"{row['nll']:.5f}", f"{row['perplexity']:.5f}"]
        for row in results["originals"]
    ]
    header = ["family", "groups", "keep", "way", "error", "share of dense", "nats per byte"]
    header += ["perplexity", "divergence", "no centre", "s", "worse than paper"]
    rows = [
        [
            *(row["family"], str(row["groups"]), f"{row['keep']:g}", row["way"]),
            *(f"{row['relative_error']:.4g}", f"{row['dense_share']:.1%}"),
            *(f"{row['nll']:.5f}", f"{row['perplexity']:.5f}", f"{row['divergence']:.2e}"),
            *(str(row["groups_without_center"] or ""), f"{row['seconds']:.1f}"),
            "" if row["way"] == PAPER else ", ".join(_worse(row)) or "no",
        ]
        for row in results["rows"]
    ]
    cases = sum(row["way"] == DEFAULT for row in results["rows"])
    return "\n\n".join(
        [
            text_table(["not compressed", "nats per byte", "perplexity"], originals),
            text_table(header, rows, left=4),
            f"the default is worse than the paper in {len(results['default_worse'])} of {cases}",
        ]
    )


def _worse(row: dict[str, Any]) -> list[str]:
    """In which figures a way is worse than the papers'."""
    names = {f"worse_{figure}": figure for figure in ("perplexity", "divergence")}
    names = {"worse_relative_error": "error"} | names
    return [name for key, name in names.items() if row[key]]
