"""A model folder decides nothing about other files: links, pipes, paths in its files, its code."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from resmoe_dist import load_model
from resmoe_dist.checkpoints.compressed import CompressedCheckpoint
from resmoe_dist.checkpoints.restore import restore_checkpoint
from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.errors import UserError
from resmoe_dist.evaluation.perplexity import load_tokenizer
from resmoe_dist.families.models import load_config
from resmoe_dist.testing.corpus import byte_tokenizer
from tests.checkpoints.damage import INDEX, copy_of, edit_json, edit_text, mistake
from tests.cli.commands import COMMAND
from tests.models import logits_of

SHARD = "model-00001-of-00001.safetensors"

READERS = {
    "load_model": load_model,
    "from_pretrained": lambda folder: AutoModelForCausalLM.from_pretrained(folder),
    "verify": lambda folder: CompressedCheckpoint(folder).faults(),
    "restore": lambda folder: restore_checkpoint(folder, folder.parent / "restored"),
    "config": lambda folder: load_config(str(folder)),
    "tokenizer": load_tokenizer,
}


@pytest.fixture
def neighbour(pristine, tmp_path) -> Path:
    """Another folder beside the one that is read."""
    return copy_of(pristine, tmp_path / "b")


@pytest.mark.parametrize("reader", ["load_model", "from_pretrained", "restore"])
def test_a_shard_of_another_folder_is_refused(folder, neighbour, reader):
    edit_json(
        folder / INDEX,
        lambda index: index.update(
            weight_map={name: f"../b/{SHARD}" for name in index["weight_map"]}
        ),
    )
    (folder / SHARD).unlink()

    with mistake("not a plain file name"):
        READERS[reader](folder)


def test_a_shard_of_another_folder_fails_verification(folder, neighbour):
    edit_json(folder / INDEX, lambda index: index["weight_map"].update(extra=f"../b/{SHARD}"))

    assert any(fault.startswith(INDEX) for fault in CompressedCheckpoint(folder).faults())


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", [SHARD, "config.json", "tokenizer.json", "extra/x.jinja"])
def test_a_link_out_of_the_folder_is_refused_by_every_reader(folder, neighbour, reader, name):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(neighbour / (name if (neighbour / name).exists() else SHARD))

    with mistake(f"{path}: a link out of the model folder"):
        READERS[reader](folder)


@pytest.mark.parametrize("reader", READERS)
def test_a_pipe_is_refused_and_not_waited_for(folder, reader):
    os.mkfifo(folder / "generation_config2.json")

    with mistake("generation_config2.json: neither a file nor a folder"):
        READERS[reader](folder)


def test_a_link_to_a_linked_folder_and_a_loop_are_refused(folder, neighbour):
    (folder / "loop").symlink_to("loop")

    with mistake("loop: a link that leads nowhere"):
        load_model(folder)


def test_a_source_with_a_link_out_of_it_is_not_compressed(mixtral, tmp_path):
    weights = mixtral / "model.safetensors"
    weights.rename(tmp_path / "weights")
    weights.symlink_to(tmp_path / "weights")

    with mistake("a link out of the model folder"):
        SourceCheckpoint(mixtral)


def test_a_snapshot_of_the_hugging_face_cache_may_link_to_its_blobs(pristine, tmp_path):
    cached = tmp_path / "models--a--b"
    snapshot, blobs = cached / "snapshots" / "0123", cached / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in pristine.iterdir():
        (blobs / path.name).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")

    assert CompressedCheckpoint(snapshot).faults() == []
    load_model(snapshot, verify=True)

    (tmp_path / "models--c--d").mkdir()
    (tmp_path / "models--c--d" / "blob").write_text("{}")
    (snapshot / "vocab.json").symlink_to("../../../models--c--d/blob")
    with mistake("a link out of the model folder"):
        load_model(snapshot)


def test_a_folder_that_is_itself_reached_by_a_link_is_read(pristine, tmp_path):
    (tmp_path / "linked").symlink_to(pristine)

    load_model(tmp_path / "linked")


@pytest.mark.parametrize("written", ["./c/", "c/../c", "c"])
def test_a_folder_may_be_written_in_any_way(folder, monkeypatch, written):
    monkeypatch.chdir(folder.parent)

    expected = logits_of(load_model(folder))
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(written)), expected)
    assert torch.equal(logits_of(load_model(written)), expected)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"transformers_weights": f"../b/{SHARD}"}, "remove transformers_weights"),
        ({"transformers_weights": SHARD}, "remove transformers_weights"),
        ({"_attn_implementation": "someone/kernel"}, "code from elsewhere"),
        ({"attn_implementation": {"text_config": "a/b:c"}}, "code from elsewhere"),
        ({"num_hidden_layers": 10**9}, "more than any model has"),
        ({"num_local_experts": 10**9}, "more than any model has"),
        ({"vocab_size": 10**12}, "the files hold"),
        ({"max_position_embeddings": "x"}, "config"),
        ({"num_attention_heads": 0}, "config"),
        ({"hidden_act": "no such"}, "config"),
        ({"rope_parameters": 3}, "config"),
        ({"num_key_value_heads": 2.5}, "config|cannot be loaded"),
    ],
)
def test_a_config_that_asks_for_the_impossible_is_one_line(folder, neighbour, changes, text):
    edit_json(folder / "config.json", lambda config: config.update(changes))

    with mistake(text):
        load_model(folder)


def test_an_adapter_is_refused(folder):
    edit_text(folder / "adapter_config.json", json.dumps({"base_model_name_or_path": "../b"}))

    with mistake("has an adapter_config.json"):
        load_model(folder)


def test_two_sets_of_weights_are_refused(folder):
    (folder / "model.safetensors").write_bytes((folder / SHARD).read_bytes())

    with mistake(f"has both model.safetensors and {INDEX}"):
        load_model(folder)


def test_a_damaged_generation_config_is_refused(folder):
    edit_text(folder / "generation_config.json", "{cut")

    with mistake("generation_config.json: not a readable JSON file"):
        load_model(folder)


def test_paths_in_a_tokenizers_config_are_not_followed(tmp_path):
    byte_tokenizer(padding_side="left").save_pretrained(tmp_path / "t")
    expected = load_tokenizer(tmp_path / "t")("class A")["input_ids"]
    edit_text(tmp_path / "other.json", "not a tokenizer")
    edit_json(
        tmp_path / "t" / "tokenizer_config.json",
        lambda config: config.update(
            dict.fromkeys(
                ("tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file"),
                str(tmp_path / "other.json"),
            )
        ),
    )

    assert load_tokenizer(tmp_path / "t")("class A")["input_ids"] == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"fast_tokenizer_files": ["../other/tokenizer.4.0.json"]},
        {"init_inputs": ["/etc/passwd"]},
    ],
)
def test_paths_that_a_tokenizer_would_follow_are_refused(tmp_path, changes):
    byte_tokenizer(padding_side="left").save_pretrained(tmp_path / "t")
    edit_json(tmp_path / "t" / "tokenizer_config.json", lambda config: config.update(changes))

    with mistake("tokenizer_config.json: "):
        load_tokenizer(tmp_path / "t")


CODE = "from pathlib import Path\nPath({marker!r}).touch()\nclass Model:\n    pass\n"


def with_code(folder: Path, marker: Path) -> None:
    """Let config and tokenizer ask for a module of the folder, of a type that nobody knows."""
    (folder / "code.py").write_text(CODE.format(marker=str(marker)))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CODE.format(marker=str(marker)))
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    config = {"auto_map": dict.fromkeys(names, "code.Model"), "model_type": "no such type"}
    edit_json(folder / "config.json", lambda found: found.update(config))
    tokenizer = {"auto_map": {"AutoTokenizer": ["code.Model", None]}, "tokenizer_class": "Model"}
    edit_text(folder / "tokenizer_config.json", json.dumps(tokenizer))


@pytest.mark.parametrize("reader", ["load_model", "config", "tokenizer"])
def test_code_of_a_folder_is_not_run(folder, tmp_path, reader, monkeypatch):
    with_code(folder, tmp_path / "ran")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))

    with pytest.raises(UserError) as caught:
        READERS[reader](folder)

    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["compress", "plan", "evaluate", "restore"])
def test_commands_refuse_code_without_asking(pristine, mixtral, tmp_path, command):
    folder = copy_of(mixtral if command == "compress" else pristine, tmp_path / "hostile")
    with_code(folder, tmp_path / "ran")
    (tmp_path / "text").write_text("some text")
    arguments = {
        "compress": (tmp_path / "o", "--ep", "1"),
        "plan": (),
        "evaluate": ("--text", tmp_path / "text"),
        "restore": (tmp_path / "o",),
    }
    done = subprocess.run(
        [
            *(COMMAND, command, folder),
            *map(str, arguments[command]),
        ],
        input="y\n" * 10,
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert not (tmp_path / "ran").exists()
    if command == "restore":
        return
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
