"""Random layers: compressed and dense hold the same experts, and bytes are counted right."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from resmoe_dist.codecs import CodecSpec
from resmoe_dist.codecs.bitmap import unpack_bitmap
from resmoe_dist.design_matrix import to_rows
from resmoe_dist.testing.random_layer import SHAPES, LayerShape, RandomLayer, parse_shape

CPU = torch.device("cpu")
SHAPE = LayerShape("tiny", hidden=64, rows=48, experts=4, top_k=2)
EXPERT_BYTES = 48 * 192 * 2


def make_layer(codec="pruned", keep=0.25, seed=0):
    """A layer drawn in several blocks of rows, the last one shorter."""
    center = None
    if codec == "quantized":
        spec = CodecSpec(name=codec, options={"bits": 3, "coder": "trellis"})
        center = CodecSpec(name=codec, options={"bits": 4, "coder": "scalar", "group_size": 32})
    else:
        spec = CodecSpec(name=codec, options={"keep": keep})
    return RandomLayer(SHAPE, spec, CPU, seed, block_entries=3 * 64 * 20, center=center)


@pytest.fixture(params=["pruned", "low_rank", "quantized"])
def layer(request):
    return make_layer(request.param)


def _dense_rows(layer, expert):
    """The design matrix [I, D] that the dense weights hold."""
    gate, up = layer.gate_up[expert].chunk(2)
    return to_rows(SHAPE.expert, {"gate": gate, "up": up, "down": layer.down[expert]})


def test_dense_weights_are_centre_and_residual_rounded_once(layer):
    # Decoded in float32, so that nothing is rounded.
    center_ID = deepcopy(layer.weights.centers[0]).float().decode()
    for expert, residual in enumerate(layer.weights.residuals):
        tensors = {name: tensor.float() for name, tensor in residual.tensors().items()}
        if "left" in tensors:
            decoded_ID = tensors["left"] @ tensors["right"]
        else:
            decoded_ID = deepcopy(residual).float().decode()
        expected_ID = center_ID + decoded_ID
        # One rounding to 8 bits. A product in another order may round the other way.
        error_ID = (_dense_rows(layer, expert).float() - expected_ID).abs()
        assert bool((error_ID <= expected_ID.abs() * 2**-8 + 1e-6).all())
        assert float(decoded_ID.square().mean()) > 1e-5


def test_no_tensors_share_memory(layer):
    matrices = (*layer.weights.centers, *layer.weights.residuals)
    tensors = [tensor for matrix in matrices for tensor in matrix.tensors().values()]
    tensors += [layer.gate_up, layer.down]
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)


def test_masks_are_random_and_independent():
    residuals = make_layer().weights.residuals
    masks = [unpack_bitmap(residual.bitmap, 192) for residual in residuals]
    for mask, residual in zip(masks, residuals, strict=True):
        assert float(mask.float().mean()) == pytest.approx(0.25, abs=0.02)
        assert residual.row_offsets.diff().tolist() == mask.sum(1).tolist()
    assert float((masks[0] & masks[1]).float().mean()) == pytest.approx(0.25**2, abs=0.01)


def test_seed_decides_weights_and_tokens():
    first, again, other = (make_layer(seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.gate_up, again.gate_up)
    assert torch.equal(first.tokens(3)[0], again.tokens(3)[0])
    assert not torch.equal(first.gate_up, other.gate_up)


def test_routing_is_uniform_and_new_in_every_call(layer):
    x_TH, index_TK, weights_TK = inputs = layer.tokens(3000)
    assert (x_TH.shape, x_TH.dtype) == ((3000, 64), torch.bfloat16)
    assert bool((index_TK[:, 0] != index_TK[:, 1]).all())
    counts = index_TK.flatten().bincount(minlength=4)
    assert counts.tolist() == pytest.approx([1500] * 4, rel=0.1)
    assert torch.allclose(weights_TK.sum(1), torch.ones(3000))
    assert bool((weights_TK > 0).all())
    assert not any(torch.equal(a, b) for a, b in zip(inputs, layer.tokens(3000), strict=True))


def test_bytes_read_are_those_of_the_experts_that_tokens_need():
    layer = make_layer()
    found = layer.bytes_read(torch.tensor([[0, 2], [2, 0], [2, 0]]))
    masks = [unpack_bitmap(layer.weights.residuals[k].bitmap, 192) for k in (0, 2)]
    kept = sum(int(mask.sum()) for mask in masks)
    bitmaps, offsets = 2 * 48 * 192 // 8, 2 * 49 * 4
    assert found["dense"] == 2 * EXPERT_BYTES
    assert found["compressed"] == EXPERT_BYTES + bitmaps + offsets + 2 * kept


def test_bytes_read_of_a_low_rank_layer_are_its_factors():
    rank = int(0.25 * 48 * 192 / (48 + 192))
    found = make_layer("low_rank").bytes_read(torch.tensor([[3, 1]]))
    assert found["compressed"] == EXPERT_BYTES + 2 * rank * (48 + 192) * 2


def test_bytes_read_of_a_quantised_layer_are_its_codes_and_scales():
    found = make_layer("quantized").bytes_read(torch.tensor([[3, 1]]))
    # Rows of 192 entries, of which the first has nine bits more; a scale per projection.
    residual = 48 * (3 * 192 + 9 + 7) // 8 + 48 * 3
    center = 48 * 192 // 2 + 48 * 6
    # Each matrix has its largest scale and six numbers of its layout.
    assert found["compressed"] == 2 * residual + center + 3 * 28


def test_a_quantised_layer_has_entries_of_the_right_size_and_may_have_no_center():
    spec = CodecSpec(name="quantized", options={"bits": 2, "coder": "scalar"})
    layer = RandomLayer(SHAPE, spec, CPU)
    assert layer.weights.centers == ()
    assert float(layer.gate_up.float().std()) == pytest.approx(0.02, rel=0.2)


def test_resident_bytes_are_close_to_the_stored_ones(layer):
    everything = torch.arange(SHAPE.experts)
    assert layer.resident_bytes == layer.bytes_read(everything)["compressed"]
    assert layer.resident_bytes == pytest.approx(layer.stored_bytes, rel=0.02)


def test_exact_output_is_the_weighted_sum_of_expert_mlps(layer):
    x_TH, index_TK, weights_TK = layer.tokens(7)
    found_TH = layer.exact(x_TH, index_TK, weights_TK)
    for t in range(7):
        x_H = x_TH[t].double()
        expected_H = torch.zeros(64, dtype=torch.float64)
        for k, weight in zip(index_TK[t].tolist(), weights_TK[t].tolist(), strict=True):
            rows_ID = _dense_rows(layer, k).double()
            h_I = F.silu(rows_ID[:, :64] @ x_H) * (rows_ID[:, 64:128] @ x_H)
            expected_H += weight * (h_I @ rows_ID[:, 128:])
        assert torch.allclose(found_TH[t].double(), expected_H, rtol=1e-4, atol=1e-7)


def test_shapes_are_named_or_given_as_sizes():
    assert parse_shape("mixtral-half") == LayerShape("mixtral-half", 4096, 7168, 8, 2)
    assert parse_shape("8x4x3x1") == LayerShape("8x4x3x1", 8, 4, 3, 1)
    for name, shape in SHAPES.items():
        if not name.endswith("-half"):
            assert 2 * SHAPES[f"{name}-half"].rows == shape.rows
    for wrong in ("mistral", "8x4x3", "8x4x2x3", "8x0x2x1"):
        with pytest.raises(ValueError, match=wrong):
            parse_shape(wrong)
