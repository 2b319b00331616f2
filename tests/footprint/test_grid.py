"""Grids: which exist, which are refused, and what a lane holds."""

from __future__ import annotations

import pytest

from resmoe_dist.footprint.grid import check_grid, footprint, grid_for, grids_up_to
from resmoe_dist.footprint.layout import SettingsLayout
from resmoe_dist.footprint.structure import read_structure
from resmoe_dist.parallel.topology import Grid, lane_positions
from tests.checkpoints.damage import mistake
from tests.compress_settings import compression_settings


@pytest.fixture
def structure(family_folder):
    return read_structure(family_folder("mixtral"), context=6)


def test_grids_have_every_ep_that_divides_and_every_power_of_two(structure):
    found = [(grid.ep, grid.tp, grid.lanes) for grid in grids_up_to(structure, 8)]

    assert found == [
        *((1, tp, 1) for tp in (1, 2, 4, 8)),
        *((2, tp, 2) for tp in (1, 2, 4)),
        *((4, tp, 4) for tp in (1, 2)),
    ]


def test_no_grid_has_more_ranks_than_rows(structure):
    assert max(grid.tp for grid in grids_up_to(structure, 64)) == 16


def test_asked_lanes_hold_where_they_divide_ep(structure):
    assert {(grid.ep, grid.lanes) for grid in grids_up_to(structure, 4, lanes=2)} == {
        (1, 1),
        (2, 2),
        (4, 2),
    }


@pytest.mark.parametrize(
    ("grid", "text"),
    [
        (grid_for(3, 1, 3), "--ep 3: 4 experts do not divide among 3 ranks; choose one of 1, 2, 4"),
        (grid_for(2, 28, 2), "--tp 28: model.layers.0.mlp.experts has 27 rows, fewer than ranks"),
    ],
)
def test_impossible_grids_are_refused(structure, grid, text):
    with mistake(text):
        check_grid(structure, grid)


def test_lanes_that_do_not_divide_a_grid_are_refused():
    with mistake("--lanes 3: a grid with ep 4 and dp 1 has 1 or 2 or 4"):
        grid_for(4, 1, 3)


@pytest.mark.parametrize(("lanes", "sequences"), [(4, 2), (2, 4), (1, 7)])
def test_sequences_are_divided_over_lanes(structure, lanes, sequences):
    settings = compression_settings(groups=4, layers=[0, 1])
    layout = SettingsLayout(structure, settings, fixed_groups=False)

    found = footprint(structure, layout, grid_for(4, 2, lanes), batch_size=7)

    # Lanes of 2, 4 and 8 ranks all divide two heads between two.
    assert found.cache == sequences * structure.cache_bytes // 2
    assert found.total == found.experts.total + found.other + found.cache


@pytest.mark.parametrize(("sequences", "lanes"), [(None, 4), (1, 1), (3, 2), (9, 4)])
def test_a_grid_has_the_lanes_that_the_runtime_builds(structure, sequences, lanes):
    assert grid_for(4, 2, sequences=sequences) == Grid(4, 2, lane_ep=4 // lanes)
    assert lanes == 4 // lane_positions(None, 4, 1, sequences)
    assert grid_for(4, 2, lanes) in grids_up_to(structure, 8, sequences=sequences)
    # Asked lanes that do not divide a grid's EP do not count for that grid.
    assert grid_for(4, 2, lanes) in grids_up_to(structure, 8, lanes=3, sequences=sequences)


def test_groups_follow_the_grid_unless_they_are_fixed(structure):
    settings = compression_settings(groups=1, layers=[0, 1])
    following = SettingsLayout(structure, settings, fixed_groups=False)
    fixed = SettingsLayout(structure, settings, fixed_groups=True)

    assert [len(layer.groups) for layer in following.experts(4).layers] == [4, 4]
    assert [len(layer.groups) for layer in fixed.experts(4).layers] == [1, 1]


def test_a_centre_counts_on_every_rank_of_its_group(structure):
    settings = compression_settings(groups=1, layers=[0, 1])
    layout = SettingsLayout(structure, settings, fixed_groups=True)

    alone = footprint(structure, layout, grid_for(1, 1, 1))
    shared = footprint(structure, layout, grid_for(4, 1, 4))

    assert shared.experts.center == alone.experts.center == 2 * 27 * 60 * 4
    assert 4 * shared.experts.residual == alone.experts.residual


def test_groups_that_do_not_divide_the_experts_are_refused(structure):
    with mistake("--groups 3: model.layers.0.mlp.experts has 4 experts, which do not divide"):
        SettingsLayout(structure, compression_settings(groups=3, layers=[0, 1]), fixed_groups=True)
