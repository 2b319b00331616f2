"""Residuals of a group: what is kept, honest errors, and alternation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from resmoe_dist.codecs import DenseResidual, EncodedResidual, LowRankResidual, PrunedResidual
from resmoe_dist.compression.alignment import align
from resmoe_dist.compression.blocks import AlignedExperts, BlockSizes, EntryWeights
from resmoe_dist.compression.encoding import BALANCED_RUN, Encoded, encode_group

DEFAULT_SIZES = BlockSizes()
seeds = st.integers(0, 2**32 - 1)
EIGHTHS = st.integers(0, 8).map(lambda n: n / 8)
every_center = pytest.mark.parametrize("center", ["none", "barycenter", "joint"])
every_allocation = pytest.mark.parametrize("allocate", ["expert", "group"])


def _encode(
    experts: Tensor | AlignedExperts,
    codec: type[EncodedResidual] = PrunedResidual,
    *,
    center: str = "joint",
    keep: float = 0.25,
    allocate: str = "group",
    dtype: torch.dtype = torch.float32,
    weights: EntryWeights | None = None,
    sizes: BlockSizes = DEFAULT_SIZES,
) -> Encoded:
    """Experts given as a tensor are in aligned order already."""
    if isinstance(experts, Tensor):
        count, rows, _ = experts.shape
        perms = torch.arange(rows).repeat(count, 1)
        experts = AlignedExperts(experts, perms, weights, sizes=sizes)
    return encode_group(experts, codec, center=center, keep=keep, allocate=allocate, dtype=dtype)


def _restored(encoded: Encoded) -> np.ndarray:
    """What the stored tensors stand for, [N, I, D] in float64."""
    shared = 0.0 if encoded.center_ID is None else encoded.center_ID.double().numpy()
    return np.stack([shared + r.decode().double().numpy() for r in encoded.residuals])


def _kept(encoded: Encoded) -> list[int]:
    return [residual.values.numel() for residual in encoded.residuals]


CODEC_AND_CENTER = [
    *((PrunedResidual, name) for name in ("joint", "barycenter", "mean", "none")),
    *((LowRankResidual, name) for name in ("joint", "barycenter", "none")),
    (DenseResidual, "joint"),
]


def _weights(rows: int, columns: int) -> tuple[EntryWeights, np.ndarray]:
    """Weights whose row part counts in the last third of the columns, and their matrix."""
    first = columns - columns // 3
    weights = EntryWeights(
        0.1 + 2 * torch.rand(columns), 0.1 + 3 * torch.rand(rows), slice(first, columns)
    )
    matrix = np.tile(weights.column_D.double().numpy(), (rows, 1))
    matrix[:, first:] *= weights.row_I.double().numpy()[:, None]
    return weights, matrix


@pytest.mark.parametrize(("codec", "center"), CODEC_AND_CENTER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
def test_errors_are_those_of_what_the_stored_tensors_restore(codec, center, dtype, keep):
    experts = torch.randn(3, 14, 20)

    encoded = _encode(experts, codec, center=center, keep=keep, dtype=dtype)

    exact = experts.double().numpy()
    for expert, restored, loss in zip(exact, _restored(encoded), encoded.losses, strict=True):
        # Exact but for float32 differences of numbers near one.
        expected = ((expert - restored) ** 2).sum()
        assert loss.squared_error == pytest.approx(expected, rel=1e-4, abs=expert.size * 1e-14)
        assert loss.squared_norm == pytest.approx((expert**2).sum(), rel=1e-6)
        assert loss.weighted_squared_error == loss.squared_error
        assert loss.weighted_squared_norm == loss.squared_norm


@pytest.mark.parametrize(("codec", "center"), CODEC_AND_CENTER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_allocation
def test_weighted_errors_are_those_of_what_the_stored_tensors_restore(
    codec, center, dtype, allocate
):
    experts = torch.randn(3, 14, 20)
    weights, matrix = _weights(14, 20)

    encoded = _encode(
        experts, codec, center=center, keep=0.3, dtype=dtype, weights=weights, allocate=allocate
    )

    exact, restored = experts.double().numpy(), _restored(encoded)
    errors = ((matrix * (exact - restored)) ** 2).sum((1, 2))
    for expert, again, error, loss in zip(exact, restored, errors, encoded.losses, strict=True):
        tiny = expert.size * 1e-13
        assert loss.weighted_squared_error == pytest.approx(error, rel=1e-4, abs=tiny)
        norm = ((matrix * expert) ** 2).sum()
        assert loss.weighted_squared_norm == pytest.approx(norm, rel=1e-6)
        unweighted = ((expert - again) ** 2).sum()
        assert loss.squared_error == pytest.approx(unweighted, rel=1e-4, abs=tiny)
        assert loss.squared_norm == pytest.approx((expert**2).sum(), rel=1e-6)
    assert encoded.squared_error == pytest.approx(errors.sum(), rel=1e-4, abs=exact.size * 1e-13)


@pytest.mark.parametrize("codec", [PrunedResidual, LowRankResidual])
def test_centre_and_values_are_stored_in_the_dtype_asked_for(codec):
    encoded = _encode(torch.randn(3, 14, 20), codec, keep=0.5, dtype=torch.bfloat16)

    assert encoded.center_ID.dtype == torch.bfloat16
    assert {residual.decode().dtype for residual in encoded.residuals} == {torch.bfloat16}


def test_a_codec_without_a_centre_gets_none():
    encoded = _encode(torch.randn(3, 4, 5), DenseResidual)

    assert encoded.center_ID is None
    assert [loss.squared_error for loss in encoded.losses] == [0, 0, 0]


@pytest.mark.parametrize("center", ["barycenter", "mean"])
def test_the_two_step_centre_is_the_mean_and_each_expert_keeps_its_largest_residuals(center):
    experts = torch.randn(3, 9, 11)

    encoded = _encode(experts, center=center, allocate="expert")

    mean = experts.double().numpy().mean(0)
    np.testing.assert_allclose(encoded.center_ID.numpy(), mean, atol=1e-6)
    for expert, residual in zip(experts.double().numpy(), encoded.residuals, strict=True):
        exact = expert - mean
        least_kept = np.sort(np.abs(exact).ravel())[-int(0.25 * 99)]
        expected = np.where(np.abs(exact) >= least_kept, exact, 0)
        np.testing.assert_allclose(residual.decode().numpy(), expected, atol=1e-6)


def test_without_a_centre_the_largest_weights_of_the_group_are_kept():
    experts = torch.randn(4, 9, 11) * torch.tensor([0.1, 1.0, 1.0, 3.0]).view(4, 1, 1)

    encoded = _encode(experts, center="none")

    least_kept = experts.abs().flatten().sort().values[-99]
    assert encoded.center_ID is None
    decoded = torch.stack([residual.decode() for residual in encoded.residuals])
    assert torch.equal(decoded, experts.where(experts.abs() >= least_kept, torch.tensor(0.0)))


@every_center
@pytest.mark.parametrize("keep", [0.0, 0.013, 0.25, 0.5])
@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
def test_each_expert_keeps_its_share_exactly(center, keep, weighted):
    # Residuals of very different size: sharing would give nearly all to the last.
    experts = torch.randn(4, 13, 17) * torch.tensor([0.1, 1.0, 1.0, 9.0]).view(4, 1, 1)
    weights = _weights(13, 17)[0] if weighted else None

    encoded = _encode(experts, center=center, keep=keep, allocate="expert", weights=weights)

    assert _kept(encoded) == [int(keep * 13 * 17)] * 4


@every_center
@pytest.mark.parametrize("keep", [0.0, 0.013, 0.25, 0.5])
@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
def test_the_group_keeps_its_share_exactly_where_it_counts_most(center, keep, weighted):
    experts = torch.randn(4, 13, 17) * torch.tensor([0.1, 1.0, 1.0, 9.0]).view(4, 1, 1)
    weights, matrix = _weights(13, 17) if weighted else (None, 1.0)

    encoded = _encode(experts, center=center, keep=keep, weights=weights)

    assert sum(_kept(encoded)) == int(keep * 4 * 13 * 17)
    shared = 0.0 if encoded.center_ID is None else encoded.center_ID.double().numpy()
    away = np.abs(matrix * (experts.double().numpy() - shared))
    kept = np.stack([residual.decode().numpy() != 0 for residual in encoded.residuals])
    assert away[kept].min(initial=np.inf) >= away[~kept].max() * (1 - 1e-6)


@every_center
@every_allocation
@pytest.mark.parametrize("sample_entries", [40, 1 << 19], ids=["a sample", "all entries"])
def test_of_equal_residuals_exactly_as_many_are_kept_as_the_budget_has_room_for(
    center, allocate, sample_entries
):
    sizes = BlockSizes(block_values=60, sample_entries=sample_entries)
    # No residual is zero but where experts agree; most are equal.
    experts = torch.randint(1, 4, (4, 15, 20)).float() * (2 * torch.randint(2, (4, 15, 20)) - 1)

    for keep in (0.1, 1 / 3, 0.5):
        encoded = _encode(experts, center=center, keep=keep, allocate=allocate, sizes=sizes)

        budget = [int(keep * 300)] * 4 if allocate == "expert" else [int(keep * 1200)]
        shared = 0.0 if encoded.center_ID is None else encoded.center_ID
        nonzero = (experts != shared).sum((1, 2)).tolist()
        nonzero = nonzero if allocate == "expert" else [sum(nonzero)]
        kept = _kept(encoded) if allocate == "expert" else [sum(_kept(encoded))]
        assert kept == [min(pair) for pair in zip(budget, nonzero, strict=True)]


@every_center
@every_allocation
def test_how_many_entries_are_kept_is_told(center, allocate):
    encoded = _encode(torch.randn(3, 8, 9), center=center, keep=0.4, allocate=allocate)

    assert [loss.kept for loss in encoded.losses] == _kept(encoded)


def test_zeros_are_never_kept():
    experts = torch.randn(3, 8, 10)
    experts[:, ::2] = 0

    encoded = _encode(experts, center="none", keep=0.9)

    assert sum(_kept(encoded)) == 3 * 4 * 10
    assert all(bool((residual.values != 0).all()) for residual in encoded.residuals)


@pytest.mark.parametrize(("codec", "center"), CODEC_AND_CENTER)
@every_allocation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_in_aligned_order_are_encoded_as_if_they_had_been_stored_so(
    codec, center, allocate, dtype
):
    experts = torch.randn(3, 11, 13).to(dtype)
    perms = torch.stack([torch.randperm(11) for _ in range(3)])
    ordered = torch.stack([e[perm].float() for e, perm in zip(experts, perms, strict=True)])

    found = _encode(AlignedExperts(experts, perms), codec, center=center, allocate=allocate)

    expected = _encode(ordered, codec, center=center, allocate=allocate)
    assert np.array_equal(_restored(found), _restored(expected))


@every_center
@every_allocation
def test_blocks_are_joined_to_the_residual_of_the_whole(center, allocate):
    experts = torch.randn(3, 11, 13)
    expected = _encode(experts, center=center, allocate=allocate)

    found = _encode(experts, center=center, allocate=allocate, sizes=BlockSizes(block_values=60))

    for residual, whole in zip(found.residuals, expected.residuals, strict=True):
        for name, tensor in whole.tensors().items():
            assert residual.tensors()[name].dtype == tensor.dtype
            assert torch.equal(residual.tensors()[name], tensor), name
    for loss, whole in zip(found.losses, expected.losses, strict=True):
        assert loss.squared_error == pytest.approx(whole.squared_error, rel=1e-12)
        assert loss.kept == whole.kept


@pytest.mark.parametrize("center", ["joint", "barycenter"])
def test_residuals_make_good_the_rounding_of_the_centre(center):
    # Near 1000, bfloat16 rounds by up to 2; the experts differ by a tenth.
    experts = 1000 + torch.rand(9, 14) + 0.1 * torch.randn(3, 9, 14)

    encoded = _encode(experts, center=center, keep=1.0, dtype=torch.bfloat16)

    assert (encoded.center_ID.float() - experts.mean(0)).abs().max() > 1
    for expert, residual in zip(experts, encoded.residuals, strict=True):
        kept = residual.decode().float() != 0
        lost = (expert - encoded.center_ID.float() - residual.decode().float()).abs()
        # Half a unit in the last of 8 bits of a residual of at most 3.
        assert lost[kept].max() <= 3 * 2**-8


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5])
@every_allocation
def test_weights_lower_the_weighted_error(keep, allocate):
    weights, matrix = _weights(24, 30)
    for count in (2, 5, 70):
        experts = torch.randn(count, 24, 30)
        found = _encode(experts, keep=keep, weights=weights, allocate=allocate)
        plain = _restored(_encode(experts, keep=keep, allocate=allocate))

        without = ((matrix * (experts.double().numpy() - plain)) ** 2).sum()
        assert found.squared_error < 0.9 * without


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
def test_alternation_never_ends_above_the_plain_barycentre(dtype, weighted):
    weights = _weights(12, 18)[0] if weighted else None
    for trial in range(5):
        generator = torch.Generator().manual_seed(trial)
        base = torch.randn(12, 18, generator=generator)
        experts = base + (0.1 + trial / 5) * torch.randn(4, 12, 18, generator=generator)
        for keep in (0.1, 0.4, 0.8):
            joint, plain = (
                _encode(
                    experts, LowRankResidual, center=name, keep=keep, dtype=dtype, weights=weights
                )
                for name in ("joint", "barycenter")
            )
            assert joint.squared_error <= plain.squared_error


def test_a_round_of_alternation_that_loses_is_not_returned():
    experts = torch.randn(4, 5, 6)
    shares = [0.9] * 4 + [0.1] * 4

    class Shrinking(DenseResidual):
        """Keeps a share of every entry, less in the second round."""

        uses_center = True

        @classmethod
        def encode(cls, residual_ID: Tensor, **_: object) -> DenseResidual:
            return DenseResidual(residual_ID.shape[1], {"weight": shares.pop(0) * residual_ID})

    encoded = _encode(experts, Shrinking, keep=0.5)

    assert not shares
    exact = experts - experts.mean(0)
    expected = [float((0.1 * expert).double().square().sum()) for expert in exact]
    assert [loss.squared_error for loss in encoded.losses] == pytest.approx(expected, rel=1e-4)


def test_alternation_finds_the_centre_from_which_every_expert_is_of_low_rank():
    # One rank apart from the base each, but from their mean six.
    base = torch.randn(12, 18)
    experts = base + torch.randn(6, 12, 1) @ torch.randn(6, 1, 18)

    joint, plain = (
        _encode(experts, LowRankResidual, center=name, keep=0.15)
        for name in ("joint", "barycenter")
    )

    assert joint.residuals[0].left.shape == (12, 1)
    assert joint.squared_error < 0.01 * plain.squared_error


@given(count=st.integers(1, 5), seed=seeds, decades=st.sampled_from([0, 8, 15]))
@settings(deadline=None)
def test_keeping_everything_restores_every_entry_to_float32_rounding(count, seed, decades):
    generator = torch.Generator().manual_seed(seed)
    # Every entry has a magnitude of its own, over so many decades.
    magnitudes = 10 ** (decades * (torch.rand(6, 7, generator=generator) - 0.5))
    experts = torch.randn(count, 6, 7, generator=generator) * magnitudes

    encoded = _encode(experts, keep=1.0)

    restored = torch.stack([encoded.center_ID + r.decode() for r in encoded.residuals])
    units = torch.finfo(torch.float32).eps * experts.abs().amax(0)
    assert bool(((restored - experts).abs() <= 2 * units).all())


@st.composite
def groups(draw: st.DrawFn) -> Tensor:
    """Any shape; one expert, equal experts, rows of zeros; any scale that float32 squares leave."""
    count, rows, columns = (draw(st.integers(1, most)) for most in (5, 9, 8))
    generator = torch.Generator().manual_seed(draw(seeds))
    experts = torch.randn(count, rows, columns, generator=generator)
    if draw(st.booleans()):
        experts = experts.round()
    if count > 1 and draw(st.booleans()):
        # Equal up to the order of their rows.
        experts[-1] = experts[0][torch.randperm(rows, generator=generator)]
    if draw(st.booleans()):
        experts[:, torch.rand(rows, generator=generator) < 0.5] = 0
    return experts * draw(st.sampled_from([1e-30, 1.0, 1e30]))


@given(
    experts=groups(),
    method=st.sampled_from(["loo", "pot", "none"]),
    center=st.sampled_from(["joint", "barycenter", "none"]),
    allocate=st.sampled_from(["expert", "group"]),
)
@settings(deadline=None, max_examples=100)
def test_what_is_compressed_with_everything_kept_is_restored_up_to_row_order(
    experts, method, center, allocate
):
    alignment = align(experts, method)
    found = _encode(
        AlignedExperts(experts, alignment.permutations_EI),
        center=center,
        keep=1.0,
        allocate=allocate,
    )

    ordered = alignment.apply(experts).double().numpy()
    units = torch.finfo(torch.float32).eps * np.abs(ordered).max(0)
    assert np.all(np.abs(_restored(found) - ordered) <= 2 * units)
    for expert, perm in zip(experts, alignment.permutations_EI, strict=True):
        assert torch.equal(expert[perm].flatten().sort().values, expert.flatten().sort().values)
        assert sorted(perm.tolist()) == list(range(len(expert)))


@given(experts=groups(), center=st.sampled_from(["joint", "barycenter"]), method=st.just("loo"))
@settings(deadline=None, max_examples=40)
def test_low_rank_with_everything_kept_restores_up_to_row_order(experts, center, method):
    alignment = align(experts, method)
    aligned = AlignedExperts(experts, alignment.permutations_EI)

    found = _encode(aligned, LowRankResidual, center=center, keep=1.0)

    ordered = alignment.apply(experts).double().numpy()
    assert np.abs(_restored(found) - ordered).max() <= 1e-5 * np.abs(ordered).max()


@given(
    experts=groups(),
    center=st.sampled_from(["joint", "barycenter", "none"]),
    allocate=st.sampled_from(["expert", "group"]),
    shares=st.tuples(EIGHTHS, EIGHTHS),
)
@settings(deadline=None, max_examples=100)
def test_the_error_does_not_rise_as_more_is_kept(experts, center, allocate, shares):
    if center == "joint" and allocate == "expert":
        # The joint centre is the best one for a budget that the group shares.
        allocate = "group"
    less, more = sorted(shares)

    errors = [
        _encode(experts, center=center, keep=keep, allocate=allocate).squared_error
        for keep in (more, less)
    ]

    # Where nothing is lost but rounding, either may be more.
    rounding = 1e-13 * float(experts.double().square().sum())
    assert errors[0] <= errors[1] * (1 + 1e-5) + rounding


@pytest.mark.parametrize("columns", [64, 192, 200])
def test_a_balanced_mask_keeps_equally_many_of_every_run(columns):
    experts = torch.randn(3, 10, columns)

    encoded = _encode(experts, keep=0.25, allocate="block")

    for residual, expert in zip(encoded.residuals, experts, strict=True):
        kept = residual.decode() != 0
        away = (expert - encoded.center_ID.float()).abs()
        for first in range(0, columns, BALANCED_RUN):
            run = slice(first, first + BALANCED_RUN)
            count = kept[:, run].shape[1] // 4
            assert (kept[:, run].sum(1) == count).all()
            least_kept = away[:, run].masked_fill(~kept[:, run], torch.inf).amin(1)
            most_dropped = away[:, run].masked_fill(kept[:, run], 0).amax(1)
            assert (least_kept >= most_dropped).all()


def test_a_balanced_mask_keeps_nearly_the_energy_of_a_free_one():
    """98.9 % of it at 16 of 64, where residuals are Gaussian."""
    experts = torch.randn(1, 64, 4096)

    energy = {
        allocate: float(
            _encode(experts, center="none", keep=0.25, allocate=allocate)
            .residuals[0]
            .decode()
            .square()
            .sum()
        )
        for allocate in ("block", "expert")
    }

    assert 0.98 <= energy["block"] / energy["expert"] < 1
