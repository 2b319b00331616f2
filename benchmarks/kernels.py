"""One MoE layer: our modes of execution beside transformers' dense implementations.

Ours are what users run: `ResMoE` on one rank, dispatch and combine included. The dense ones are
transformers' experts module in each of its implementations; they share one set of weights, which is
exactly what ours restores to. Before a case is timed, all outputs are compared with float32
products of those weights.

Contenders take turns with cold caches. In every repeat all get the same tokens and routing, both
new. Routing is uniform, so more experts are active than with a trained router. A dense way that is
four times as slow as another gets a single turn.

ratio        seconds of the fastest dense way / ours, medians
dense, ours  bytes that must be read at least once: dense, the active experts; ours, the centre and
             the active residuals, bitmaps and offsets included. Activations are not counted
bound        dense bytes / our bytes: the ratio if reading were all that takes time
of bound     ratio / bound
of memory    bytes per second, as a share of what a sum or dot product over 1 GiB reads

The last table compares the bytes per second that restoring reads and writes with those of a copy of
the same size.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.codec_arguments import add_codec_arguments, codec_specs
from benchmarks.harness import logger, main, positive
from benchmarks.ratio_plot import check_plot, plot_ratios
from benchmarks.tables import Row
from benchmarks.timing import Clock, medians
from benchmarks.ways import DENSE, MODES, against_dense, try_ways, workspace_bytes
from resmoe_dist.runtime.execution import Auto
from resmoe_dist.runtime.layer import ResMoE
from resmoe_dist.testing.random_layer import DTYPE, SHAPES, LayerShape, RandomLayer, parse_shape

# Largest error of a token's output in the Euclidean norm: a few roundings to bfloat16 of 0.4 %.
TOLERANCE = 0.03

Inputs = tuple[Tensor, Tensor, Tensor]

_CASE = ("layer=shape", "tokens")
_LAYER = ("layer=shape", "experts")
TABLES = (
    ("rows", *_CASE, "active_experts:g", "{} ms=seconds.*:ms"),
    (
        *(
            "rows",
            *_CASE,
            "fastest_dense",
            "dense=bytes.dense:bytes",
            "ours=bytes.compressed:bytes",
        ),
        *("bound:.2f", "{}=ratios.*:.2f", "auto_takes"),
    ),
    ("rows", *_CASE, "{} of bound=of_bound.*:.0%", "{} of memory=of_memory.*:.0%"),
    ("skipped", *_CASE, "left out=way", "because=reason"),
    ("memory", "memory reads GB/s=read:GB/s", "copies GB/s (read and written)=copy:GB/s"),
    (
        *("resident", *_LAYER, "dense:bytes", "resident:bytes", "of_stored:.4f", "of_dense:.1%"),
        "workspace {}=workspace.*:bytes",
    ),
    ("restoring", *_LAYER, "{} ms=seconds.*:ms", "{} GB/s=bytes_per_second.*:GB/s", "ratio:.2f"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    add, shapes = parser.add_argument, list(SHAPES.values())
    text = f"{', '.join(SHAPES)} (default: all), or HIDDENxROWSxEXPERTSxTOP_K"
    add("--shapes", nargs="+", type=_shape, default=shapes, metavar="SHAPE", help=text)
    add("--tokens", nargs="+", type=positive, default=[1, 4, 16, 64, 256, 1024])
    add("--modes", nargs="+", choices=MODES, default=list(MODES))
    add_codec_arguments(parser)
    add("--plot", type=Path, metavar="F", help="plot the ratios over tokens (.png, .svg, .pdf)")
    parser.set_defaults(repeats=9, seconds=6)


def _shape(text: str) -> LayerShape:
    try:
        return parse_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def measure(args: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """rows: per shape and number of tokens. resident, restoring: per shape. memory: its speed."""
    check_plot(args.plot)
    codec, center = codec_specs(args)
    rows: list[Row] = []
    skipped, resident, restoring, speeds = list[Row](), list[Row](), list[Row](), []
    for shape in args.shapes:
        speeds.append(clock.memory_speed())
        layer = RandomLayer(shape, codec, clock.device, args.seed, center=center)
        ours = {mode: layer.compressed(mode) for mode in args.modes}
        ways = {name: layer.dense(name) for name in DENSE} | ours
        for tokens in args.tokens:
            rows.append(_measure_case(clock, layer, ways, tokens, skipped))
            logger.info("%s, %d tokens: done", shape, tokens)
        resident.append(_measure_bytes(layer, ours))
        several = min(shape.experts, max(1, clock.effort.restored_bytes // shape.expert_bytes))
        restoring += [_measure_restoring(clock, layer, count) for count in sorted({1, several})]
        # Free the memory before the next layer is drawn.
        del layer, ours, ways
    # Other work on the machine can only slow memory down, so the fastest is its speed.
    memory = {kind: max(found[kind] for found in speeds) for kind in ("read", "copy")}
    for row in rows:
        row["of_memory"] = {n: r / memory["read"] for n, r in row["bytes_per_second"].items()}
    if args.plot:
        plot_ratios(rows, args.plot)
    return {
        "rows": rows,
        "memory": [memory],
        "resident": resident,
        "restoring": restoring,
        "skipped": skipped,
    }


def _measure_case(
    clock: Clock,
    layer: RandomLayer,
    ways: Mapping[str, nn.Module],
    tokens: int,
    skipped: list[Row],
) -> Row:
    """One row. Ways that are left out are added to `skipped`."""
    errors, reasons = check_outputs(clock, layer, ways, layer.tokens(tokens))
    case = {"shape": layer.shape.name, "tokens": tokens}
    skipped += [case | {"way": name, "reason": reason} for name, reason in reasons.items()]
    active: list[int] = []
    read: dict[str, list[int]] = {"dense": [], "compressed": []}

    def prepare() -> dict[str, Callable[[], Tensor]]:
        inputs = layer.tokens(tokens)
        active.append(len(inputs[1].unique()))
        for kind, count in layer.bytes_read(inputs[1]).items():
            read[kind].append(count)
        return {name: partial(ways[name], *inputs) for name in errors}

    seconds = clock.compare(prepare, may_drop=DENSE)
    size = {kind: statistics.median(sizes) for kind, sizes in read.items()}
    kinds = {name: "dense" if name in DENSE else "compressed" for name in seconds}
    bound = size["dense"] / size["compressed"]
    found = against_dense(seconds)
    ratios = {name: ratio for name, ratio in found["ratios"].items() if name not in DENSE}
    return {
        **case,
        "active_experts": statistics.median(active),
        "bytes": size,
        "bound": bound,
        "seconds": seconds,
        **found,
        "ratios": ratios,
        "of_bound": {name: ratio / bound for name, ratio in ratios.items()},
        "bytes_per_second": {n: size[kinds[n]] / taken for n, taken in medians(seconds).items()},
        "relative_errors": errors,
        "auto_takes": _choice(ways.get("auto"), tokens, tokens * layer.shape.top_k),
    }


def check_outputs(
    clock: Clock, layer: RandomLayer, ways: Mapping[str, nn.Module], inputs: Inputs
) -> tuple[dict[str, float], dict[str, str]]:
    """The largest relative error of each way that runs, and why others do not.

    Raises RuntimeError if an output differs from float32 products by more than TOLERANCE.
    """
    exact_TH = layer.exact(*inputs)
    gathered = inputs[1].numel() * layer.shape.expert_bytes
    calls = {name: partial(module, *inputs) for name, module in ways.items()}
    outputs, skipped = try_ways(calls, gathered, clock.effort)
    errors = {}
    for name, out_TH in outputs.items():
        error_T = (out_TH.float() - exact_TH).norm(dim=1) / exact_TH.norm(dim=1)
        errors[name] = float(error_T.max())
        if not errors[name] <= TOLERANCE:
            raise RuntimeError(
                f"{layer.shape}, {len(exact_TH)} tokens: the output of {name} differs by "
                f"{errors[name]:.1%} from float32 products of the same weights"
            )
    return errors, skipped


def _choice(layer: nn.Module | None, tokens: int, copies: int) -> str | None:
    """The mode that `auto` takes for this many tokens and routed copies."""
    if layer is None:
        return None
    assert isinstance(layer, ResMoE) and isinstance(layer.experts.execution, Auto)
    return layer.experts.execution.planner.choose(layer.experts.backend, tokens, copies)


def _measure_bytes(layer: RandomLayer, ours: Mapping[str, ResMoE]) -> Row:
    """Bytes in memory beside those of the codec's formula; and the workspace of each mode."""
    dense = layer.shape.experts * layer.shape.expert_bytes
    return {
        "shape": layer.shape.name,
        "experts": layer.shape.experts,
        "dense": dense,
        "resident": layer.resident_bytes,
        "stored": layer.stored_bytes,
        "of_stored": layer.resident_bytes / layer.stored_bytes,
        "of_dense": layer.resident_bytes / dense,
        "workspace": {mode: workspace_bytes(module) for mode, module in ours.items()},
    }


