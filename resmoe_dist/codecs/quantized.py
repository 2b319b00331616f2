"""`quantized`: a few bits per entry, and scales.

Each row is one stream of bits (see `coders.py`), so ranges of rows are slices. Row biases, the last
columns of a design matrix, are stored as they are. With `rotate`, the entries that are coded are
those of the rotated matrix (see `rotation.py`); `decode` rotates back.

With second moments, errors are fed back to entries that are coded later (see `feedback.py`): along
the hidden dimension for the input projections, along the rows for the output projection.

Legend: I rows, R rows held here, D columns, H hidden, b blocks of H columns, F = D − b·H row
biases, P bytes of a row's stream, g entries that share a scale, G scales of a row, C columns.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from resmoe_dist.codecs.base import CodecConfig, EncodedMatrix, StoredTensor, TensorReader
from resmoe_dist.codecs.bit_streams import (
    has_stray_stream_bits,
    pack_stream,
    read_windows,
    row_chunks,
    stream_bytes,
)
from resmoe_dist.codecs.coders import Coder, CoderName, make_coder
from resmoe_dist.codecs.matrix_coding import MOMENT_ROWS, code_matrix
from resmoe_dist.codecs.moments import Moments
from resmoe_dist.codecs.registry import register_codec
from resmoe_dist.codecs.rotation import rotate, rotate_back

# Scales are powers of 2^(1/16): rounding one changes it by at most 2.2 %.
_SCALES_PER_OCTAVE = 16
_LARGEST_SCALE = 255

_CODERS: tuple[CoderName, ...] = ("scalar", "trellis")
_LAYOUT = ("bits", "coder", "blocks", "hidden", "group", "rotated")


class QuantizedConfig(CodecConfig):
    """bits: of an entry. coder: see `coders.py`. group_size: g. blocks: b."""

    bits: int = Field(default=3, description="bits per entry: 1, 2, 3, 4 or 8")
    coder: Literal["auto", "scalar", "trellis"] = Field(
        default="auto",
        description="how entries become bits: scalar, trellis, or trellis if there are at most 4",
    )
    group_size: int | None = Field(
        default=None,
        ge=16,
        description="entries of a row that share a scale (default: those of a projection)",
    )
    rotate: bool = Field(default=True, description="rotate the hidden dimension")
    blocks: int = Field(default=3, ge=1, description="projections: 3 gated, 2 two-layer")

    @model_validator(mode="after")
    def _check_coder(self) -> Self:
        self.make_coder()
        return self

    def make_coder(self) -> Coder:
        """Raises ValueError if the coder cannot have so many bits."""
        name: CoderName = "scalar" if self.bits > 4 else "trellis"
        return make_coder(name if self.coder == "auto" else self.coder, self.bits)

    def with_bits(self, bits: int) -> Self:
        """The same options at other bits; the trellis has at most 4, so more are scalar."""
        coder = self.coder if bits <= 4 else "auto"
        return self.model_validate(self.model_dump() | {"bits": bits, "coder": coder})

    def for_blocks(self, blocks: int) -> Self:
        return self.model_copy(update={"blocks": blocks})

    def layout(self, columns: int) -> dict[str, int]:
        """What a matrix with D columns says of itself."""
        coder, blocks = self.make_coder(), min(self.blocks, columns)
        hidden = columns // blocks
        return {
            "bits": self.bits,
            "coder": _CODERS.index(coder.name),
            "blocks": blocks,
            "hidden": hidden,
            "group": min(self.group_size or hidden, hidden),
            "rotated": int(self.rotate),
        }


@register_codec
class QuantizedMatrix(EncodedMatrix):
    """codes [R, P], scales [R, G], biases [R, F], top [1] and layout.

    Entry i is integer(window i) · scale of its group, with scale = top · 2^((s − 255)/16) for the
    stored byte s, and 0 for s = 0. layout: the numbers that `_LAYOUT` names.
    """

    name = "quantized"
    config = QuantizedConfig
    stored = {
        "codes": StoredTensor("values", dtypes=(torch.uint8,)),
        "scales": StoredTensor("scales", dtypes=(torch.uint8,)),
        "biases": StoredTensor("values"),
        "top": StoredTensor("scales", per_row=False, dtypes=(torch.float32,)),
        "layout": StoredTensor("indices", per_row=False, dtypes=(torch.int32,)),
    }
    spends_bits = True
    uses_moments = True

    codes: Tensor
    scales: Tensor
    biases: Tensor
    top: Tensor
    layout: Tensor

    def __init__(
        self, shape: tuple[int, int], tensors: dict[str, Tensor], dtype: torch.dtype
    ) -> None:
        super().__init__(shape, tensors, dtype)
        numbers = dict(zip(_LAYOUT, self.layout.tolist(), strict=True))
        self.coder = make_coder(_CODERS[numbers["coder"]], numbers["bits"])
        self.blocks, self.hidden = numbers["blocks"], numbers["hidden"]
        self.group, self.is_rotated = numbers["group"], bool(numbers["rotated"])

    @classmethod
    def encode(
        cls,
        matrix_ID: Tensor,
        config: Any,
        dtype: torch.dtype,
        mask_ID: Tensor | None = None,
        moments: Moments | None = None,
    ) -> QuantizedMatrix:
        layout = config.layout(matrix_ID.shape[1])
        blocks, hidden, group = layout["blocks"], layout["hidden"], layout["group"]
        weights_IE = matrix_ID[:, : blocks * hidden].float().cpu().clone()
        if config.rotate:
            for block_IH in weights_IE.split(hidden, dim=1):
                block_IH.copy_(rotate(block_IH))
        coder = config.make_coder()
        scales, top = _choose_scales(weights_IE, coder, hidden, group)
        scale_IE = _scale_entries(scales, top, hidden, group, blocks)
        prefix_I, symbols_IE = code_matrix(
            weights_IE, scale_IE, coder, hidden, config.rotate, moments
        )
        tensors = {
            "codes": pack_stream(prefix_I, coder.prefix_bits, symbols_IE, coder.bits),
            "scales": scales,
            "biases": matrix_ID[:, blocks * hidden :].to(dtype).contiguous(),
            "top": top,
            "layout": torch.tensor([layout[name] for name in _LAYOUT], dtype=torch.int32),
        }
        return cls((matrix_ID.shape[0], matrix_ID.shape[1]), tensors, dtype)

    @classmethod
    def read(
        cls, read: TensorReader, columns: int, start: int, stop: int, dtype: torch.dtype
    ) -> QuantizedMatrix:
        _check_layout(read("layout", 0, None).tolist(), columns)
        found = super().read(read, columns, start, stop, dtype)
        entries = found.blocks * found.hidden
        bits = found.coder.stream_bits(entries)
        wanted = {
            "codes": stream_bytes(bits),
            "scales": found.blocks * _groups(found.hidden, found.group),
            "biases": columns - entries,
        }
        for name, size in wanted.items():
            tensor = found.tensors()[name]
            if tensor.dim() != 2 or tensor.shape[1] != size:
                raise ValueError(f"{name} of shape {list(tensor.shape)}, expected {size} per row")
        if has_stray_stream_bits(found.codes, bits):
            raise ValueError("a row has bits after its last entry")
        return found

    @classmethod
    def error_at(cls, config: QuantizedConfig, bits: int) -> float:
        return config.with_bits(bits).make_coder().error

    @classmethod
    def shapes(cls, rows: int, columns: int) -> dict[str, tuple[int | None, ...]]:
        per_row = {name: (rows, None) for name in ("codes", "scales", "biases")}
        return {**per_row, "top": (1,), "layout": (len(_LAYOUT),)}

    @classmethod
    def stored_bytes(cls, rows: int, columns: int, config: QuantizedConfig, itemsize: int) -> int:
        layout = config.layout(columns)
        entries = layout["blocks"] * layout["hidden"]
        scales = layout["blocks"] * _groups(layout["hidden"], layout["group"])
        codes = stream_bytes(config.make_coder().stream_bits(entries))
        per_row = codes + scales + (columns - entries) * itemsize
        return rows * per_row + 4 + 4 * len(_LAYOUT)

    @classmethod
    def sliced_bytes(
        cls, rows: int, columns: int, held: int, config: QuantizedConfig, itemsize: int
    ) -> int:
        return cls.stored_bytes(held, columns, config, itemsize)

    @property
    def bits(self) -> int:
        return self.coder.bits

    @classmethod
    def encoding_bytes(cls, rows: int, columns: int) -> int:
        # Weights, scales and divisors in float32, and symbols; moments and inverses in float64.
        moments = 2 * (columns // 2) ** 2 + rows**2 + 3 * min(rows, MOMENT_ROWS) ** 2
        return 16 * rows * columns + 8 * moments

    def decode(self) -> Tensor:
        return self.decode_columns(0, self.columns)

    def decode_columns(self, first: int, count: int) -> Tensor:
        stop, coded = first + count, self.blocks * self.hidden
        parts = []
        for block in range(self.blocks):
            begin = block * self.hidden
            if first < begin + self.hidden and stop > begin:
                columns = slice(max(first - begin, 0), min(stop - begin, self.hidden))
                parts.append(self._decode_block(block)[:, columns])
        if stop > coded:
            parts.append(self.biases[:, max(first - coded, 0) : stop - coded])
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def rotated_block(self, block: int) -> Tensor:
        """The coded entries [R, H] of a projection, before they are rotated back, float32."""
        first = block * self.hidden
        coder, scales = self.coder, self._block_scales(block)
        parts = []
        for rows in row_chunks(self.rows, self.hidden):
            windows = read_windows(self.codes[rows], first, self.hidden, coder.bits, coder.window)
            parts.append(coder.integers(windows) * scales[rows])
        return torch.cat(parts) if parts else scales

    def _decode_block(self, block: int) -> Tensor:
        entries_RH = self.rotated_block(block)
        return (rotate_back(entries_RH) if self.is_rotated else entries_RH).to(self.dtype)

    def _block_scales(self, block: int) -> Tensor:
        """[R, H]: the scale of each entry of a projection."""
        groups = _groups(self.hidden, self.group)
        scales = self.scales[:, block * groups : (block + 1) * groups]
        return _scale_entries(scales, self.top, self.hidden, self.group, 1)


def _groups(hidden: int, group: int) -> int:
    """Groups of a row of one projection."""
    return -(-hidden // group)


def _check_layout(numbers: list[int], columns: int) -> None:
    """Raise ValueError unless these are the numbers of a matrix with D = `columns`."""
    if len(numbers) != len(_LAYOUT):
        raise ValueError(f"a layout of {len(numbers)} numbers")
    bits, coder, blocks, hidden, group, rotated = numbers
    if coder not in range(len(_CODERS)) or rotated not in (0, 1):
        raise ValueError(f"layout {numbers}")
    make_coder(_CODERS[coder], bits)
    if blocks < 1 or hidden != columns // blocks or not 1 <= group <= hidden:
        raise ValueError(f"layout {numbers} for {columns} columns")


def _choose_scales(
    weights_IE: Tensor, coder: Coder, hidden: int, group: int
) -> tuple[Tensor, Tensor]:
    """scales [I, G] uint8 and top [1]: from the root mean square of each group."""
    parts = [
        part_Ig.square().mean(1).sqrt()
        for block_IH in weights_IE.split(hidden, dim=1)
        for part_Ig in block_IH.split(group, dim=1)
    ]
    wanted_IG = torch.stack(parts, dim=1) * coder.step
    top = wanted_IG.max() if wanted_IG.numel() else torch.zeros(())
    octaves_IG = torch.log2(wanted_IG / top.clamp(min=torch.finfo(torch.float32).tiny))
    scales = (_SCALES_PER_OCTAVE * octaves_IG).round() + _LARGEST_SCALE
    scales = torch.where(wanted_IG > 0, scales.clamp(1, _LARGEST_SCALE), torch.zeros(()))
    return scales.to(torch.uint8), top.view(1)


def _scale_entries(scales: Tensor, top: Tensor, hidden: int, group: int, blocks: int) -> Tensor:
    """The scale of each entry: [R, blocks·H] in float32."""
    exponent = (scales.float() - _LARGEST_SCALE) / _SCALES_PER_OCTAVE
    scale = torch.where(scales > 0, top * torch.exp2(exponent), torch.zeros_like(exponent))
    spread = scale.unflatten(1, (blocks, _groups(hidden, group))).repeat_interleave(group, dim=2)
    return spread[:, :, :hidden].flatten(1)
