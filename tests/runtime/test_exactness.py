"""What everything rests on: the compressed model computes what the dense one does.

Authority, in order: with everything kept, the source model; with any checkpoint, the dense model
that `restore` writes, run by transformers alone. `test_grids` has the same on grids.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from resmoe_dist import load_model
from resmoe_dist.checkpoints.restore import restore_checkpoint
from tests.checkpoints.damage import copy_of, edit_tensors, mistake
from tests.models import FAMILIES, compress, dense_model, logits_of, relative_difference

TOLERANCE = 1e-4  # relative, float32
LAYOUTS = [(name, fused) for name in FAMILIES for fused in (False, True)]


@pytest.mark.parametrize(("name", "fused"), LAYOUTS)
@pytest.mark.parametrize("codec", ["pruned", "low_rank"])
def test_keeping_everything_gives_the_source_logits(family_folder, tmp_path, name, fused, codec):
    source = family_folder(name, fused)
    compress(source, tmp_path / "c", groups=2, keep=1.0, codec=codec)

    found = logits_of(load_model(tmp_path / "c"))

    assert relative_difference(found, logits_of(dense_model(source))) <= TOLERANCE


@pytest.mark.parametrize(("name", "fused"), LAYOUTS)
def test_restored_dense_model_gives_the_compressed_logits(family_folder, tmp_path, name, fused):
    compress(family_folder(name, fused), tmp_path / "c", groups=2)
    restore_checkpoint(tmp_path / "c", tmp_path / "d")

    expected = logits_of(dense_model(tmp_path / "d"))

    assert relative_difference(logits_of(load_model(tmp_path / "c")), expected) <= TOLERANCE
    # The comparison means something only where compression changed the model.
    assert relative_difference(expected, logits_of(dense_model(family_folder(name, fused)))) > 1e-2


def test_transformers_alone_loads_a_compressed_folder(family_folder, tmp_path):
    source = family_folder("mixtral")
    compress(source, tmp_path / "c", keep=1.0)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "c")

    assert relative_difference(logits_of(model), logits_of(dense_model(source))) <= TOLERANCE


def test_layers_left_out_are_served_dense(family_folder, tmp_path):
    source = family_folder("mixtral")
    index = compress(source, tmp_path / "c", groups=2, layers=[1])
    restore_checkpoint(tmp_path / "c", tmp_path / "d")

    assert [layer.residual_codec for layer in index.layers] == ["dense", "pruned"]
    found = logits_of(load_model(tmp_path / "c"))
    assert relative_difference(found, logits_of(dense_model(tmp_path / "d"))) <= TOLERANCE


@pytest.mark.parametrize("compressed", [False, True])
def test_a_model_with_missing_tensors_is_refused_not_filled_with_noise(
    family_folder, tmp_path, compressed
):
    folder = copy_of(family_folder("mixtral"), tmp_path / "source")
    if compressed:
        compress(folder, tmp_path / "c")
        folder = tmp_path / "c"
    name = "model.layers.1.self_attn.q_proj.weight"
    for path in folder.glob("model*.safetensors"):
        edit_tensors(path, lambda tensors: tensors.pop(name))

    with mistake(f"{name}' is missing"):
        load_model(folder)


def test_a_tensor_of_the_wrong_shape_is_refused(family_folder, tmp_path):
    source = copy_of(family_folder("mixtral"), tmp_path / "source")
    name = "model.layers.1.self_attn.q_proj.weight"

    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name][:-1].clone()

    edit_tensors(source / "model.safetensors", shorten)

    with mistake(f"{name}' is of another shape"):
        load_model(source)


def test_a_dense_model_of_odd_sizes_loads_too(family_folder):
    source = family_folder("mixtral")

    assert relative_difference(logits_of(load_model(source)), logits_of(dense_model(source))) == 0


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_model_loads_in_the_dtype_it_was_compressed_to(family_folder, tmp_path, dtype):
    compress(family_folder("mixtral"), tmp_path / "c", dtype=dtype)

    model = load_model(tmp_path / "c")

    wanted = torch.bfloat16 if dtype else torch.float32
    assert model.dtype == model.model.layers[0].mlp.experts.experts.centers[0].dtype == wanted
