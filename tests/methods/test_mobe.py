"""`mobe`: how bases are fitted, and what a folder stores of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from resmoe_dist import load_model
from resmoe_dist.checkpoints.compressed import CompressedCheckpoint
from resmoe_dist.checkpoints.restore import restore_checkpoint
from resmoe_dist.codecs import BasesMatrix, CodecSpec, MobeMatrix
from resmoe_dist.compression.basis_mixtures import fit_mixtures
from resmoe_dist.compression.encoding import GroupCodecs
from resmoe_dist.config.commands import CompressConfig
from resmoe_dist.design_matrix import ExpertShape
from resmoe_dist.errors import UserError
from resmoe_dist.launch.compress import compress as run_compress
from resmoe_dist.methods import MethodSpec, SourceGroup, method_of
from tests.methods.folders import TOLERANCE, compress, settings
from tests.models import dense_model, logits_of, relative_difference


def _relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).square().sum() / exact.square().sum())


def test_matrices_that_are_such_products_are_found():
    left, bases = torch.randn(4, 12, 3), torch.randn(2, 3, 8)
    mixing = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.5, 0.5]])
    mixed = torch.nn.functional.silu(torch.einsum("em,mrw->erw", mixing, bases))

    errors = [
        _relative_error(fit_mixtures(left @ mixed, 2, 3, steps).restored(), left @ mixed)
        for steps in (0, 300)
    ]

    # Singular vectors alone do not tell the bases; descent finds them.
    assert errors[1] < errors[0] / 5


def test_one_basis_starts_at_the_singular_vectors_that_all_share():
    matrices = torch.randn(3, 20, 9)

    error = _relative_error(fit_mixtures(matrices, 1, 4, steps=0).restored(), matrices)

    values = torch.linalg.svdvals(matrices.flatten(0, 1)).square()
    # silu bends the vectors a little.
    assert error == pytest.approx(float(values[4:].sum() / values.sum()), rel=0.1)


def test_steps_never_make_it_worse():
    matrices = torch.randn(4, 16, 10) + torch.randn(16, 10)

    errors = [
        _relative_error(fit_mixtures(matrices, 2, 4, steps=steps).restored(), matrices)
        for steps in (0, 30, 200)
    ]

    assert errors[0] >= errors[1] > errors[2]


def test_full_rank_loses_nothing_and_zeros_stay_zeros():
    matrices = torch.randn(3, 6, 5)

    assert _relative_error(fit_mixtures(matrices, 2, 5, steps=0).restored(), matrices) < 1e-6
    assert not fit_mixtures(torch.zeros(2, 4, 3), 1, 2, steps=2).restored().any()


def test_mixtures_are_shares():
    mixing = fit_mixtures(torch.randn(5, 6, 4), 3, 2, steps=20).mixing_Em

    assert mixing.shape == (5, 3)
    assert (mixing > 0).all()
    torch.testing.assert_close(mixing.sum(1), torch.ones(5))


def _codecs(keep: float, projections: int = 3, **options: Any) -> GroupCodecs:
    chosen = CodecSpec(name="pruned").with_keep(keep)
    wanted = GroupCodecs(chosen, torch.float32, projections=projections)
    return method_of(MethodSpec(name="mobe", options=options)).codecs(wanted)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "switch"])
def test_file_holds_the_bases_once_and_every_byte_is_counted(family_folder, tmp_path, family):
    source = family_folder(family)

    index = compress(source, tmp_path / "c", settings(source, "mobe", 0.8, steps=5))

    checkpoint = CompressedCheckpoint(tmp_path / "c")
    assert checkpoint.faults() == []
    for layer in index.layers:
        assert (layer.center_codec, layer.residual_codec) == ("bases", "mobe")
        (group,) = layer.groups
        tensors = load_file(tmp_path / "c" / group.file.file)
        assert [name for name in tensors if "bases" in name] == ["center.bases"]
        assert group.stored_bytes == sum(tensor.nbytes for tensor in tensors.values())
        # The output projection is stored as it is.
        outputs = [name for name in tensors if name.endswith(".output")]
        assert len(outputs) == 4


def test_model_has_the_bases_once_and_computes_what_it_restores_to(family_folder, tmp_path):
    source = family_folder("mixtral")
    compress(source, tmp_path / "c", settings(source, "mobe", 0.8, steps=5))

    model = load_model(tmp_path / "c")

    layers = CompressedCheckpoint(tmp_path / "c").index.layers
    for layer, entry in zip(model.model.layers, layers, strict=True):
        experts = layer.mlp.experts.experts
        assert sum(buffer.nbytes for buffer in experts.buffers()) == entry.groups[0].stored_bytes
        assert experts.center_bytes == entry.groups[0].center_bytes
    restore_checkpoint(tmp_path / "c", tmp_path / "d")
    expected = logits_of(dense_model(tmp_path / "d"))
    assert relative_difference(logits_of(model), expected) <= TOLERANCE


def test_budget_below_the_output_projection_is_refused():
    shape = ExpertShape(rows=6, hidden=4)
    codecs = _codecs(0.3)

    with pytest.raises(UserError, match=r"stores down whole, so keep must be above 0.33, not 0.3"):
        method_of(MethodSpec(name="mobe")).encode(SourceGroup(torch.randn(2, 6, 12), shape), codecs)


def test_codec_without_a_budget_is_refused():
    wanted = GroupCodecs(CodecSpec.parse("dense"), torch.float32)

    with pytest.raises(UserError, match="--method mobe: takes its rank from --keep"):
        method_of(MethodSpec(name="mobe")).codecs(wanted)


@pytest.mark.parametrize("option", ["codec", "center_codec"])
@pytest.mark.parametrize("codec", ["mobe", "bases"])
def test_codecs_of_the_method_cannot_be_chosen(family_folder, tmp_path, option, codec):
    config = CompressConfig(
        source=family_folder("mixtral"), output=tmp_path / "c", ep=1, **{option: codec}
    )

    with pytest.raises(UserError, match=f"{codec}: only a method that chooses this codec"):
        run_compress(config)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", [0.6, 0.8])
def test_target_bytes_count_the_bases(family_folder, tmp_path, target):
    source = family_folder("mixtral")
    config = CompressConfig(
        source=source, output=tmp_path / "c", ep=2, method="mobe:steps=0", target_bytes=target
    )

    index = run_compress(config)

    stored = sum(group.stored_bytes for layer in index.layers for group in layer.groups)
    dense = sum(layer.num_experts * layer.shape.entries * 4 for layer in index.layers)
    # One more rank would exceed it.
    assert 0.9 * target < stored / dense <= target
    residual = index.settings.residual_codec
    codecs = _codecs(residual.keep)
    layer = index.layers[0]
    sizes = layer.rows, layer.shape.columns
    bases = BasesMatrix.stored_bytes(*sizes, codecs.center.config, 4)
    expert = MobeMatrix.stored_bytes(*sizes, codecs.residual.config, 4)
    assert [group.stored_bytes for group in layer.groups] == [bases + 2 * expert] * 2
