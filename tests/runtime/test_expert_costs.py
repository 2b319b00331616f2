"""Costs are measured once per machine and shape, and cached."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resmoe_dist.kernels import LayerWeights, backend_for
from resmoe_dist.kernels.cpu.build import load_kernels
from resmoe_dist.runtime import planning
from resmoe_dist.runtime.expert_costs import (
    TOKENS,
    ExpertCosts,
    MeasuringEffort,
    known_or_measured,
    measure,
)
from resmoe_dist.runtime.planning import MeasuredPlanner, execution_for
from tests.runtime.random_layers import (
    CODECS,
    GROUPINGS,
    LONG,
    SHORT,
    make_experts,
    make_layer,
    random_tokens,
)

QUICK = MeasuringEffort(evicting_bytes=4, repeats=1)
COSTS = ExpertCosts(*((float(i + 1),) * len(TOKENS) for i in range(4)))


@pytest.fixture
def measured(tmp_path, monkeypatch) -> list[LayerWeights]:
    """Layers that a planner measured, each giving COSTS. The cache is a folder of the test."""
    load_kernels()  # built in the cache that all tests share
    layers = []

    def known_or_fake(key, layer, effort):
        def fake(layer: LayerWeights, effort: MeasuringEffort) -> ExpertCosts:
            layers.append(layer)
            return COSTS

        return known_or_measured(key, layer, effort, fake)

    monkeypatch.setattr(planning, "known_or_measured", known_or_fake)
    monkeypatch.setenv("RESMOE_CACHE", str(tmp_path / "cache"))
    return layers


def costs_file(tmp_path: Path) -> Path:
    """The one cached file."""
    (path,) = (tmp_path / "cache" / "costs").iterdir()
    return path


def test_costs_are_measured_once_and_cached_for_other_processes(measured):
    backend = backend_for(make_layer())
    planner = MeasuredPlanner()
    for _ in range(2):
        assert planner.costs(backend) == COSTS
        assert planner.costs(backend_for(make_layer())) == COSTS
    assert len(measured) == 1

    # Another planner knows only what is in the cache.
    assert MeasuredPlanner().costs(backend) == COSTS
    assert len(measured) == 1


def test_costs_are_measured_when_a_layer_is_prepared(measured):
    experts = make_experts(execution=execution_for())

    experts.prepare()
    assert len(measured) == 1

    experts(random_tokens(5))
    assert len(measured) == 1


def test_dense_experts_are_not_measured(measured):
    experts = make_experts(codec="dense", execution=execution_for())

    experts.prepare()
    experts(random_tokens(5))

    assert measured == []


OTHERS = {
    "shape": lambda: make_layer(LONG),
    "dtype": lambda: make_layer(dtype=torch.bfloat16),
    "codec": lambda: make_layer(codec=CODECS["low_rank"]),
    "codec of the centre": lambda: make_layer(center_codec=CODECS["low_rank"]),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_layers_have_costs_of_their_own(measured, other):
    planner = MeasuredPlanner()
    planner.costs(backend_for(make_layer()))

    planner.costs(backend_for(OTHERS[other]()))

    assert len(measured) == 2


def test_costs_depend_on_the_number_of_threads(measured):
    before = torch.get_num_threads()
    MeasuredPlanner().costs(backend_for(make_layer()))
    try:
        torch.set_num_threads(before + 1)
        MeasuredPlanner().costs(backend_for(make_layer()))
    finally:
        torch.set_num_threads(before)

    assert len(measured) == 2


WHOLE = {name: [1.0] * len(TOKENS) for name in ("restored", "tiled", "residual", "center")}
DAMAGED = {
    "empty": "",
    "truncated": json.dumps(WHOLE)[:40],
    "not text": b"\xff\xfe\x00",
    "a list": "[1, 2]",
    "a number": "7",
    "an empty object": "{}",
    "a missing name": json.dumps({k: v for k, v in WHOLE.items() if k != "center"}),
    "an unknown name": json.dumps(WHOLE | {"other": WHOLE["center"]}),
    "too few numbers": json.dumps(WHOLE | {"center": [1.0, 2.0]}),
    "strings": json.dumps(WHOLE | {"center": ["a"] * len(TOKENS)}),
    "NaN": json.dumps(WHOLE | {"center": [float("nan")] * len(TOKENS)}),
    "a number instead of a list": json.dumps(WHOLE | {"center": 3.0}),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_cache_file_is_measured_again_and_replaced(measured, tmp_path, damage):
    backend = backend_for(make_layer())
    MeasuredPlanner().costs(backend)
    whole = costs_file(tmp_path).read_text()
    text = DAMAGED[damage]
    costs_file(tmp_path).write_bytes(text if isinstance(text, bytes) else text.encode())

    found = MeasuredPlanner().choose(backend, 5, 15)

    assert found in ("restore", "shared", "tiled")
    assert len(measured) == 2
    assert costs_file(tmp_path).read_text() == whole


def test_a_read_only_cache_is_no_error(measured, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("RESMOE_CACHE", str(tmp_path / "file"))

    assert MeasuredPlanner().costs(backend_for(make_layer())) == COSTS
    assert len(measured) == 1


@pytest.mark.parametrize("codec", ["pruned", "low_rank"])
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_measuring_gives_seconds_for_every_token_count(grouping, codec):
    shape = replace(SHORT, row_bias=True, output_bias=True)
    layer = make_layer(shape, GROUPINGS[grouping], CODECS[codec])
    matrices = [*layer.residuals, *layer.centers]
    before = [tensor.clone() for matrix in matrices for tensor in matrix.buffers()]

    costs = measure(layer, QUICK)

    for seconds in (costs.restored, costs.tiled):
        assert len(seconds) == len(TOKENS)
        assert all(0 < value < 60 for value in seconds)
    # Differences of timings, of which noise may leave zero.
    for pair in zip(costs.residual, costs.center, strict=True):
        assert min(pair) >= 0
        assert 0 < sum(pair) < 60
    if not layer.centers:
        assert costs.center == (0,) * len(TOKENS)
    after = [tensor for matrix in matrices for tensor in matrix.buffers()]
    assert all(map(torch.equal, after, before))
