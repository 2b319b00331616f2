"""Figures that the papers publish, one `Figure` each. Means only, without deviations.

Papers: 000 ResMoE (later version's appendix), 001 ResMoE, 002 MC-SMoE, 003 UNCURL.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One cell of a published table. measure: its unit, metric or task. source: paper and table."""

    table: str
    model: str
    method: str
    measure: str
    figure: float
    source: str


def published(source: str, model: str, method: str, measure: str | None = None) -> float | None:
    """The only figure of a model and method in a table; None if the table has none.

    measure: which one, for tables with several. Tables that tell `concat` from `sep` mean `concat`
    where others name the method alone.
    """
    names = (method, f"{method} (concat)")
    found = [
        each.figure
        for each in FIGURES
        if (each.source, each.model) == (source, model)
        and each.method in names
        and measure in (None, each.measure)
    ]
    assert len(found) <= 1, f"{source} has several figures of {model}, {method}"
    return found[0] if found else None


def _figures(paper: str, table: int, columns: str, lines: str) -> Iterator[Figure]:
    """columns: `model: measure` of each column, by commas. lines: `method | figures`, `-` none."""
    heads = [head.strip().split(": ") for head in columns.split(",")]
    for line in lines.strip().splitlines():
        method, _, cells = line.partition("|")
        for (model, measure), cell in zip(heads, cells.split(), strict=True):
            if cell != "-":
                yield Figure(
                    str(table),
                    model,
                    method.strip(),
                    measure,
                    float(cell),
                    f"{paper} table {table}",
                )


