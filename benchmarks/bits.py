"""Quality against bits per expert weight: ours beside plain quantisers, on one model.

    python -m benchmarks.bits MODEL --calibration TEXT --token-ids IDS --bits 2 3 4

At a number of bits, every way gets at most the bytes that round-to-nearest in groups of 64 takes:
the bits, and 0.125 for scales. All figures come from the files that were written.

bits/weight   bytes of all expert tensors, scales, centres and offsets included, · 8 / weights
lost          NLL of the held-out text minus that of the model as it was, in nats per token
of RTN, of GPTQ
              what this way lost / what the yardstick at the same `--bits` lost: below 1 is better
divergence    Kullback–Leibler divergence from the model's own predictions

rtn           round-to-nearest, symmetric, the scale of least error for each group
gptq          the same with feedback of errors (GPTQ), no centre, no rotation
trellis       ours without a centre: rotated, trellis-coded, with feedback
resmoe        ours: centres and bits chosen by `--target-bits`, with calibration
resmoe-plain  the same without calibration
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import logger, main, positive
from benchmarks.timing import Clock
from resmoe_dist.checkpoints.compressed import CompressedCheckpoint
from resmoe_dist.config.commands import CompressConfig
from resmoe_dist.evaluation.perplexity import evaluate, likeness, sequences_from_json
from resmoe_dist.evaluation.report import describe
from resmoe_dist.launch.compress import compress
from resmoe_dist.runtime.loading import load_model

RTN, GPTQ = "rtn", "gptq"
_GROUP = 64
# Bits per weight that one-byte scales add.
_SCALE_BITS = 8 / _GROUP
_PLAIN = f"coder=scalar,rotate=false,group_size={_GROUP}"
TABLES = (
    ("source", "model", "nll:.5f", "perplexity:.5f"),
    (
        *("rows", "bits", "way", "bits/weight=weight_bits:.3f", "error=relative_error:.4f"),
        *("nll:.5f", "lost:.5f", "of RTN=of_rtn:.2f", "of GPTQ=of_gptq:.2f", "divergence:.3e"),
        *("s=seconds:.0f", "chosen"),
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    add = parser.add_argument
    add("model", type=Path, help="model folder")
    add("--token-ids", type=Path, required=True, metavar="F", help="held-out text, as token ids")
    add("--calibration", type=Path, required=True, metavar="TEXT")
    add("--bits", type=positive, nargs="+", default=[2, 3, 4])
    add("--target-bits", type=float, nargs="*", default=[], help="of resmoe alone")
    add("--ep", type=positive, nargs="+", default=[1], help="groups per layer, for ours")
    add("--ways", nargs="+", help="default: all")
    parser.set_defaults(repeats=1)


def measure(args: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """source: the model as it is. rows: per number of bits and way."""
    reference = load_model(args.model)
    sequences = sequences_from_json(args.token_ids)
    quality = evaluate(reference, sequences)
    source = {"model": str(args.model), "nll": quality.nll, "perplexity": quality.perplexity}
    rows: list[dict[str, Any]] = []
    cases: list[tuple[float, bool]] = [(bits, True) for bits in args.bits]
    for bits, is_whole in cases + [(bits, False) for bits in args.target_bits]:
        found: dict[str, float] = {}
        for way, options in _ways(bits, args, is_whole).items():
            if args.ways and way.partition(" ")[0] not in args.ways:
                continue
            row = _measure(clock, args.model, options, reference, sequences)
            found[way] = row["lost"] = row["nll"] - quality.nll
            for name in (RTN, GPTQ):
                row[f"of_{name}"] = row["lost"] / found[name] if found.get(name) else None
            rows.append({"bits": bits, "way": way, **row})
            logger.info("%s at %g bits: lost %.5f", way, bits, row["lost"])
    return {"source": [source], "rows": rows}


def _ways(bits: float, args: argparse.Namespace, is_whole: bool) -> dict[str, dict[str, Any]]:
    """Options of `compress` by way."""
    calibrated = {"calibration": args.calibration}
    target = bits + _SCALE_BITS if is_whole else bits
    ours: dict[str, dict[str, Any]] = {}
    for groups in args.ep:
        suffix = "" if len(args.ep) == 1 else f" {groups}"
        ours[f"resmoe-plain{suffix}"] = {"ep": groups, "target_bits": target}
        ours[f"resmoe{suffix}"] = ours[f"resmoe-plain{suffix}"] | calibrated
    if not is_whole:
        return ours
    alone = {"ep": 1, "center": "none"}
    plain = alone | {"codec": f"quantized:bits={bits},{_PLAIN}"}
    trellis = alone | {"codec": f"quantized:bits={bits}"} | calibrated
    return {RTN: plain, GPTQ: plain | calibrated, "trellis": trellis, **ours}


def _measure(
    clock: Clock,
    model: Path,
    options: dict[str, Any],
    reference: Any,
    sequences: list[list[int]],
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "compressed"
        config = CompressConfig(source=model, output=output, **options)
        _, seconds = clock.timed(lambda: compress(config))
        checkpoint = CompressedCheckpoint(output)
        described = describe(checkpoint)
        layers = checkpoint.index.layers
        weights = sum(layer.num_experts * layer.source_shape.entries for layer in layers)
        scored = likeness(load_model(output), reference, sequences)
        shutil.rmtree(output)
    experts = described["experts"]
    return {
        "weight_bits": 8 * experts["stored_bytes"] / weights,
        "relative_error": experts["relative_error"],
        "nll": scored.evaluation.nll,
        "divergence": scored.divergence,
        "seconds": seconds,
        "chosen": ", ".join(sorted(f"{k}={v}" for k, v in options.items() if k != "calibration")),
    }


if __name__ == "__main__":
    main(sys.modules[__name__])
