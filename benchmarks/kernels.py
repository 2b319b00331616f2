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
import math
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from benchmarks import speed
from benchmarks.machine import summary
from resmoe_dist.codecs import EncodedResidual, LowRankResidual, PrunedResidual, codec_named
from resmoe_dist.codecs.low_rank import rank_for
from resmoe_dist.design_matrix import ExpertShape
from resmoe_dist.errors import UserError, first_line
from resmoe_dist.evaluation.report import human_bytes, text_table
from resmoe_dist.ops.bitmap import pack_bitmap
from resmoe_dist.runtime import execution
from resmoe_dist.runtime.activation import PlainActivation
from resmoe_dist.runtime.experts import CompressedExperts, ExpertGroup
from resmoe_dist.runtime.layer import ResMoE
from resmoe_dist.runtime.planning import execution_for

DENSE = ("eager", "batched_mm", "grouped_mm")
# `cached` is as fast as dense where all experts fit its budget, and else as `restore`.
MODES = tuple(mode for mode in execution.MODES if mode != "cached")
_DTYPE = torch.bfloat16
_STD = 0.02
_BLOCK_ENTRIES = 1 << 24
# `batched_mm` copies an expert for every copy of a token; where that is more, it is left out.
_GATHERED_BYTES = 2 << 30
# Restored at once, in the measurement of several experts.
_RESTORED_BYTES = 1 << 30
_RATIO_TICKS = (0.1, 0.25, 0.5, 1, 2, 4, 8)
# Of a token's output, in the Euclidean norm: a few roundings to bfloat16, of 0.4 % each.
_TOLERANCE = 0.03

# By name, as it is run as `__main__`.
logger = logging.getLogger("benchmarks.kernels")


@dataclass(frozen=True)
class LayerShape:
    """A layer of E gated experts, `top_k` of them for each token."""

    name: str
    hidden: int
    rows: int
    experts: int
    top_k: int

    def __str__(self) -> str:
        return self.name

    @property
    def expert(self) -> ExpertShape:
        """Of each."""
        return ExpertShape(self.rows, self.hidden)

    @property
    def expert_bytes(self) -> int:
        """Of each, dense."""
        return self.expert.entries * _DTYPE.itemsize


# The halves are what each of two tensor-parallel ranks has.
SHAPES = {
    shape.name: shape
    for shape in (
        LayerShape("mixtral", 4096, 14336, 8, 2),
        LayerShape("mixtral-half", 4096, 7168, 8, 2),
        LayerShape("deepseek", 2048, 1408, 64, 6),
        LayerShape("deepseek-half", 2048, 704, 64, 6),
        LayerShape("qwen3", 2048, 768, 128, 8),
        LayerShape("qwen3-half", 2048, 384, 128, 8),
    )
}


def layer_shape(text: str) -> LayerShape:
    """A shape by name, or by its numbers as HIDDENxROWSxEXPERTSxTOP_K. For argparse."""
    if text in SHAPES:
        return SHAPES[text]
    try:
        hidden, rows, experts, top_k = map(int, text.split("x"))
    except ValueError:
        names = ", ".join(SHAPES)
        message = f"{text}: one of {names}, or numbers as in 4096x14336x8x2"
        raise argparse.ArgumentTypeError(message) from None
    if min(hidden, rows, top_k) < 1 or top_k > experts:
        raise argparse.ArgumentTypeError(f"{text}: all must be 1 or more, and TOP_K ≤ EXPERTS")
    return LayerShape(text, hidden, rows, experts, top_k)


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


