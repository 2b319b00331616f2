"""Which tokens a shared centre is multiplied with: each token once, not once per copy.

Legend: G centres, R received rows (tokens), N routed copies, C centre copies (a token and a
centre), S rows of a shard.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from resmoe_dist.kernels.layer import LayerWeights
from resmoe_dist.routing import Copies, RoutedTokens


@dataclass(frozen=True, eq=False)
class CenterCopies:
    """Centre copies, and which of them the routed copies need.

    copies: sorted by centre. index_N (int64): the centre copy that each routed copy needs, -1 for
    none.
    """

    copies: Copies
    index_N: Tensor

    @classmethod
    def of(cls, routed: RoutedTokens, layer: LayerWeights) -> CenterCopies | None:
        """The centre copies of routed tokens; None for a layer without centres."""
        if not layer.centers:
            return None
        R, device = len(routed.x_RH), routed.x_RH.device
        if layer.shares_one_center:
            # Every token needs the one centre; dropped copies use it with weight 0.
            offsets_G = torch.arange(2, device=device) * R
            return cls(Copies(torch.arange(R, device=device), offsets_G), routed.token_N)
        center_N = layer.center_of_copies(routed.expert_N)
        G = len(layer.centers)
        # An extra last row takes the copies without a centre (index -1).
        needed_GR = torch.zeros(G + 1, R, dtype=torch.bool, device=device)
        needed_GR[center_N, routed.token_N] = True
        needed_GR = needed_GR[:G]
        place_GR = (needed_GR.flatten().cumsum(0) - 1).view(G, R)
        index_N = torch.where(center_N >= 0, place_GR[center_N, routed.token_N], -1)
        ends_G = needed_GR.sum(1).cumsum(0)
        offsets_G = torch.cat([ends_G.new_zeros(1), ends_G])
        return cls(Copies(needed_GR.nonzero()[:, 1].contiguous(), offsets_G), index_N)

    def add_to(self, in_NC: Tensor, center_in_CC: Tensor) -> None:
        """Add to each routed copy's input products those of its centre."""
        # Index -1 picks an extra last row of zeros.
        in_NC += F.pad(center_in_CC, (0, 0, 0, 1))[self.index_N]

    def sum_of(self, h_NS: Tensor) -> Tensor:
        """Sum of the activations over the routed copies that share a centre copy: [C, S]."""
        # An extra row takes the copies without a centre.
        C = len(self.copies)
        h_CS = h_NS.new_zeros(C + 1, h_NS.shape[1])
        h_CS.index_add_(0, self.index_N.masked_fill(self.index_N < 0, C), h_NS)
        return h_CS[:C]
