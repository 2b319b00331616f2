"""What each rank of a lane holds besides experts.

The ranks divide it by the rules that the runtime loads it by.
"""

from __future__ import annotations

from dataclasses import dataclass

from resmoe_dist.footprint.structure import ModelStructure
from resmoe_dist.runtime.sharding_rules import Division, ShardingRules, sharding_rules


@dataclass(frozen=True)
class LaneShare:
    """Bytes of the rank that holds most. other: everything that is not an expert's. cache: the KV
    cache of one sequence."""

    other: int
    cache: int


def lane_share(structure: ModelStructure, lane_ranks: int) -> LaneShare:
    """The share of one of the `lane_ranks` ranks of a lane."""
    rules = sharding_rules(structure.model, [site.module for site in structure.sites], lane_ranks)
    whole = Division("replicate", 1)
    other = sum(
        tensor.new_empty(rules.divided.get(name, whole).largest_slice(tensor.shape)).nbytes
        for name, tensor in structure.others.items()
    )
    parts = _cache_parts(structure, rules)
    cache = sum(
        -(-layer_bytes // parts.get(layer, 1))
        for layer, layer_bytes in enumerate(structure.cache_by_layer)
    )
    return LaneShare(other, cache)


def _cache_parts(structure: ModelStructure, rules: ShardingRules) -> dict[int, int]:
    """Among how many ranks each layer's KV cache is divided; layers that are whole are missing.

    A rank caches the heads that its slice of the key projection gives it. It caches all heads if
    outputs are gathered (OLMoE), and the whole latent in latent attention (MLA).
    """
    found = {}
    for name, module in structure.model.named_modules():
        keys = rules.divided.get(f"{name}.k_proj")
        if keys is not None and keys.style == "colwise" and hasattr(module, "layer_idx"):
            found[module.layer_idx] = keys.parts
    return found
