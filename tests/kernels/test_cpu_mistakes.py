"""Invalid tensors given to the C++ kernels raise an error instead of crashing.

The layer has four rows of 60 columns (20 hidden), two experts and one centre; three tokens, five
copies.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

INTS = torch.int64


def layer(**changed: object) -> object:
    arguments: dict[str, object] = {
        "bitmaps": [torch.full((4, 8), 255, dtype=torch.uint8) for _ in range(2)],
        "values": [torch.randn(240) for _ in range(2)],
        "row_offsets": [torch.arange(5, dtype=torch.int32) * 60 for _ in range(2)],
        "centers": [torch.randn(4, 60)],
        "center_of": [0, -1],
        "hidden": 20,
        "inputs": 2,
        "activation": "silu",
    }
    return torch.classes.resmoe.Layer(*(arguments | changed).values())


def first(tensor: torch.Tensor, key: str) -> Callable[[], object]:
    """A layer whose first expert has another tensor."""
    return lambda: layer(**{key: [tensor, layer_lists()[key][1]]})


def layer_lists() -> dict[str, list[torch.Tensor]]:
    return {
        "bitmaps": [torch.full((4, 8), 255, dtype=torch.uint8)] * 2,
        "values": [torch.randn(240)] * 2,
        "row_offsets": [torch.arange(5, dtype=torch.int32) * 60] * 2,
    }


ROUTING = {"token": torch.tensor([0, 1, 2, 0, 2]), "offsets": torch.tensor([0, 3, 5])}
ARGUMENTS: dict[str, dict[str, object]] = {
    "mlp": {
        "x": torch.randn(3, 20),
        "token": ROUTING["token"],
        "weight": torch.ones(5),
        "offsets": ROUTING["offsets"],
        "center_token": torch.arange(3),
        "center_offsets": torch.tensor([0, 3]),
        "center_index": torch.tensor([0, 1, 2, -1, -1]),
    },
    "project_in": {"part": "whole", "x": torch.randn(3, 20), **ROUTING, "first_row": 0, "rows": 4},
    "project_out": {
        **{"part": "whole", "h": torch.randn(5, 4)},
        **ROUTING,
        **{"first_row": 0, "num_tokens": 3},
    },
}


def call(operation: str, **changed: object) -> torch.Tensor:
    """An operation with its right arguments but for the changed ones."""
    arguments = {"layer": layer(), **ARGUMENTS[operation]} | changed
    return getattr(torch.ops.resmoe, operation)(*arguments.values())


mlp, project_in, project_out = (partial(call, operation) for operation in ARGUMENTS)


def restore(
    out: torch.Tensor | None = None, expert: int = 0, first_row: int = 0, first_column: int = 0
) -> None:
    out = torch.empty(4, 60) if out is None else out
    torch.ops.resmoe.restore(layer(), expert, out, first_row, first_column)


LAYERS = {
    "centre of another dtype": lambda: layer(centers=[torch.randn(4, 60).double()]),
    "centre of fewer columns": lambda: layer(centers=[torch.randn(4, 59)]),
    "centre of other rows": lambda: layer(centers=[torch.randn(5, 60)]),
    "transposed centre": lambda: layer(centers=[torch.randn(60, 4).T]),
    "centre of one dimension": lambda: layer(centers=[torch.randn(4)]),
    "centre number too large": lambda: layer(center_of=[0, 1]),
    "centre number below -1": lambda: layer(center_of=[0, -2]),
    "centre numbers for other experts": lambda: layer(center_of=[0]),
    "bitmap of another dtype": first(torch.zeros(4, 8, dtype=torch.int8), "bitmaps"),
    "bitmap of fewer columns": first(torch.zeros(4, 7, dtype=torch.uint8), "bitmaps"),
    "bitmap of one dimension": first(torch.zeros(4, dtype=torch.uint8), "bitmaps"),
    "bitmaps of different rows": first(torch.zeros(3, 8, dtype=torch.uint8), "bitmaps"),
    "non-contiguous bitmap": first(torch.zeros(4, 9, dtype=torch.uint8)[:, :8], "bitmaps"),
    "fewer bitmaps than values": lambda: layer(bitmaps=layer_lists()["bitmaps"][:1]),
    "no experts": lambda: layer(bitmaps=[], values=[], row_offsets=[], center_of=[]),
    "values of another dtype": first(torch.randn(240).bfloat16(), "values"),
    "values in double precision": lambda: layer(values=[torch.randn(240).double()] * 2),
    "non-contiguous values": first(torch.randn(480)[::2], "values"),
    "values of two dimensions": first(torch.randn(240, 1), "values"),
    "fewer values than the offsets say": first(torch.randn(239), "values"),
    "negative offsets": first(torch.arange(5) * 60 - 60, "row_offsets"),
    "offsets past the values": first(torch.arange(5) * 60 + 2**40, "row_offsets"),
    "one offset past the values": first(torch.tensor([0, 60, 2**40, 180, 240]), "row_offsets"),
    "offsets of another dtype": first(torch.arange(5).short() * 60, "row_offsets"),
    "one offset missing": first(torch.arange(4) * 60, "row_offsets"),
    "non-contiguous offsets": first((torch.arange(10) * 30)[::2], "row_offsets"),
    "no inputs": lambda: layer(inputs=0),
    "three inputs": lambda: layer(inputs=3, hidden=15),
    "negative inputs": lambda: layer(inputs=-1),
    "larger hidden size": lambda: layer(hidden=22),
    "negative hidden size": lambda: layer(hidden=-20),
    "unknown activation": lambda: layer(activation="gelu"),
}
CALLS = {
    "output of another dtype": lambda: restore(torch.empty(4, 60).bfloat16()),
    "output in half precision": lambda: restore(torch.empty(4, 60).half()),
    "transposed output": lambda: restore(torch.empty(60, 4).T),
    "output of more rows": lambda: restore(torch.empty(5, 60)),
    "output of one dimension": lambda: restore(torch.empty(60)),
    "rows past the last": lambda: restore(torch.empty(2, 60), first_row=3),
    "rows before the first": lambda: restore(torch.empty(2, 60), first_row=-1),
    "columns past the last": lambda: restore(torch.empty(4, 60), first_column=5),
    "columns before the first": lambda: restore(torch.empty(4, 10), first_column=-5),
    "expert past the last": lambda: restore(expert=2),
    "expert before the first": lambda: restore(expert=-1),
    "unknown part": lambda: project_in(part="half"),
    "tokens of another dtype": lambda: project_in(x=torch.randn(3, 20).bfloat16()),
    "tokens in half precision": lambda: project_in(x=torch.randn(3, 20).half()),
    "tokens of more columns": lambda: project_in(x=torch.randn(3, 40)),
    "tokens of one dimension": lambda: project_in(x=torch.randn(20)),
    "tokens of three dimensions": lambda: project_in(x=torch.randn(3, 20, 0)),
    "products of rows past the last": lambda: project_in(first_row=1),
    "products of negative rows": lambda: project_in(rows=-1),
    "activations of another dtype": lambda: project_out(h=torch.randn(5, 4).bfloat16()),
    "activations of more rows": lambda: project_out(h=torch.randn(5, 5)),
    "fewer activations than copies": lambda: project_out(h=torch.randn(4, 4)),
    "activations of three dimensions": lambda: project_out(h=torch.randn(5, 4, 0)),
    "token numbers of 32 bits": lambda: project_in(token=torch.arange(5).int() % 3),
    "non-contiguous token numbers": lambda: project_in(token=torch.zeros(10, dtype=INTS)[::2]),
    "token numbers of two dimensions": lambda: project_in(token=torch.zeros(5, 1, dtype=INTS)),
    "token past the last": lambda: project_in(token=torch.tensor([0, 1, 3, 0, 0])),
    "token before the first": lambda: project_out(token=torch.tensor([-1, 0, 1, 0, 0])),
    "token past the output": lambda: project_out(num_tokens=2),
    "negative number of tokens": lambda: project_out(num_tokens=-1),
    "offsets of 32 bits": lambda: project_in(offsets=torch.tensor([0, 3, 5]).int()),
    "offsets past the copies": lambda: project_in(offsets=torch.tensor([0, 3, 6])),
    "descending offsets": lambda: project_in(offsets=torch.tensor([0, 6, 5])),
    "negative first offset": lambda: project_in(offsets=torch.tensor([-1, 3, 5])),
    "offsets for fewer experts": lambda: project_in(offsets=torch.tensor([0, 5])),
    "offsets for more experts": lambda: project_out(offsets=torch.tensor([0, 1, 3, 5])),
    "weights of another dtype": lambda: mlp(weight=torch.ones(5).double()),
    "one weight missing": lambda: mlp(weight=torch.ones(4)),
    "one weight too many": lambda: mlp(weight=torch.ones(6)),
    "weights of two dimensions": lambda: mlp(weight=torch.ones(5, 1)),
    "non-contiguous weights": lambda: mlp(weight=torch.ones(10)[::2]),
    "layer without an activation": lambda: mlp(layer=layer(activation="")),
    "mlp of tokens of another dtype": lambda: mlp(x=torch.ones(3, 20).bfloat16()),
    "mlp of tokens of more columns": lambda: mlp(x=torch.ones(3, 40)),
    "mlp of fewer tokens than their numbers": lambda: mlp(x=torch.ones(2, 20)),
    "mlp of a token before the first": lambda: mlp(token=torch.tensor([0, 1, 2, -1, 1])),
    "mlp with offsets past the copies": lambda: mlp(offsets=torch.tensor([0, 3, 6])),
    "centre copies without offsets": lambda: mlp(center_offsets=None),
    "centre copies without indices": lambda: mlp(center_index=None),
    "centre token past the last": lambda: mlp(center_token=torch.tensor([0, 1, 3])),
    "centre offsets past the copies": lambda: mlp(center_offsets=torch.tensor([0, 4])),
    "centre offsets for more centres": lambda: mlp(center_offsets=torch.tensor([0, 2, 3])),
    "centre index past the last": lambda: mlp(center_index=torch.tensor([0, 1, 3, -1, -1])),
    "centre index below -1": lambda: mlp(center_index=torch.tensor([0, 1, -2, -1, -1])),
    "centre indices of 32 bits": lambda: mlp(center_index=torch.zeros(5).int()),
    "one centre index missing": lambda: mlp(center_index=torch.zeros(4, dtype=INTS)),
}


@pytest.mark.parametrize("mistake", [*LAYERS, *CALLS])
def test_a_mistake_is_an_error_not_a_crash(kernels, mistake):
    with pytest.raises(RuntimeError):
        (LAYERS | CALLS)[mistake]()


def test_unchanged_arguments_are_right(kernels):
    restore()
    project_in()
    project_out()
    mlp()
    mlp(center_token=None, center_offsets=None, center_index=None)