def _measure_restoring(clock: Clock, layer: RandomLayer, count: int) -> Row:
    """Restore some experts, each to a different place, beside a copy of as many dense ones."""
    shape, backend = layer.shape, layer.compressed("restore").experts.backend
    size = (count, shape.rows, shape.expert.columns)
    dense_EID = torch.zeros(size, dtype=DTYPE, device=clock.device)
    other_EID = torch.zeros_like(dense_EID)

    def restore() -> None:
        for expert, dense_ID in enumerate(dense_EID):
            backend.restore(expert, dense_ID)

    work = {"restore": restore, "copy": lambda: dense_EID.copy_(other_EID)}
    restore()
    seconds = clock.compare(lambda: work)
    # Every expert reads the centre again, but from the caches if it is small: it counts once.
    compressed = layer.bytes_read(torch.arange(count))["compressed"]
    moved = {"restore": compressed + dense_EID.nbytes, "copy": 2 * dense_EID.nbytes}
    rates = {name: moved[name] / taken for name, taken in medians(seconds).items()}
    return {
        "shape": shape.name,
        "experts": count,
        "seconds": seconds,
        "bytes": moved,
        "bytes_per_second": rates,
        "ratio": rates["restore"] / rates["copy"],
    }


if __name__ == "__main__":
    main(sys.modules[__name__])
