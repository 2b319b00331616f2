"""`restore` writes the source back: its names, dtypes, shapes, and, with keep = 1, its experts."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from resmoe_dist.checkpoints import restore
from resmoe_dist.checkpoints.compressed import CompressedCheckpoint
from resmoe_dist.checkpoints.restore import restore_checkpoint
from resmoe_dist.errors import UserError
from tests.checkpoints.damage import (
    copy_of,
    edit_text,
    flip_byte_of,
    mistake,
    names_in,
    sharded_copy,
    truncate,
)
from tests.checkpoints.regrouping import regroup
from tests.models import FAMILIES, compress, dense_model

LAYOUTS = [(name, fused) for name in FAMILIES for fused in (False, True)]
GROUP = "resmoe-00002-of-00002-group-000.safetensors"


def _tensors(folder):
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def _outlines(folder):
    return {name: (tensor.dtype, tensor.shape) for name, tensor in _tensors(folder).items()}


def _expert_functions(model):
    """Every routed expert of a model as a function of tokens [T, H], by transformers alone."""
    functions = []
    for name, module in model.named_modules():
        if name.endswith("experts") and isinstance(module, torch.nn.ModuleDict):
            functions += module.values()
        elif name.endswith("experts") and hasattr(module, "down_proj"):
            if not isinstance(module.down_proj, torch.Tensor):
                continue  # DeepSeek's shared expert
            for k in range(module.down_proj.shape[0]):

                def run(x_TH, module=module, k=k):
                    chosen = torch.full((len(x_TH), 1), k)
                    return module(x_TH, chosen, torch.ones(len(x_TH), 1))

                functions.append(run)
    return functions


@pytest.fixture(scope="module")
def restored(family_folder, tmp_path_factory):
    """restored(name, fused): the folder of a family's model after compress with keep = 1."""
    made = {}

    def make(name, fused):
        if (name, fused) not in made:
            folder = tmp_path_factory.mktemp(f"restored-{name}")
            compress(family_folder(name, fused), folder / "c", groups=2, keep=1.0)
            restore_checkpoint(folder / "c", folder / "d")
            made[name, fused] = folder / "d"
        return made[name, fused]

    return make


@pytest.mark.parametrize(("name", "fused"), LAYOUTS)
def test_names_dtypes_and_shapes_equal_the_sources(family_folder, restored, name, fused):
    assert _outlines(restored(name, fused)) == _outlines(family_folder(name, fused))


@pytest.mark.parametrize(("name", "fused"), LAYOUTS)
def test_config_equals_the_sources(family_folder, restored, name, fused):
    config = json.loads((family_folder(name, fused) / "config.json").read_text())
    assert json.loads((restored(name, fused) / "config.json").read_text()) == config


@pytest.mark.parametrize(("name", "fused"), LAYOUTS)
def test_shard_index_names_the_file_of_each_tensor(restored, name, fused):
    folder = restored(name, fused)
    index = json.loads((folder / "model.safetensors.index.json").read_text())

    assert index["weight_map"].keys() == _tensors(folder).keys()
    for tensor, file in index["weight_map"].items():
        assert tensor in load_file(folder / file)
    size = sum(tensor.nbytes for tensor in _tensors(folder).values())
    assert index["metadata"]["total_size"] == size


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_models_keep_their_dtype(family_folder, tmp_path, dtype):
    model = dense_model(family_folder("mixtral")).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "source")
    compress(tmp_path / "source", tmp_path / "c", groups=2)

    restore_checkpoint(tmp_path / "c", tmp_path / "d")

    assert _outlines(tmp_path / "d") == _outlines(tmp_path / "source")


def test_sharded_model_comes_back_whole(family_folder, tmp_path):
    source = sharded_copy(family_folder("mixtral"), tmp_path / "source")
    compress(source, tmp_path / "c", groups=2)

    restore_checkpoint(tmp_path / "c", tmp_path / "d")

    assert _outlines(tmp_path / "d") == _outlines(source)


