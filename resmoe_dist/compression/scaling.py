"""Powers of two that keep the squares of weights within the range of float32."""

from __future__ import annotations

import math

from torch import Tensor


def power_of_two_scale(matrix: Tensor) -> float:
    """A power of two close to the largest magnitude in `matrix`; 2⁻¹⁰⁰ if that is smaller.

    Divided by it, the entries are at most about 1, so their squares and products fit in float32.
    Dividing by a power of two does not round.
    """
    low, high = matrix.aminmax()
    # The lower limit keeps the inverse of the scale within float32.
    return 2.0 ** max(math.frexp(max(-float(low), float(high)))[1], -100)
