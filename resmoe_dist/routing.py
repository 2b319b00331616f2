"""Routed copies: the one form in which tokens travel from the dispatcher to the kernels.

Legend: T tokens, K experts per token, R received rows (tokens), N routed copies, L local experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

# A router gives this expert number to a copy that it drops.
NO_EXPERT = -1


@dataclass(frozen=True, eq=False)
class Copies:
    """Copies of tokens, sorted by the job (an expert, or a shared centre) that multiplies them.

    token_N (int64): the token of each copy. offsets_J (int64, one more than there are jobs): copies
    [offsets[j], offsets[j + 1]) belong to job j; copies after the last offset have no job.
    """

    token_N: Tensor
    offsets_J: Tensor

    def __len__(self) -> int:
        return len(self.token_N)

    @property
    def num_jobs(self) -> int:
        """J."""
        return len(self.offsets_J) - 1


@dataclass(frozen=True, eq=False)
class RoutedTokens:
    """The tokens of one rank and their routed copies, sorted by local expert.

    x_RH: the tokens. token_N (int64): the row of x_RH that each copy is of, ascending within an
    expert. weight_N (float32): factor of each copy's output. offsets_L (int64, [L + 1]): copies
    [offsets[l], offsets[l + 1]) go to local expert l. Dropped copies come after the last offset,
    with weight 0; no expert runs them.

    Everything is on one device, and nothing here needs its values on the host: sizes follow from
    shapes.
    """

    x_RH: Tensor
    token_N: Tensor
    weight_N: Tensor
    offsets_L: Tensor

    @classmethod
    def from_routing(
        cls,
        x_TH: Tensor,
        top_k_index_TK: Tensor,
        top_k_weights_TK: Tensor,
        num_experts: int,
        first_expert: int = 0,
    ) -> RoutedTokens:
        """The copies for local experts, of all that a router asks for.

        top_k_index_TK: expert numbers, NO_EXPERT for a dropped copy. num_experts, first_expert: of
        the local experts. Copies for other experts count as dropped.
        """
        top_k = top_k_index_TK.shape[1]
        local_S = top_k_index_TK.flatten() - first_expert
        dropped_S = (local_S < 0) | (local_S >= num_experts)
        # Dropped copies sort behind every expert.
        expert_N, slot_N = local_S.masked_fill(dropped_S, num_experts).sort(stable=True)
        weight_S = top_k_weights_TK.flatten().float().masked_fill(dropped_S, 0.0)
        return cls(x_TH, slot_N // top_k, weight_S[slot_N], expert_offsets(expert_N, num_experts))

    def without_dropped(self) -> RoutedTokens:
        """Only the copies that an expert runs. On a GPU this waits for the device."""
        kept = int(self.offsets_L[-1])
        return replace(self, token_N=self.token_N[:kept], weight_N=self.weight_N[:kept])

    @cached_property
    def expert_N(self) -> Tensor:
        """Local expert of each copy; L for dropped copies."""
        copies = torch.arange(len(self.token_N), device=self.token_N.device)
        return torch.searchsorted(self.offsets_L[1:], copies, right=True)

    @property
    def copies(self) -> Copies:
        """The copies by expert."""
        return Copies(self.token_N, self.offsets_L)

    def host_offsets(self) -> list[int]:
        """`offsets_L` on the host. On a GPU this waits for the device."""
        return self.offsets_L.tolist()


def expert_offsets(expert_N: Tensor, num_experts: int) -> Tensor:
    """[L + 1]: where each expert's copies begin in ascending expert numbers, and the last end."""
    return torch.searchsorted(expert_N, torch.arange(num_experts + 1, device=expert_N.device))
