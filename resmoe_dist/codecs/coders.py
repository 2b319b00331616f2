"""How `quantized` turns a row of Gaussian entries into bits.

    scalar    each entry rounded to one of 2^b evenly spaced values
    trellis   each entry has the value of a window of L bits of the row's stream; windows of
              neighbours overlap in all but b bits, so the search may look ahead

Both read entry i from the bits [b·i, b·i + L) of a row's stream (see `bit_streams.py`), L = b for
`scalar`. A window stands for an integer, and an entry is the integer times a scale. So every entry
can be read by itself.

`trellis` is the bit-shift trellis of QTIP (arXiv:2406.11235, section 3.1). Its code is computed
like QTIP's "1MAD" from the bytes of a hash of the window, whose sum is nearly Gaussian.
The hash is two products of 16 bits instead of one of 32: CPUs multiply twice as many of these at a
time, and with the factors below the error on Gaussian noise is 2 to 5 % smaller at 2 to 4 bits. No
table is stored.

Legend: R rows, C entries of a row, b bits per entry, L bits of a window, S = 2^L windows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from resmoe_dist.codecs.trellis import FREE, divisor_of, search_beam, search_path

CoderName = Literal["scalar", "trellis"]
BITS = (1, 2, 3, 4, 8)

# Window of `trellis`. Longer ones come closer to the bound, and each bit doubles the search.
STATE_BITS = 12
_MOST_TRELLIS_BITS = 4
# Paths that a search with feedback keeps.
_BEAM = 128
# Hash of a window: (window | MARK) · factor modulo 2^16 for both factors. Found by trying random
# ones on Gaussian noise.
FACTORS, MARK = (59041, 5771), 14 << STATE_BITS
# The four signed bytes of a hash add up to a number with this standard deviation.
_BYTES_DEVIATION = (4 * (256**2 - 1) / 12) ** 0.5


class CodedRows(NamedTuple):
    """prefix_R: the first L − b bits of each row's stream. symbols_RC: the b bits that each entry
    adds to it. integers_RC: what the entries stand for, float32, in units of the scale. last_R:
    windows of the last entries."""

    prefix_R: Tensor
    symbols_RC: Tensor
    integers_RC: Tensor
    last_R: Tensor


class ByteSum(NamedTuple):
    """What a window stands for: the sum of the four bytes of a hash, minus `offset`.

    The hash is (window | mark) · factors[0] and (window | mark) · factors[1], each modulo 2^16,
    side by side, with the bits of `flipped` flipped.
    """

    mark: int
    factors: tuple[int, int]
    flipped: int
    offset: int


class Coder(ABC):
    """Codes rows of entries with `bits` bits each."""

    name: ClassVar[CoderName]
    # With feedback of errors: entries that are coded together, and how many more the search sees.
    at_a_time: ClassVar[int] = 1
    look_ahead: ClassVar[int] = 0

    def __init__(self, bits: int) -> None:
        self.bits = bits

    @property
    @abstractmethod
    def window(self) -> int:
        """L."""

    @property
    @abstractmethod
    def step(self) -> float:
        """The scale that loses least for entries with a standard deviation of 1."""

    @property
    @abstractmethod
    def error(self) -> float:
        """Mean squared error per entry with a standard deviation of 1, measured."""

    @property
    @abstractmethod
    def byte_sum(self) -> ByteSum:
        """`integers` as kernels compute them, the same way for all coders."""

    @abstractmethod
    def integers(self, windows: Tensor) -> Tensor:
        """What windows (integers of any shape) stand for, float32."""

    @abstractmethod
    def encode(self, target_RC: Tensor, before_R: Tensor | None, coded: int) -> CodedRows:
        """The best codes of the first `coded` entries of rows, given in units of the scale.

        before_R: windows of the entries before; None at the start of a row. The entries after the
        first `coded` are looked at, not coded.
        """

    @abstractmethod
    def encode_with_feedback(
        self,
        weights_RC: Tensor,
        scales_RC: Tensor,
        root_CC: Tensor,
        before_R: Tensor | None,
        coded: int,
    ) -> CodedRows:
        """The same for entries whose errors have cross terms, given with their scales.

        root_CC: U as in `feedback.py`, of all C entries.
        """

    @property
    def prefix_bits(self) -> int:
        """Bits of a row's stream before the first symbol."""
        return self.window - self.bits

    def stream_bits(self, entries: int) -> int:
        """Bits of a row of so many entries."""
        return self.prefix_bits + self.bits * entries


