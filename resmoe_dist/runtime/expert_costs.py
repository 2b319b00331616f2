"""What running an expert costs on this machine: measured once per shape, kept in the user's cache.

Costs add up over experts, because experts run one after the other: a restored or tiled expert with
its tokens, a residual with its tokens, a centre with the tokens of all its experts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, fields
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from resmoe_dist.checkpoints.tensor_files import write_json
from resmoe_dist.errors import UserError
from resmoe_dist.kernels import LayerWeights, backend_for
from resmoe_dist.routing import RoutedTokens
from resmoe_dist.runtime.execution import Product, Restore
from resmoe_dist.user_cache import cache_root

logger = logging.getLogger(__name__)

# Costs are measured at these token counts, interpolated between them, and taken as proportional
# above the last.
TOKENS = (1, 4, 16, 64, 256)
# Increase when `measure` changes: cached costs of the old method are then ignored.
_MEASURE_VERSION = 3


@dataclass(frozen=True)
class MeasuringEffort:
    """evicting_bytes: read before every timing, more than the last-level cache. repeats: timings
    per point. weight_bytes: dense size of the experts that are timed together, so that they do not
    fit into the cache either."""

    evicting_bytes: int = 64 << 20
    repeats: int = 3
    weight_bytes: int = 128 << 20


@dataclass(frozen=True)
class ExpertCosts:
    """Seconds at each of TOKENS token counts: of a restored expert, a tiled expert, a residual
    alone, and a centre alone."""

    restored: tuple[float, ...]
    tiled: tuple[float, ...]
    residual: tuple[float, ...]
    center: tuple[float, ...]

    def __post_init__(self) -> None:
        for seconds in astuple(self):
            if len(seconds) != len(TOKENS) or not all(value >= 0 for value in seconds):
                raise ValueError(f"expected {len(TOKENS)} timings, got {seconds}")

    def seconds(self, way: str, tokens: float) -> float:
        """Interpolated cost of "restored", "tiled", "residual" or "center" with some tokens.

        Below one token: the chance of one token. Above the last of TOKENS: proportional.
        """
        scale = max(tokens / TOKENS[-1], 1) * min(tokens, 1)
        return float(np.interp(tokens, TOKENS, getattr(self, way))) * scale


def measure(layer: LayerWeights, effort: MeasuringEffort) -> ExpertCosts:
    """Time experts of this layer on random tokens.

    The costs of a residual and of a centre follow from running several experts that share one
    centre, and one expert with it: kernels compute both at once, so neither can be timed alone.
    """
    dense_bytes = layer.rows * layer.shape.columns * layer.dtype.itemsize
    count = min(layer.num_experts, max(2, effort.weight_bytes // dense_bytes))
    center_of = (0 if layer.centers else -1,)
    several, one = (
        backend_for(
            LayerWeights(
                layer.shape,
                layer.residuals[:number],
                layer.centers[:1],
                center_of * number,
                layer.activation,
            )
        )
        for number in (count, 1)
    )
    restore, shared = Restore(), Product(share_center=True)
    tiled = Product(share_center=False)
    evicting = torch.zeros(effort.evicting_bytes // 4, device=layer.device)
    seconds: dict[str, list[float]] = {field.name: [] for field in fields(ExpertCosts)}
    for tokens in TOKENS:
        of_several, of_one = (_same_tokens(layer, tokens, number) for number in (count, 1))
        restored_s, tiled_s, shared_s, shared_by_one_s = (
            _seconds(partial(way.run, routed, backend), evicting, effort.repeats)
            for way, routed, backend in (
                (restore, of_several, several),
                (tiled, of_several, several),
                (shared, of_several, several),
                (shared, of_one, one),
            )
        )
        if not layer.centers or count == 1:
            # No centre is shared, or one expert's share of the time cannot be told apart.
            residual_s, center_s = shared_s / count, 0.0
        else:
            residual_s = max(shared_s - shared_by_one_s, 0) / (count - 1)
            center_s = max(shared_by_one_s - residual_s, 0)
        seconds["restored"].append(restored_s / count)
        seconds["tiled"].append(tiled_s / count)
        seconds["residual"].append(residual_s)
        seconds["center"].append(center_s)
    return ExpertCosts(**{name: tuple(values) for name, values in seconds.items()})


def _same_tokens(layer: LayerWeights, tokens: int, num_experts: int) -> RoutedTokens:
    """Random tokens, each of which goes to all of the experts."""
    device = layer.device
    return RoutedTokens(
        x_RH=torch.randn(tokens, layer.hidden, device=device).to(layer.dtype),
        token_N=torch.arange(tokens, device=device).repeat(num_experts),
        weight_N=torch.ones(tokens * num_experts, device=device),
        offsets_L=torch.arange(num_experts + 1, device=device) * tokens,
    )


def known_or_measured(
    key: tuple[object, ...],
    layer: LayerWeights,
    effort: MeasuringEffort,
    measure_costs: Callable[[LayerWeights, MeasuringEffort], ExpertCosts] | None = None,
) -> ExpertCosts:
    """Costs from the cache, or measured now and cached.

    key: everything they depend on. measure_costs: how to measure, `measure` by default.
    """
    path = _path(key, layer.device)
    try:
        return ExpertCosts(**{name: tuple(v) for name, v in json.loads(path.read_text()).items()})
    except (OSError, ValueError, TypeError, AttributeError):
        costs = (measure_costs or measure)(layer, effort)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(costs))
    except (OSError, UserError) as error:
        logger.debug("cannot cache measured costs: %s", error)
    return costs


def _seconds(work: Callable[[], object], evicting: Tensor, repeats: int) -> float:
    """The least of a few timings, each with cold caches."""
    times, device = [], evicting.device
    work()
    for _ in range(repeats):
        # Read, not written: pending write-backs would be part of the time.
        evicting.sum()
        _wait(device)
        began = perf_counter()
        work()
        _wait(device)
        times.append(perf_counter() - began)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _path(key: tuple[object, ...], device: torch.device) -> Path:
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        machine = f"{_processor()}, {torch.get_num_threads()} threads"
    text = repr((machine, torch.__version__, _MEASURE_VERSION, TOKENS, *key))
    return cache_root() / "costs" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def _processor() -> str:
    """The processor's name from Linux, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
