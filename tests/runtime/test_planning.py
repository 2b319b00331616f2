"""`auto`: the cheapest way is chosen from measured costs and sizes known on the host."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from resmoe_dist.kernels import Backend, backend_for
from resmoe_dist.routing import RoutedTokens
from resmoe_dist.runtime.execution import Auto, Execution
from resmoe_dist.runtime.expert_costs import TOKENS, ExpertCosts
from resmoe_dist.runtime.planning import Load, MeasuredPlanner, fastest
from tests.models import relative_difference
from tests.runtime.random_layers import (
    EXPERTS,
    HIDDEN,
    LONG,
    MIXED,
    NONE,
    ONE,
    make_experts,
    make_layer,
    naive,
    to_experts,
)


def constant(seconds: float) -> tuple[float, ...]:
    return (seconds,) * len(TOKENS)


def per_token(seconds: float) -> tuple[float, ...]:
    return tuple(seconds * tokens for tokens in TOKENS)


COSTS = ExpertCosts(
    restored=constant(10.0), tiled=per_token(1.0), residual=per_token(0.5), center=constant(6.0)
)


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        # shared 0.5 + 6, tiled 1, restore 10
        (Load(1, 1, (1,)), "tiled"),
        # shared 8 + 6, tiled 16, restore 40
        (Load(4, 4, (9,)), "shared"),
        # shared 8 + 12, tiled 16, restore 40
        (Load(4, 4, (9, 5)), "tiled"),
        # shared 32 + 6, tiled 64, restore 20
        (Load(2, 32, (60,)), "restore"),
        # Between measured token counts: shared 3 + 6, tiled 6, restore 20
        (Load(2, 3, (3,)), "tiled"),
        # shared 9 · 1.5 + 6, tiled 27, restore 90
        (Load(9, 3, (27,)), "shared"),
        # No centre: shared 10.5, tiled 21, restore 20
        (Load(2, 10.5, ()), "shared"),
        # A centre that one in ten calls needs: shared 0.5 + 0.6 · 2, tiled 1
        (Load(1, 1, (0.05, 0.05)), "tiled"),
        (Load(4, 1, (0.1, 0.1)), "shared"),
    ],
)
def test_the_cheapest_way_wins(load, expected):
    assert fastest(COSTS, load) == expected


# The cheapest other way is tiled at 1; shared costs 0.5 + center.
@pytest.mark.parametrize(("center", "expected"), [(0.54, "shared"), (0.56, "tiled")])
def test_shared_wins_up_to_five_percent(center, expected):
    costs = replace(COSTS, center=constant(center))

    assert fastest(costs, Load(1, 1, (1,))) == expected
    assert fastest(costs, Load(2, 1, (1, 1))) == expected


def test_costs_above_the_last_measured_are_proportional():
    last = TOKENS[-1]

    assert COSTS.seconds("restored", last) == 10
    assert COSTS.seconds("restored", 2 * last) == 20
    assert COSTS.seconds("tiled", 3 * last) == pytest.approx(3 * last)


def test_costs_below_one_token_are_the_chance_of_one():
    assert COSTS.seconds("center", 0.25) == pytest.approx(1.5)
    assert COSTS.seconds("center", 0) == 0


@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (1, 3), (4, 2), (50, 3), (400, 1)])
def test_the_load_is_the_mean_over_random_routing(tokens, top_k):
    layer = make_layer(grouping=MIXED)
    active, centers = [], []
    for _ in range(200):
        index_TK = torch.rand(tokens, EXPERTS).topk(top_k).indices
        routed = to_experts(index_TK, torch.zeros(tokens, HIDDEN))
        active.append(int((routed.offsets_L.diff() > 0).sum()))
        centers.append(int(routed.offsets_L.diff()[[0, 3]].sum()))

    load = Load.of(layer, tokens, tokens * top_k)

    assert load.active_experts == pytest.approx(sum(active) / 200, rel=0.1)
    assert load.active_experts * load.copies == pytest.approx(tokens * top_k)
    # Copies for the first centre's experts, each of a different token at most.
    assert load.center_rows[0] == pytest.approx(min(tokens, sum(centers) / 200), rel=0.25)
    assert len(load.center_rows) == 2


def test_a_layer_without_centres_has_no_center_rows():
    assert Load.of(make_layer(grouping=NONE), 5, 10).center_rows == ()


class Planned(MeasuredPlanner):
    """A planner with given costs."""

    def __init__(self, *costs: tuple[Backend, ExpertCosts]) -> None:
        super().__init__()
        self.given = costs

    def costs(self, backend: Backend) -> ExpertCosts:
        return next((costs for known, costs in self.given if known is backend), COSTS)


def test_the_planner_answers_from_the_layers_load():
    backend, planner = backend_for(make_layer(grouping=ONE)), Planned()
    for tokens, copies in [(1, 1), (4, 16), (60, 60), (4, 16), (1, 1), (400, 1200)]:
        expected = fastest(COSTS, Load.of(backend.layer, tokens, copies))

        assert planner.choose(backend, tokens, copies) == expected


def test_layers_with_other_costs_have_other_answers():
    small, large = backend_for(make_layer()), backend_for(make_layer(LONG))
    planner = Planned((large, replace(COSTS, tiled=per_token(99.0))))

    for _ in range(2):
        assert planner.choose(small, 1, 1) == "tiled"
        assert planner.choose(large, 1, 1) == "shared"


def test_the_table_of_answers_is_bounded():
    planner, backend = Planned(), backend_for(make_layer())
    planner.max_answers = 3
    for tokens in (*range(1, 9), *range(1, 9)):
        expected = fastest(COSTS, Load.of(backend.layer, tokens, tokens))

        assert planner.choose(backend, tokens, tokens) == expected
        assert planner.num_answers <= 3


class Recorded(Execution):
    """Records that it ran."""

    def __init__(self, name: str, way: Execution, ran: list[str]) -> None:
        self.name, self.way, self.ran = name, way, ran

    def run(self, routed: RoutedTokens, backend: Backend) -> Tensor:
        self.ran.append(self.name)
        return self.way.run(routed, backend)


def test_auto_runs_what_the_planner_chooses():
    planner, ran = Planned(), []
    auto = Auto(planner)
    auto.ways = {name: Recorded(name, way, ran) for name, way in auto.ways.items()}
    experts = make_experts(execution=auto)
    expected = []
    for count, top_k in ((1, 1), (4, 4), (60, 1)):
        index_TK = torch.arange(top_k).expand(count, top_k)
        routed = to_experts(index_TK, torch.randn(count, HIDDEN))
        expected.append(planner.choose(experts.backend, count, count * top_k))

        found = experts(routed)

        assert relative_difference(found.double(), naive(experts, routed)) <= 1e-5
    assert ran == expected
    assert len(set(ran)) > 1
