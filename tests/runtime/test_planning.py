"""`auto`: what each mode costs is measured once and kept, and the cheapest is taken."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resmoe_dist.codecs import DenseResidual, LowRankResidual, PrunedResidual
from resmoe_dist.kernels.cpu.build import load_kernels
from resmoe_dist.parallel.dispatcher import NO_EXPERT
from resmoe_dist.runtime import planning
from resmoe_dist.runtime.execution import Execution
from resmoe_dist.runtime.experts import CompressedExperts
from resmoe_dist.runtime.planning import TOKENS, ExpertCosts, MeasuredPlanner, execution_for
from tests.models import relative_difference
from tests.runtime.random_layers import (
    GROUPINGS,
    HIDDEN,
    LONG,
    MIXED,
    SHORT,
    make_experts,
    naive,
    routed,
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
    ("counts", "centers", "fastest"),
    [
        # shared 0.5 + 6, tiled 1, restore 10
        ([1], [1], "tiled"),
        # shared 8 + 6, tiled 16, restore 40
        ([4, 4, 4, 4], [9], "shared"),
        # shared 8 + 12, tiled 16, restore 40
        ([4, 4, 4, 4], [9, 5], "tiled"),
        # shared 32 + 6, tiled 64, restore 20
        ([60, 4], [60], "restore"),
        # Between two that were measured: shared 1.5 + 1.5 + 6, tiled 6, restore 20
        ([3, 3], [3], "tiled"),
        # shared 9 · 1.5 + 6, tiled 27, restore 90
        ([3] * 9, [27], "shared"),
        # Who gets no tokens costs nothing: as the first.
        ([0, 1, 0, 0, 0], [1], "tiled"),
        # No centre: shared 10.5, tiled 21, restore 20
        ([18, 3], [], "shared"),
    ],
)
def test_the_fastest_mode_is_that_of_the_least_sum(counts, centers, fastest):
    assert COSTS.fastest(counts, centers) == fastest


# Of the cheapest other mode: 0.5 + center for one token, where tiled is 1.
@pytest.mark.parametrize(("center", "fastest"), [(0.54, "shared"), (0.56, "tiled")])
def test_shared_is_taken_where_it_costs_up_to_five_percent_more(center, fastest):
    costs = replace(COSTS, center=constant(center))

    assert costs.fastest([1], [1]) == fastest
    assert costs.fastest([1, 0, 1], [1, 1]) == fastest


def test_costs_above_the_last_measured_ones_are_proportional():
    last = TOKENS[-1]
    restored = (*constant(3.0)[:-1], 10.0)
    tiled = (*constant(0.01)[:-1], 12.0)
    costs = ExpertCosts(restored, tiled, constant(99.0), constant(99.0))

    # 10 + 3 against 12 + 0.01, and with twice the tokens 20 + 3 against 24 + 0.01.
    assert costs.fastest([last, 1], []) == "tiled"
    assert costs.fastest([2 * last, 1], []) == "restore"


class Planned(MeasuredPlanner):
    """A planner that need not measure."""

    def costs(self, experts: CompressedExperts) -> ExpertCosts:
        return COSTS


def test_the_planner_counts_copies_and_the_tokens_of_each_centre(monkeypatch):
    asked = []

    def fastest(self, counts_L: list[int], center_rows: list[int]) -> str:
        asked.append((counts_L, center_rows))
        return "tiled"

    monkeypatch.setattr(ExpertCosts, "fastest", fastest)
    tokens = to_experts(torch.tensor([[0, 3], [0, 3], [3, 4]]), torch.randn(3, HIDDEN))

    assert Planned().choose(make_experts(grouping=MIXED), tokens) == "tiled"

    # Five copies of three tokens in the first group; the second has no centre, the third no copy.
    assert asked == [([2, 0, 0, 3, 1, 0], [3])]


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_the_same_question_has_the_same_answer_in_whichever_order_it_is_asked(grouping):
    planner, experts = Planned(), make_experts(grouping=GROUPINGS[grouping])
    one = experts.groups[0].experts
    for counts in ([1], [4] * len(one), [3, 1], [60, 1], [9] * len(one)):
        counts = counts[: len(one)]
        x_TH = torch.randn(max(counts), HIDDEN)
        answers = []
        for order in (counts, counts, counts[::-1]):
            index_TK = torch.full((len(x_TH), len(order)), NO_EXPERT)
            for k, (expert, count) in enumerate(zip(one, order, strict=False)):
                index_TK[:count, k] = expert
            answers.append(planner.choose(experts, to_experts(index_TK, x_TH)))

        centers = [min(sum(counts), len(x_TH))] if experts.groups[0].center is not None else []
        assert answers == [COSTS.fastest(counts, centers)] * 3


def test_layers_of_other_costs_have_their_own_answers(monkeypatch):
    small, large = make_experts(), make_experts(LONG)
    dear = replace(COSTS, tiled=per_token(99.0))
    planner = MeasuredPlanner()
    monkeypatch.setattr(planner, "costs", lambda experts: COSTS if experts is small else dear)
    tokens = to_experts(torch.tensor([[0]]), torch.randn(1, HIDDEN))

    for _ in range(2):
        assert planner.choose(small, tokens) == "tiled"
        assert planner.choose(large, tokens) == "shared"


def test_no_more_answers_are_kept_than_there_is_room_for(monkeypatch):
    monkeypatch.setattr(planning, "_MOST_ANSWERS", 3)
    planner, experts = Planned(), make_experts()
    for count in (*range(1, 9), *range(1, 9)):
        tokens = to_experts(torch.tensor([[0]]).expand(count, 1), torch.randn(count, HIDDEN))

        assert planner.choose(experts, tokens) == COSTS.fastest([count], [count])
        assert len(planner._answers) <= 3


def test_auto_runs_what_the_planner_chooses(monkeypatch):
    ran = []
    for name in ("run_restored", "run_shared", "run_tiled"):
        original = getattr(CompressedExperts, name)

        def run(self, tokens, name=name, original=original) -> torch.Tensor:
            ran.append(name)
            return original(self, tokens)

        monkeypatch.setattr(CompressedExperts, name, run)
    experts = make_experts(execution=Execution("auto", planner=Planned()))
    for count, top_k in ((1, 1), (4, 4), (60, 1)):
        index_TK = torch.arange(top_k).expand(count, top_k)
        tokens = to_experts(index_TK, torch.randn(count, HIDDEN))
        found = experts(tokens)
        assert relative_difference(found.double(), naive(experts, tokens)) <= 1e-5

    assert ran == ["run_tiled", "run_shared", "run_restored"]


@pytest.fixture
def measured(monkeypatch, tmp_path) -> list[CompressedExperts]:
    """Layers that were measured, each as COSTS; the cache is a folder of this test."""
    load_kernels()  # from the cache that all tests have
    layers = []

    def measure(experts: CompressedExperts) -> ExpertCosts:
        layers.append(experts)
        return COSTS

    monkeypatch.setattr(planning, "measure", measure)
    monkeypatch.setenv("RESMOE_CACHE", str(tmp_path / "cache"))
    return layers


def costs_file(tmp_path: Path) -> Path:
    """The one that was written."""
    (path,) = (tmp_path / "cache" / "costs").iterdir()
    return path


def test_costs_are_measured_once_and_kept_for_other_processes(measured):
    experts = make_experts()
    planner = MeasuredPlanner()
    for _ in range(2):
        assert planner.costs(experts) == COSTS
        assert planner.costs(make_experts()) == COSTS
    assert len(measured) == 1

    # Another one knows nothing but what is in the cache.
    assert MeasuredPlanner().costs(experts) == COSTS
    assert len(measured) == 1


def test_costs_are_measured_when_a_layer_is_prepared(measured):
    execution = execution_for()
    experts = make_experts(execution=execution)

    execution.prepare(experts)
    assert len(measured) == 1

    experts(routed(5))
    assert len(measured) == 1


def test_what_is_stored_whole_is_not_measured(measured):
    execution = execution_for()
    experts = make_experts(codec=DenseResidual, execution=execution)

    execution.prepare(experts)
    experts(routed(5))

    assert measured == []


OTHERS = {
    "shape": lambda: make_experts(LONG),
    "dtype": lambda: make_experts(dtype=torch.bfloat16),
    "codec": lambda: make_experts(codec=LowRankResidual),
}


@pytest.mark.parametrize("other", OTHERS)
def test_costs_of_another_layer_are_its_own(measured, other):
    planner = MeasuredPlanner()
    planner.costs(make_experts())

    planner.costs(OTHERS[other]())

    assert len(measured) == 2


def test_costs_of_another_number_of_threads_are_their_own(measured):
    before = torch.get_num_threads()
    MeasuredPlanner().costs(make_experts())
    try:
        torch.set_num_threads(before + 1)
        MeasuredPlanner().costs(make_experts())
    finally:
        torch.set_num_threads(before)

    assert len(measured) == 2


WHOLE = {name: list(constant(1.0)) for name in ("restored", "tiled", "residual", "center")}
DAMAGED = {
    "nothing": "",
    "half": json.dumps(WHOLE)[:40],
    "no text": b"\xff\xfe\x00",
    "a list": "[1, 2]",
    "a number": "7",
    "no costs": "{}",
    "a name less": json.dumps({k: v for k, v in WHOLE.items() if k != "center"}),
    "a name more": json.dumps(WHOLE | {"other": WHOLE["center"]}),
    "too few numbers": json.dumps(WHOLE | {"center": [1.0, 2.0]}),
    "no numbers": json.dumps(WHOLE | {"center": ["a"] * len(TOKENS)}),
    "not a number": json.dumps(WHOLE | {"center": [float("nan")] * len(TOKENS)}),
    "no list": json.dumps(WHOLE | {"center": 3.0}),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_of_costs_is_measured_anew_and_replaced(measured, tmp_path, damage):
    experts = make_experts()
    MeasuredPlanner().costs(experts)
    whole = costs_file(tmp_path).read_text()
    text = DAMAGED[damage]
    costs_file(tmp_path).write_bytes(text if isinstance(text, bytes) else text.encode())

    found = MeasuredPlanner().choose(experts, routed(5))

    assert found in ("restore", "shared", "tiled")
    assert len(measured) == 2
    assert costs_file(tmp_path).read_text() == whole


def test_a_cache_that_cannot_be_written_is_no_error(measured, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("RESMOE_CACHE", str(tmp_path / "file"))

    assert MeasuredPlanner().costs(make_experts()) == COSTS
    assert len(measured) == 1


@pytest.mark.parametrize("codec", [PrunedResidual, LowRankResidual])
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_measuring_gives_seconds_for_every_number_of_tokens(monkeypatch, grouping, codec):
    monkeypatch.setattr(planning, "_EVICTING_BYTES", 1)
    monkeypatch.setattr(planning, "_REPEATS", 1)
    experts = make_experts(
        replace(SHORT, row_bias=True, output_bias=True), GROUPINGS[grouping], codec
    )
    before = [tensor.clone() for tensor in experts.buffers()]

    costs = planning.measure(experts)

    for seconds in (costs.restored, costs.tiled):
        assert len(seconds) == len(TOKENS)
        assert all(0 < value < 60 for value in seconds)
    # Differences, of which noise may leave nothing.
    for seconds in zip(costs.residual, costs.center, strict=True):
        assert min(seconds) >= 0
        assert 0 < sum(seconds) < 60
    if all(group.center is None for group in experts.groups):
        assert costs.center == (0,) * len(TOKENS)
    for tensor, old in zip(experts.buffers(), before, strict=True):
        assert torch.equal(tensor, old)
