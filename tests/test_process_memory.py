"""The memory of this process."""

from __future__ import annotations

import torch

from resmoe_dist.process_memory import resident_bytes


def test_allocated_memory_is_resident():
    before = resident_bytes()

    tensor = torch.ones(64 * 2**20, dtype=torch.uint8)

    assert tensor.nbytes * 0.9 <= resident_bytes() - before <= tensor.nbytes * 1.5
