"""`svd` and `d2_moe`, by cases that can be followed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from resmoe_dist.codecs import CodecSpec
from resmoe_dist.compression.encoding import GroupCodecs
from resmoe_dist.compression.samples import LayerSamples
from resmoe_dist.design_matrix import ExpertShape
from resmoe_dist.errors import UserError
from resmoe_dist.methods import EncodedGroup, MethodSpec, SourceGroup, method_of
from resmoe_dist.methods.d2_moe import fitted_factors, moment_root

TWO_LAYER = ExpertShape(rows=2, hidden=2, gated=False)


def _encode(name: str, keep: float, group: SourceGroup, **options: Any) -> EncodedGroup:
    method = method_of(MethodSpec(name=name, options=options))
    residual = CodecSpec.parse(f"pruned:keep={keep}")
    wanted = GroupCodecs(residual, torch.float32, projections=group.shape.projections)
    return method.encode(group, method.codecs(wanted))


def _assert_equal(found: Tensor, expected: Any) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=0, atol=1e-5)


# svd


def test_svd_concat_keeps_the_largest_singular_value_of_the_whole_matrix():
    expert_ID = torch.tensor([[3.0, 0.0, 0.0, 4.0], [0.0, 2.0, 0.0, 0.0]])

    # r = 0.9 · 2 · 4 / (2 + 4) = 1.2
    found = _encode("svd", 0.9, SourceGroup(expert_ID.unsqueeze(0), TWO_LAYER))

    # Singular values 5 and 2.
    _assert_equal(found.residuals[0].decode(), [[3.0, 0, 0, 4], [0, 0, 0, 0]])
    assert found.losses[0].squared_error == pytest.approx(4.0, abs=1e-4)
    assert found.residuals[0].nbytes == (2 + 4) * 4


def test_svd_sep_keeps_the_largest_singular_value_of_each_projection():
    expert_ID = torch.tensor([[3.0, 0.0, 0.0, 1.0], [0.0, 2.0, 5.0, 0.0]])

    found = _encode("svd", 0.9, SourceGroup(expert_ID.unsqueeze(0), TWO_LAYER), form="sep")

    _assert_equal(found.residuals[0].decode(), [[3.0, 0, 0, 0], [0, 0, 5, 0]])
    assert found.losses[0].squared_error == pytest.approx(2.0**2 + 1.0**2, abs=1e-4)
    assert found.residuals[0].nbytes == 2 * (2 + 2) * 4


@pytest.mark.parametrize("form", ["concat", "sep"])
def test_svd_takes_a_rank(form):
    method = method_of(MethodSpec(name="svd", options={"form": form}))
    wanted = GroupCodecs(CodecSpec.parse("low_rank:rank=7"), torch.float32)

    assert method.codecs(wanted).residual.options["rank"] == 7


@pytest.mark.parametrize("name", ["svd", "d2_moe"])
def test_codec_without_a_budget_is_refused(name):
    method = method_of(MethodSpec(name=name))

    with pytest.raises(UserError, match=f"--method {name}: takes its rank from --keep"):
        method.codecs(GroupCodecs(CodecSpec.parse("dense"), torch.float32))


# d2_moe


def _group(experts_EID: Tensor, x_TH: Tensor, chosen_T: list[int]) -> SourceGroup:
    index_TK = torch.tensor(chosen_T).unsqueeze(1)
    samples = LayerSamples(inputs_TH=x_TH, index_TK=index_TK, weights_TK=torch.ones(len(x_TH), 1))
    return SourceGroup(experts_EID, TWO_LAYER, samples=samples, activation=torch.relu)


def test_base_is_the_mean_by_routing_frequency():
    experts_EID = torch.stack([torch.full((2, 4), 8.0), torch.full((2, 4), -4.0)])

    found = _encode("d2_moe", 1.0, _group(experts_EID, torch.randn(4, 2), [0, 0, 1, 0]))

    # 3/4 · 8 − 1/4 · 4
    assert found.center.decode().tolist() == [[5.0] * 4] * 2
    for residual, expert_ID in zip(found.residuals, experts_EID, strict=True):
        # At full rank nothing is lost but rounding.
        torch.testing.assert_close(5.0 + residual.decode(), expert_ID, rtol=0, atol=1e-3)


def test_experts_without_tokens_get_an_equal_share():
    experts_EID = torch.stack([torch.full((2, 4), 8.0), torch.full((2, 4), -4.0)])
    group = _group(experts_EID, torch.randn(2, 2), [7, 7])

    assert _encode("d2_moe", 0.5, group).center.decode().tolist() == [[2.0] * 4] * 2


def test_groups_find_their_experts_among_the_layers_tokens():
    experts_EID = torch.stack([torch.full((2, 4), 8.0), torch.full((2, 4), -4.0)])
    group = _group(experts_EID, torch.randn(4, 2), [0, 2, 3, 2])
    second_half = SourceGroup(**vars(group) | {"numbers": (2, 3)})

    # 2/3 · 8 − 1/3 · 4
    _assert_equal(_encode("d2_moe", 0.5, second_half).center.decode(), [[4.0] * 4] * 2)


def test_difference_fits_the_inputs_that_occur():
    # Equal but for `in`: ± diag(1, 2). The first input is ten times the second.
    delta_ID = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]])
    x_TH = torch.tensor([[10.0, 0.0], [0.0, 1.0], [10.0, 0.0], [0.0, 1.0]])
    group = _group(torch.stack([delta_ID, -delta_ID]), x_TH, [0, 0, 1, 1])

    found = _encode("d2_moe", 0.9, group, damping=1e-6)

    # Rank 1 of diag(1, 2) · diag(10, 1) keeps the first; plain SVD would keep the second.
    _assert_equal(found.residuals[0].decode(), [[1.0, 0, 0, 0], [0, 0, 0, 0]])
    assert found.losses[0].squared_error == pytest.approx(4.0, abs=1e-3)


def test_output_projection_fits_the_neurons_that_fire():
    # `in` is diag(10, 1) for both, `out` is ± diag(1, 2): the first neuron fires ten times as much.
    base_ID = torch.tensor([[10.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    delta_ID = torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 2.0]])
    group = _group(
        torch.stack([base_ID + delta_ID, base_ID - delta_ID]),
        torch.eye(2).repeat(2, 1),
        [0, 0, 1, 1],
    )

    found = _encode("d2_moe", 0.9, group, damping=1e-6)

    _assert_equal(found.center.decode(), base_ID)
    _assert_equal(found.residuals[0].decode(), [[0.0, 0, 1, 0], [0, 0, 0, 0]])


def test_fitted_factors_minimise_the_error_of_outputs():
    weight_NM, x_RM = torch.randn(6, 5), torch.randn(40, 5) * torch.tensor([5.0, 3, 1, 0.5, 0.1])

    left_Nr, right_rM = fitted_factors(weight_NM, moment_root(x_RM.double(), 1e-9), 2)

    # The least error of rank 2 is that of the outputs themselves.
    outputs_RN = x_RM.double() @ weight_NM.double().T
    least = torch.linalg.svdvals(outputs_RN)[2:].square().sum()
    lost = (outputs_RN - x_RM.double() @ (left_Nr @ right_rM).double().T).square().sum()
    assert float(lost) == pytest.approx(float(least), rel=1e-4)


def test_moment_root_is_a_factor_of_the_damped_moment():
    x_RM = torch.tensor([[3.0, 0.0], [1.0, 2.0]], dtype=torch.float64)

    root_MM = moment_root(x_RM, 0.5)

    # E[x xᵀ] = [[5, 1], [1, 2]], whose diagonal has the mean 3.5.
    _assert_equal(root_MM @ root_MM.T, torch.tensor([[6.75, 1.0], [1.0, 3.75]]).double())
    _assert_equal(moment_root(x_RM[:0], 0.5), torch.eye(2).double())
