"""Sizes such as 8GB, as users write them."""

from __future__ import annotations

import re

import pytest

from resmoe_dist.errors import UserError
from resmoe_dist.sizes import parse_size

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
]


@pytest.mark.parametrize("text", SIZES)
def test_size_is_parsed(text):
    assert parse_size(text) == SIZES[text]


@pytest.mark.parametrize("text", NOT_SIZES)
def test_other_text_is_a_user_error_that_quotes_it(text):
    with pytest.raises(UserError, match=re.escape(f"--max-memory {text}: not a size")):
        parse_size(text)
