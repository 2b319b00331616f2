"""Dequantises float8 weights with a scale per block, as DeepSeek-V3 stores them, to bfloat16.

A float8 weight [O, C] comes with `<name>_scale_inv` [⌈O/b⌉, ⌈C/c⌉] for blocks of b × c: entry
(i, j) means weight[i, j] · scale[⌊i/b⌋, ⌊j/c⌋]. Fused experts have one more leading dimension. Some
modules may be left unconverted (a router, the output head), so each tensor's dtype decides, not the
config.

Legend: O outputs, C columns (inputs), R rows read of the O; B, S blocks over rows and columns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError
from torch import Tensor

from resmoe_dist.checkpoints.model_folder import ModelFiles
from resmoe_dist.errors import UserError

DEQUANTIZED = "BF16"
SCALE_SUFFIX = "_scale_inv"
_FLOAT8 = "F8_E4M3"
# DeepSeek stores float32; others store bfloat16, or powers of two.
_SCALE_DTYPES = ("F32", "F16", "BF16", "F8_E8M0")


class ScaleBlocks(BaseModel):
    """Rows and columns of the block that shares one scale."""

    model_config = ConfigDict(frozen=True)

    rows: PositiveInt
    columns: PositiveInt

    def grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of a weight [.., O, C]."""
        *leading, rows, columns = shape
        return (*leading, -(-rows // self.rows), -(-columns // self.columns))

    def dequantize(self, weight_RC: Tensor, scale_BS: Tensor, skipped: int) -> Tensor:
        """R rows of a weight in bfloat16, rounded once.

        scale_BS: the scales of all blocks that these rows are in. skipped: rows of the first of
        these blocks that come before the first given row.
        """
        values_RC = torch.empty(weight_RC.shape, dtype=torch.bfloat16)
        for k, scale_S in enumerate(scale_BS.float()):
            rows = slice(max(k * self.rows - skipped, 0), (k + 1) * self.rows - skipped)
            scale_C = scale_S.repeat_interleave(self.columns)[: weight_RC.shape[1]]
            values_RC[rows] = weight_RC[rows].float().mul_(scale_C)
        return values_RC


def blocks_of(folder: Path, quantization: Any) -> ScaleBlocks | None:
    """Blocks of an fp8 model from its config's `quantization_config`; None if it is not quantised.

    Raises UserError for any other quantisation, and for fp8 without blocks.
    """
    if not quantization:
        return None
    if not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    method = quantization.get("quant_method")
    advice = "give the unquantised checkpoint, or one in fp8 with a 'weight_block_size'"
    if method != "fp8":
        raise UserError(f"{folder}: the model is quantised already, by {method!r}; {advice}")
    # transformers' default.
    size = quantization.get("weight_block_size", (128, 128))
    try:
        rows, columns = size
        return ScaleBlocks(rows=rows, columns=columns)
    except (TypeError, ValueError, ValidationError) as error:
        raise UserError(
            f"{folder}: the model is quantised already, by 'fp8' with weight_block_size {size!r}; "
            f"{advice} of two numbers"
        ) from error


def find_scaled(files: ModelFiles, blocks: ScaleBlocks | None) -> frozenset[str]:
    """Names of the float8 weights; empty for a model without blocks.

    Raises UserError for a weight without scales or with scales of the wrong shape, and for scales
    without a weight.
    """
    if blocks is None:
        return frozenset()
    names = files.locations
    scaled = frozenset(name for name in names if files.holding(name).dtype(name) == _FLOAT8)
    for name in names:
        if name in scaled:
            _check_scale(files, blocks, name)
        elif name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) not in scaled:
            raise UserError(
                f"{files.holding(name).path}: tensor {name!r} scales no tensor in {_FLOAT8}; fetch "
                "the model again"
            )
    return scaled


def _check_scale(files: ModelFiles, blocks: ScaleBlocks, name: str) -> None:
    file, scale = files.holding(name), name + SCALE_SUFFIX
    shape = file.shape(name)
    if len(shape) not in (2, 3):
        raise UserError(
            f"{file.path}: tensor {name!r} of shape {list(shape)} is stored as {_FLOAT8}, which is "
            "supported for matrices, of one expert or of several"
        )
    if scale not in files.locations:
        raise UserError(
            f"{file.path}: tensor {name!r} is stored as {_FLOAT8}, but {scale!r} is missing; fetch "
            "the model again"
        )
    file = files.holding(scale)
    if file.shape(scale) != blocks.grid(shape):
        raise UserError(
            f"{file.path}: tensor {scale!r} has shape {list(file.shape(scale))}, blocks of "
            f"{blocks.rows} x {blocks.columns} ask for {list(blocks.grid(shape))}"
        )
    if file.dtype(scale) not in _SCALE_DTYPES:
        raise UserError(
            f"{file.path}: tensor {scale!r} is stored as {file.dtype(scale)}; supported are "
            f"{', '.join(_SCALE_DTYPES)}"
        )
