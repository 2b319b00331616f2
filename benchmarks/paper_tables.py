"""Tables of the papers beside ours: memory of one MoE layer, and FLOPs (000, tables 5 and 7).

    python -m benchmarks.paper_tables --shapes

Arithmetic on the published shapes, without weights. Each figure is counted as the paper counts and
compared with what it publishes. Beside it is what we store in bfloat16, indices and centre
included, and what our kernels multiply.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
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
from benchmarks.published import published
from benchmarks.timing import Clock

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See `harness`."""
    text = "memory and FLOPs of the published shapes, without weights"
    parser.add_argument("--shapes", action="store_true", required=True, help=text)


def measure(args: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """See `harness`. ours: in the unit of the published figure."""
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
