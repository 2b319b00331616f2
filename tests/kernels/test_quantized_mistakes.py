"""Invalid quantised tensors given to the C++ kernels raise an error instead of crashing.

The layer has four rows of 3 · 40 entries of 3 bits in groups of 32, and one centre.
"""

from __future__ import annotations

import pytest
import torch

BYTE = torch.uint8


def matrix(**changed: object) -> object:
    arguments: dict[str, object] = {
        "codes": torch.zeros(4, 45, dtype=BYTE),
        "scales": torch.full((4, 6), 255, dtype=BYTE),
        "top": torch.ones(1),
        "coder": "scalar",
        "bits": 3,
        "window_bits": 3,
        "group_size": 32,
        "hidden": 40,
        "blocks": 3,
        "first_factor": 5,
        "second_factor": 7,
        "mark": 0,
    }
    return torch.classes.resmoe.QuantizedMatrix(*(arguments | changed).values())


def layer(**changed: object) -> object:
    arguments: dict[str, object] = {
        "residuals": [matrix()],
        "centers": [matrix()],
        "center_of": [0],
        "hidden": 40,
        "inputs": 2,
        "activation": "silu",
        "signs": torch.empty(0),
        "hadamard_size": 1,
        "dtype": torch.float32,
    }
    return torch.classes.resmoe.Layer.quantized(*(arguments | changed).values())


def wide(**changed: object) -> object:
    """A layer that can be rotated: 3 · 32 entries."""
    part = matrix(hidden=32, scales=torch.zeros(4, 3, dtype=BYTE))
    return layer(**{"residuals": [part], "centers": [part], "hidden": 32, **changed})


MISTAKES = {
    "codes of fewer columns": lambda: matrix(codes=torch.zeros(4, 44, dtype=BYTE)),
    "codes of another dtype": lambda: matrix(codes=torch.zeros(4, 45, dtype=torch.int8)),
    "codes of one dimension": lambda: matrix(codes=torch.zeros(180, dtype=BYTE)),
    "non-contiguous codes": lambda: matrix(codes=torch.zeros(45, 4, dtype=BYTE).T),
    "scales of other rows": lambda: matrix(scales=torch.zeros(3, 6, dtype=BYTE)),
    "scales of fewer groups": lambda: matrix(scales=torch.zeros(4, 5, dtype=BYTE)),
    "scales of another dtype": lambda: matrix(scales=torch.zeros(4, 6)),
    "two tops": lambda: matrix(top=torch.ones(2)),
    "top of another dtype": lambda: matrix(top=torch.ones(1).double()),
    "unknown coder": lambda: matrix(coder="huffman"),
    "five bits": lambda: matrix(bits=5, window_bits=5),
    "scalar with longer windows": lambda: matrix(window_bits=12),
    "trellis of eight bits": lambda: matrix(coder="trellis", bits=8, window_bits=12),
    "trellis with windows of 17 bits": lambda: matrix(coder="trellis", window_bits=17),
    "trellis with windows of 2 bits": lambda: matrix(coder="trellis", window_bits=2),
    "trellis without the first bits": lambda: matrix(coder="trellis", window_bits=12),
    "groups of part of a step": lambda: matrix(group_size=16, scales=torch.zeros(4, 9, dtype=BYTE)),
    "groups of no entries": lambda: matrix(group_size=0),
    "no columns": lambda: matrix(hidden=0),
    "no residuals": lambda: layer(residuals=[], center_of=[]),
    "centre numbers for other experts": lambda: layer(center_of=[0, 0]),
    "centre number too large": lambda: layer(center_of=[1]),
    "centre number below -1": lambda: layer(center_of=[-2]),
    "another hidden size": lambda: layer(hidden=41),
    "another number of blocks": lambda: layer(inputs=1),
    "three inputs": lambda: layer(inputs=3),
    "rows of other numbers": lambda: layer(
        centers=[matrix(codes=torch.zeros(5, 45, dtype=BYTE), scales=torch.zeros(5, 6, dtype=BYTE))]
    ),
    "unknown activation": lambda: layer(activation="gelu"),
    "half precision": lambda: layer(dtype=torch.float16),
    "fewer signs": lambda: wide(signs=torch.ones(16), hadamard_size=16),
    "signs of another dtype": lambda: wide(signs=torch.ones(32).double(), hadamard_size=16),
    "a transform of no power of two": lambda: layer(signs=torch.ones(40), hadamard_size=20),
    "a small transform": lambda: wide(signs=torch.ones(32), hadamard_size=8),
    "a transform longer than a row": lambda: wide(signs=torch.ones(32), hadamard_size=64),
    "tokens of another size": lambda: torch.ops.resmoe.rotate(layer(), torch.ones(2, 41), False),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_an_error_not_a_crash(kernels, mistake):
    with pytest.raises(RuntimeError):
        MISTAKES[mistake]()


def test_unchanged_arguments_are_right(kernels):
    matrix()
    matrix(coder="trellis", window_bits=3)
    layer()
    wide(signs=torch.ones(32), hadamard_size=16)
