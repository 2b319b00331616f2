"""Sizes and shares as users write them."""

from __future__ import annotations

import pytest

from resmoe_dist.sizes import parse_share, parse_size

SIZES = {
    "1": 1,
    "1B": 1,
    "8GB": 8 * 10**9,
    "8gb": 8 * 10**9,
    "8G": 8 * 10**9,
    "512MiB": 512 * 2**20,
    "512mib": 512 * 2**20,
    "512Mi": 512 * 2**20,
    "3 KiB": 3 * 2**10,
    " 7 kB ": 7000,
    "1.5T": 1.5 * 10**12,
    "0.5TiB": 2**39,
    ".5K": 500,
    "2e9": 2 * 10**9,
    "2E9": 2 * 10**9,
    "2e3MB": 2 * 10**9,
    "7500MiB": 7500 * 1024**2,
    "512 kib": 512 * 1024,
    "1.5G": 1500 * 10**6,
    "123": 123,
    "1b": 1,
}
NOT_SIZES = [
    "",
    " ",
    "0",
    "0GB",
    "0.4",
    "-1GB",
    "GB",
    "eight GB",
    "8XB",
    "8iB",
    "8GBs",
    "8 G B",
    "1..5GB",
    ".",
    "1,5GB",
    "8GB 8GB",
    "8e",
    "nan",
    "inf",
    "1e999",
    "1e308TB",
    "much",
    "0.1",
    "1..2GB",
]


@pytest.mark.parametrize("text", SIZES)
def test_sizes_are_bytes(text):
    assert parse_size(text) == SIZES[text]


@pytest.mark.parametrize("text", NOT_SIZES)
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
