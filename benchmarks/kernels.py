"""One MoE layer at a time: our ways to run it beside transformers' dense ones.

Ours are what a user gets: `ResMoE` of one process, dispatch and combine included. The dense ones
are transformers' own experts module in each of its implementations, which share one set of weights;
they hold exactly what ours restore to. Before anything is timed, all outputs are compared with
float32 products of those weights.

Contenders take turns; a dense way that is four times as slow as another gets one. In each
repetition all have the same tokens and routing, both drawn anew; routing is uniform, so that more
experts are active than with a trained router. Weights are random; no two experts share memory, and
every turn starts with caches that hold none of it.

ratio        seconds of the fastest dense way / ours, medians
bytes        what must be read at least once: of a dense layer the active experts; of ours the
             centre and the active residuals, bitmaps and offsets included. Activations not counted
bound        dense bytes / our bytes: the ratio where nothing but reading takes time
of the bound ratio / bound
of memory    bytes per second beside what a sum over 1 GiB reads (see `speed.memory_speed`)

The last table compares the bytes per second that restoring reads and writes with those of a copy
of the same size.

Legend: T tokens, K experts per token, E experts, I rows, H hidden, D columns, S rows of a block.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import speed
from benchmarks.machine import summary
from benchmarks.random_layer import DTYPE, SHAPES, RandomLayer, layer_shape
from resmoe_dist.codecs import codec_named
from resmoe_dist.errors import UserError, first_line
from resmoe_dist.evaluation.tables import human_bytes, text_table
from resmoe_dist.runtime import execution
from resmoe_dist.runtime.layer import ResMoE

DENSE = ("eager", "batched_mm", "grouped_mm")
# `cached` is as fast as dense where all experts fit its budget, and else as `restore`.
MODES = tuple(mode for mode in execution.MODES if mode != "cached")
# `batched_mm` copies an expert for every copy of a token; where that is more, it is left out.
_GATHERED_BYTES = 2 << 30
# Restored at once, in the measurement of several experts.
_RESTORED_BYTES = 1 << 30
_RATIO_TICKS = (0.1, 0.25, 0.5, 1, 2, 4, 8)
# Of a token's output, in the Euclidean norm: a few roundings to bfloat16, of 0.4 % each.
_TOLERANCE = 0.03

# By name, as it is run as `__main__`.
logger = logging.getLogger("benchmarks.kernels")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    add = parser.add_argument
    add(
        "--shapes",
        nargs="+",
        type=layer_shape,
        default=list(SHAPES.values()),
        metavar="SHAPE",
        help=f"{', '.join(SHAPES)} (default: all), or HIDDENxROWSxEXPERTSxTOP_K",
    )
    add("--tokens", nargs="+", type=speed.positive, default=[1, 4, 16, 64, 256, 1024])
    add("--modes", nargs="+", choices=MODES, default=list(MODES))
    add("--codec", choices=("pruned", "low_rank"), default="pruned")
    add("--keep", type=speed.share, default=0.25)
    add("--repeats", type=speed.positive, default=9)
    add("--seconds", type=float, default=6, help="no more repeats of a case after so long, but 3")
    add("--seed", type=int, default=0)
    add("--plot", type=Path, metavar="F", help="ratios over tokens as a picture (.png, .svg, .pdf)")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Per shape and number of tokens, seconds and bytes of all ways; restoring; resident bytes."""
    _check_plot(args.plot)
    device = torch.device(args.device)
    turns = speed.Turns(device, args.seed)
    speeds, rows, restoring, resident = [], [], [], []
    for shape in args.shapes:
        speeds.append(speed.memory_speed(device))
        layer = RandomLayer(shape, args.codec, args.keep, device, args.seed)
        logger.info("%s: weights drawn", shape.name)
        ours = {mode: layer.compressed(mode) for mode in args.modes}
        ways = {name: layer.dense(name) for name in DENSE} | ours
        for tokens in args.tokens:
            rows.append(_case(args, turns, layer, ways, tokens))
            logger.info("%s, %d tokens: done", shape.name, tokens)
        resident.append(_resident(layer, ours, args.codec, args.keep))
        several = min(shape.experts, max(1, _RESTORED_BYTES // shape.expert_bytes))
        restoring += [_restoring(args, turns, layer, count) for count in sorted({1, several})]
        # Before the next layer is drawn.
        del layer, ours, ways
    # What others do on the machine can only slow it down.
    memory = {kind: max(found[kind] for found in speeds) for kind in ("read", "copy")}
    results = {
        "memory": memory,
        "rows": [_against_memory(row, memory["read"]) for row in rows],
        "restoring": restoring,
        "resident": resident,
    }
    if args.plot:
        plot(results, args.plot)
    return results


def _case(
    args: argparse.Namespace,
    turns: speed.Turns,
    layer: RandomLayer,
    ways: dict[str, nn.Module],
    tokens: int,
) -> dict[str, Any]:
    """All ways at one number of tokens: checked, then timed."""
    inputs = layer.tokens(tokens)
    errors, skipped = _checked(layer, ways, inputs)
    taken: dict[str, list[float]] = {name: [] for name in errors}
    running = set(errors)
    active, read, choices = [], [], []
    for _ in speed.repetitions(args.repeats, args.seconds):
        inputs = layer.tokens(tokens)
        active.append(len(inputs[1].unique()))
        read.append(layer.bytes_read(inputs[1]))
        if "auto" in ways:
            choices.append(_choice(ways["auto"], inputs))
        turn = turns.seconds({name: partial(ways[name], *inputs) for name in running})
        for name, seconds in turn.items():
            taken[name].append(seconds)
        running -= speed.hopeless(turn, DENSE)
    seconds = {name: summary(all_) for name, all_ in taken.items()}
    dense, compressed = (statistics.median(sizes) for sizes in zip(*read, strict=True))
    return {
        "shape": layer.shape.name,
        "tokens": tokens,
        "active_experts": statistics.median(active),
        "bytes": {"dense": dense, "compressed": compressed},
        "bound": dense / compressed,
        "fastest_dense": min(
            (name for name in DENSE if name in seconds), key=lambda name: seconds[name]["median"]
        ),
        "seconds": seconds,
        "relative_errors": errors,
        "skipped": skipped,
        "choices": dict(Counter(choices)),
    }


def _checked(
    layer: RandomLayer, ways: dict[str, nn.Module], inputs: tuple[Tensor, Tensor, Tensor]
) -> tuple[dict[str, float], dict[str, str]]:
    """Errors of the ways that run, and why others do not. Also what a first call costs is paid."""
    exact_TH = layer.exact(*inputs)
    errors, skipped = {}, {}
    for name, module in ways.items():
        gathered = inputs[1].numel() * layer.shape.expert_bytes
        if name == "batched_mm" and gathered > _GATHERED_BYTES:
            skipped[name] = f"would copy {human_bytes(gathered)} of weights"
            continue
        try:
            out_TH = module(*inputs)
        except RuntimeError as error:
            if name not in DENSE:
                raise
            skipped[name] = first_line(error)
            continue
        away_T = (out_TH.float() - exact_TH).norm(dim=1) / exact_TH.norm(dim=1)
        errors[name] = float(away_T.max())
        if not errors[name] <= _TOLERANCE:
            raise RuntimeError(
                f"{layer.shape.name}, {len(exact_TH)} tokens: {name} is {errors[name]:.1%} away "
                "from the products of the same weights in float32"
            )
    return errors, skipped


def _choice(layer: ResMoE, inputs: tuple[Tensor, Tensor, Tensor]) -> str:
    """The mode that `auto` takes for these tokens."""
    tokens, _ = layer.deepspeed_moe.dispatcher.dispatch(*inputs)
    return layer.experts.execution.choose(layer.experts, tokens)


def _against_memory(row: dict[str, Any], read_speed: float) -> dict[str, Any]:
    """The row, with what its seconds mean for every way."""
    fastest = row["seconds"][row["fastest_dense"]]["median"]
    row |= {"ratios": {}, "of_bound": {}, "bytes_per_second": {}, "of_memory": {}}
    for name, found in row["seconds"].items():
        size = row["bytes"]["dense" if name in DENSE else "compressed"]
        row["bytes_per_second"][name] = size / found["median"]
        row["of_memory"][name] = size / found["median"] / read_speed
        if name not in DENSE:
            row["ratios"][name] = fastest / found["median"]
            row["of_bound"][name] = row["ratios"][name] / row["bound"]
    return row


def _resident(
    layer: RandomLayer, ours: dict[str, ResMoE], codec: str, keep: float
) -> dict[str, Any]:
    """Bytes that stay, beside what the checkpoint promises; and the buffer each mode grew."""
    shape, group = layer.shape, layer.group
    expert = codec_named(codec).stored_bytes(shape.rows, shape.expert.columns, keep, DTYPE.itemsize)
    resident = group.center.nbytes + sum(residual.nbytes for residual in group.residuals)
    return {
        "shape": shape.name,
        "experts": shape.experts,
        "dense": shape.experts * shape.expert_bytes,
        "resident": resident,
        "stored": shape.expert_bytes + shape.experts * expert,
        "workspace": {
            mode: module.experts.execution.workspace.nbytes for mode, module in ours.items()
        },
    }


def _restoring(
    args: argparse.Namespace, turns: speed.Turns, layer: RandomLayer, count: int
) -> dict[str, Any]:
    """Restore some experts, each into a place of its own, beside a copy of as many dense ones."""
    shape, group = layer.shape, layer.group
    dense_NID = torch.zeros(
        count, shape.rows, shape.expert.columns, dtype=DTYPE, device=turns.device
    )
    other_NID = torch.zeros_like(dense_NID)
    residuals = list(group.residuals)[:count]

    def restore() -> None:
        for residual, dense_ID in zip(residuals, dense_NID, strict=True):
            residual.restore(group.center, dense_ID)

    work = {"restore": restore, "copy": lambda: dense_NID.copy_(other_NID)}
    restore()
    every = [turns.seconds(work) for _ in speed.repetitions(args.repeats, args.seconds)]
    seconds = {name: summary([turn[name] for turn in every]) for name in work}
    # The centre is read again for every expert, unless it is so small that it stays in the caches.
    moved = {
        "restore": group.center.nbytes + sum(r.nbytes for r in residuals) + dense_NID.nbytes,
        "copy": 2 * dense_NID.nbytes,
    }
    rates = {name: moved[name] / seconds[name]["median"] for name in work}
    return {
        "shape": shape.name,
        "experts": count,
        "seconds": seconds,
        "bytes": moved,
        "bytes_per_second": rates,
        "ratio": rates["restore"] / rates["copy"],
    }


def table(results: dict[str, Any]) -> str:
    """The results of `measure` as text."""
    rows, memory = results["rows"], results["memory"]
    modes = list(rows[0]["ratios"])
    ways = [*DENSE, *modes]
    times = _table(
        rows,
        ["layer", "tokens", "active experts", *(f"{name} ms" for name in ways)],
        lambda row: [
            f"{row['active_experts']:g}",
            *(speed.milliseconds(row["seconds"][n]) if n in row["seconds"] else "-" for n in ways),
        ],
    )
    ratios = _table(
        rows,
        ["layer", "tokens", "fastest dense", "dense", "ours", "bound"]
        + [f"{mode} (of the bound)" for mode in modes]
        + ["auto takes"] * ("auto" in modes),
        lambda row: [
            row["fastest_dense"],
            *(human_bytes(row["bytes"][kind]) for kind in ("dense", "compressed")),
            f"{row['bound']:.2f}",
            *(f"{row['ratios'][mode]:.2f} ({row['of_bound'][mode]:.0%})" for mode in modes),
            *([", ".join(sorted(row["choices"]))] if "auto" in modes else []),
        ],
    )
    rates = _table(
        rows,
        ["layer", "tokens", *(f"{name} GB/s (of memory)" for name in ("dense", *modes))],
        lambda row: [
            f"{row['bytes_per_second'][name] / 1e9:.1f} ({row['of_memory'][name]:.0%})"
            for name in (row["fastest_dense"], *modes)
        ],
    )
    speeds = (
        f"memory reads {memory['read'] / 1e9:.1f} GB/s, "
        f"copies (read and written) {memory['copy'] / 1e9:.1f} GB/s"
    )
    resident = _table(
        results["resident"],
        ["layer", "experts", "dense", "resident", "resident / stored", "of dense"]
        + [f"workspace {mode}" for mode in modes],
        lambda row: [
            *(human_bytes(row[kind]) for kind in ("dense", "resident")),
            *(f"{row['resident'] / row['stored']:.4f}", f"{row['resident'] / row['dense']:.1%}"),
            *(human_bytes(row["workspace"][mode]) for mode in modes),
        ],
    )
    kinds = ("restore", "copy")
    restoring = _table(
        results["restoring"],
        ["layer", "experts"]
        + [f"{kind} {unit}" for unit in ("ms", "GB/s") for kind in kinds]
        + ["ratio"],
        lambda row: [
            *(speed.milliseconds(row["seconds"][kind]) for kind in kinds),
            *(f"{row['bytes_per_second'][kind] / 1e9:.1f}" for kind in kinds),
            f"{row['ratio']:.2f}",
        ],
    )
    return "\n\n".join([times, ratios, rates, speeds, resident, restoring])


def _table(
    rows: list[dict[str, Any]], header: list[str], cells: Callable[[dict[str, Any]], list[str]]
) -> str:
    """Layer, the column of the header's second word, and what `cells` makes of each row."""
    return text_table(header, [[row["shape"], str(row[header[1]]), *cells(row)] for row in rows])


def _check_plot(path: Path | None) -> None:
    """Before minutes are spent."""
    if path is None:
        return
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--plot {path}: must end in .png, .svg or .pdf")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib; run pip install 'resmoe-dist[plot]'")


def plot(results: dict[str, Any], path: Path) -> None:
    """A picture of the ratios over tokens, one diagram for each shape."""
    # A figure of its own, not pyplot's: no window system is asked for.
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["shape"] for row in results["rows"]))
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(4 * columns, 3 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for diagram, name in zip(grid, names, strict=False):
        rows = [row for row in results["rows"] if row["shape"] == name]
        tokens = [row["tokens"] for row in rows]
        for mode in rows[0]["ratios"]:
            # `auto` lies on one of the others: it must not hide it.
            style = {"linestyle": "--", "marker": "o"} if mode == "auto" else {"marker": "."}
            diagram.plot(tokens, [row["ratios"][mode] for row in rows], label=mode, **style)
        bounds = [row["bound"] for row in rows]
        diagram.plot(tokens, bounds, label="bound by bytes", color="grey", linestyle=":")
        diagram.axhline(1, color="black", linewidth=0.5)
        diagram.set(title=name, xscale="log", yscale="log", xlabel="tokens")
        diagram.set_xticks(tokens, [str(count) for count in tokens])
        diagram.set_yticks(_RATIO_TICKS, [f"{ratio:g}" for ratio in _RATIO_TICKS])
        diagram.minorticks_off()
    shown = [ratio for row in results["rows"] for ratio in (*row["ratios"].values(), row["bound"])]
    grid[0].set_ylim(min(0.5, *shown) / 1.2, max(2, *shown) * 1.2)
    for diagram in grid[len(names) :]:
        diagram.remove()
    for diagram in grid[: len(names) : columns]:
        diagram.set_ylabel("ratio to fastest dense")
    lines_and_names = grid[0].get_legend_handles_labels()
    figure.legend(*lines_and_names, loc="outside lower center", ncols=len(lines_and_names[1]))
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    speed.main(sys.modules[__name__])