@pytest.mark.parametrize(("name", "fused"), LAYOUTS)
def test_tensors_that_are_not_experts_equal_the_sources(family_folder, restored, name, fused):
    found, source = _tensors(restored(name, fused)), _tensors(family_folder(name, fused))
    others = {n: tensor for n, tensor in source.items() if ".experts." not in n}
    assert others
    for tensor_name, tensor in others.items():
        assert torch.equal(found[tensor_name], tensor), tensor_name


@pytest.mark.parametrize(("name", "fused"), LAYOUTS)
def test_keeping_everything_restores_each_expert_as_a_function(
    family_folder, restored, name, fused
):
    before, after = dense_model(family_folder(name, fused)), dense_model(restored(name, fused))
    x_TH = torch.randn(5, 20)
    with torch.no_grad():
        expected = [expert(x_TH) for expert in _expert_functions(before)]
        found = [expert(x_TH) for expert in _expert_functions(after)]

    assert len(found) == len(expected) >= 4
    for mine, want in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-5, atol=1e-4 * float(want.abs().max()))


def test_keeping_everything_restores_each_expert_up_to_the_order_of_its_rows(
    family_folder, tmp_path
):
    source = family_folder("mixtral")
    compress(source, tmp_path / "c", groups=1, keep=1.0)
    restore_checkpoint(tmp_path / "c", tmp_path / "d")

    def rows(tensors, layer, expert):
        block = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
        w1, w2, w3 = (tensors[f"{block}.{name}.weight"] for name in ("w1", "w2", "w3"))
        return torch.cat([w1, w3, w2.T], dim=1)

    before, after = _tensors(source), _tensors(tmp_path / "d")
    moved = 0
    for layer in range(2):
        for expert in range(4):
            mine, want = rows(after, layer, expert), rows(before, layer, expert)
            moved += not torch.allclose(mine, want, atol=1e-6)
            in_order = (matrix[matrix[:, 0].argsort()] for matrix in (mine, want))
            torch.testing.assert_close(*in_order, rtol=1e-6, atol=1e-6)
    assert moved  # otherwise the test would not depend on the order


@pytest.mark.parametrize(("name", "fused"), LAYOUTS)
def test_experts_are_written_by_number_whatever_their_groups(family_folder, tmp_path, name, fused):
    compress(family_folder(name, fused), tmp_path / "c")
    regroup(tmp_path / "c", tmp_path / "r", [[1, 3], [2], [0]], centerless=[0])

    restore_checkpoint(tmp_path / "c", tmp_path / "before")
    restore_checkpoint(tmp_path / "r", tmp_path / "after")

    before, after = _tensors(tmp_path / "before"), _tensors(tmp_path / "after")
    assert before.keys() == after.keys()
    for tensor_name, tensor in before.items():
        torch.testing.assert_close(after[tensor_name], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "fused"), LAYOUTS)
def test_merged_experts_are_each_written_from_the_stored_one(family_folder, tmp_path, name, fused):
    compress(family_folder(name, fused), tmp_path / "c", align="none", keep=1.0)
    expert_map = [0, 1, 1, 0]
    merged = regroup(
        tmp_path / "c", tmp_path / "r", [[0], [1]], codec="empty", expert_map=expert_map
    )

    assert CompressedCheckpoint(merged).faults() == []
    restore_checkpoint(merged, tmp_path / "d")

    assert _outlines(tmp_path / "d") == _outlines(family_folder(name, fused))
    x_TH = torch.randn(5, 20)
    with torch.no_grad():
        found = [expert(x_TH) for expert in _expert_functions(dense_model(tmp_path / "d"))]
    for layer in range(0, len(found), 4):
        outputs = found[layer : layer + 4]
        for k, stored in enumerate(expert_map):
            twin = expert_map.index(stored)
            assert torch.equal(outputs[k], outputs[twin])
        assert not torch.allclose(outputs[0], outputs[1])


