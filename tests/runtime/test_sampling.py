"""Draws that depend on the seed, the prompt and the position: not on the batch."""

from __future__ import annotations

import pytest
import torch

from resmoe_dist.runtime.sampling import sampling_processors

VOCABULARY = 50


def _draw(numbers: list[int], steps: int = 4, seed: int = 1, top_p: float | None = 0.9) -> dict:
    """The tokens of each prompt; all have the same logits at each step."""
    process = sampling_processors(seed, numbers, 0.7, top_p)
    logits = torch.randn(steps, VOCABULARY, generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(len(numbers), 1, dtype=torch.long)
    tokens = [process(ids, row.repeat(len(numbers), 1)).argmax(-1) for row in logits]
    return dict(zip(numbers, torch.stack(tokens, 1).tolist(), strict=True))


def test_draws_do_not_depend_on_the_rest_of_the_batch():
    together = _draw([0, 1, 2, 3])

    assert {**_draw([2]), **_draw([3, 0]), **_draw([1])} == together
    assert len({tuple(tokens) for tokens in together.values()}) > 1


def test_another_seed_gives_other_draws():
    assert _draw([0, 1], seed=1) == _draw([0, 1], seed=1) != _draw([0, 1], seed=2)


@pytest.mark.parametrize("top_p", [None, 0.5])
def test_tokens_are_drawn_with_the_probabilities_of_the_softmax(top_p):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    draws = 4000
    process = sampling_processors(3, range(draws), 0.8, top_p)

    scores = process(torch.zeros(draws, 1, dtype=torch.long), logits.repeat(draws, 1))

    expected = (logits / 0.8).softmax(0)
    if top_p is not None:  # the first token alone has more than half
        expected = torch.tensor([1.0, 0, 0, 0])
    found = scores.argmax(-1).bincount(minlength=4) / draws
    assert (found - expected).abs().max() < 0.03
