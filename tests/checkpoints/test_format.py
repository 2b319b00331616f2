"""The index: what is refused, and older versions.

Version-2 folders are written by a converter that does not use the program's upgrade.
"""

from __future__ import annotations

import pytest
import torch

import tests.codecs.rounded_codec  # noqa: F401  (registers codec `rounded`)
from resmoe_dist import load_model
from resmoe_dist.checkpoints.compressed import CompressedCheckpoint
from resmoe_dist.checkpoints.format import read_index
from resmoe_dist.checkpoints.restore import restore_checkpoint
from resmoe_dist.evaluation.report import describe, layer_table
from tests.checkpoints.damage import copy_of, edit_json, edit_text, mistake
from tests.checkpoints.old_versions import as_version_1, as_version_2
from tests.checkpoints.regrouping import regroup
from tests.models import compress, logits_of


def test_folder_without_an_index_is_refused(tmp_path):
    with mistake(f"{tmp_path}: no resmoe.json here; give a folder made by resmoe-dist compress"):
        read_index(tmp_path)


def test_newer_format_version_is_refused(folder):
    # This program need not understand the rest of a newer index.
    edit_text(folder / "resmoe.json", '{"format_version": 5, "tiles": []}')
    with mistake(r"resmoe.json: format version 5 is newer than this program reads \(4\); upgrade"):
        read_index(folder)


OLD_CASES = [
    ("mixtral", {"groups": 2}),
    ("mixtral", {"groups": 2, "center": "none"}),
    ("mixtral", {"center": "auto", "groups": 4}),
    ("mixtral", {"codec": "low_rank", "layers": [1]}),
    ("gpt_oss", {"dtype": "bfloat16", "target_bytes": 0.9}),
]


@pytest.mark.parametrize(("family", "options"), OLD_CASES)
def test_version_2_is_read_as_the_same_checkpoint(family_folder, tmp_path, family, options):
    compress(family_folder(family), tmp_path / "new", **options)
    as_version_2(copy_of(tmp_path / "new", tmp_path / "old"))
    new, old = (CompressedCheckpoint(tmp_path / name) for name in ("new", "old"))

    assert old.faults() == []
    assert old.index.format_version == 2
    assert old.index.settings == new.index.settings
    for mine, theirs in zip(old.index.layers, new.index.layers, strict=True):
        assert mine.model_copy(update={"groups": []}) == theirs.model_copy(update={"groups": []})
    assert layer_table(describe(old)) == layer_table(describe(new))
    for name in ("new", "old"):
        restore_checkpoint(tmp_path / name, tmp_path / f"{name}-dense")
    for file in (tmp_path / "new-dense").iterdir():
        assert (tmp_path / "old-dense" / file.name).read_bytes() == file.read_bytes()


def test_version_2_serves_the_same_logits(folder):
    expected = logits_of(load_model(folder))

    assert torch.equal(logits_of(load_model(as_version_2(folder))), expected)


def test_version_1_serves_the_same_logits(folder):
    expected = logits_of(load_model(folder))
    as_version_1(as_version_2(folder))

    assert torch.equal(logits_of(load_model(folder)), expected)
    assert CompressedCheckpoint(folder).faults() == []
    settings = read_index(folder).settings
    assert (settings.groups_per_rank, settings.target_bytes, settings.calibration) == (
        1,
        None,
        None,
    )
    assert settings.method.options["allocate"] == "group"
    assert settings.method.options["solver"] == "scipy"


def test_version_1_had_a_budget_per_expert_unless_the_centre_was_joint(family_folder, tmp_path):
    compress(family_folder("mixtral"), tmp_path / "c", center="barycenter", allocate="group")
    as_version_1(as_version_2(tmp_path / "c"))

    assert read_index(tmp_path / "c").settings.method.options["allocate"] == "expert"


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.pop("settings"),
        lambda index: index["settings"].pop("codec"),
        lambda index: index["settings"].update(codec="zip"),
        lambda index: index["settings"].update(surprise=1),
        lambda index: index["layers"][0].pop("codec"),
        lambda index: index["layers"][0].update(groups=None),
        lambda index: index["layers"][0]["groups"][0].pop("value_bytes"),
        lambda index: index.update(layers=[1]),
    ],
)
def test_damaged_index_of_version_2_is_refused(folder, change):
    edit_json(as_version_2(folder) / "resmoe.json", change)
    with mistake(r"resmoe.json: damaged \("):
        read_index(folder)


