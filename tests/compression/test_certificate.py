"""The 8-bit certificate: its error bound holds, and it never certifies a wrong partner."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from resmoe_dist.compression.certificate import (
    RoundedRows,
    best_partners,
    certified_assignment,
    supports_int8_products,
)
from resmoe_dist.compression.scaling import power_of_two_scale
from tests.compression.random_pairs import every_kind, needs_int8, random_pair


@needs_int8
@pytest.mark.parametrize("kind", ["unrelated", "duplicate rows", "zeros", "coarse", "constant"])
def test_nothing_is_certified_if_rows_compete_for_a_partner(kind):
    target, expert = random_pair(kind, 90, 12)

    assert certified_assignment(target, expert, block_rows=1024, max_undecided=128) is None


@needs_int8
@every_kind
def test_rounding_error_is_at_most_its_bound(kind):
    target, expert = random_pair(kind, 70, 33)

    for matrix in (target, expert):
        rounded = RoundedRows(matrix)

        exact = matrix.double().numpy() / power_of_two_scale(matrix)
        scale = rounded.scale_I.double().numpy()[:, None]
        stored = rounded.integers_ID.double().numpy() * scale
        assert np.all(np.linalg.norm(exact - stored, axis=1) <= rounded.error_I.numpy())
        np.testing.assert_allclose(
            rounded.norm_I.numpy(), np.linalg.norm(stored, axis=1), rtol=1e-6, atol=0
        )


@needs_int8
@pytest.mark.parametrize("exact", ["neither", "target", "expert"])
@pytest.mark.parametrize("columns", [2, 3, 8])
def test_every_row_gets_its_best_partner(exact, columns):
    # Few columns, so that errors come close to the bound, and many partners, so that some nearly
    # tie. The result is not required to be a permutation, which would hide most errors.
    for _ in range(10):
        target, expert = torch.randn(2, 1000, columns)
        # Along an axis, the full error of the expert's row counts.
        target[::2, 1:] = 0
        target = target.roll(1, dims=1)
        for name, matrix in (("target", target), ("expert", expert)):
            if name == exact:
                matrix.mul_(40).round_().clamp_(-127, 127)
                matrix[:, 0] = 127

        found = best_partners(target, expert, block_rows=1024, max_undecided=1000)

        scores = target.double() @ expert.double().T
        lost = scores.amax(1) - scores.gather(1, found.unsqueeze(1)).squeeze(1)
        # Undecided rows are decided in float32.
        assert float(lost.max()) <= 1e-6 * float(scores.abs().max())


def test_int8_products_are_not_used_if_their_sums_could_overflow():
    max_columns = (2**31 - 1) // 127**2

    assert not supports_int8_products(max_columns + 1)
