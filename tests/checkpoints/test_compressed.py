"""A damaged compressed checkpoint: the reader says which file, `faults` names every one."""

from __future__ import annotations

import hashlib
import json
import re

import pytest
import torch

from resmoe_dist import load_model
from resmoe_dist.checkpoints.compressed import CompressedCheckpoint
from resmoe_dist.checkpoints.restore import restored_expert
from resmoe_dist.evaluation.report import describe
from tests.checkpoints.damage import (
    edit_json,
    edit_tensors,
    flip_byte,
    flip_byte_of,
    header_of,
    mistake,
    names_in,
    truncate,
)
from tests.checkpoints.regrouping import regroup
from tests.models import compress

GROUP = "resmoe-00002-of-00002-group-001.safetensors"  # experts 2 and 3 of the second layer


def _read_group(folder):
    """The restored experts of GROUP, read as loading reads them."""
    checkpoint = CompressedCheckpoint(folder)
    layer = checkpoint.index.layers[1]
    file = checkpoint.open_group(layer, layer.groups[1])
    return [restored_expert(file, k)[0] for k in layer.groups[1].experts]


@pytest.mark.parametrize(("stored", "said"), [(True, False), (False, True)])
def test_centre_that_only_the_file_or_only_the_index_has_is_noticed(
    pristine, tmp_path, stored, said
):
    folder = regroup(pristine, tmp_path / "r", [[0, 1], [2, 3]], centerless=[] if stored else [1])

    def change(index):
        groups = index["layers"][1]["groups"]
        groups[1]["center_bytes"] = groups[0]["center_bytes"] if said else 0

    edit_json(folder / "resmoe.json", change)
    with mistake(f"{folder / GROUP}: (damaged|tensor 'center.weight' is missing)"):
        load_model(folder)
    of_index, fault = CompressedCheckpoint(folder).faults()
    assert of_index == "resmoe.json: differs from its digest"
    assert fault.startswith(GROUP)


def _describe(folder):
    """What `inspect` shows."""
    return describe(CompressedCheckpoint(folder))


@pytest.mark.parametrize("read", [_read_group, load_model, _describe])
def test_missing_group_file_is_named(folder, read):
    (folder / GROUP).unlink()
    with mistake(f"{folder / GROUP}: this file is missing"):
        read(folder)


@pytest.mark.parametrize("read", [_read_group, load_model, _describe])
@pytest.mark.parametrize("size", [0, 5, 200, 4000, -1])
def test_truncated_group_file_is_named(folder, read, size):
    truncate(folder / GROUP, size % (folder / GROUP).stat().st_size)
    with mistake(f"{folder / GROUP}: "):
        read(folder)


def test_group_file_with_something_appended_is_named(folder):
    (folder / GROUP).write_bytes((folder / GROUP).read_bytes() + b"\0")
    with mistake(f"{folder / GROUP}: "):
        _read_group(folder)


@pytest.mark.parametrize("tensor", ["experts.2.bitmap", "experts.3.row_offsets"])
def test_flipped_index_byte_is_named_when_the_model_is_loaded(folder, tensor):
    flip_byte_of(folder / GROUP, tensor, offset=8)
    with mistake(f"{folder / GROUP}: damaged .*expert {tensor[8]}: .*bitmap"):
        load_model(folder)


def test_every_flipped_byte_of_an_index_tensor_is_noticed(folder):
    header, _ = header_of(folder / GROUP)
    intact = (folder / GROUP).read_bytes()
    for tensor in ("experts.3.bitmap", "experts.3.row_offsets"):
        begin, end = header[tensor]["data_offsets"]
        for offset in range(end - begin):
            flip_byte_of(folder / GROUP, tensor, offset)
            with mistake(f"{folder / GROUP}: "):
                _read_group(folder)
            (folder / GROUP).write_bytes(intact)


def test_no_flipped_byte_of_the_header_changes_what_is_read_unnoticed(folder):
    _, data = header_of(folder / GROUP)
    intact, expected = (folder / GROUP).read_bytes(), _read_group(folder)
    noticed = 0
    for offset in range(data):
        flip_byte(folder / GROUP, offset)
        try:
            found = _read_group(folder)
        except Exception as error:
            assert type(error).__name__ == "UserError", f"byte {offset}: {error!r}"
            assert GROUP in str(error)
            noticed += 1
        else:
            # The record that `compress` keeps in the header for itself is not read here.
            assert all(map(torch.equal, found, expected)), f"byte {offset}"
        (folder / GROUP).write_bytes(intact)
    assert noticed > data // 3


