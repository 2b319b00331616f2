"""A plot of the ratios that `kernels` measures. Needs matplotlib."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from benchmarks.tables import Row
from resmoe_dist.errors import UserError

_TICKS = (0.1, 0.25, 0.5, 1, 2, 4, 8)


def check_plot(path: Path | None) -> None:
    """Raise UserError if a plot could not be written to `path`. None: no plot is wanted."""
    if path is None:
        return
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--plot {path}: must end in .png, .svg or .pdf")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib; run pip install 'resmoe-dist[plot]'")


def plot_ratios(rows: list[Row], path: Path) -> None:
    """Ratios over tokens: one diagram per shape, one line per mode, and the bound by bytes."""
    # Not pyplot, which would look for a display.
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure = Figure(figsize=(4 * len(shapes), 3), layout="constrained")
    diagrams = figure.subplots(1, len(shapes), squeeze=False, sharex=True, sharey=True)[0]
    for diagram, shape in zip(diagrams, shapes, strict=True):
        own = [row for row in rows if row["shape"] == shape]
        tokens = [row["tokens"] for row in own]
        for mode in own[0]["ratios"]:
            # `auto` coincides with another mode and must not hide it.
            style = {"linestyle": "--", "marker": "o"} if mode == "auto" else {"marker": "."}
            diagram.plot(tokens, [row["ratios"][mode] for row in own], label=mode, **style)
        bounds = [row["bound"] for row in own]
        diagram.plot(tokens, bounds, label="bound by bytes", color="grey", linestyle=":")
        diagram.axhline(1, color="black", linewidth=0.5)
        diagram.set(title=shape, xscale="log", yscale="log", xlabel="tokens")
        diagram.set_xticks(tokens, [str(count) for count in tokens])
        diagram.set_yticks(_TICKS, [f"{ratio:g}" for ratio in _TICKS])
        diagram.minorticks_off()
    diagrams[0].set_ylabel("ratio to fastest dense")
    handles, labels = diagrams[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.savefig(path, dpi=150)
