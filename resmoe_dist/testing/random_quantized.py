"""Quantised matrices with random codes: encoding a real model's shape would take minutes.

Legend: R rows, P bytes of a row's stream.
"""

from __future__ import annotations

import torch

from resmoe_dist.codecs import QuantizedConfig, QuantizedMatrix
from resmoe_dist.design_matrix import ExpertShape

# The scales that are drawn: the largest four octaves' upper half.
_SCALES = (224, 256)


def random_quantized(
    shape: ExpertShape,
    config: QuantizedConfig,
    dtype: torch.dtype,
    std: float,
    generator: torch.Generator,
) -> QuantizedMatrix:
    """Uniform bits and scales. std: of the entries, about."""
    config = config.for_blocks(shape.projections)
    layout = config.layout(shape.columns)
    coder = config.make_coder()
    device = generator.device
    groups = layout["blocks"] * -(-layout["hidden"] // layout["group"])
    stream = coder.stream_bits(layout["blocks"] * layout["hidden"])
    size = (shape.rows, -(-stream // 8))
    codes_RP = torch.randint(256, size, generator=generator, dtype=torch.uint8, device=device)
    if stream % 8:
        # Bits after the last entry are zeros.
        codes_RP[:, -1] &= (1 << stream % 8) - 1
    scales = torch.randint(
        *_SCALES, (shape.rows, groups), generator=generator, dtype=torch.uint8, device=device
    )
    integers = coder.integers(torch.arange(1 << coder.window))
    # The root mean square of the drawn scales, in units of the largest.
    octaves = (torch.arange(*_SCALES) - 255) / 16
    typical = float((4.0**octaves).mean().sqrt() * integers.square().mean().sqrt())
    tensors = {
        "codes": codes_RP,
        "scales": scales,
        "biases": torch.zeros(shape.rows, 0, dtype=dtype, device=device),
        "top": torch.tensor([std / typical], device=device),
        "layout": torch.tensor(list(layout.values()), dtype=torch.int32),
    }
    return QuantizedMatrix((shape.rows, shape.columns), tensors, dtype)
