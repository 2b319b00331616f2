"""Tables of the papers beside ours.

    python -m benchmarks.paper_tables --shapes
    python -m benchmarks.paper_tables MODEL --calibration TEXT --compared REPORT/report.json

`--shapes`: memory of one MoE layer and FLOPs (000, tables 5 and 7) by arithmetic on the published
shapes, without weights. Each figure is counted as the paper counts and compared with what it
publishes. Beside it is what we store in bfloat16, indices and centre included, and what our kernels
multiply.

MODEL: approximation error of each method (001, tables 1 and 5), and what `resmoe-dist compare` has
measured beside 001's table 3: perplexity of its text, and accuracy on its tasks with `--tasks
lambada_openai,piqa,winogrande`. Published figures are shown if the model is theirs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.paper_counting import (
    METHODS,
    SHAPES,
    TOKENS,
    Method,
    ModelShape,
    our_bytes,
    our_flops,
    paper_bytes,
    paper_flops,
)
from benchmarks.paper_errors import Case, error_rows, quality_rows
from benchmarks.paper_methods import KEEP, MISSING
from benchmarks.paper_methods import METHODS as COMPRESSORS
from benchmarks.published import published
from benchmarks.timing import Clock
from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.errors import UserError

TOLERANCE = 0.01
_COLUMNS = (
    "model",
    "method",
    "published=published:,.2f",
    "counted=counted:,.2f",
    "difference=difference:+.2%",
    "within 1 %=verdict",
    "ours=ours:,.2f",
    "unit",
)
TABLES = (
    ("memory", *_COLUMNS),
    ("flops", *_COLUMNS),
    ("assumptions", "table", "model", "assumption"),
    (
        *("errors", "method", "layers", "published=published:,.2f", "mean=mean:.4g"),
        *("sum=sum:.4g", "relative=relative_error:.4f", "of dense bytes=dense_share:.1%", "reason"),
    ),
    (
        *("quality", "method", "budget", "measure", "published=published:,.2f"),
        "measured=measured:.4f",
    ),
    ("remarks", "about", "remark"),
)

_MIB, _TERA, _GIGA = float(2**20), 1e12, 1e9
# The unit of each model's column in table 7; GFLOPs where the paper has no column.
_FLOPS_UNITS = {"Mixtral": (_TERA, "TFLOPs")}

Counting = Callable[[ModelShape, Method], float]

_ASSUMPTIONS = (
    ("5", "all", "1 MB is 2^20 bytes; routed experts and centre only, float32 values"),
    ("5", "all", "SP, SVD, MLP Fusion, merging: exactly 25 % of the values, no indices"),
    ("5", "Mixtral", "UP: CSR, one int16 index per kept value, row offsets left out (A.7)"),
    ("5", "DeepSeekMoE", "UP: COO, two int16 indices per kept value; CSR would give 792"),
    ("5", "switch-base-8", "nothing published; counted as Mixtral"),
    ("7", "all", f"2 FLOPs per weight, {TOKENS} tokens (batch 1, length 128, or any such product)"),
    ("7", "all", "output layer and router included; norms and attention scores left out"),
    ("7", "all", "UP counts kept entries only; ResMoE (UP) is restored, so dense"),
    ("7", "all", "SVD: each matrix by both factors, rank of A.4"),
    ("7", "Mixtral", "24 of 32 layers compressed"),
    ("7", "Mixtral", "ResMoE (SVD): the centre takes the place of one of two low-rank experts"),
    ("7", "DeepSeekMoE", "21 of 27 MoE layers compressed (not stated; 75 % of 28, as 24 of 32)"),
    ("7", "DeepSeekMoE", "ResMoE (SVD): the centre is added to all low-rank experts"),
    ("7", "switch-base-8", "nothing published; 8 of 12 MoE layers, a token in each half"),
    ("ours", "all", "bfloat16; pruned: bitmap, row offsets, values; the centre is dense"),
    ("ours", "all", "pruned rows are expanded and their zeros multiplied: no FLOPs saved"),
    ("ours", "all", "mode shared: the centre once per token besides each residual"),
)  # fmt: skip


_REMARKS = (
    ("error", "(1/N) Σ‖T W − restored‖² of a layer's N experts, divided by their rows"),
    ("error", "the paper does not say how it joins layers: both their mean and sum are shown"),
    *((name, "published, but no method of this package") for name in MISSING),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See `harness`."""
    add = parser.add_argument
    add("model", type=Path, nargs="?", metavar="MODEL", help="folder of a model to compress")
    text = "memory and FLOPs of the published shapes, without weights"
    add("--shapes", action="store_true", help=text)
    names = list(COMPRESSORS)
    add("--methods", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    add("--keep", type=harness.share, default=KEEP, help="share kept (default %(default)s)")
    add("--layers", help="as of compress (default: those that the papers compress)")
    add("--calibration", type=Path, metavar="TEXT", help="for methods that look at activations")
    add("--compared", type=Path, metavar="F", help="report.json of resmoe-dist compare")
    add("--work", type=Path, metavar="DIR", help="for compressed models, one at a time")


def measure(args: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """See `harness`. ours: in the unit of the published figure."""
    if args.shapes == (args.model is not None):
        raise UserError("give either a MODEL or --shapes")
    empty: dict[str, Any] = {name: [] for name, *_ in TABLES}
    if args.shapes:
        return empty | _shapes()
    if args.work is not None and not args.work.is_dir():
        raise UserError(f"--work {args.work}: no such folder")
    case = Case(
        args.model, args.keep, args.layers, args.calibration, args.device, scratch=args.work
    )
    quality = []
    if args.compared is not None:
        quality = quality_rows(args.compared, SourceCheckpoint(args.model).config)
    return empty | {
        "quality": quality,
        "errors": error_rows(case, args.methods, args.seed),
        "remarks": [{"about": about, "remark": remark} for about, remark in _REMARKS],
    }


def _shapes() -> dict[str, Any]:
    memory, flops = [], []
    for shape in SHAPES:
        flops_unit = _FLOPS_UNITS.get(shape.name, (_GIGA, "GFLOPs"))
        for method in METHODS:
            memory.append(_row(shape, method, "000 table 5", paper_bytes, our_bytes, (_MIB, "MiB")))
            flops.append(_row(shape, method, "000 table 7", paper_flops, our_flops, flops_unit))
    keys = ("table", "model", "assumption")
    assumptions = [dict(zip(keys, line, strict=True)) for line in (*_ASSUMPTIONS, *_missed(flops))]
    return {"memory": memory, "flops": flops, "assumptions": assumptions}


def _row(
    shape: ModelShape,
    method: Method,
    source: str,
    paper: Counting,
    ours: Counting,
    unit: tuple[float, str],
) -> dict[str, Any]:
    """One line. difference: counted less published, as a share of published."""
    scale, name = unit
    figure = published(source, shape.name, method.name)
    counted = paper(shape, method) / scale
    difference = None if figure is None else counted / figure - 1
    verdict = None
    if difference is not None:
        verdict = "yes" if abs(difference) <= TOLERANCE else "NOT REPRODUCED"
    return {
        "model": shape.name,
        "method": method.name,
        "published": figure,
        "counted": counted,
        "difference": difference,
        "verdict": verdict,
        "ours": ours(shape, method) / scale,
        "unit": name,
        "source": source,
    }


def _missed(rows: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    text = "{method}: not reproduced within 1 %; counted {counted:.2f}, published {published:.2f}"
    return [
        ("7", row["model"], text.format(**row))
        for row in rows
        if row["verdict"] not in (None, "yes")
    ]


if __name__ == "__main__":
    harness.main(sys.modules[__name__])
