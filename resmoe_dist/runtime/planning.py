"""The choice of `auto`: the cheapest way to run a layer, by costs measured on this machine.

Legend: L local experts, R received rows (tokens), N routed copies, G centres.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from resmoe_dist.kernels import Backend, LayerWeights
from resmoe_dist.kernels.cpu.build import fingerprint
from resmoe_dist.runtime.execution import (
    MODES,
    Auto,
    Execution,
    Product,
    Restore,
    RestoredExperts,
)
from resmoe_dist.runtime.expert_costs import ExpertCosts, MeasuringEffort, known_or_measured

# Differences smaller than this are noise; `shared` then wins, because it needs the least memory.
_WITHIN_NOISE = 0.95
# Entries of the table of answers. Decoding asks the same few questions.
MAX_ANSWERS = 1024


@dataclass(frozen=True)
class Load:
    """What a layer has to do, as far as sizes on the host tell: copies spread evenly.

    active_experts: how many experts have copies, on average. copies: of each of them. center_rows:
    for each centre, the tokens that need it.
    """

    active_experts: float
    copies: float
    center_rows: tuple[float, ...]

    @classmethod
    def of(cls, layer: LayerWeights, tokens: int, copies: int) -> Load:
        """The load of `copies` copies of `tokens` tokens, each expert equally likely.

        The true counts are on the device. An even spread is what routers are trained for, and costs
        are nearly linear in the counts.
        """
        L = layer.num_experts
        chance = min(1.0, copies / (tokens * L))
        active = L * (1 - (1 - chance) ** tokens)
        experts_G = [layer.center_of.count(g) for g in range(len(layer.centers))]
        rows_G = tuple(min(tokens, copies * experts / L) for experts in experts_G)
        return cls(active, copies / active, rows_G)


def fastest(costs: ExpertCosts, load: Load) -> str:
    """The cheapest way to run a load: "shared", "tiled" or "restore"."""
    active, copies = load.active_experts, load.copies
    centers = sum(costs.seconds("center", rows) for rows in load.center_rows)
    seconds = {
        "shared": active * costs.seconds("residual", copies) + centers,
        "tiled": active * costs.seconds("tiled", copies),
        "restore": active * costs.seconds("restored", copies),
    }
    seconds["shared"] *= _WITHIN_NOISE
    return min(seconds, key=seconds.__getitem__)


def execution_for(mode: str = "auto", cache_bytes: int = 0) -> Execution:
    """The execution called `mode` (one of MODES). cache_bytes: budget of `cached`.

    Raises ValueError for an unknown mode.
    """
    ways: dict[str, Callable[[], Execution]] = {
        "auto": lambda: Auto(MeasuredPlanner()),
        "restore": Restore,
        "shared": lambda: Product(share_center=True),
        "tiled": lambda: Product(share_center=False),
        "cached": lambda: Restore(RestoredExperts(cache_bytes)),
    }
    if mode not in ways:
        raise ValueError(f"execution {mode!r}: choose one of {', '.join(MODES)}")
    return ways[mode]()


class MeasuredPlanner:
    """Chooses by the costs of a layer's shape, measured when the first such layer is prepared."""

    def __init__(
        self, effort: MeasuringEffort | None = None, max_answers: int = MAX_ANSWERS
    ) -> None:
        self._effort = effort or MeasuringEffort()
        self.max_answers = max_answers
        self._costs: dict[tuple[object, ...], ExpertCosts] = {}
        self._costs_of: WeakKeyDictionary[Backend, ExpertCosts] = WeakKeyDictionary()
        self._answers: dict[tuple[object, ...], str] = {}

    def prepare(self, backend: Backend) -> None:
        """Measure now what `choose` needs, unless it is known."""
        self.costs(backend)

    def choose(self, backend: Backend, tokens: int, copies: int) -> str:
        """The fastest way for this many tokens and copies."""
        layer = backend.layer
        costs = self.costs(backend)
        question = (id(costs), layer.center_of, tokens, copies)
        if question not in self._answers:
            if len(self._answers) >= self.max_answers:
                self._answers.clear()
            self._answers[question] = fastest(costs, Load.of(layer, tokens, copies))
        return self._answers[question]

    @property
    def num_answers(self) -> int:
        """Answers that are remembered."""
        return len(self._answers)

    def costs(self, backend: Backend) -> ExpertCosts:
        """The costs of a layer: known in this process, read from the cache, or measured now."""
        if backend in self._costs_of:
            return self._costs_of[backend]
        layer = backend.layer
        residual = layer.residuals[0]
        density = round(residual.nbytes / (residual.rows * residual.columns), 1)
        codecs = residual.name, *(center.name for center in layer.centers[:1])
        key = (backend.name, fingerprint(), codecs, layer.dtype, layer.rows, layer.shape, density)
        if key not in self._costs:
            self._costs[key] = known_or_measured(key, layer, self._effort)
        self._costs_of[backend] = self._costs[key]
        return self._costs[key]