@pytest.mark.parametrize("tensor", ["center.weight", "experts.2.values"])
def test_values_of_another_dtype_than_the_index_says_are_noticed(folder, tensor):
    raw = (folder / GROUP).read_bytes()
    before = f'"{tensor}":{{"dtype":"F32"'.encode()
    assert raw.count(before) == 1
    (folder / GROUP).write_bytes(raw.replace(before, before.replace(b"F32", b"I32")))
    with mistake(f"{folder / GROUP}: damaged .*{tensor}.* is stored as int32, not float32"):
        load_model(folder)


@pytest.mark.parametrize(("tensor", "stored_as"), [("bitmap", "I8"), ("row_offsets", "F32")])
def test_dtypes_that_the_codec_does_not_declare_are_noticed(folder, tensor, stored_as):
    raw = (folder / GROUP).read_bytes()
    before = re.search(rf'"experts.2.{tensor}":{{"dtype":"(\w+)"'.encode(), raw)[0]
    after = before.rpartition(b':"')[0] + f':"{stored_as}"'.encode()
    assert len(after) == len(before)
    (folder / GROUP).write_bytes(raw.replace(before, after))
    with mistake(f"{folder / GROUP}: damaged .*experts.2.{tensor}.* is stored as"):
        load_model(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda sizes: sizes.update(values=sizes["values"] + 1, indices=sizes["indices"] - 1),
        lambda sizes: sizes.update(scales=sizes.pop("indices")),
        lambda sizes: sizes.clear(),
    ],
)
def test_bytes_of_a_kind_that_differ_from_the_index_are_noticed(folder, change):
    edit_json(
        folder / "resmoe.json",
        lambda index: change(index["layers"][1]["groups"][1]["residual_bytes"]),
    )
    with mistake(f"{folder / GROUP}: damaged .*bytes of (values|indices), resmoe.json says"):
        load_model(folder)


def test_tensor_that_the_index_does_not_account_for_is_noticed(folder):
    edit_tensors(folder / GROUP, lambda tensors: tensors.update(extra=torch.zeros(0)))

    def change(index):
        file = index["layers"][1]["groups"][1]["file"]
        file["bytes"] = (folder / GROUP).stat().st_size

    edit_json(folder / "resmoe.json", change)
    with mistake(f"{folder / GROUP}: damaged .*does not account for tensor 'extra'"):
        load_model(folder)


def test_group_file_of_another_model_is_named(folder, family_folder, tmp_path):
    compress(family_folder("olmoe"), tmp_path / "other", groups=2)
    (tmp_path / "other" / GROUP).replace(folder / GROUP)
    with mistake(f"{folder / GROUP}: damaged"):
        load_model(folder)


def test_whole_checkpoint_has_no_faults(pristine):
    assert CompressedCheckpoint(pristine).faults() == []


def test_index_accounts_for_every_file_but_itself(pristine):
    listed = {entry.file for entry in CompressedCheckpoint(pristine).files()}
    assert "generation_config.json" in listed
    assert listed | {"resmoe.json"} == names_in(pristine)


def test_faults_name_every_bad_file_and_only_those(folder):
    first = GROUP.replace("group-001", "group-000")
    flip_byte_of(folder / GROUP, "experts.2.values")  # only the digest can tell
    (folder / first).unlink()
    truncate(folder / "model-00001-of-00001.safetensors", 1000)
    edit_json(folder / "config.json", lambda config: config.update(vocab_size=65))

    faults = CompressedCheckpoint(folder).faults()

    assert {fault.split(":")[0] for fault in faults} == {
        GROUP,
        first,
        "model-00001-of-00001.safetensors",
        "config.json",
    }
    assert len(faults) == 4
    assert not any("\n" in fault for fault in faults)


def test_flipped_value_byte_is_found_by_its_digest_alone(folder):
    flip_byte_of(folder / GROUP, "experts.2.values", offset=40)

    load_model(folder)
    (fault,) = CompressedCheckpoint(folder).faults()
    assert re.match(f"{GROUP}: .*sha256", fault)


def test_faults_name_a_group_file_that_fits_its_digest_but_not_the_index(folder):
    def fewer_rows(index):
        index["layers"][1]["rows"] = 26

    edit_json(folder / "resmoe.json", fewer_rows)
    faults = CompressedCheckpoint(folder).faults()

    named = ["resmoe.json", GROUP.replace("001", "000"), GROUP]
    assert [fault.split(":")[0] for fault in faults] == named


def test_index_is_plain_json_that_lists_digests(pristine):
    index = json.loads((pristine / "resmoe.json").read_text())
    for entry in index["other_files"] + [g["file"] for x in index["layers"] for g in x["groups"]]:
        content = (pristine / entry["file"]).read_bytes()
        assert entry["bytes"] == len(content)
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