FIGURES: tuple[Figure, ...] = (
    *_figures("000", 5, "Mixtral: MiB, DeepSeekMoE: MiB", """
Full          | 5376 2112
UP            | 2016 1056
SP            | 1344 528
SVD           | 1344 528
M-SMoE        | 1344 528
Git Re-Basin  | 1344 528
MEO           | 1344 528
MLP Fusion    | 1344 528
ResMoE (UP)   | 2688 1089
ResMoE (SVD)  | 2016 561
"""),
    *_figures("000", 7, "Mixtral: TFLOPs, DeepSeekMoE: GFLOPs", """
Full          | 3.26 670.46
UP            | 1.64 460.24
SP            | 1.64 460.24
SVD           | 2.21 480.52
M-SMoE        | 3.26 670.46
Git Re-Basin  | 3.26 670.46
MEO           | 3.26 670.46
MLP Fusion    | 1.64 460.24
ResMoE (UP)   | 3.26 670.46
ResMoE (SVD)  | 2.73 526.93
"""),
    *_figures("001", 1, "Switch: error, Mixtral: error", """
UP            | 34.27 10.26
SP            | 87.00 27.09
SVD           | 56.44 21.70
M-SMoE        | 278.76 16.73
MEO           | 63.25 15.81
MLP Fusion    | 83.45 27.28
ResMoE (UP)   | 22.05 6.60
"""),
    *_figures("001", 2, "Switch: SST-2, Switch: MRPC, Switch: CoLA, Switch: MNLI", """
Full          | 93.92 89.54 82.29 87.82
UP (concat)   | 93.12 87.75 81.40 85.32
UP (sep)      | 90.21 78.92 79.33 76.06
SP (concat)   | 90.67 88.72 79.39 85.19
SP (sep)      | 83.60 80.88 76.89 81.87
SVD (concat)  | 92.47 87.58 75.90 85.86
SVD (sep)     | 92.59 87.25 81.62 86.04
M-SMoE        | 93.31 87.42 80.06 85.72
Git Re-Basin  | 84.94 85.70 61.90 83.76
MEO           | 92.73 86.77 79.99 85.29
MLP Fusion    | 91.86 88.40 79.64 85.72
ResMoE (UP)   | 93.58 89.21 82.13 86.13
"""),
    *_figures("001", 3, "Mixtral: WikiText perplexity, Mixtral: LAMBADA, Mixtral: PIQA, "
              "Mixtral: WinoGrande", """
Full          | 3.87 74.05 82.37 77.11
UP            | 13.03 36.10 72.09 68.59
SP            | 13851.63 0.00 53.05 47.91
SVD           | 267.94 16.09 59.47 56.99
M-SMoE        | 10.45 58.57 73.56 69.61
Git Re-Basin  | 9.96 59.09 74.70 69.22
MEO           | 8.32 62.93 75.84 70.48
MLP Fusion    | 80.06 5.12 66.67 56.80
ResMoE (UP)   | 5.38 69.44 80.81 74.45
"""),
    *_figures("001", 4, "Switch: SST-2, Switch: MRPC, Switch: CoLA, Mixtral: LAMBADA, "
              "Mixtral: PIQA, Mixtral: WinoGrande", """
UP            | 93.12 87.75 81.40 36.10 72.09 68.59
Average + UP  | 92.81 89.13 81.62 67.38 78.89 73.95
ResMoE (SVD)  | 92.85 88.18 76.88 69.28 80.47 73.20
ResMoE (UP)   | 93.58 89.21 82.13 69.44 80.81 74.45
"""),
    *_figures("001", 5, "Switch: error, Mixtral: error", """
UP            | 34.27 10.26
ResMoE (SVD)  | 63.09 22.36
ResMoE (UP)   | 22.05 6.60
"""),
    *_figures("002", 2, "switch-base-32: million parameters, switch-base-32: TFLOPs, "
              "switch-base-32: SST-2, switch-base-32: MRPC, switch-base-32: MultiRC F1, "
              "switch-base-32: COPA, switch-base-32: WinoGrande, switch-base-32: SQuAD EM, "
              "switch-base-32: SQuAD F1, switch-base-32: WikiQA, switch-base-32: HotpotQA EM, "
              "switch-base-32: HotpotQA F1", """
Dense (t5-base) | 220 4.65 94.61 88.97 74.25 58.00 58.72 63.65 83.76 96.12 66.13 83.45
Full          | 2000 4.65 95.75 90.20 76.19 68.00 61.80 65.39 85.81 96.45 67.55 84.60
Pruning       | 733 4.65 94.50 88.97 75.13 63.00 61.64 64.80 85.13 96.27 67.39 84.56
Task-Specific | 733 4.65 91.28 82.04 53.63 52.00 58.56 54.40 78.00 95.24 64.70 82.76
Averaging     | 733 4.65 92.66 88.73 74.04 62.00 59.59 64.49 84.75 96.19 67.36 84.61
ZipIt         | 733 4.65 93.12 91.18 75.26 65.00 60.38 65.01 85.06 96.05 67.59 84.70
REPAIR        | 733 4.65 92.89 90.44 74.44 65.00 61.48 64.67 84.84 96.27 67.67 84.77
Git Re-Basin  | 733 4.65 93.35 88.24 74.25 65.00 59.25 64.61 84.92 96.23 67.29 84.46
M-SMoE        | 733 4.65 94.50 90.69 75.57 68.00 61.80 65.66 85.49 96.34 67.91 84.83
MC-SMoE       | 381 3.83 93.35 89.22 73.98 67.00 59.52 65.41 85.30 96.08 67.64 84.77
"""),
    # Methods of paper 003 are the experts before and after; the model has 354M dense parameters.
    *_figures("003", 2, "354M: billion parameters, 354M: RTE, 354M: BoolQ, 354M: COPA, 354M: CB, "
              "354M: ReCORD, 354M: WSC", """
8 experts           | 1.05 66.03 67.35 58.4 50.87 65.17 68.16
32 experts          | 3.4 66.86 68.27 59.13 51.86 67.75 70.87
UNCURL 32 to 8      | 1.05 66.48 69.13 58.96 50.65 66.34 69.86
64 experts          | 6.7 67.64 69.09 60.05 52.17 68.85 71.68
UNCURL 64 to 8      | 1.05 66.17 67.27 58.11 50.16 65.01 68.11
UNCURL 64 to 32     | 3.4 67.14 68.86 59.96 51.94 67.96 69.94
128 experts         | 13 68.58 70.13 61.3 52.04 69.83 72.18
UNCURL 128 to 8     | 1.05 62.91 66.93 56.56 49.31 64.32 64.98
UNCURL 128 to 32    | 3.4 65.17 67.17 59.04 50.17 67.02 71.04
UNCURL 128 to 64    | 6.7 67.73 69.28 60.82 51.81 68.91 71.73
"""),
    *_figures("003", 3, "354M: RTE, 354M: BoolQ, 354M: COPA", """
8 experts           | 66.03 67.35 58.4
UNCURL 32 to 8      | 66.48 69.13 58.96
Frequency 32 to 8   | 64.54 65.12 56.19
"""),
    *_figures("003", 4, "354M: RTE, 354M: BoolQ, 354M: COPA", """
8 experts           | 66.03 67.35 58.4
UNCURL 32 to 8      | 66.48 69.13 58.96
MC-SMoE 32 to 8     | 66.91 67.83 59.01
UNCURL 64 to 32     | 67.14 68.86 59.96
MC-SMoE 64 to 32    | 67.07 67.96 58.62
UNCURL 128 to 64    | 67.73 69.28 60.82
MC-SMoE 128 to 64   | 67.41 68.47 59.14
"""),
)  # fmt: skip
