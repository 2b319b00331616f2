"""The interface between a layer and the kernels that run it.

Legend: R received rows (tokens), H hidden, C columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from resmoe_dist.kernels.layer import LayerWeights
from resmoe_dist.routing import RoutedTokens


class Backend(ABC):
    """Runs the experts of one layer.

    Made once when a layer is loaded, and again when its weights move to another device or dtype.
    Whatever can be prepared from the weights alone is prepared here, not per token.
    """

    name: ClassVar[str]

    def __init__(self, layer: LayerWeights) -> None:
        self.layer = layer
        # Identifies these weights in caches, without keeping them alive.
        self.key = object()

    @property
    def prepared_bytes(self) -> int:
        """Bytes of tensors that were decoded in preparation, beside the layer's own."""
        return 0

    @classmethod
    @abstractmethod
    def supports(cls, layer: LayerWeights) -> bool:
        """Whether this backend can run the layer on this machine."""

    @abstractmethod
    def mlp(self, routed: RoutedTokens, *, share_center: bool) -> Tensor:
        """For each token the weighted sum of its copies' expert outputs: [R, H] in float32.

        With C = [C_in | C_out], residuals R_k alike, and weights g_k over the experts k of a token:

            h_k = act((C_in + R_k,in) x)
            y   = Σ g_k (C_out + R_k,out) h_k

        share_center=False adds centre and residual inside the product ("tiled"). share_center=True
        multiplies a centre once per token, whichever of its experts the token goes to ("shared"):

            h_k = act(C_in x + R_k,in x)
            y   = C_out (Σ g_k h_k) + Σ g_k R_k,out h_k

        Output biases are not included. Activations are rounded to the dtype of x once.
        """

    @abstractmethod
    def restore(
        self, expert: int, out_RC: Tensor, first_row: int = 0, first_column: int = 0
    ) -> None:
        """Write C + R_k of a local expert into `out_RC`, rounded once to its dtype.

        As many rows and columns as `out_RC` has, from the given ones on.
        """
