"""What the ways to run an expert cost on this machine: measured once, kept in the user's cache;
and the choice between them.

Costs add up over experts, which are run one after the other: a restored expert with its tokens, a
residual with its tokens, and a centre with the tokens of all its experts.

Legend: L local experts, R rows of tokens, S rows of a shard, H hidden.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, fields
from functools import partial
from itertools import islice
from pathlib import Path
from time import perf_counter
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from resmoe_dist.checkpoints.tensor_files import write_json
from resmoe_dist.errors import UserError
from resmoe_dist.kernels.cpu.build import fingerprint
from resmoe_dist.kernels.dispatch import kernels_for
from resmoe_dist.parallel.dispatcher import DispatchedTokens
from resmoe_dist.runtime.execution import Execution, RestoredExperts
from resmoe_dist.runtime.experts import CompressedExperts, ExpertGroup
from resmoe_dist.user_cache import cache_root

logger = logging.getLogger(__name__)

# Between these the costs are interpolated; above the last they are taken to be proportional.
TOKENS = (1, 4, 16, 64, 256)
# More than the caches hold: what a model runs was last read a token ago.
_EVICTING_BYTES = 64 << 20
_REPEATS = 3
# To be changed with what `measure` does: kept costs are those of one way to measure.
_MEASURE = 2
_WITHIN_NOISE = 0.95
_MOST_ANSWERS = 1024
# As many experts as do not stay in the caches either.
_MEASURED_BYTES = 128 << 20


@dataclass(frozen=True)
class ExpertCosts:
    """Seconds at each of TOKENS tokens: of an expert restored, and tiled, of a residual alone, and
    of a centre alone."""

    restored: tuple[float, ...]
    tiled: tuple[float, ...]
    residual: tuple[float, ...]
    center: tuple[float, ...]

    def __post_init__(self) -> None:
        for seconds in astuple(self):
            if len(seconds) != len(TOKENS) or not all(value >= 0 for value in seconds):
                raise ValueError(f"costs of {seconds}, where {len(TOKENS)} numbers are due")

    def fastest(self, counts_L: list[int], center_rows: list[int]) -> str:
        """The mode for experts with so many tokens, whose centres have so many."""
        counts = np.array([count for count in counts_L if count])
        seconds = {
            "shared": _total(self.residual, counts) + _total(self.center, np.array(center_rows)),
            "tiled": _total(self.tiled, counts),
            "restore": _total(self.restored, counts),
        }
        # Times vary more than this, and `shared` needs the least memory.
        seconds["shared"] *= _WITHIN_NOISE
        return min(seconds, key=seconds.__getitem__)


def _total(seconds: tuple[float, ...], counts: np.ndarray) -> float:
    beyond = np.maximum(counts / TOKENS[-1], 1)
    return float((np.interp(counts, TOKENS, seconds) * beyond).sum())


def execution_for(mode: str = "auto", cache_bytes: int = 0) -> Execution:
    """The execution called `mode` (see `execution.MODES`); cache_bytes: of `cached`."""
    return Execution(
        mode,
        cache=RestoredExperts(cache_bytes) if mode == "cached" else None,
        planner=MeasuredPlanner() if mode == "auto" else None,
    )


class MeasuredPlanner:
    """Chooses by the costs of a layer's shape, measured when the first such layer is prepared."""

    def __init__(self) -> None:
        self._costs: dict[tuple[object, ...], ExpertCosts] = {}
        self._answers: dict[tuple[int, ...], str] = {}
        # Every token of every layer asks.
        self._of_layer: WeakKeyDictionary[CompressedExperts, ExpertCosts] = WeakKeyDictionary()

    def choose(self, experts: CompressedExperts, tokens: DispatchedTokens) -> str:
        """The fastest mode for these tokens."""
        copies_G: dict[int, int] = {}
        for (g, _), count in zip(experts.places, tokens.counts_L, strict=True):
            if count:
                copies_G[g] = copies_G.get(g, 0) + count
        center_rows = [
            min(copies, len(tokens.x_RH))
            for g, copies in copies_G.items()
            if experts.groups[g].center is not None
        ]
        costs = self.costs(experts)
        # Decoding asks the same again and again.
        question = (id(costs), *sorted(filter(None, tokens.counts_L)), -1, *center_rows)
        if question not in self._answers:
            if len(self._answers) == _MOST_ANSWERS:
                self._answers.clear()
            self._answers[question] = costs.fastest(tokens.counts_L, center_rows)
        return self._answers[question]

    def prepare(self, experts: CompressedExperts) -> None:
        """Measure now what `choose` will need, unless it is known."""
        self.costs(experts)

    def costs(self, experts: CompressedExperts) -> ExpertCosts:
        """Those of a layer: of this process, from the cache, or measured now."""
        if experts in self._of_layer:
            return self._of_layer[experts]
        residual = experts.groups[0].residuals[0]
        density = round(residual.nbytes / (residual.rows * residual.columns), 1)
        kernels = kernels_for(experts.device, experts.dtype).__name__, fingerprint()
        key = (kernels, experts.codec.name, experts.dtype, residual.rows, experts.shape, density)
        if key not in self._costs:
            self._costs[key] = _known_or_measured(key, experts)
        self._of_layer[experts] = self._costs[key]
        return self._costs[key]