class RandomLayer:
    """A layer with random weights, compressed (`experts`) and dense (`gate_up`, `down`).

    experts has one group. gate_up [E, 2I, H] and down [E, H, I] hold centre + residual, rounded
    once, as transformers' experts lay them out.
    """

    def __init__(
        self, shape: LayerShape, codec: str, keep: float, device: torch.device, seed: int
    ) -> None:
        self.shape = shape
        self.generator = torch.Generator(device).manual_seed(seed)
        E, I, H = shape.experts, shape.rows, shape.hidden  # noqa: E741
        new = partial(torch.empty, dtype=_DTYPE, device=device)
        self.gate_up, self.down = new(E, 2 * I, H), new(E, H, I)
        center_ID = self._normal(I, shape.expert.columns)
        draw = {"pruned": self._draw_pruned, "low_rank": self._draw_low_rank}[codec]
        residuals = [draw(k, center_ID, keep) for k in range(E)]
        self.group = ExpertGroup(list(range(E)), center_ID, residuals, [])

    def compressed(self, mode: str) -> ResMoE:
        """Our layer."""
        shape, run_by = self.shape, execution_for(mode)
        experts = CompressedExperts(shape.expert, [self.group], PlainActivation("silu"), run_by)
        run_by.prepare(experts)
        return ResMoE(shape.hidden, experts, shape.experts).eval()

    def dense(self, implementation: str) -> nn.Module:
        """Mixtral's experts, which differ from DeepSeek's and Qwen3's in nothing but their name."""
        shape = self.shape
        config = MixtralConfig(
            hidden_size=shape.hidden,
            intermediate_size=shape.rows,
            num_local_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            module = MixtralExperts(config)
        module.gate_up_proj = nn.Parameter(self.gate_up, requires_grad=False)
        module.down_proj = nn.Parameter(self.down, requires_grad=False)
        return module.eval()

    def tokens(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [T, H], experts [T, K], each equally likely, and their weights [T, K]."""
        shape, device = self.shape, self.gate_up.device
        logits_TE = torch.empty(count, shape.experts, device=device)
        weights_TK, index_TK = logits_TE.normal_(generator=self.generator).topk(shape.top_k)
        x_TH = torch.empty(count, shape.hidden, dtype=_DTYPE, device=device)
        return x_TH.normal_(generator=self.generator), index_TK, weights_TK.softmax(-1)

    def bytes_read(self, index_TK: Tensor) -> tuple[int, int]:
        """What the experts of some tokens make it necessary to read: dense, and compressed."""
        active = index_TK.unique().tolist()
        compressed = sum(self.group.residuals[k].nbytes for k in active)
        return len(active) * self.shape.expert_bytes, self.group.center.nbytes + compressed

    def exact(self, x_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The output [T, H] by float32 products with the dense weights."""
        out_TH = torch.zeros_like(x_TH, dtype=torch.float32)
        for k in index_TK.unique().tolist():
            token_n, place_n = (index_TK == k).nonzero(as_tuple=True)
            gate_up_nC = x_TH[token_n].float() @ self.gate_up[k].float().T
            gate_nI, up_nI = gate_up_nC.chunk(2, -1)
            y_nH = (F.silu(gate_nI) * up_nI) @ self.down[k].float().T
            out_TH.index_add_(0, token_n, y_nH * weights_TK[token_n, place_n, None])
        return out_TH

    def _draw_pruned(self, expert: int, center_ID: Tensor, keep: float) -> EncodedResidual:
        parts, columns = [], center_ID.shape[1]
        for first, center_SD in self._blocks(center_ID):
            chance_SD = torch.empty(center_SD.shape, device=center_SD.device)
            mask_SD = chance_SD.uniform_(generator=self.generator) < keep
            counts_S = mask_SD.sum(1)
            values = self._normal(int(counts_S.sum()))
            offsets = F.pad(counts_S.cumsum(0), (1, 0)).int()
            tensors = {"bitmap": pack_bitmap(mask_SD), "values": values, "row_offsets": offsets}
            parts.append(PrunedResidual(columns, tensors))
            residual_SD = torch.zeros_like(center_SD).masked_scatter_(mask_SD, values)
            self._keep_dense(expert, first, residual_SD.add_(center_SD))
        return PrunedResidual.join_rows(parts)

    def _draw_low_rank(self, expert: int, center_ID: Tensor, keep: float) -> EncodedResidual:
        rows, columns = center_ID.shape
        rank = min(rows, columns) if keep == 1 else rank_for(rows, columns, keep)
        # So that the entries of the product have the centre's spread.
        scale = (_STD * math.sqrt(rank)) ** -0.5
        left, right = self._normal(rows, rank) * scale, self._normal(rank, columns) * scale
        for first, center_SD in self._blocks(center_ID):
            left_Sr = left[first : first + len(center_SD)]
            self._keep_dense(expert, first, torch.addmm(center_SD, left_Sr, right))
        return LowRankResidual(columns, {"left": left, "right": right})

    def _blocks(self, center_ID: Tensor) -> list[tuple[int, Tensor]]:
        """First row and rows, a few at a time: what is drawn takes several times their memory."""
        step = max(1, _BLOCK_ENTRIES // center_ID.shape[1])
        return [(i, center_ID[i : i + step]) for i in range(0, len(center_ID), step)]

    def _keep_dense(self, expert: int, first: int, dense_SD: Tensor) -> None:
        I, rows = self.shape.rows, slice(first, first + len(dense_SD))  # noqa: E741
        gate_SH, up_SH, down_SH = dense_SD.chunk(3, 1)
        self.gate_up[expert, :I][rows] = gate_SH
        self.gate_up[expert, I:][rows] = up_SH
        self.down[expert, :, rows] = down_SH.T

    def _normal(self, *shape: int) -> Tensor:
        values = torch.empty(shape, dtype=_DTYPE, device=self.gate_up.device)
        return values.normal_(std=_STD, generator=self.generator)


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
    expert = codec_named(codec).stored_bytes(
        shape.rows, shape.expert.columns, keep, _DTYPE.itemsize
    )
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
        count, shape.rows, shape.expert.columns, dtype=_DTYPE, device=turns.device
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