def test_merged_expert_is_the_mean_that_was_stored(family_folder, tmp_path):
    source = family_folder("mixtral")
    compress(source, tmp_path / "c", align="none", keep=1.0)
    regroup(tmp_path / "c", tmp_path / "r", [[0, 1], [2]], expert_map=[2, 0, 1, 2])

    restore_checkpoint(tmp_path / "r", tmp_path / "d")

    before, after = _tensors(source), _tensors(tmp_path / "d")
    block = "model.layers.1.block_sparse_moe.experts"
    for name in ("w1.weight", "w2.weight", "w3.weight"):
        mean = (before[f"{block}.0.{name}"] + before[f"{block}.3.{name}"]) / 2
        for expert in (0, 3):
            torch.testing.assert_close(after[f"{block}.{expert}.{name}"], mean, atol=1e-5, rtol=0)
        for expert in (1, 2):
            expected = before[f"{block}.{expert}.{name}"]
            found = after[f"{block}.{expert}.{name}"]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_experts_can_be_written_in_another_dtype(pristine, tmp_path):
    restore_checkpoint(pristine, tmp_path / "d", torch.bfloat16)

    dtypes = {n: tensor.dtype for n, tensor in _tensors(tmp_path / "d").items()}
    assert {d for n, d in dtypes.items() if ".experts." in n} == {torch.bfloat16}
    assert dense_model(tmp_path / "d").dtype == torch.bfloat16


def test_companion_files_come_along(pristine, tmp_path):
    folder = copy_of(pristine, tmp_path / "c")
    edit_text(folder / "tokenizer.json", '{"a": 1}')

    restore_checkpoint(folder, tmp_path / "d")

    assert (tmp_path / "d" / "tokenizer.json").read_text() == '{"a": 1}'
    assert (tmp_path / "d" / "generation_config.json").is_file()
    assert "resmoe.json" not in names_in(tmp_path / "d")


@pytest.mark.parametrize("taken", ["d", "d.partial"])
def test_output_that_exists_is_left_alone(pristine, tmp_path, taken):
    (tmp_path / taken).mkdir()
    (tmp_path / taken / "precious").touch()
    with mistake(f"{tmp_path / taken}: exists already"):
        restore_checkpoint(pristine, tmp_path / "d")
    assert names_in(tmp_path) == {taken}
    assert names_in(tmp_path / taken) == {"precious"}


def test_output_below_a_file_is_refused(pristine, tmp_path):
    (tmp_path / "file").touch()
    with mistake(f"{tmp_path}/file/d.partial: cannot be made"):
        restore_checkpoint(pristine, tmp_path / "file" / "d")


def test_folder_that_is_not_compressed_is_refused(family_folder, tmp_path):
    with mistake("no resmoe.json here; give a folder made by resmoe-dist compress"):
        restore_checkpoint(family_folder("mixtral"), tmp_path / "d")
    assert names_in(tmp_path) == set()


def _damage_group(folder):
    flip_byte_of(folder / GROUP, "experts.1.bitmap", 9)


def _truncate_shard(folder):
    truncate(folder / "model-00001-of-00001.safetensors", 3000)


def _remove_config(folder):
    (folder / "config.json").unlink()


def _break_config(folder):
    edit_text(folder / "config.json", "{")


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (_damage_group, GROUP),
        (_truncate_shard, "model-00001-of-00001.safetensors"),
        (_remove_config, "config.json"),
        (_break_config, "config.json"),
    ],
)
def test_damaged_file_is_named_and_nothing_is_left(pristine, tmp_path, harm, named):
    harm(copy_of(pristine, tmp_path / "c"))
    with mistake(f"{tmp_path}/c/{named}: "):
        restore_checkpoint(tmp_path / "c", tmp_path / "d")
    assert names_in(tmp_path) == {"c"}


@pytest.mark.parametrize("problem", [KeyboardInterrupt, UserError("no"), RuntimeError])
def test_nothing_is_left_of_a_restore_that_is_cut_short(pristine, tmp_path, monkeypatch, problem):
    def fail(*args, **kwargs):
        raise problem

    monkeypatch.setattr(restore, "write_json", fail)
    with pytest.raises(problem if isinstance(problem, type) else UserError):
        restore_checkpoint(pristine, tmp_path / "d")
    assert names_in(tmp_path) == set()
