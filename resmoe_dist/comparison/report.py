"""The report of a comparison: Markdown, JSON, and plots of what quality costs."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from resmoe_dist.checkpoints.tensor_files import write_bytes, write_json
from resmoe_dist.comparison.contenders import CONTENDERS
from resmoe_dist.comparison.measuring import Row
from resmoe_dist.evaluation.tables import human_bytes


def _plain(digits: str) -> Callable[[float], str]:
    return lambda value: format(value, digits)


NO_PLOT = "No plot: matplotlib is missing; run pip install 'resmoe-dist[plot]'."
# Header, key of the row, how the figure is written, and what it means.
_COLUMNS: tuple[tuple[str, str, Callable[[float], str], str], ...] = (
    ("experts", "expert_bytes", human_bytes, "bytes of everything stored for the experts, centres "
     "and indices included"),
    ("share", "expert_share", _plain(".1%"), "those bytes as a share of dense experts in the "
     "stored dtype"),
    ("values kept", "values_kept", _plain(".1%"), "that share without indices: what papers count"),
    ("checkpoint", "checkpoint_bytes", human_bytes, "bytes of all files; source: weights only"),
    ("resident", "resident_bytes", human_bytes, "bytes in memory, with what kernels prepare"),
    ("error", "error", _plain(".4g"), "mean over compressed layers of "
     "(1/E) Σ ‖T_k W_k − restored_k‖²"),
    ("relative", "relative_error", _plain(".4f"), "that error as a share of Σ ‖W_k‖²"),
    ("perplexity", "perplexity", _plain(".4f"), "of the text"),
    ("divergence", "divergence", _plain(".2e"), "mean Kullback-Leibler divergence of next-token "
     "distributions from the source's, in nats"),
    ("MFLOP/token", "flops_per_token", lambda value: f"{value / 1e6:.2f}", "of a forward pass: "
     "products and attention; the cheaper of experts restored and centres shared"),
    ("compress s", "compress_seconds", _plain(".1f"), "seconds to compress, calibration included"),
    ("score s", "score_seconds", _plain(".1f"), "seconds to score the text"),
)  # fmt: skip
_TASK_SCORE = _plain(".4f")
# Figures whose standard deviation over seeds is shown.
_SPREAD = ("error", "relative_error", "perplexity", "divergence")
_PLOTTED = (
    ("relative_error", "relative error"),
    ("perplexity", "perplexity"),
    ("divergence", "divergence (nats)"),
)


def write_report(folder: Path, facts: dict[str, Any], source: Row, rows: list[Row]) -> None:
    """Write report.json, report.md and, with matplotlib, report.svg.

    rows: finished ones, each with `contender` and `budget`, and figures or a `reason`.
    """
    write_json(folder / "report.json", {"facts": facts, "source": source, "rows": rows})
    plotted = _plot(folder / "report.svg", rows)
    text = "\n".join(_markdown(facts, source, rows, plotted=plotted)) + "\n"
    write_bytes(folder / "report.md", text.encode())


def can_plot() -> bool:
    """Whether matplotlib, an optional dependency, is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def table(source: Row, rows: list[Row]) -> list[str]:
    """Markdown lines: the source, then a row per contender and budget, smallest divergence first
    within a budget."""
    header = ["method", "budget", *(name for name, *_ in _COLUMNS), *source.get("tasks", {})]
    lines = ["| " + " | ".join(header) + " |", "|---|---|" + "---:|" * (len(header) - 2)]
    lines.append(_line("(source)", "", source))
    order = {budget: i for i, budget in enumerate(dict.fromkeys(row["budget"] for row in rows))}
    measured = [row for row in rows if "reason" not in row]
    # One run has no deviation: a dash, if others of the table have one.
    no_spread = " ± –" if any("error_sd" in row for row in measured) else ""
    for row in sorted(measured, key=lambda row: (order[row["budget"]], row["divergence"])):
        lines.append(_line(row["contender"], row["budget"], row, no_spread))
    return lines


def _line(name: str, budget: str, row: Row, no_spread: str = "") -> str:
    cells = [_cell(row, key, written, no_spread) for _, key, written, _ in _COLUMNS]
    scores = [_TASK_SCORE(score) for score in row.get("tasks", {}).values()]
    return "| " + " | ".join([name, budget, *cells, *scores]) + " |"


def _cell(row: Row, key: str, written: Callable[[float], str], no_spread: str) -> str:
    if key not in row:
        return ""
    if key not in _SPREAD:
        return written(row[key])
    spread = row.get(f"{key}_sd")
    return written(row[key]) + (no_spread if spread is None else f" ± {written(spread)}")


def _markdown(facts: dict[str, Any], source: Row, rows: list[Row], *, plotted: bool) -> list[str]:
    lines = ["# Compression methods side by side", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", *table(source, rows), ""]
    if plotted:
        lines += ["![Error, perplexity and divergence against bytes](report.svg)", ""]
    elif not can_plot():
        lines += [NO_PLOT, ""]
    if failed := [row for row in rows if "reason" in row]:
        lines += ["Not measured:", ""]
        lines += [f"- {row['contender']}, {row['budget']}: {row['reason']}" for row in failed]
        lines.append("")
    lines += ["Methods:", ""]
    names = dict.fromkeys(row["contender"] for row in rows)
    lines += [f"- {name} ({CONTENDERS[name].kind}): {CONTENDERS[name].text}" for name in names]
    lines += [
        "",
        "Columns (± is the standard deviation over seeds, of methods that draw at random):",
        "",
    ]
    lines += [f"- {name}: {meaning}" for name, _, _, meaning in _COLUMNS]
    lines += [f"- {name}: of lm-eval's task" for name in source.get("tasks", {})]
    return lines


def _plot(path: Path, rows: list[Row]) -> bool:
    """Figures against the experts' bytes, one line per contender; whether it could be drawn."""
    measured = [row for row in rows if "reason" not in row]
    if not measured or not can_plot():
        return False
    # Not pyplot, which would look for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(_PLOTTED), 4), layout="constrained")
    diagrams = figure.subplots(1, len(_PLOTTED))
    names = list(dict.fromkeys(row["contender"] for row in measured))
    for diagram, (key, label) in zip(diagrams, _PLOTTED, strict=True):
        for i, name in enumerate(names):
            own = sorted(
                (row["expert_share"], row[key]) for row in measured if row["contender"] == name
            )
            shares, figures = zip(*own, strict=True)
            style = {"marker": "os^vD<>pX*"[i % 10], "linestyle": "-" if len(own) > 1 else ""}
            diagram.plot([100 * share for share in shares], figures, label=name, **style)
        diagram.set(xlabel="expert bytes, % of dense", ylabel=label, yscale="log")
    handles, labels = diagrams[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="svg")
    write_bytes(path, drawn.getvalue())
    return True
