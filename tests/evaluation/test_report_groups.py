"""What `inspect` says of groups: which have a centre, and figures that not all of them have."""

from __future__ import annotations

import pytest

from resmoe_dist.checkpoints.compressed import CompressedCheckpoint
from resmoe_dist.evaluation.report import describe, layer_table
from tests.checkpoints.damage import copy_of, edit_json
from tests.checkpoints.regrouping import regroup
from tests.models import compress


@pytest.fixture(scope="module")
def regrouped(family_folder, tmp_path_factory):
    """Two layers of three groups: [0, 3] and [1] with a centre, [2] without."""
    folder = tmp_path_factory.mktemp("regrouped")
    compress(family_folder("mixtral"), folder / "c")
    return regroup(folder / "c", folder / "r", [[0, 3], [2], [1]], centerless=[1])


def _described(folder):
    return describe(CompressedCheckpoint(folder))


def test_groups_without_a_centre_are_counted(regrouped):
    found = _described(regrouped)

    assert [layer["groups"] for layer in found["layers"]] == [3, 3]
    assert [layer["groups_without_center"] for layer in found["layers"]] == [1, 1]
    assert found["experts"]["groups_without_center"] == 2
    assert found["experts"]["center_bytes"] == 2 * 2 * 27 * 60 * 4  # layers, centres, I, D, bytes
    assert "\nno centre in 2 of 6 groups: there it would not pay" in layer_table(found)


def test_missing_centres_are_explained_by_the_settings_that_ask_for_none(family_folder, tmp_path):
    compress(family_folder("mixtral"), tmp_path / "c", groups=2, center="none")

    table = layer_table(_described(tmp_path / "c"))
    assert "no centre in 4 of 4 groups: as the settings ask" in table
    assert "would not pay" not in table


def test_groups_without_a_centre_do_not_count_dense_layers(family_folder, tmp_path):
    compress(family_folder("mixtral"), tmp_path / "c", layers=[1])
    found = _described(tmp_path / "c")

    assert found["experts"]["groups_without_center"] == 0
    assert "no centre" not in layer_table(found)


def _set_per_group(folder, **values):
    """Values of new fields for each group in turn; each layer gets the same."""

    def change(index):
        for layer in index["layers"]:
            for i, group in enumerate(layer["groups"]):
                group.update({key: per_group[i] for key, per_group in values.items()})

    edit_json(folder / "resmoe.json", change)


def _columns(table):
    return table.splitlines()[0].split()


def test_kept_share_counts_each_group_by_its_experts(regrouped, tmp_path):
    folder = copy_of(regrouped, tmp_path / "r")
    _set_per_group(folder, keep=[0.5, 0.1, 0.3])
    found = _described(folder)

    kept = pytest.approx((2 * 0.5 + 0.1 + 0.3) / 4)
    assert [layer["keep"] for layer in found["layers"]] == [kept, kept]
    assert found["experts"]["keep"] == kept
    assert "keep" in _columns(layer_table(found))
    assert all("  0.350  " in line for line in layer_table(found).splitlines()[2:5])


def test_weighted_error_is_taken_over_all_experts(regrouped, tmp_path):
    folder = copy_of(regrouped, tmp_path / "r")
    _set_per_group(
        folder,
        weighted_squared_errors=[[1.0, 2.0], [0.0], [3.0]],
        weighted_squared_norms=[[10.0, 10.0], [5.0], [23.0]],
    )
    found = _described(folder)

    for part in (*found["layers"], found["experts"]):
        assert part["weighted_relative_error"] == pytest.approx(6 / 48)
    assert "weighted" in _columns(layer_table(found))
    assert all("  0.1250  " in line for line in layer_table(found).splitlines()[2:5])


def test_empty_columns_are_left_out(regrouped):
    found = _described(regrouped)

    for part in (*found["layers"], found["experts"]):
        assert part["keep"] is None
        assert part["weighted_relative_error"] is None
    assert not {"keep", "weighted"} & set(_columns(layer_table(found)))


def test_layer_value_is_missing_if_one_group_lacks_it(regrouped, tmp_path):
    folder = copy_of(regrouped, tmp_path / "r")
    _set_per_group(
        folder,
        keep=[0.5, None, 0.5],
        weighted_squared_errors=[[1.0, 1.0], None, [1.0]],
        weighted_squared_norms=[[2.0, 2.0], [2.0], [2.0]],
    )
    found = _described(folder)

    assert [layer["keep"] for layer in found["layers"]] == [None, None]
    assert found["experts"]["weighted_relative_error"] is None


def test_totals_of_compressed_layers_leave_dense_layers_out(family_folder, tmp_path):
    compress(family_folder("mixtral"), tmp_path / "c", layers=[1])

    def change(index):
        (group,) = index["layers"][1]["groups"]
        group.update(keep=0.25, weighted_squared_errors=[1.0] * 4, weighted_squared_norms=[4.0] * 4)

    edit_json(tmp_path / "c" / "resmoe.json", change)
    found = _described(tmp_path / "c")

    assert found["experts"]["keep"] == 0.25
    assert found["experts"]["weighted_relative_error"] == 0.25
