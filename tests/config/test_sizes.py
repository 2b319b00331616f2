"""Sizes and shares as users write them."""

from __future__ import annotations

import pytest

from resmoe_dist.sizes import parse_share, parse_size

SIZES = {
    "8GB": 8 * 10**9,
    "7500MiB": 7500 * 1024**2,
    "512 kib": 512 * 1024,
    "1.5G": 1500 * 10**6,
    "2e9": 2 * 10**9,
    "123": 123,
    "1b": 1,
}


@pytest.mark.parametrize("text", SIZES)
def test_sizes_are_bytes(text):
    assert parse_size(text) == SIZES[text]


@pytest.mark.parametrize("text", ["", "much", "8XB", "-1GB", "0", "0.1", "1..2GB", "GB", "inf"])
def test_other_text_is_not_a_size(text):
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


@pytest.mark.parametrize(("text", "share"), [("35%", 0.35), ("0.35", 0.35), (0.35, 0.35), ("1", 1)])
def test_shares_are_numbers_or_percent(text, share):
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "%", "half", "3%%"])
def test_other_text_is_not_a_share(text):
    with pytest.raises(ValueError, match="not a share"):
        parse_share(text)
