"""Powers of two that keep the squares of weights within the range of float32."""

from __future__ import annotations

import math

from torch import Tensor


def power_of_two_scale(matrix: Tensor) -> float:
    """A power of two close to the largest magnitude in `matrix`, limited to [2⁻¹⁰⁰, 2¹²⁷].

    Divided by it, the entries are below 2, so their squares and products fit in float32. Dividing
    by a power of two does not round.
    """
    low, high = matrix.aminmax()
    # The limits keep the scale and its inverse within float32.
    exponent = math.frexp(max(-float(low), float(high)))[1]
    return 2.0 ** min(max(exponent, -100), 127)
