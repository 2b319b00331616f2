"""What methods share that merge similar experts: groups of experts become one expert each.

A method says which experts form a cluster, in which order of their rows they match, and how much
each counts; the merged expert is the weighted mean, unless the method merges in another way. The
router stays as it is: all model experts of a cluster become the same stored expert (paper 002,
appendix A3).

Legend: E experts of the group, I rows, D columns, H hidden.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from resmoe_dist.codecs import EncodedMatrix
from resmoe_dist.compression.activations import LayerActivations
from resmoe_dist.compression.assignment import best_assignment
from resmoe_dist.compression.encoding import GroupCodecs
from resmoe_dist.compression.permutations import add_permuted_rows, identity_permutations
from resmoe_dist.compression.routing_similarity import router_similarity
from resmoe_dist.compression.stored_size import share_of
from resmoe_dist.methods.base import EncodedGroup, SourceGroup
from resmoe_dist.methods.fewer_experts import FewerExperts
from resmoe_dist.methods.plan import GroupPlan
from resmoe_dist.methods.stored import encode_dense, encode_fewer_experts

# Experts that become one, the dominant one first.
Cluster = list[int]


@dataclass(frozen=True)
class Merged:
    """What the clusters of a group become.

    experts: a matrix [I, D] per cluster, float32. permutations_EI: the order of each expert's rows
    in which it is compared with the one that replaces it.
    """

    experts: list[Tensor]
    permutations_EI: Tensor


class MergingMethod(FewerExperts):
    """Each layer stores one weighted mean per cluster of experts."""

    @abstractmethod
    def clusters(self, group: SourceGroup, count: int) -> list[Cluster]:
        """`count` clusters that together hold every expert once."""

    def permutations(self, group: SourceGroup, clusters: Sequence[Cluster]) -> Tensor:
        """The order [E, I] of each expert's rows in which it is merged. By default as stored."""
        return identity_permutations(group.experts_EID)

    def importance(self, group: SourceGroup) -> Tensor:
        """How much each expert counts in the mean of its cluster, [E]. By default all alike."""
        return torch.ones(len(group.experts_EID))

    def merge(
        self, group: SourceGroup, clusters: Sequence[Cluster], shares: dict[int, float]
    ) -> Merged:
        """One expert per cluster. shares: how much each expert counts in its cluster."""
        permutations_EI = self.permutations(group, clusters)
        means = [_mean(group.experts_EID, part, shares, permutations_EI) for part in clusters]
        return Merged(means, permutations_EI)

    def encoder(
        self, group: SourceGroup, merged: Merged
    ) -> Callable[[Tensor, GroupCodecs], EncodedMatrix]:
        """How merged experts are encoded. By default dense."""
        return encode_dense

    def encode(
        self, group: SourceGroup, codecs: GroupCodecs, plan: GroupPlan | None = None
    ) -> EncodedGroup:
        assert group.max_stored is not None
        clusters = self.clusters(group, group.max_stored)
        shares = shares_in(clusters, self.importance(group))
        merged = self.merge(group, clusters, shares)
        biases_EH = group.biases_EH
        encoded = encode_fewer_experts(
            group,
            codecs,
            expert_map_of(clusters),
            merged.experts,
            permutations_EI=merged.permutations_EI,
            encode=self.encoder(group, merged),
            biases=None
            if biases_EH is None
            else [_mean_bias(biases_EH, part, shares) for part in clusters],
        )
        distance = sum(loss.squared_error for loss in encoded.losses) / len(encoded.losses)
        return replace(encoded, objective=distance)


class MatchedByUseMethod(MergingMethod):
    """Experts are matched to the first one of their cluster, and count by their use."""

    @property
    def aligns_rows(self) -> bool:
        return True

    def permutations(self, group: SourceGroup, clusters: Sequence[Cluster]) -> Tensor:
        return match_leaders(group, clusters)

    def importance(self, group: SourceGroup) -> Tensor:
        return frequency(group)


class GlobalRoutingMethod(MergingMethod):
    """Clusters around the experts that the router uses most, chosen over all layers together.

    Paper 002, algorithm 1: how many experts a layer stores follows from how its tokens spread.
    """

    def experts_per_layer(
        self, counts: Sequence[int], keep: float, activations: Sequence[LayerActivations] | None
    ) -> list[int]:
        total = sum(share_of(count, keep) for count in counts)
        assert activations is not None, "the method needs a calibration text"
        return dominant_per_layer([measured.tokens_E for measured in activations], total)

    def clusters(self, group: SourceGroup, count: int) -> list[Cluster]:
        return routing_clusters(group, count)


