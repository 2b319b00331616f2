"""One group of experts: read within the memory bound and compressed by the layer's method.

Legend: E experts of the group, I rows, D columns, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resmoe_dist.checkpoints.compressed import group_tensors, residual_bytes
from resmoe_dist.checkpoints.entries import STORED_DTYPES
from resmoe_dist.checkpoints.format import CompressionSettings
from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.compression.activations import LayerActivations
from resmoe_dist.compression.blocks import CPU
from resmoe_dist.compression.clustering import cluster_experts
from resmoe_dist.compression.encoding import GroupCodecs
from resmoe_dist.compression.losses import Loss
from resmoe_dist.compression.samples import SampleFiles
from resmoe_dist.compression.stages import stage
from resmoe_dist.compression.stored_size import StoredSize
from resmoe_dist.design_matrix import ExpertShape
from resmoe_dist.errors import UserError
from resmoe_dist.heap import return_freed_memory
from resmoe_dist.jobs.memory_budget import ExpertStore, GroupMemory
from resmoe_dist.kernels.cpu.build import load_kernels
from resmoe_dist.methods import Dense, GroupPlan, Method, SourceGroup, method_of

# In a record: of which stored expert each expert of the layer is one.
EXPERT_MAP = "expert_map"


@dataclass(frozen=True)
class CompressedGroup:
    """tensors: of the group's file, by name. record: its `GroupEntry` without the file, and the
    layer's EXPERT_MAP if experts were merged or dropped."""

    tensors: dict[str, Tensor]
    record: dict[str, Any]


def wanted_codecs(
    settings: CompressionSettings, shape: ExpertShape, dtype: torch.dtype
) -> GroupCodecs:
    """What settings ask for in a layer, before its method decides. dtype: of stored values."""
    residual = settings.residual_codec.for_blocks(shape.projections)
    center = settings.center_codec.for_blocks(shape.projections)
    return GroupCodecs(residual, dtype, center, residual.keep, shape.projections)


