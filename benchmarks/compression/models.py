"""The embedded models, compressed as in the papers and in this project's ways.

All ways have the same `--keep`, so a lower error or perplexity costs no more bytes: the table shows
the share of the dense expert bytes, measured on the files. Divergence is from the predictions of
the uncompressed model. Where it is small, differences in perplexity are chance.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.harness import logger, positive, share
from benchmarks.tables import Row
from benchmarks.timing import Clock, summary
from resmoe_dist.checkpoints.compressed import CompressedCheckpoint
from resmoe_dist.config.commands import CompressConfig
from resmoe_dist.config.sources import build_config
from resmoe_dist.evaluation.perplexity import divergence, evaluate, sequences_from_json
from resmoe_dist.evaluation.report import describe
from resmoe_dist.launch.compress import compress
from resmoe_dist.runtime.loading import load_model
from resmoe_dist.testing import FAMILIES, cached_tiny_model
from resmoe_dist.testing.corpus import EOS_ID, read_corpus
from resmoe_dist.testing.training import HELD_OUT_FILE

PAPER, DEFAULT, CALIBRATED = "paper", "default", "calibrated"
# Options of `compress`. The calibrated ways also get --calibration.
WAYS: dict[str, dict[str, Any]] = {
    PAPER: {},
    DEFAULT: {},
    "over the model": {"allocate": "model"},
    CALIBRATED: {},
    f"{CALIBRATED} over the model": {"allocate": "model"},
}
_FIGURES = ("relative_error", "perplexity", "divergence")
_QUALITY = ("nats per byte=nll:.5f", "perplexity:.5f")
TABLES = (
    ("originals", "not compressed=family", *_QUALITY),
    (
        *("rows", "family", "way", "groups=ep", "keep:g", "error=relative_error:.4g"),
        *("share of dense=dense_share:.1%", *_QUALITY, "divergence:.2e"),
        *("without centre=groups_without_center", "s=seconds:s", "worse than paper=worse:names"),
    ),
)
_CALIBRATION_BYTES = 1 << 16
_PIECE_BYTES = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `models`."""
    add = parser.add_argument
    add("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    add("--keeps", type=share, nargs="+", default=[0.125, 0.25, 0.5])
    add("--ep", type=positive, nargs="+", default=[1, 4], help="groups per layer")
    add("--sequences", type=positive, help="of the held-out text (default: all)")
    text = "holds what `resmoe-dist tiny-model` writes, by family (default: the user's cache)"
    add("--work", type=Path, metavar="DIR", help=text)
    parser.set_defaults(repeats=1)


def measure(args: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """rows: per family, number of groups, keep and way. originals: the uncompressed models."""
    results: dict[str, Any] = {"rows": [], "originals": []}
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "calibration.txt"
        text.write_text(calibration_text(), encoding="utf-8")
        for family in args.families:
            source = args.work / family if args.work else cached_tiny_model(family)
            sequences = sequences_from_json(source / HELD_OUT_FILE)[: args.sequences]
            original = load_model(source, dtype=torch.float32)
            quality = evaluate(original, sequences).as_dict()
            results["originals"].append({"family": family, **quality})
            for case in [{"ep": groups, "keep": k} for groups in args.ep for k in args.keeps]:
                found = []
                for way, options in WAYS.items():
                    given = {"source": source, "device": args.device} | case | options
                    given |= {"calibration": text} if way.startswith(CALIBRATED) else {}
                    row = {"family": family, "way": way, **case}
                    row |= _measure_way(clock, way, given, original, sequences)
                    found.append(row)
                    row["worse"] = [name for name in _FIGURES if row[name] > found[0][name]]
                results["rows"] += found
                logger.info("%s, %d groups, keep %g: done", family, case["ep"], case["keep"])
    return results


def calibration_text() -> str:
    """Evenly spaced pieces of the files that the tiny models were trained on."""
    train, _ = read_corpus()
    data = train[train != EOS_ID].to(torch.uint8).numpy().tobytes()
    step = len(data) // (_CALIBRATION_BYTES // _PIECE_BYTES)
    pieces = (data[start : start + _PIECE_BYTES] for start in range(0, len(data), step))
    return b"".join(pieces).decode("utf-8", errors="ignore")


def _measure_way(
    clock: Clock,
    way: str,
    given: dict[str, Any],
    original: PreTrainedModel,
    sequences: list[list[int]],
) -> Row:
    """Compress with the options `given`, and compare with the original model."""
    with tempfile.TemporaryDirectory() as scratch:
        output, seconds = Path(scratch) / "compressed", []
        preset = "paper" if way == PAPER else None
        config = build_config(CompressConfig, given | {"output": output}, preset=preset)
        for _ in clock.repeats():
            shutil.rmtree(output, ignore_errors=True)
            seconds.append(clock.timed(lambda: compress(config))[1])
        experts = describe(CompressedCheckpoint(output))["experts"]
        model = load_model(output, dtype=torch.float32)
        quality = evaluate(model, sequences).as_dict()
        quality["divergence"] = divergence(model, original, sequences)
    keys = ("relative_error", "weighted_relative_error", "groups_without_center")
    share = experts["stored_bytes"] / experts["dense_bytes"]
    figures = {key: experts[key] for key in keys} | {"dense_share": share}
    return figures | quality | {"seconds": summary(seconds)}
