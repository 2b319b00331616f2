"""Damage that a header does not show: values that are not finite, swapped files, surplus files."""

from __future__ import annotations

import json

import pytest
import torch

from resmoe_dist import load_model
from resmoe_dist.checkpoints.compressed import CompressedCheckpoint
from resmoe_dist.checkpoints.format import read_index, write_index
from resmoe_dist.checkpoints.tensor_files import sha256_of
from tests.checkpoints.damage import (
    edit_json,
    edit_tensors,
    edit_text,
    flip_byte_of,
    header_of,
    mistake,
)
from tests.checkpoints.old_versions import as_version_2
from tests.checkpoints.regrouping import regroup
from tests.models import compress

SHARD = "model-00001-of-00001.safetensors"
GROUPS = [
    f"resmoe-0000{layer}-of-00002-group-00{g}.safetensors" for layer in (1, 2) for g in (0, 1)
]


def spoil(path, tensor: str, value: float) -> None:
    """Overwrite the first value of a float32 tensor."""
    header, data = header_of(path)
    raw = bytearray(path.read_bytes())
    place = data + header[tensor]["data_offsets"][0]
    raw[place : place + 4] = torch.tensor([value]).numpy().tobytes()
    path.write_bytes(raw)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("file", "tensor"),
    [
        (GROUPS[3], "experts.2.values"),
        (GROUPS[3], "center.weight"),
        (SHARD, "model.norm.weight"),
        (SHARD, "model.embed_tokens.weight"),
    ],
)
def test_values_that_are_not_finite_are_refused(folder, file, tensor, value):
    spoil(folder / file, tensor, value)

    with mistake(f"tensor '{tensor}' holds NaN or infinite values"):
        load_model(folder)


def test_output_biases_that_are_not_finite_are_refused(family_folder, tmp_path):
    compress(family_folder("gpt_oss"), tmp_path / "c")
    (path,) = tmp_path.glob("c/resmoe-00001-*.safetensors")
    spoil(path, "experts.1.output_bias", float("nan"))

    with mistake("tensor 'experts.1.output_bias' holds NaN or infinite values"):
        load_model(tmp_path / "c")


def test_values_beyond_the_chosen_dtype_are_refused(folder):
    edit_tensors(folder / SHARD, lambda tensors: tensors["model.norm.weight"].fill_(1e6))

    load_model(folder)
    with mistake("'model.norm.weight' holds NaN or infinite values in float16"):
        load_model(folder, dtype=torch.float16)


def swap(folder) -> None:
    first, second = folder / GROUPS[0], folder / GROUPS[2]
    content = first.read_bytes(), second.read_bytes()
    second.write_bytes(content[0])
    first.write_bytes(content[1])


DAMAGE = {
    "a flipped value": (
        lambda folder: flip_byte_of(folder / GROUPS[1], "experts.2.values"),
        GROUPS[1],
    ),
    "a flipped weight": (lambda folder: flip_byte_of(folder / SHARD, "lm_head.weight"), SHARD),
    "swapped files": (swap, GROUPS[0]),
    "a changed config": (
        lambda folder: edit_json(folder / "config.json", lambda c: c.update(rms_norm_eps=1e-3)),
        "config.json",
    ),
    "a changed generation config": (
        lambda folder: edit_text(folder / "generation_config.json", '{"eos_token_id": 3}'),
        "generation_config.json",
    ),
    "a changed index": (
        lambda folder: edit_json(
            folder / "resmoe.json", lambda index: index["settings"].update(groups=1)
        ),
        "resmoe.json",
    ),
    "no digest": (
        lambda folder: edit_json(folder / "resmoe.json", lambda index: index.pop("digest")),
        "resmoe.json",
    ),
    "a surplus tokenizer": (
        lambda folder: edit_text(folder / "tokenizer.json", "{}"),
        "tokenizer.json",
    ),
    "surplus weights": (
        lambda folder: (folder / "other.safetensors").write_bytes(b""),
        "other.safetensors",
    ),
    "a surplus template": (
        lambda folder: (
            (folder / "additional_chat_templates").mkdir(),
            edit_text(folder / "additional_chat_templates" / "x.jinja", "x"),
        ),
        "additional_chat_templates/x.jinja",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_verify_and_a_verifying_load_find_what_a_load_does_not(folder, name):
    damage, file = DAMAGE[name]
    damage(folder)

    load_model(folder)
    assert {fault.split(":")[0] for fault in CompressedCheckpoint(folder).faults()} >= {file}
    with mistake(f"{folder / file}: "):
        load_model(folder, verify=True)


def test_a_whole_folder_loads_with_its_digests(pristine):
    load_model(pristine, verify=True)


def test_documents_are_not_surplus(folder):
    for name in ("README.md", "LICENSE", ".gitattributes"):
        edit_text(folder / name, "text")

    assert CompressedCheckpoint(folder).faults() == []


def test_older_versions_did_not_list_all_files(folder):
    as_version_2(folder)
    index = json.loads((folder / "resmoe.json").read_text())
    index["other_files"] = [
        e for e in index["other_files"] if e["file"] != "generation_config.json"
    ]
    edit_text(folder / "resmoe.json", json.dumps(index))

    assert CompressedCheckpoint(folder).faults() == []


def test_a_plain_folder_has_no_digests(mixtral):
    with mistake("has no digests to verify; leave --verify out"):
        load_model(mixtral, verify=True)


def test_tensors_of_a_shard_that_no_index_lists_are_faults(folder):
    edit_tensors(folder / SHARD, lambda tensors: tensors.update(extra=torch.zeros(3)))
    index = read_index(folder)
    size, digest = (folder / SHARD).stat().st_size, sha256_of(folder / SHARD)
    entries = [
        e.model_copy(update={"bytes": size, "sha256": digest}) if e.file == SHARD else e
        for e in index.other_files
    ]
    write_index(folder, index.model_copy(update={"other_files": entries}))

    (fault,) = CompressedCheckpoint(folder).faults()
    assert fault == f"{SHARD}: tensor 'extra' is not in model.safetensors.index.json"


def test_a_centre_that_the_index_drops_is_found(pristine, tmp_path):
    folder = regroup(pristine, tmp_path / "r", [[0, 1], [2, 3]])
    edit_json(
        folder / "resmoe.json",
        lambda index: index["layers"][0]["groups"][0].update(center_bytes=0),
    )

    with mistake("does not account for tensor 'center.weight'"):
        load_model(folder)


def test_tokenizer_files_are_listed(mixtral, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        edit_text(mixtral / name, "{}")
    compress(mixtral, tmp_path / "c")

    edit_text(tmp_path / "c" / "chat_template.jinja", "{{ 7 }}")

    (fault,) = CompressedCheckpoint(tmp_path / "c").faults()
    assert fault.startswith("chat_template.jinja: ")


def test_experts_of_another_size_than_the_models_are_refused(folder, tmp_path):
    edit_json(folder / "config.json", lambda config: config.update(intermediate_size=28))

    with mistake("do not belong together"):
        load_model(folder)
