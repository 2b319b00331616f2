"""Rounding with feedback: what a rounded entry gets wrong, later ones make up for (GPTQ).

Of a projection with inputs of second moment S, columns are rounded from left to right. The error of
the columns B that are done is fixed; the later columns L change by the least-squares answer to it,
− E · U_BB⁻¹ · U_BL with Uᵀ U = S⁻¹ (arXiv:2210.17323, section 3.3; in blocks: QuIP#,
arXiv:2402.04396, section 4.1).

Legend: N outputs, M inputs of a projection, B inputs rounded at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Later inputs than these get the errors of so many inputs in one product.
_LAZY = 128


def round_with_feedback(
    weight_NM: Tensor,
    root_MM: Tensor,
    round_inputs: Callable[[int, int], Tensor],
    *,
    at_a_time: int,
    look_ahead: int = 0,
) -> None:
    """Round all inputs of a projection, `at_a_time` together.

    weight_NM: changed in place, as the errors are fed back. root_MM: U. round_inputs: rounds the
    inputs [start, stop) of the present `weight_NM` and returns what they are rounded to,
    [N, stop − start]; it may look at so many inputs more.
    """
    inputs = weight_NM.shape[1]
    for lazy_start in range(0, inputs, _LAZY):
        lazy_stop = min(lazy_start + _LAZY, inputs)
        seen = min(lazy_stop + look_ahead, inputs)
        scaled = []
        for start in range(lazy_start, lazy_stop, at_a_time):
            stop = min(start + at_a_time, lazy_stop)
            error_NB = weight_NM[:, start:stop] - round_inputs(start, stop)
            scaled_NB = torch.linalg.solve_triangular(
                root_MM[start:stop, start:stop], error_NB, upper=True, left=False
            )
            weight_NM[:, stop:seen] -= scaled_NB @ root_MM[start:stop, stop:seen]
            scaled.append(scaled_NB)
        weight_NM[:, seen:] -= torch.cat(scaled, dim=1) @ root_MM[lazy_start:lazy_stop, seen:]
