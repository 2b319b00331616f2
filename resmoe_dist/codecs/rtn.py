"""`rtn`: round-to-nearest integers with a scale and a zero point per group of columns.

Plain affine quantisation, the yardstick for everything else: asymmetric, and zero is representable.
With float32 scales the integers are those of torchao's `quantize_affine`. It is no dependency:
where it is installed, transformers imports it in every process, which takes seconds. A group is
`group_size` consecutive columns of one row, so each row stands alone. In the columns of downᵀ a
group runs along the outputs, where quantised checkpoints have it along the inputs.

Integers are packed as bit planes: bit p of all of a group's integers comes before bit p + 1. So
3 bits take 3 bits. Zero points are packed likewise, over the groups of a row. In bfloat16 an entry
costs bits + (16 + bits) / group_size bits.

Legend: I rows, R rows held here, D columns, b bits, S columns of a group, G = ⌈D/S⌉ groups of a
row, C = G·S, N groups or integers.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from resmoe_dist.codecs.base import CodecConfig, EncodedMatrix, StoredTensor, TensorReader
from resmoe_dist.codecs.bitmap import bytes_per_row, pack_bitmap, unpack_bitmap
from resmoe_dist.codecs.moments import Moments
from resmoe_dist.codecs.registry import register_codec

_MAX_BITS = 8
_PLANE_BITS = 8


class RtnConfig(CodecConfig):
    """bits: of an integer. group_size: columns that share a scale and a zero point."""

    bits: int = Field(default=4, ge=2, le=_MAX_BITS, description="bits of an integer")
    group_size: int = Field(
        default=64, ge=8, multiple_of=8, description="columns that share a scale"
    )


@register_codec
class RtnMatrix(EncodedMatrix):
    """Entry c of group g is (integer − zero point[g]) · scale[g].

    integers [R, G, b, S/8], scales [R, G], zero_points [R, b, ⌈G/8⌉]. The last group is padded.
    """

    name = "rtn"
    config = RtnConfig
    stored = {
        "integers": StoredTensor("values", dtypes=(torch.uint8,)),
        "scales": StoredTensor("scales"),
        "zero_points": StoredTensor("scales", dtypes=(torch.uint8,)),
    }

    integers: Tensor
    scales: Tensor
    zero_points: Tensor

    @classmethod
    def encode(
        cls,
        matrix_ID: Tensor,
        config: Any,
        dtype: torch.dtype,
        mask_ID: Tensor | None = None,
        moments: Moments | None = None,
    ) -> RtnMatrix:
        rows, columns = matrix_ID.shape
        groups = -(-columns // config.group_size)
        padded_IC = matrix_ID.new_zeros(rows, groups * config.group_size)
        padded_IC[:, :columns] = matrix_ID
        integers_NS, scales_N, zero_points_N = round_to_nearest(
            padded_IC.view(-1, config.group_size), config.bits, dtype
        )
        tensors = {
            "integers": pack_planes(integers_NS.view(rows, groups, -1), config.bits),
            "scales": scales_N.view(rows, groups),
            "zero_points": pack_planes(zero_points_N.view(rows, groups), config.bits),
        }
        return cls((rows, columns), tensors, dtype)

    @classmethod
    def read(
        cls, read: TensorReader, columns: int, start: int, stop: int, dtype: torch.dtype
    ) -> RtnMatrix:
        found = super().read(read, columns, start, stop, dtype)
        if found.integers.dim() != 4 or found.scales.dim() != 2 or found.zero_points.dim() != 3:
            raise ValueError("the numbers of dimensions are not 4, 2 and 3")
        groups, bits, plane_bytes = found.integers.shape[1:]
        if not 1 <= bits <= _MAX_BITS or groups != -(-columns // max(1, plane_bytes * _PLANE_BITS)):
            raise ValueError(
                f"{groups} groups of {bits} planes of {plane_bytes} bytes do not fit {columns} "
                "columns"
            )
        if found.scales.shape[1] != groups:
            raise ValueError(f"{found.scales.shape[1]} scales for {groups} groups")
        if found.zero_points.shape[1:] != (bits, bytes_per_row(groups)):
            raise ValueError(f"zero points of shape {list(found.zero_points.shape[1:])}")
        return found

    @classmethod
    def shapes(cls, rows: int, columns: int) -> dict[str, tuple[int | None, ...]]:
        return {
            "integers": (rows, None, None, None),
            "scales": (rows, None),
            "zero_points": (rows, None, None),
        }

    @classmethod
    def stored_bytes(cls, rows: int, columns: int, config: RtnConfig, itemsize: int) -> int:
        groups = -(-columns // config.group_size)
        integers = groups * config.bits * config.group_size // _PLANE_BITS
        return rows * (integers + groups * itemsize + config.bits * bytes_per_row(groups))

    def decode(self) -> Tensor:
        return self.decode_columns(0, self.columns)

    def decode_columns(self, first: int, count: int) -> Tensor:
        """Columns [first, first + count) of `decode`, from their groups alone."""
        group_size = self.integers.shape[3] * _PLANE_BITS
        groups = slice(first // group_size, -(-(first + count) // group_size))
        integers_RGS = unpack_planes(self.integers[:, groups], group_size)
        zero_points_RG = unpack_planes(self.zero_points, self.scales.shape[1])[:, groups]
        # Differences of 8-bit integers are exact in bfloat16 too.
        steps_RGS = integers_RGS.to(self.dtype) - zero_points_RG.to(self.dtype).unsqueeze(2)
        found_RC = (steps_RGS * self.scales[:, groups].unsqueeze(2)).flatten(1)
        offset = first - groups.start * group_size
        return found_RC[:, offset : min(offset + count, self.columns - first + offset)]


def round_to_nearest(groups_NS: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Integers [N, S] (uint8), scales [N] (dtype) and zero points [N] (uint8) of groups of values.

    The integers divide the range of a group's values, and zero, into 2^bits − 1 steps.
    """
    largest = 2**bits - 1
    least_N, most_N = groups_NS.amin(1).clamp_max(0.0), groups_NS.amax(1).clamp_min(0.0)
    scales_N = ((most_N - least_N) / largest).to(dtype)
    # All values of the group are zero, or too small for the dtype.
    scales_N = torch.where(scales_N > 0, scales_N, 1.0)
    # Rounded with the scales as stored.
    exact_N = scales_N.float()
    zero_points_N = (-least_N / exact_N).round().clamp(0, largest)
    steps_NS = (groups_NS / exact_N.unsqueeze(1)).round()
    integers_NS = (steps_NS + zero_points_N.unsqueeze(1)).clamp(0, largest)
    return integers_NS.to(torch.uint8), scales_N, zero_points_N.to(torch.uint8)


def pack_planes(integers: Tensor, bits: int) -> Tensor:
    """Integers [..., N] below 2^bits (uint8) as bit planes [..., bits, ⌈N/8⌉] (uint8)."""
    planes = [integers.bitwise_right_shift(p) & 1 for p in range(bits)]
    stacked = torch.stack(planes, dim=-2)
    packed = pack_bitmap(stacked.flatten(0, -2).bool())
    return packed.view(*stacked.shape[:-1], packed.shape[1])


def unpack_planes(planes: Tensor, count: int) -> Tensor:
    """The `count` integers [..., count] (uint8) of bit planes: the inverse of `pack_planes`."""
    bits_flat = unpack_bitmap(planes.flatten(0, -2), count)
    separate = bits_flat.view(*planes.shape[:-1], count).unbind(-2)
    integers = torch.zeros_like(separate[0], dtype=torch.uint8)
    for p, plane in enumerate(separate):
        integers |= plane.to(torch.uint8) << p
    return integers
