"""Encoding a group: errors are those of the stored tensors, rows stay aligned, nothing is lost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tests.codecs.rounded_codec  # noqa: F401  (registers codec `rounded`)
from resmoe_dist.compression.alignment import align
from resmoe_dist.compression.blocks import AlignedExperts, BlockSizes
from tests.compression.encoding_cases import (
    center_of,
    encode,
    every_allocation,
    every_center,
    every_codec_and_center,
    groups,
    kept_entries,
    restored,
    weights_and_matrix,
)

EIGHTHS = st.integers(0, 8).map(lambda n: n / 8)
every_center_codec = pytest.mark.parametrize("center_codec", ["dense", "rounded", "low_rank"])


@every_codec_and_center
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
def test_errors_are_those_of_what_the_stored_tensors_restore(codec, center, dtype, keep):
    experts = torch.randn(3, 14, 20)

    encoded = encode(experts, codec, center=center, keep=keep, dtype=dtype)

    exact = experts.double().numpy()
    for expert, found, loss in zip(exact, restored(encoded), encoded.losses, strict=True):
        # Exact except for float32 differences of numbers near one.
        expected = ((expert - found) ** 2).sum()
        assert loss.squared_error == pytest.approx(expected, rel=1e-4, abs=expert.size * 1e-14)
        assert loss.squared_norm == pytest.approx((expert**2).sum(), rel=1e-6)
        assert loss.weighted_squared_error == loss.squared_error
        assert loss.weighted_squared_norm == loss.squared_norm


@every_codec_and_center
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_allocation
def test_weighted_errors_are_those_of_what_the_stored_tensors_restore(
    codec, center, dtype, allocate
):
    experts = torch.randn(3, 14, 20)
    weights, matrix = weights_and_matrix(14, 20)

    encoded = encode(
        experts, codec, center=center, keep=0.3, dtype=dtype, weights=weights, allocate=allocate
    )

    exact, found = experts.double().numpy(), restored(encoded)
    errors = ((matrix * (exact - found)) ** 2).sum((1, 2))
    for expert, again, error, loss in zip(exact, found, errors, encoded.losses, strict=True):
        tiny = expert.size * 1e-13
        assert loss.weighted_squared_error == pytest.approx(error, rel=1e-4, abs=tiny)
        norm = ((matrix * expert) ** 2).sum()
        assert loss.weighted_squared_norm == pytest.approx(norm, rel=1e-6)
        unweighted = ((expert - again) ** 2).sum()
        assert loss.squared_error == pytest.approx(unweighted, rel=1e-4, abs=tiny)
        assert loss.squared_norm == pytest.approx((expert**2).sum(), rel=1e-6)
    assert encoded.squared_error == pytest.approx(errors.sum(), rel=1e-4, abs=exact.size * 1e-13)


@pytest.mark.parametrize("codec", ["pruned", "low_rank"])
def test_centre_and_values_are_stored_in_the_dtype_asked_for(codec):
    encoded = encode(torch.randn(3, 14, 20), codec, keep=0.5, dtype=torch.bfloat16)

    assert encoded.center.weight.dtype == torch.bfloat16
    assert {residual.decode().dtype for residual in encoded.residuals} == {torch.bfloat16}


def test_dense_residuals_without_a_centre_lose_nothing():
    encoded = encode(torch.randn(3, 4, 5), "dense", center="none")

    assert encoded.center is None
    assert [loss.squared_error for loss in encoded.losses] == [0, 0, 0]


@pytest.mark.parametrize("center", ["barycenter", "mean"])
def test_barycentre_is_the_mean_and_each_expert_keeps_its_largest_residuals(center):
    experts = torch.randn(3, 9, 11)

    encoded = encode(experts, center=center, allocate="expert")

    mean = experts.double().numpy().mean(0)
    np.testing.assert_allclose(center_of(encoded), mean, atol=1e-6)
    for expert, residual in zip(experts.double().numpy(), encoded.residuals, strict=True):
        exact = expert - mean
        least_kept = np.sort(np.abs(exact).ravel())[-int(0.25 * 99)]
        expected = np.where(np.abs(exact) >= least_kept, exact, 0)
        np.testing.assert_allclose(residual.decode().numpy(), expected, atol=1e-6)


def test_without_a_centre_the_largest_weights_of_the_group_are_kept():
    experts = torch.randn(4, 9, 11) * torch.tensor([0.1, 1.0, 1.0, 3.0]).view(4, 1, 1)

    encoded = encode(experts, center="none")

    least_kept = experts.abs().flatten().sort().values[-99]
    assert encoded.center is None
    decoded = torch.stack([residual.decode() for residual in encoded.residuals])
    assert torch.equal(decoded, experts.where(experts.abs() >= least_kept, torch.tensor(0.0)))


@every_codec_and_center
@every_allocation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_permuted_experts_encode_like_experts_stored_in_that_order(codec, center, allocate, dtype):
    experts = torch.randn(3, 11, 13).to(dtype)
    perms = torch.stack([torch.randperm(11) for _ in range(3)])
    ordered = torch.stack([e[perm].float() for e, perm in zip(experts, perms, strict=True)])

    found = encode(AlignedExperts(experts, perms), codec, center=center, allocate=allocate)

    expected = encode(ordered, codec, center=center, allocate=allocate)
    assert np.array_equal(restored(found), restored(expected))


@every_center
@every_allocation
def test_block_size_does_not_change_what_is_stored(center, allocate):
    experts = torch.randn(3, 11, 13)
    expected = encode(experts, center=center, allocate=allocate)

    found = encode(experts, center=center, allocate=allocate, sizes=BlockSizes(block_values=60))

    for residual, whole in zip(found.residuals, expected.residuals, strict=True):
        for name, tensor in whole.tensors().items():
            assert residual.tensors()[name].dtype == tensor.dtype
            assert torch.equal(residual.tensors()[name], tensor), name
    for loss, whole in zip(found.losses, expected.losses, strict=True):
        assert loss.squared_error == pytest.approx(whole.squared_error, rel=1e-12)
        assert loss.kept == whole.kept


@pytest.mark.parametrize("center", ["joint", "barycenter"])
def test_residuals_make_up_for_the_rounding_of_the_centre(center):
    # Near 1000, bfloat16 rounds by up to 2; the experts differ by a tenth.
    experts = 1000 + torch.rand(9, 14) + 0.1 * torch.randn(3, 9, 14)

    encoded = encode(experts, center=center, keep=1.0, dtype=torch.bfloat16)

    center_ID = encoded.center.weight.float()
    assert (center_ID - experts.mean(0)).abs().max() > 1
    for expert, residual in zip(experts, encoded.residuals, strict=True):
        kept = residual.decode().float() != 0
        lost = (expert - center_ID - residual.decode().float()).abs()
        # Half a unit in the last of 8 bits of a residual of at most 3.
        assert lost[kept].max() <= 3 * 2**-8


@every_center_codec
@pytest.mark.parametrize("center", ["joint", "barycenter"])
@pytest.mark.parametrize("codec", ["pruned", "low_rank"])
def test_residuals_make_up_for_what_the_codec_of_the_centre_loses(codec, center, center_codec):
    experts = torch.randn(12, 15) + 0.1 * torch.randn(3, 12, 15)

    encoded = encode(experts, codec, center=center, center_codec=center_codec, keep=0.4)

    assert encoded.center.name == center_codec
    for expert, found, loss in zip(
        experts.double().numpy(), restored(encoded), encoded.losses, strict=True
    ):
        assert loss.squared_error == pytest.approx(((expert - found) ** 2).sum(), rel=1e-4)


@every_center_codec
def test_residuals_are_taken_against_the_decoded_centre(center_codec):
    experts = torch.randn(8, 10) + 0.1 * torch.randn(3, 8, 10)

    encoded = encode(experts, "dense", center="barycenter", center_codec=center_codec, keep=0.3)

    # Dense residuals restore the experts, whatever the centre's codec lost.
    np.testing.assert_allclose(restored(encoded), experts.numpy(), atol=1e-6)
    lost = np.abs(center_of(encoded) - experts.double().numpy().mean(0)).max()
    assert bool(lost > 1e-3) is (center_codec != "dense")


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5])
@every_allocation
def test_weights_lower_the_weighted_error(keep, allocate):
    weights, matrix = weights_and_matrix(24, 30)
    for count in (2, 5, 70):
        experts = torch.randn(count, 24, 30)
        found = encode(experts, keep=keep, weights=weights, allocate=allocate)
        plain = restored(encode(experts, keep=keep, allocate=allocate))

        without = ((matrix * (experts.double().numpy() - plain)) ** 2).sum()
        assert found.squared_error < 0.9 * without


@given(
    count=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
    decades=st.sampled_from([0, 8, 15]),
)
@settings(deadline=None)
def test_keeping_everything_restores_every_entry_to_float32_rounding(count, seed, decades):
    generator = torch.Generator().manual_seed(seed)
    # The magnitudes of the entries spread over so many decades.
    magnitudes = 10 ** (decades * (torch.rand(6, 7, generator=generator) - 0.5))
    experts = torch.randn(count, 6, 7, generator=generator) * magnitudes

    encoded = encode(experts, keep=1.0)

    found = torch.stack([encoded.center.decode() + r.decode() for r in encoded.residuals])
    units = torch.finfo(torch.float32).eps * experts.abs().amax(0)
    assert bool(((found - experts).abs() <= 2 * units).all())


@given(
    experts=groups(),
    method=st.sampled_from(["loo", "pot", "none"]),
    center=st.sampled_from(["joint", "barycenter", "none"]),
    allocate=st.sampled_from(["expert", "group"]),
)
@settings(deadline=None, max_examples=100)
def test_keeping_everything_restores_experts_up_to_row_order(experts, method, center, allocate):
    alignment = align(experts, method)
    aligned = AlignedExperts(experts, alignment.permutations_EI)

    found = encode(aligned, center=center, keep=1.0, allocate=allocate)

    ordered = alignment.apply(experts).double().numpy()
    units = torch.finfo(torch.float32).eps * np.abs(ordered).max(0)
    assert np.all(np.abs(restored(found) - ordered) <= 2 * units)
    for expert, perm in zip(experts, alignment.permutations_EI, strict=True):
        assert torch.equal(expert[perm].flatten().sort().values, expert.flatten().sort().values)
        assert sorted(perm.tolist()) == list(range(len(expert)))


@given(experts=groups(), center=st.sampled_from(["joint", "barycenter"]), method=st.just("loo"))
@settings(deadline=None, max_examples=40)
def test_low_rank_with_everything_kept_restores_up_to_row_order(experts, center, method):
    alignment = align(experts, method)
    aligned = AlignedExperts(experts, alignment.permutations_EI)

    found = encode(aligned, "low_rank", center=center, keep=1.0)

    ordered = alignment.apply(experts).double().numpy()
    assert np.abs(restored(found) - ordered).max() <= 1e-5 * np.abs(ordered).max()


@given(
    experts=groups(),
    center=st.sampled_from(["joint", "barycenter", "none"]),
    allocate=st.sampled_from(["expert", "group"]),
    shares=st.tuples(EIGHTHS, EIGHTHS),
)
@settings(deadline=None, max_examples=100)
def test_error_does_not_rise_as_more_is_kept(experts, center, allocate, shares):
    if center == "joint" and allocate == "expert":
        # The joint centre is optimal for a budget that the group shares.
        allocate = "group"
    less, more = sorted(shares)

    errors = [
        encode(experts, center=center, keep=keep, allocate=allocate).squared_error
        for keep in (more, less)
    ]

    # If only rounding is lost, either may be larger.
    rounding = 1e-13 * float(experts.double().square().sum())
    assert errors[0] <= errors[1] * (1 + 1e-5) + rounding


@every_center
@every_allocation
def test_number_of_kept_entries_is_reported(center, allocate):
    encoded = encode(torch.randn(3, 8, 9), center=center, keep=0.4, allocate=allocate)

    assert [loss.kept for loss in encoded.losses] == kept_entries(encoded)