class ScalarCoder(Coder):
    """Odd integers from −(2^b − 1) to 2^b − 1."""

    name = "scalar"
    # Half of the step of the uniform quantiser with the least error for a unit Gaussian (Max 1960,
    # table II), computed again by minimising the integral.
    _STEPS = {1: 0.79788, 2: 0.49784, 3: 0.29300, 4: 0.16760, 8: 0.015405}
    _ERRORS = {1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154, 8: 0.000103}

    @property
    def window(self) -> int:
        return self.bits

    @property
    def step(self) -> float:
        return self._STEPS[self.bits]

    @property
    def error(self) -> float:
        return self._ERRORS[self.bits]

    @property
    def byte_sum(self) -> ByteSum:
        # The window twice, in two bytes.
        return ByteSum(0, (257, 0), 0, 2**self.bits - 1)

    def integers(self, windows: Tensor) -> Tensor:
        return 2.0 * windows.float() - (2**self.bits - 1)

    def encode(self, target_RC: Tensor, before_R: Tensor | None, coded: int) -> CodedRows:
        highest = 2**self.bits - 1
        symbols_RC = ((target_RC[:, :coded] + highest) / 2).round_().clamp_(0, highest).int()
        prefix_R = symbols_RC.new_zeros(len(symbols_RC))
        return CodedRows(prefix_R, symbols_RC, self.integers(symbols_RC), symbols_RC[:, -1])

    def encode_with_feedback(
        self,
        weights_RC: Tensor,
        scales_RC: Tensor,
        root_CC: Tensor,
        before_R: Tensor | None,
        coded: int,
    ) -> CodedRows:
        # One entry at a time: nothing is fed back in between.
        assert coded == 1
        return self.encode(weights_RC / divisor_of(scales_RC), before_R, coded)


class TrellisCoder(Coder):
    """Sums of the bytes of hashed windows, with the path of least error (Viterbi's search)."""

    name = "trellis"
    at_a_time = 128
    look_ahead = 16

    def __init__(self, bits: int, window: int = STATE_BITS) -> None:
        super().__init__(bits)
        self._window = window

    # A code that leaves the error D has the variance 1 − D. The errors are measured ones.
    _ERRORS = {1: 0.278, 2: 0.0735, 3: 0.0191, 4: 0.00518}

    @property
    def window(self) -> int:
        return self._window

    @property
    def step(self) -> float:
        return (1 - self.error) ** 0.5 / _BYTES_DEVIATION

    @property
    def error(self) -> float:
        return self._ERRORS[self.bits]

    @property
    def byte_sum(self) -> ByteSum:
        # Signed bytes, as unsigned ones that are 128 larger.
        return ByteSum(MARK, FACTORS, 0x80808080, 4 * 0x80)

    def integers(self, windows: Tensor) -> Tensor:
        marked = windows.long() | MARK
        products = torch.stack([(marked * factor) & 0xFFFF for factor in FACTORS])
        unsigned = torch.stack([products & 0xFF, products >> 8])
        return ((unsigned ^ 0x80) - 0x80).sum((0, 1)).float()

    def encode(self, target_RC: Tensor, before_R: Tensor | None, coded: int) -> CodedRows:
        windows_RC = search_path(
            target_RC / _BYTES_DEVIATION,
            self._values_S / _BYTES_DEVIATION,
            _before(before_R, len(target_RC)),
            bits=self.bits,
            coded=coded,
        )
        return self._coded(windows_RC)

    def encode_with_feedback(
        self,
        weights_RC: Tensor,
        scales_RC: Tensor,
        root_CC: Tensor,
        before_R: Tensor | None,
        coded: int,
    ) -> CodedRows:
        windows_RC = search_beam(
            weights_RC,
            scales_RC,
            root_CC,
            self._values_S,
            _before(before_R, len(weights_RC)),
            bits=self.bits,
            coded=coded,
            width=_BEAM,
        )
        return self._coded(windows_RC)

    def _coded(self, windows_RC: Tensor) -> CodedRows:
        prefix_R = windows_RC[:, 0] & ((1 << self.prefix_bits) - 1)
        symbols_RC = (windows_RC >> self.prefix_bits).to(torch.uint8)
        integers_RC = self._values_S[windows_RC.long()]
        return CodedRows(prefix_R, symbols_RC, integers_RC, windows_RC[:, -1])

    @cached_property
    def _values_S(self) -> Tensor:
        return self.integers(torch.arange(1 << self.window))


def _before(before_R: Tensor | None, rows: int) -> Tensor:
    """int32 windows before the entries, FREE at the start of rows."""
    return torch.full((rows,), FREE, dtype=torch.int32) if before_R is None else before_R


def make_coder(name: CoderName, bits: int) -> Coder:
    """Raises ValueError if that coder cannot have so many bits."""
    if bits not in BITS:
        raise ValueError(f"bits {bits}: choose one of {', '.join(map(str, BITS))}")
    if name == "scalar":
        return ScalarCoder(bits)
    if bits > _MOST_TRELLIS_BITS:
        raise ValueError(f"coder trellis: for at most {_MOST_TRELLIS_BITS} bits, not {bits}")
    return TrellisCoder(bits)