@pytest.mark.parametrize(
    "text",
    [
        *("{cut", "", "[]", "{}", "7", "\xff", "[" * 100_000, "9" * 5000),
        *('{"format_version": "1"}', '{"format_version": true}', '{"format_version": -1}'),
    ],
)
def test_file_that_is_not_an_index_is_refused(folder, text):
    (folder / "resmoe.json").write_bytes(text.encode("latin-1"))
    with mistake(r"resmoe.json: (damaged \(|not a readable JSON file)"):
        read_index(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.update(layers=[]),
        lambda index: index["layers"].append(index["layers"][0]),
        lambda index: index["settings"].update(layers=[2]),
        lambda index: index["layers"][0].update(num_experts=10**12),
        lambda index: index["layers"][0].update(rows=0),
        lambda index: index["layers"][0].update(hidden="20"),
        lambda index: index["layers"][0]["groups"][0].update(source_bytes=0),
        lambda index: index["layers"][0]["groups"][0].update(squared_norms=[float("nan")] * 2),
        lambda index: index["layers"][0]["groups"][0].update(squared_errors=[]),
        lambda index: index["layers"][0]["groups"][0].update(objective=float("inf")),
    ],
)
def test_index_with_impossible_numbers_is_refused(folder, change):
    edit_json(folder / "resmoe.json", change)
    with mistake(r"resmoe.json: damaged \("):
        read_index(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.pop("layers"),
        lambda index: index["layers"][0].pop("rows"),
        lambda index: index["layers"][0].update(rows="many"),
        lambda index: index["layers"][0].update(residual_codec="zip"),
        lambda index: index["layers"][0]["groups"].pop(),
        lambda index: index["layers"][0]["groups"][0].update(experts=[0, 0]),
        lambda index: index["layers"][0]["storage"].update(surprise=1),
        lambda index: index["settings"]["residual_codec"].update(name="zip"),
        lambda index: index["settings"]["residual_codec"]["options"].update(keep=2),
        lambda index: index["layers"][0].update(center_codec="zip"),
        lambda index: index["layers"][0].update(center_codec=None),
        lambda index: index["layers"][0]["groups"][0]["residual_bytes"].update(surprise=1),
    ],
)
def test_index_with_missing_or_contradictory_fields_is_refused(folder, change):
    edit_json(folder / "resmoe.json", change)
    with mistake(r"resmoe.json: damaged \("):
        read_index(folder)


@pytest.mark.parametrize(
    ("groups", "reason"),
    [
        ([[0, 1], [1, 2, 3]], "each expert once"),
        ([[0, 1], [2, 2, 3]], "each expert once"),
        ([[0, 1], [3]], "each expert once"),
        ([[0, 1], [2, 3, 4]], "each expert once"),
        ([[-1, 0, 1], [2, 3]], "each expert once"),
        ([[1, 0], [2, 3]], "do not ascend"),
        ([[0, 1, 2, 3], []], "do not ascend"),
    ],
)
def test_groups_that_do_not_partition_the_experts_are_refused(folder, groups, reason):
    def change(index):
        layer = index["layers"][1]
        layer["groups"] = [
            group | {"experts": experts}
            for group, experts in zip(layer["groups"], groups, strict=True)
        ]

    edit_json(folder / "resmoe.json", change)
    with mistake(rf"resmoe.json: damaged \(.*layers.1.*{reason}"):
        read_index(folder)


def test_groups_may_be_any_partition_of_the_experts(pristine, tmp_path):
    regroup(pristine, tmp_path / "r", [[3], [0, 2], [1]])

    assert [group.experts for group in read_index(tmp_path / "r").layers[1].groups] == [
        [3],
        [0, 2],
        [1],
    ]
    assert CompressedCheckpoint(tmp_path / "r").faults() == []


@pytest.mark.parametrize(
    ("where", "name"),
    [
        (where, name)
        for name in ["../c/config.json", "/etc/passwd", "..", ".", "", "a\\b", ".hidden", "a\n"]
        for where in ("group", "other")
    ]
    + [("group", "a/b"), ("other", "a/../../b"), ("other", "a//b")],
)
def test_file_name_that_is_not_plain_is_refused(folder, name, where):
    def change(index):
        files = index["other_files"]
        entry = files[0] if where == "other" else index["layers"][1]["groups"][1]["file"]
        entry["file"] = name

    edit_json(folder / "resmoe.json", change)
    with mistake(r"resmoe.json: damaged \(.*not a plain file name"):
        read_index(folder)


@pytest.mark.parametrize(
    ("expert_map", "reason"),
    [
        ([0, 1, 1], "3 entries for 4 experts"),
        ([0, 1, 1, 3], "skips a stored expert"),
        ([-1, -1, 1, 0], "each expert once"),
        ([0, 1, 1, -2], "greater than or equal to -1"),
    ],
)
def test_expert_map_that_does_not_fit_the_groups_is_refused(pristine, tmp_path, expert_map, reason):
    folder = regroup(pristine, tmp_path / "r", [[0, 1], [2]], expert_map=[0, 1, 1, 2])
    edit_json(
        folder / "resmoe.json", lambda index: index["layers"][1].update(expert_map=expert_map)
    )
    with mistake(rf"resmoe.json: damaged \(.*{reason}"):
        read_index(folder)


def test_expert_map_numbers_the_stored_experts(pristine, tmp_path):
    regroup(pristine, tmp_path / "r", [[1], [0]], expert_map=[0, -1, 1, 0])

    layer = read_index(tmp_path / "r").layers[0]
    assert (layer.num_experts, layer.stored_experts) == (4, 2)
    assert [layer.stored_expert(k) for k in range(4)] == [0, -1, 1, 0]
    assert CompressedCheckpoint(tmp_path / "r").faults() == []
