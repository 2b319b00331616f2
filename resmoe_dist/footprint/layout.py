"""How a model's experts are stored: as settings of `compress` ask, or as an index says."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from resmoe_dist.checkpoints.entries import STORED_DTYPES, GroupEntry, LayerEntry
from resmoe_dist.checkpoints.format import CompressionSettings, read_index
from resmoe_dist.codecs import DENSE, CodecSpec
from resmoe_dist.compression.encoding import GroupCodecs
from resmoe_dist.compression.stored_size import StoredSize, share_of
from resmoe_dist.errors import UserError
from resmoe_dist.families.storage import ExpertSite
from resmoe_dist.footprint.experts import ExpertBytes, PlannedGroup, PlannedLayer
from resmoe_dist.footprint.structure import ModelStructure
from resmoe_dist.jobs.bit_budget import sizes_for_target
from resmoe_dist.jobs.group import wanted_codecs
from resmoe_dist.jobs.settings import check_choices, keep_for_target
from resmoe_dist.methods import Dense, Method, method_of


@dataclass(frozen=True)
class StoredExperts:
    """layers: as stored. disk_bytes: of all files of weights, without their headers. settings: that
    made them."""

    layers: tuple[PlannedLayer, ...]
    disk_bytes: int
    settings: CompressionSettings


class Layout(ABC):
    """How a model's experts are stored for a grid."""

    @abstractmethod
    def experts(self, ep: int) -> StoredExperts:
        """The experts of a checkpoint to serve at `ep`. Raises UserError if it cannot be made."""


class SettingsLayout(Layout):
    """The checkpoint that `compress` would make, with a group for each EP rank.

    settings: its `groups` count only if `fixed_groups` is set, for a checkpoint that is served at
    another EP than it is compressed for. Raises UserError if they do not divide the experts.
    """

    def __init__(
        self, structure: ModelStructure, settings: CompressionSettings, *, fixed_groups: bool
    ) -> None:
        self.structure, self.settings, self.fixed_groups = structure, settings, fixed_groups
        for site in structure.sites:
            if fixed_groups and site.num_experts % max(settings.groups, 1):
                raise UserError(
                    f"--groups {settings.groups}: {site.module} has {site.num_experts} experts, "
                    "which do not divide into as many groups; choose a divisor"
                )

    def experts(self, ep: int) -> StoredExperts:
        settings = self.settings
        if not self.fixed_groups:
            settings = settings.model_copy(update={"groups": ep})
        check_choices(self.structure.sites, settings)
        if settings.chooses_bits:
            return self._stored(self._of_size(settings), settings)
        if settings.target_bytes is not None:
            keep = keep_for_target(settings, self._sizes(settings))
            residual = settings.residual_codec.with_keep(keep)
            settings = settings.model_copy(update={"residual_codec": residual})
        return self._stored(self._layers(settings), settings)

    def _layers(self, settings: CompressionSettings) -> tuple[PlannedLayer, ...]:
        return tuple(
            self._layer(site, settings, position)
            for position, site in enumerate(self.structure.sites)
        )

    def _of_size(self, settings: CompressionSettings) -> tuple[PlannedLayer, ...]:
        """Layers of the size that is asked for, with the bytes of centres among the residuals'."""
        sizes = self._sizes(settings)
        layers = list(self._layers(settings))
        expert_bytes = sizes_for_target(settings, sizes)
        for i in settings.layers:
            bytes_of_expert = expert_bytes[i] + sizes[i].bias_bytes
            groups = [
                replace(
                    group,
                    center=None,
                    measured=ExpertBytes(0, int(len(group.experts) * bytes_of_expert)),
                )
                for group in layers[i].groups
            ]
            layers[i] = replace(layers[i], groups=tuple(groups))
        return tuple(layers)

    def _stored(
        self, layers: tuple[PlannedLayer, ...], settings: CompressionSettings
    ) -> StoredExperts:
        experts = sum(layer.stored_bytes for layer in layers)
        return StoredExperts(layers, experts + self.structure.other_stored_bytes, settings)

    def _layer(
        self, site: ExpertSite, settings: CompressionSettings, position: int
    ) -> PlannedLayer:
        codecs, method = self._codecs(settings, position), self._method(settings, position)
        compressed = position in settings.layers
        groups = settings.groups * (settings.groups_per_rank if compressed else 1)
        experts = site.num_experts
        if method.reduces == "experts" and codecs.budget is not None:
            experts = share_of(experts, codecs.budget)
        return PlannedLayer(
            site.module,
            replace(site.shape, rows=method.stored_rows(site.shape, codecs.budget)),
            experts,
            codecs.dtype.itemsize,
            tuple(
                PlannedGroup(tuple(_part(experts, i, groups)), codecs.center, codecs.residual)
                for i in range(groups)
            ),
        )

    def _codecs(self, settings: CompressionSettings, position: int) -> GroupCodecs:
        dtype = self.structure.source_dtype
        if settings.dtype and position in settings.layers:
            dtype = STORED_DTYPES[settings.dtype]
        wanted = wanted_codecs(settings, self.structure.sites[position].shape, dtype)
        return self._method(settings, position).codecs(wanted)

    def _sizes(self, settings: CompressionSettings) -> list[StoredSize]:
        """All experts of each layer, as if they were one group."""
        return [
            self._method(settings, position).size(
                site.shape, site.num_experts, self._codecs(settings, position)
            )
            for position, site in enumerate(self.structure.sites)
        ]

    def _method(self, settings: CompressionSettings, position: int) -> Method:
        return method_of(settings.method) if position in settings.layers else Dense()


