"""Which files beside the weights a compressed and a restored folder get."""

from __future__ import annotations

import pytest

from resmoe_dist.checkpoints.companions import companions
from resmoe_dist.checkpoints.restore import restore_checkpoint
from tests.checkpoints.damage import edit_json, mistake
from tests.models import compress

COPIED = [
    "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja",
    "configuration_custom.py",
    "generation_config.json",
    "LICENSE",
    "preprocessor_config.json",
    "sub/deep/vocab.bpe",
    "tokenizer.json",
    "tokenizer.model",
]
LEFT_OUT = [
    ".git/config",
    ".hidden.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.safetensors.index.fp8.index.json",
    "tf_model.h5",
    "model-Q4.gguf",
    "optimizer.pt",
    "onnx/model.onnx",
    "onnx/config.json",
    "original/consolidated.00.pth",
    "original/params.json",
]


def _add(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def _files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_companions_reach_the_compressed_and_the_restored_folder(mixtral, tmp_path):
    (mixtral / "generation_config.json").unlink(missing_ok=True)
    _add(mixtral, [*COPIED, *LEFT_OUT])
    auto_map = {"AutoConfig": "configuration_custom.CustomConfig"}
    edit_json(mixtral / "config.json", lambda config: config.update(auto_map=auto_map))

    compress(mixtral, tmp_path / "c")
    restore_checkpoint(tmp_path / "c", tmp_path / "d")

    for folder in (tmp_path / "c", tmp_path / "d"):
        found = _files(folder)
        assert found >= set(COPIED)
        assert not found & set(LEFT_OUT)
        assert (folder / COPIED[0]).read_text() == COPIED[0]


def test_link_out_of_the_folder(mixtral, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (mixtral / "notes.txt").symlink_to(tmp_path / "secret")
    with mistake(f"{mixtral}/notes.txt: leads out of the folder"):
        companions(mixtral)


def test_snapshot_of_the_cache_consists_of_links(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    _add(tmp_path, ["blobs/1"])
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").symlink_to(blobs / "1")
    assert [str(path) for path in companions(snapshot)] == ["tokenizer.json"]


@pytest.mark.parametrize("name", ["tokenizer.json", "additional_chat_templates/x.jinja"])
def test_links_inside_the_folder_are_followed(tmp_path, name):
    _add(tmp_path, [name])
    (tmp_path / "link.json").symlink_to(tmp_path / name)
    assert {str(path) for path in companions(tmp_path)} == {name, "link.json"}