def dominant_per_layer(tokens: Sequence[Tensor], total: int) -> list[int]:
    """How many of the `total` most used experts each layer has; at least one.

    tokens: of each layer's experts [E]. An expert's frequency is its share of its layer's tokens,
    except that the most used one of each layer comes first (paper 002, section 3.1, footnote 3).
    Earlier layers win ties.
    """
    found = [1] * len(tokens)
    candidates: list[tuple[float, int]] = []
    for layer, tokens_E in enumerate(tokens):
        frequency_E = tokens_E.double() / max(1, int(tokens_E.sum()))
        # The most used one is in already.
        others = frequency_E.sort(descending=True).values[1:]
        candidates += [(-frequency, layer) for frequency in others.tolist()]
    for _, layer in sorted(candidates)[: total - len(found)]:
        found[layer] += 1
    return found


def most_used(group: SourceGroup, count: int) -> list[int]:
    """The `count` experts with the most tokens, most first; earlier ones win ties."""
    return frequency(group).sort(descending=True, stable=True).indices[:count].tolist()


def frequency(group: SourceGroup) -> Tensor:
    """How many calibration tokens each expert received, [E]."""
    assert group.activations is not None, "the method needs a calibration text"
    return group.activations.tokens_E


def routing_clusters(group: SourceGroup, count: int) -> list[Cluster]:
    """The `count` most used experts; every other joins the one with the most similar router logits.

    Paper 002, section 3.1. Raises UserError if the router's logits are unknown.
    """
    assert group.samples is not None
    similarity_EE = router_similarity(group.samples)
    dominant = sorted(most_used(group, count))
    found = [[k] for k in dominant]
    for k in range(len(group.experts_EID)):
        if k not in dominant:
            found[int(similarity_EE[k, dominant].argmax())].append(k)
    return found


def led_by_most_used(group: SourceGroup, clusters: Sequence[Sequence[int]]) -> list[Cluster]:
    """The clusters with the expert that has the most tokens first."""
    tokens = frequency(group).tolist()
    return [sorted(part, key=lambda k: (-tokens[k], k)) for part in clusters]


def match_rows(group: SourceGroup, targets: Sequence[int]) -> Tensor:
    """The order [E, I] in which each expert's rows are closest to those of its target.

    targets: an expert for each expert. Weight matching (Ainsworth et al. 2022, as in paper 002,
    appendix A2): maximises ⟨in_t, P in_k⟩ + ⟨out_t, out_k Pᵀ⟩, summed over all projections.
    """
    permutations_EI = identity_permutations(group.experts_EID)
    for k, target in enumerate(targets):
        if k != target:
            permutations_EI[k] = best_assignment(
                group.experts_EID[target].float(), group.experts_EID[k], device=group.device
            )
    return permutations_EI


def match_leaders(group: SourceGroup, clusters: Sequence[Cluster]) -> Tensor:
    """The order [E, I] in which each expert matches the first one of its cluster."""
    leaders = {k: part[0] for part in clusters for k in part}
    return match_rows(group, [leaders[k] for k in sorted(leaders)])


def expert_map_of(clusters: Sequence[Cluster]) -> list[int]:
    """The number of each expert's cluster."""
    numbers = {k: number for number, part in enumerate(clusters) for k in part}
    return [numbers[k] for k in sorted(numbers)]


def shares_in(clusters: Sequence[Cluster], importance_E: Tensor) -> dict[int, float]:
    """Of each expert, its share of its cluster's mean.

    In a cluster without importance, such as experts that no token reached, all count alike.
    """
    found: dict[int, float] = {}
    for part in clusters:
        weights = importance_E[part].double()
        weights = weights if weights.sum() else torch.ones_like(weights)
        found |= dict(zip(part, (weights / weights.sum()).tolist(), strict=True))
    return found


def weighted_mean(
    experts_EID: Tensor, part: Cluster, shares: dict[int, float], permutations_EI: Tensor
) -> Tensor:
    """Σ share · expert [I, D] over a cluster, float32; each expert in its order of rows."""
    total_ID = torch.zeros(experts_EID.shape[1:])
    for k in part:
        add_permuted_rows(total_ID, experts_EID[k], permutations_EI[k], shares[k])
    return total_ID


def _mean_bias(biases_EH: Tensor, part: Cluster, shares: dict[int, float]) -> Tensor:
    return torch.stack([shares[k] * biases_EH[k].float() for k in part]).sum(0)
