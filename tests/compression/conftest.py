"""Fixtures shared by the tests of the compression mathematics."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def set_threads():
    """A function that sets PyTorch's number of threads until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