def measure(experts: CompressedExperts) -> ExpertCosts:
    """Time experts of this layer, on random tokens.

    What a residual costs, and what a centre, is told from several experts of one centre beside one:
    kernels do both at once, and another way where there is no centre to share.
    """
    dense_bytes = experts.rows * experts.shape.columns * experts.dtype.itemsize
    places = list(islice(experts.places, max(2, _MEASURED_BYTES // dense_bytes)))
    center = experts.groups[places[0][0]].center
    residuals = [experts.groups[g].residuals[i] for g, i in places]
    several, one = (
        CompressedExperts(
            experts.shape,
            [ExpertGroup(list(range(count)), center, residuals[:count], [])],
            experts.activation,
            adds_output_bias=False,
        )
        for count in (len(places), 1)
    )
    evicting = torch.zeros(_EVICTING_BYTES // 4, device=experts.device)
    seconds: dict[str, list[float]] = {field.name: [] for field in fields(ExpertCosts)}
    for count in TOKENS:
        of_several, of_one = (_same_tokens(experts, count, n) for n in (len(places), 1))
        times = [
            _seconds(work, evicting)
            for work in (
                partial(several.run_restored, of_several),
                partial(several.run_tiled, of_several),
                partial(several.run_shared, of_several),
                partial(one.run_shared, of_one),
            )
        ]
        restored, tiled, shared, shared_by_one = times
        if center is None or len(places) == 1:
            # Nothing is shared, or what one expert takes cannot be told apart.
            residual, of_center = shared / len(places), 0.0
        else:
            residual = max(shared - shared_by_one, 0) / (len(places) - 1)
            of_center = max(shared_by_one - residual, 0)
        seconds["restored"].append(restored / len(places))
        seconds["tiled"].append(tiled / len(places))
        seconds["residual"].append(residual)
        seconds["center"].append(of_center)
    return ExpertCosts(**{name: tuple(values) for name, values in seconds.items()})


def _same_tokens(like: CompressedExperts, count: int, num_experts: int) -> DispatchedTokens:
    """`count` random tokens, each of which goes to all of the experts."""
    device = like.device
    return DispatchedTokens(
        x_RH=torch.randn(count, like.shape.hidden, device=device).to(like.dtype),
        row_N=torch.arange(count, device=device).repeat(num_experts),
        weight_N=torch.ones(count * num_experts, device=device),
        counts_L=[count] * num_experts,
    )


def _known_or_measured(key: tuple[object, ...], experts: CompressedExperts) -> ExpertCosts:
    path = _path(key, experts.device)
    try:
        return ExpertCosts(**{name: tuple(v) for name, v in json.loads(path.read_text()).items()})
    except (OSError, ValueError, TypeError, AttributeError):
        costs = measure(experts)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(costs))
    except (OSError, UserError) as error:
        logger.debug("measured costs are not kept: %s", error)
    return costs


def _seconds(work: Callable[[], object], evicting: Tensor) -> float:
    """The least of a few times, with nothing in the caches but `evicting`."""
    times, device = [], evicting.device
    work()
    for _ in range(_REPEATS):
        # Read, not written: what is still to be written back would be part of the time.
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
    text = repr((machine, torch.__version__, _MEASURE, TOKENS, *key))
    return cache_root() / "costs" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def _processor() -> str:
    """The processor's name as Linux has it, or as much as Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