class GroupCompressor:
    """Compresses groups of one source with one set of settings.

    activations: of each MoE layer, to weigh errors by; None weighs all entries alike. samples: of
    each MoE layer, for methods that need them.

    Raises ValueError if the settings' method is unknown or has wrong options.
    """

    def __init__(
        self,
        source: SourceCheckpoint,
        settings: CompressionSettings,
        store: ExpertStore,
        *,
        device: torch.device = CPU,
        activations: Sequence[LayerActivations] | None = None,
        samples: SampleFiles | None = None,
    ) -> None:
        self.source, self.settings, self.store = source, settings, store
        self.device, self.activations, self.samples = device, activations, samples
        self._method, self._dense = method_of(settings.method), Dense()

    def method(self, layer: int) -> Method:
        """How a layer is compressed. Layers that the settings leave out are stored dense."""
        return self._method if self._is_compressed(layer) else self._dense

    def codecs(self, layer: int) -> GroupCodecs:
        """How a layer's groups are stored.

        Raises UserError if the method's options and the codecs contradict each other.
        """
        dtype = self.source.dtype(layer)
        if self.settings.dtype and self._is_compressed(layer):
            dtype = STORED_DTYPES[self.settings.dtype]
        wanted = wanted_codecs(self.settings, self.source.sites[layer].shape, dtype)
        return self.method(layer).codecs(wanted)

    def size(self, layer: int, count: int) -> StoredSize:
        """What decides the bytes of a group of `count` experts of a layer.

        A group that does without a centre keeps more entries for the same bytes.
        """
        shape = self.source.sites[layer].shape
        return self.method(layer).size(shape, count, self.codecs(layer))

    def cluster(self, layer: int, experts: Sequence[int], clusters: int) -> list[list[int]]:
        """Split a rank's experts into groups of similar ones."""
        matrices = (self.source.read_expert(layer, k)[0] for k in experts)
        found = cluster_experts(matrices, clusters, device=self.device)
        return [[experts[i] for i in cluster] for cluster in found]

    def plan(self, layer: int, experts: Sequence[int]) -> GroupPlan:
        """What the layer's method decides about a group before it is encoded."""
        group = self._read(layer, experts, keep=0.0)
        return self.method(layer).plan(group, self.codecs(layer))

    def compress(
        self, layer: int, experts: Sequence[int], plan: GroupPlan | None = None
    ) -> CompressedGroup:
        """Encode a group, by its plan if there is one already.

        Raises UserError if a tensor of the source holds NaN or infinities, or values that are too
        large for the stored dtype.
        """
        return_freed_memory()
        codecs = self.codecs(layer)
        keep = codecs.residual.keep if plan is None else plan.keep
        group = self._read(layer, experts, keep)
        if codecs.residual.codec.spends_bits:
            load_kernels()  # also has the searches for codes
        with stage("encode"):
            encoded = self.method(layer).encode(group, codecs, plan)
        losses = encoded.losses
        if not all(math.isfinite(loss.squared_error) for loss in losses):
            raise UserError(
                f"{self.source.sites[layer].module}: experts {list(experts)} hold values too large "
                f"for {codecs.dtype}; choose --dtype bfloat16 or float32"
            )
        stored = list(experts) if encoded.expert_map is None else range(len(encoded.residuals))
        residuals = dict(zip(stored, encoded.residuals, strict=True))
        biases_H = group.biases_EH if encoded.biases is None else encoded.biases
        output_biases = {}
        if biases_H is not None:
            output_biases = {
                k: bias_H.to(codecs.dtype) for k, bias_H in zip(stored, biases_H, strict=True)
            }
        source_bytes = group.experts_EID.nbytes
        if group.biases_EH is not None:
            source_bytes += group.biases_EH.nbytes
        record: dict[str, Any] = {
            "experts": list(stored),
            "squared_errors": [_rounded(loss.squared_error) for loss in losses],
            "squared_norms": [_rounded(loss.squared_norm) for loss in losses],
            "source_bytes": source_bytes,
            "center_bytes": 0 if encoded.center is None else encoded.center.nbytes,
            "residual_bytes": residual_bytes(residuals, output_biases),
            "objective": _rounded(encoded.objective),
        }
        if codecs.residual.codec.selects_entries:
            kept = sum(loss.kept for loss in losses)
            record["keep"] = _rounded(kept / group.experts_EID.numel())
        if codecs.residual.codec.spends_bits:
            record["residual_bits"] = [residual.bits for residual in encoded.residuals]
        if encoded.center is not None and encoded.center.bits is not None:
            record["center_bits"] = encoded.center.bits
        if group.activations is not None:
            record |= _weighted_record(losses)
        if encoded.expert_map is not None:
            record[EXPERT_MAP] = encoded.expert_map
        return CompressedGroup(group_tensors(encoded.center, residuals, output_biases), record)

    def _is_compressed(self, layer: int) -> bool:
        return layer in self.settings.layers

    @stage("read")
    def _read(self, layer: int, experts: Sequence[int], keep: float | None) -> SourceGroup:
        """Read a group as stored.

        keep: the budget that it will be encoded with, for which there must be memory too.
        """
        shape, dtype = self.source.sites[layer].shape, self.source.dtype(layer)
        need = GroupMemory.estimate(
            len(experts),
            shape.rows,
            shape.columns,
            dtype.itemsize,
            stored_bytes=self.size(layer, len(experts)).bytes_at(keep),
            aligns=self.method(layer).aligns_rows and len(experts) > 1,
            encoding_bytes=self.codecs(layer).residual.codec.encoding_bytes(
                shape.rows, shape.columns
            ),
        )
        experts_EID = self.store.allocate(need, (len(experts), shape.rows, shape.columns), dtype)
        found = [
            self.source.read_expert_into(layer, k, matrix_ID)
            for k, matrix_ID in zip(experts, experts_EID, strict=True)
        ]
        biases = [bias_H for bias_H in found if bias_H is not None]
        activations = samples = activation = None
        if self.activations is not None and self._is_compressed(layer):
            activations = self.activations[layer].of_experts(experts)
        if self._is_compressed(layer) and self.samples is not None:
            samples, activation = self.samples.read(layer), self.source.activation(layer)
        assert samples is not None or not self.method(layer).needs_samples
        return SourceGroup(
            experts_EID,
            shape,
            activations,
            self.device,
            samples=samples,
            activation=activation,
            biases_EH=torch.stack(biases) if biases else None,
            max_stored=self._max_stored(layer),
            numbers=tuple(experts),
            of_layer=self.source.sites[layer].num_experts,
        )

    def _max_stored(self, layer: int) -> int | None:
        """How many experts a layer may store, if its method merges or drops experts."""
        layers, keep = self.settings.layers, self.settings.residual_codec.keep
        if not self._is_compressed(layer) or self._method.reduces != "experts" or keep is None:
            return None
        counts = [self.source.sites[i].num_experts for i in layers]
        measured = None if self.activations is None else [self.activations[i] for i in layers]
        return self._method.experts_per_layer(counts, keep, measured)[layers.index(layer)]


def _weighted_record(losses: Sequence[Loss]) -> dict[str, list[float]]:
    return {
        "weighted_squared_errors": [_rounded(loss.weighted_squared_error) for loss in losses],
        "weighted_squared_norms": [_rounded(loss.weighted_squared_norm) for loss in losses],
    }


def _rounded(measured: float) -> float:
    """To nine digits: further ones depend on how many threads shared a sum."""
    return float(f"{measured:.9g}")
