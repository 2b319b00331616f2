"""The entries of layers in the index, from what was recorded of their groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from resmoe_dist.checkpoints.entries import GroupEntry, LayerEntry, dtype_name
from resmoe_dist.jobs.group import GroupCompressor
from resmoe_dist.jobs.tasks import GroupTask


@dataclass(frozen=True)
class FinishedGroup:
    """A group's entry in the index, and its layer's expert map if experts were merged."""

    entry: GroupEntry
    expert_map: list[int] | None


def layer_entries(
    compressor: GroupCompressor,
    finished: Mapping[GroupTask, FinishedGroup],
    sensitivity: Mapping[int, float],
) -> list[LayerEntry]:
    """Entries of all layers, from all groups of all of them. sensitivity: of those with one."""
    in_order = sorted(finished, key=lambda task: task.group)
    return [
        _layer_entry(
            compressor,
            layer,
            [finished[task] for task in in_order if task.layer == layer],
            sensitivity.get(layer),
        )
        for layer in range(len(compressor.source.sites))
    ]


def _layer_entry(
    compressor: GroupCompressor,
    layer: int,
    groups: list[FinishedGroup],
    sensitivity: float | None,
) -> LayerEntry:
    site, codecs = compressor.source.sites[layer], compressor.codecs(layer)
    method = compressor.method(layer)
    rows = method.stored_rows(site.shape, codecs.budget)
    return LayerEntry(
        module=site.module,
        num_experts=site.num_experts,
        rows=rows,
        source_rows=None if rows == site.shape.rows else site.shape.rows,
        hidden=site.shape.hidden,
        gated=site.shape.gated,
        row_bias=site.shape.row_bias,
        output_bias=site.shape.output_bias,
        method=method.name,
        center_codec=None if codecs.center is None else codecs.center.name,
        residual_codec=codecs.residual.name,
        dtype=dtype_name(codecs.dtype),
        storage=compressor.source.storages[layer],
        # Experts are merged or dropped only if one group holds the whole layer.
        expert_map=groups[0].expert_map,
        sensitivity=sensitivity,
        groups=[group.entry for group in groups],
    )