class CheckpointLayout(Layout):
    """An existing compressed checkpoint: its index has the bytes of every group.

    Raises UserError if the folder's index is damaged or too new.
    """

    def __init__(self, folder: Path) -> None:
        index = read_index(folder)
        groups = [group.file for layer in index.layers for group in layer.groups]
        weights = [entry for entry in index.other_files if entry.file.endswith(".safetensors")]
        self._stored = StoredExperts(
            tuple(_planned(layer, index.settings) for layer in index.layers),
            sum(entry.bytes for entry in [*groups, *weights]),
            index.settings,
        )

    def experts(self, ep: int) -> StoredExperts:
        return self._stored


def dense_layers(sites: tuple[ExpertSite, ...], dtype: torch.dtype) -> tuple[PlannedLayer, ...]:
    """The same experts, not compressed."""
    return tuple(
        PlannedLayer(
            site.module,
            site.shape,
            site.num_experts,
            dtype.itemsize,
            (PlannedGroup(tuple(range(site.num_experts)), None, DENSE),),
        )
        for site in sites
    )


def _part(count: int, i: int, parts: int) -> range:
    """The i-th of `parts` nearly equal ranges of [0, count)."""
    return range(i * count // parts, (i + 1) * count // parts)


def _planned(layer: LayerEntry, settings: CompressionSettings) -> PlannedLayer:
    return PlannedLayer(
        layer.module,
        layer.shape,
        layer.stored_experts,
        STORED_DTYPES[layer.dtype].itemsize,
        tuple(_measured(layer, group, settings) for group in layer.groups),
    )


def _measured(layer: LayerEntry, group: GroupEntry, settings: CompressionSettings) -> PlannedGroup:
    residual = _spec(layer.residual_codec, settings.residual_codec)
    if group.keep is not None and residual.keep is not None:
        residual = residual.with_keep(group.keep)
    center = None
    if group.has_center:
        assert layer.center_codec is not None
        center = _spec(layer.center_codec, settings.center_codec)
    measured = ExpertBytes(group.center_bytes, sum(group.residual_bytes.values()))
    return PlannedGroup(tuple(group.experts), center, residual, measured)


def _spec(name: str, chosen: CodecSpec) -> CodecSpec:
    """A layer's codec, with the options of the settings if these chose it."""
    return chosen if chosen.name == name else CodecSpec(name=name)
