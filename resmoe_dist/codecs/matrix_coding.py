"""Codes of a whole matrix: row by row, or with feedback of errors between columns and rows.

Without second moments every row is coded by itself. With them, the input projections are coded in
columns, and the output projection in rows, whose errors later ones make up for (see `feedback.py`).

Legend: I rows, H hidden, b projections, E = b·H coded entries of a row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from resmoe_dist.codecs.bit_streams import row_chunks
from resmoe_dist.codecs.coders import CodedRows, Coder
from resmoe_dist.codecs.feedback import round_with_feedback
from resmoe_dist.codecs.moments import Moments, inverse_root
from resmoe_dist.codecs.trellis import divisor_of

_DAMPING = 1e-2
# Rows whose second moment is inverted together: more would take gigabytes.
MOMENT_ROWS = 2048


def code_matrix(
    weights_IE: Tensor,
    scale_IE: Tensor,
    coder: Coder,
    hidden: int,
    rotated: bool,
    moments: Moments | None,
) -> tuple[Tensor, Tensor]:
    """The prefix of each row [I] and the symbols [I, b·H] of its entries.

    weights_IE: rotated if `rotated`; changed in place if errors are fed back. scale_IE: of each
    entry. moments: None weighs all entries alike.
    """
    divisor_IE = divisor_of(scale_IE)
    if moments is None:
        parts = [
            coder.encode(weights_IE[rows] / divisor_IE[rows], None, weights_IE.shape[1])
            for rows in row_chunks(*weights_IE.shape)
        ]
        prefixes = torch.cat([part.prefix_R for part in parts])
        return prefixes, torch.cat([part.symbols_RC.to(torch.uint8) for part in parts])
    rows = _Rows(weights_IE, divisor_IE, scale_IE, coder)
    input_HH = moments.rotated() if rotated else moments.input_HH
    root_HH = inverse_root(input_HH, _DAMPING)
    # The search looks ahead into the next projection, whose errors have no cross terms with this.
    ahead = root_HH[: coder.look_ahead, : coder.look_ahead]
    seen_HH = torch.block_diag(root_HH, ahead)
    output = weights_IE.shape[1] - hidden
    for first in range(0, output, hidden):
        round_with_feedback(
            weights_IE[:, first : first + hidden],
            root_HH,
            rows.code_columns_from(first, seen_HH),
            at_a_time=coder.at_a_time,
            look_ahead=coder.look_ahead,
        )
    for chunk in torch.arange(len(weights_IE)).split(MOMENT_ROWS):
        start, stop = int(chunk[0]), int(chunk[-1]) + 1
        round_with_feedback(
            weights_IE[start:stop, output:].T,
            inverse_root(moments.neuron_II[start:stop, start:stop], _DAMPING),
            rows.code_output_rows_from(start, output),
            at_a_time=1,
        )
    return rows.prefix_I, rows.symbols_IE


class _Rows:
    """The codes of a matrix, filled in block by block as errors are fed back."""

    def __init__(
        self, weights_IE: Tensor, divisor_IE: Tensor, scale_IE: Tensor, coder: Coder
    ) -> None:
        self._weights_IE, self._divisor_IE, self._scale_IE = weights_IE, divisor_IE, scale_IE
        self._coder = coder
        rows = len(weights_IE)
        self.prefix_I = torch.zeros(rows, dtype=torch.int32)
        self.symbols_IE = torch.zeros(weights_IE.shape, dtype=torch.uint8)
        self._last_I = torch.zeros(rows, dtype=torch.int32)

    def code_columns_from(self, first: int, root: Tensor) -> Callable[[int, int], Tensor]:
        """Codes columns of all rows; returns what they are rounded to, [I, columns].

        root: U of the columns from `first` on, and of those that are looked at after them.
        """

        def code(start: int, stop: int) -> Tensor:
            end = min(stop + self._coder.look_ahead, len(root))
            coded = self._coder.encode_with_feedback(
                self._weights_IE[:, first + start : first + end],
                self._scale_IE[:, first + start : first + end],
                root[start:end, start:end],
                self._last_I if first + start else None,
                stop - start,
            )
            return self._keep(slice(None), first + start, first + stop, coded)

        return code

    def code_output_rows_from(self, first: int, output: int) -> Callable[[int, int], Tensor]:
        """Codes the output projection of some rows: [H, rows]."""

        def code(start: int, stop: int) -> Tensor:
            rows = slice(first + start, first + stop)
            target = self._weights_IE[rows, output:] / self._divisor_IE[rows, output:]
            coded = self._coder.encode(target, self._last_I[rows], target.shape[1])
            return self._keep(rows, output, self._weights_IE.shape[1], coded).T

        return code

    def _keep(self, rows: slice, start: int, stop: int, coded: CodedRows) -> Tensor:
        """Note codes of some entries; returns what these are rounded to."""
        if start == 0:
            self.prefix_I[rows] = coded.prefix_R
        self.symbols_IE[rows, start:stop] = coded.symbols_RC.to(torch.uint8)
        self._last_I[rows] = coded.last_R
        return coded.integers_RC * self._scale_IE[rows, start:stop]
