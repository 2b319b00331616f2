"""`inspect`, `verify` and `restore`: what they print, their exit codes, and mistakes."""

from __future__ import annotations

import json

import pytest

from tests.checkpoints.damage import (
    bytes_by_tensor,
    copy_of,
    edit_text,
    flip_byte_of,
    names_in,
)
from tests.checkpoints.regrouping import regroup
from tests.cli.commands import GROUP, assert_mistake


def test_inspect_writes_json_that_adds_up(run, pristine, tmp_path):
    assert run("inspect", pristine, "--json", tmp_path / "i.json")[0] == 0

    found = json.loads((tmp_path / "i.json").read_text())
    files = {p.name: sum(bytes_by_tensor(p).values()) for p in pristine.glob("*.safetensors")}
    experts = sum(size for name, size in files.items() if name.startswith("resmoe-"))
    total = found["experts"]
    assert sum(layer["stored_bytes"] for layer in found["layers"]) == experts
    assert total["center_bytes"] + sum(total["residual_bytes"].values()) == experts
    assert found["other_bytes"] + experts == found["total_bytes"] == sum(files.values())


def test_inspect_refuses_a_dense_model(run, family_folder):
    assert_mistake(run("inspect", family_folder("mixtral")), "no resmoe.json here")


def test_inspect_names_a_missing_file(run, pristine, tmp_path):
    folder = copy_of(pristine, tmp_path / "c")
    (folder / GROUP).unlink()
    assert_mistake(run("inspect", folder), f"{folder / GROUP}: this file is missing")


def test_inspect_names_a_json_file_that_cannot_be_written(run, pristine, tmp_path):
    code, _, err = run("inspect", pristine, "--json", tmp_path / "none" / "i.json")
    assert code == 2
    assert err.startswith(f"error: {tmp_path}/none: no such folder; ")


def test_verify_names_every_bad_file_and_exits_1(run, pristine, tmp_path):
    folder = copy_of(pristine, tmp_path / "c")
    second = GROUP.replace("group-000", "group-001")
    flip_byte_of(folder / GROUP, "experts.0.values", 3)
    flip_byte_of(folder / second, "experts.2.bitmap", 3)

    code, out, err = run("verify", folder)

    assert (code, err) == (1, "")
    assert [line.split(":")[0] for line in out.splitlines()] == [GROUP, second]


def test_verify_refuses_a_newer_format(run, pristine, tmp_path):
    folder = copy_of(pristine, tmp_path / "c")
    edit_text(folder / "resmoe.json", '{"format_version": 99}')
    assert_mistake(run("verify", folder), "upgrade resmoe-dist")


def test_restore_refuses_an_existing_folder(run, pristine, tmp_path):
    assert_mistake(run("restore", pristine, tmp_path), f"{tmp_path}: exists already")
    assert names_in(tmp_path) == set()


def test_restore_of_a_damaged_folder_leaves_nothing(run, pristine, tmp_path):
    folder = copy_of(pristine, tmp_path / "c")
    flip_byte_of(folder / GROUP, "experts.1.bitmap", 3)
    assert_mistake(run("restore", folder, tmp_path / "d"), f"{folder / GROUP}: damaged")
    assert names_in(tmp_path) == {"c"}


@pytest.mark.parametrize(
    ("options", "rows", "said"),
    [
        ((), 9, "config.json: intermediate_size is 9 instead of 27"),
        (("--full-rows",), 27, "2 of 2 layers: zero rows are added to experts, from 9 to 27 in"),
    ],
)
def test_restore_says_how_the_model_differs_from_the_source(
    run, pristine, tmp_path, options, rows, said
):
    folder = regroup(pristine, tmp_path / "r", [[0, 1, 2, 3]], kept_rows=range(9))

    code, out, err = run("restore", folder, tmp_path / "d", *options)

    assert (code, err) == (0, "")
    first, second = out.splitlines()
    assert first == f"{tmp_path}/d: dense model written"
    assert second.startswith(said)
    assert json.loads((tmp_path / "d" / "config.json").read_text())["intermediate_size"] == rows
