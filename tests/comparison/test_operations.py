"""Operations per token, against counts by hand from the shapes of the model."""

from __future__ import annotations

import pytest

from resmoe_dist.comparison.operations import flops_per_token
from resmoe_dist.runtime.loading import load_model
from tests.models import compress, random_sequences

# The Mixtral of `tests.models`: two layers, two of four experts per token.
H, ROWS, HEADS, HEAD_DIM, EXPERTS, TOP_K, LAYERS, VOCABULARY = 20, 27, 2, 10, 4, 2, 2, 64
TOKENS = 12
COLUMNS = 3 * H
EXPERT = 2 * ROWS * COLUMNS


@pytest.fixture(scope="module")
def sequences():
    return random_sequences(TOKENS)


def _beside_experts() -> int:
    """Per token: projections, attention over all pairs, router and head."""
    projections = 2 * 4 * H * HEADS * HEAD_DIM
    attention = 2 * 2 * HEADS * HEAD_DIM * TOKENS
    return LAYERS * (projections + attention + 2 * H * EXPERTS) + 2 * H * VOCABULARY


def _measured(folder, sequences):
    return flops_per_token(load_model(folder), sequences)


def test_source_counts_products_and_attention(family_folder, sequences):
    # The key and value projections are as wide as the query's here.
    expected = _beside_experts() + LAYERS * TOP_K * EXPERT
    assert _measured(family_folder("mixtral"), sequences) == pytest.approx(expected)


def test_pruned_entries_count_as_zeros_that_are_multiplied(family_folder, tmp_path, sequences):
    source = family_folder("mixtral")
    compress(source, tmp_path / "c", keep=0.1)

    assert _measured(tmp_path / "c", sequences) == _measured(source, sequences)


def test_factors_count_as_they_are_multiplied(family_folder, tmp_path, sequences):
    compress(family_folder("mixtral"), tmp_path / "c", codec="low_rank:rank=1", center="none")

    # x · rightᵀ · leftᵀ for gate and for up, and once back: each with one rank.
    factors = 3 * 2 * (ROWS + H)
    expected = _beside_experts() + LAYERS * TOP_K * factors
    assert _measured(tmp_path / "c", sequences) == pytest.approx(expected)


def test_shared_centre_counts_once_per_token(family_folder, tmp_path, sequences):
    compress(family_folder("mixtral"), tmp_path / "c", codec="low_rank:rank=1")

    expected = _beside_experts() + LAYERS * (EXPERT + TOP_K * 3 * 2 * (ROWS + H))
    assert _measured(tmp_path / "c", sequences) == pytest.approx(expected)


def test_counting_leaves_the_execution_as_it_was(family_folder, tmp_path, sequences):
    compress(family_folder("mixtral"), tmp_path / "c")
    model = load_model(tmp_path / "c")
    ways = [m.execution for m in model.modules() if hasattr(m, "execution")]

    flops_per_token(model, sequences)

    assert [m.execution for m in model.modules() if hasattr(m, "execution")] == ways
