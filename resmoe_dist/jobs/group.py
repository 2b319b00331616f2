"""One group of experts: read, aligned, encoded; what its file holds and what the index says of it.

Legend: N experts of the group, E of the layer, I rows, D columns, H hidden.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resmoe_dist.checkpoints.compressed import STORED_DTYPES, CompressionSettings, group_tensors
from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.checkpoints.tensor_files import TensorFile, write_tensors
from resmoe_dist.codecs import DenseResidual, EncodedResidual, codec_named
from resmoe_dist.compression.activations import LayerActivations
from resmoe_dist.compression.alignment import Alignment, align, rows_as_stored
from resmoe_dist.compression.blocks import CPU, AlignedExperts, EntryWeights
from resmoe_dist.compression.budget import PriceCurve, StoredSize, center_pays, centerless_keep
from resmoe_dist.compression.clustering import cluster_experts
from resmoe_dist.compression.encoding import encode_group
from resmoe_dist.design_matrix import ExpertShape
from resmoe_dist.errors import UserError
from resmoe_dist.jobs.memory_budget import ExpertStore, GroupMemory
from resmoe_dist.process_memory import return_freed_memory

# Weight of inputs and neurons that no calibration token used, in units of the root mean square.
_LEAST_WEIGHT = 1e-2
_PLAN = "resmoe_plan"


@dataclass(frozen=True)
class GroupPlan:
    """What is decided about a group before it is encoded.

    center and keep: as `encode_group` takes them. curve: the prices of dropping its entries, where
    budgets are shared out over the model.
    """

    alignment: Alignment
    center: str
    keep: float
    curve: PriceCurve | None = None

    def without_alignment(self) -> GroupPlan:
        """The same but for the permutations, which may take megabytes."""
        empty = torch.empty(0, 0, dtype=torch.int64)
        return replace(self, alignment=replace(self.alignment, permutations_NI=empty))

    def save(self, path: Path) -> None:
        """Write the plan to a safetensors file, atomically."""
        decided = {
            "center": self.center,
            "keep": self.keep,
            "objective": self.alignment.objective,
            "curve": None if self.curve is None else vars(self.curve),
        }
        permutations_NI = self.alignment.permutations_NI.int()
        write_tensors(path, {"permutations": permutations_NI}, {_PLAN: json.dumps(decided)})

    @classmethod
    def load(cls, path: Path) -> GroupPlan | None:
        """The plan in a file that `save` wrote; None where there is none."""
        try:
            file = TensorFile(path)
            decided = json.loads(file.metadata[_PLAN])
        except (UserError, KeyError, ValueError):
            return None
        curve = decided["curve"]
        return cls(
            Alignment(file.read("permutations").long(), decided["objective"]),
            decided["center"],
            decided["keep"],
            None if curve is None else PriceCurve(**curve | {"prices": tuple(curve["prices"])}),
        )


@dataclass(frozen=True)
class CompressedGroup:
    """tensors: of the group's file, by name. record: its `GroupEntry`, all but the file."""

    tensors: dict[str, Tensor]
    record: dict[str, Any]


class GroupCompressor:
    """Compresses groups of one source with one set of settings.

    activations: of each MoE layer, to weigh errors by; None weighs all entries alike.
    """

    def __init__(
        self,
        source: SourceCheckpoint,
        settings: CompressionSettings,
        store: ExpertStore,
        *,
        device: torch.device = CPU,
        activations: Sequence[LayerActivations] | None = None,
    ) -> None:
        self.source, self.settings, self.store = source, settings, store
        self.device, self.activations = device, activations

    def codec(self, layer: int) -> type[EncodedResidual]:
        """How a layer's residuals are stored: layers that were not chosen are left dense."""
        chosen = layer in self.settings.layers
        return codec_named(self.settings.codec) if chosen else DenseResidual

    def dtype(self, layer: int) -> torch.dtype:
        """In which a layer's values are stored."""
        if self.settings.dtype and layer in self.settings.layers:
            return STORED_DTYPES[self.settings.dtype]
        return self.source.dtype(layer)

    def size(self, layer: int, count: int) -> StoredSize:
        """What decides the bytes of a group of `count` experts of a layer.

        Without a centre as many values more are kept as it would have had: that changes nothing.
        """
        shape, codec, dtype = self.source.sites[layer].shape, self.codec(layer), self.dtype(layer)
        biases = count * shape.hidden * dtype.itemsize if shape.output_bias else 0
        has_center = codec.uses_center and self.settings.center != "none"
        return StoredSize(
            count, shape.rows, shape.columns, dtype.itemsize, codec, has_center, biases
        )

    def cluster(self, layer: int, experts: Sequence[int], clusters: int) -> list[list[int]]:
        """Which of a rank's experts share a centre, where it has several."""
        matrices = (self.source.read_expert(layer, k)[0] for k in experts)
        found = cluster_experts(matrices, clusters, device=self.device)
        return [[experts[i] for i in cluster] for cluster in found]

    def plan(self, layer: int, experts: Sequence[int]) -> GroupPlan:
        """Align a group, decide whether it has a centre, and find the prices of its entries."""
        experts_NID, _ = self._read(layer, experts, keep=0.0)
        plan, aligned = self._plan(layer, experts, experts_NID)
        if self.codec(layer).chooses_entries:
            return replace(plan, curve=PriceCurve.of(aligned, plan.center))
        return plan

    def compress(
        self, layer: int, experts: Sequence[int], plan: GroupPlan | None = None
    ) -> CompressedGroup:
        """Encode a group, by its plan where there is one already.

        Raises UserError where a tensor of the source holds NaN or infinities, or values that are
        too large for the stored dtype.
        """
        return_freed_memory()
        keep = self.settings.keep if plan is None else plan.keep
        experts_NID, biases = self._read(layer, experts, keep)
        if plan is None:
            plan, aligned = self._plan(layer, experts, experts_NID)
        else:
            aligned = self._aligned(layer, experts, experts_NID, plan.alignment)
        codec, dtype = self.codec(layer), self.dtype(layer)
        encoded = encode_group(
            aligned,
            codec,
            center=plan.center,
            keep=plan.keep,
            allocate=self.settings.allocate,
            dtype=dtype,
        )
        losses = encoded.losses
        if not all(math.isfinite(loss.squared_error) for loss in losses):
            raise UserError(
                f"{self.source.sites[layer].module}: experts {list(experts)} hold values too large "
                f"for {dtype}; choose --dtype bfloat16 or float32"
            )
        residuals = dict(zip(experts, encoded.residuals, strict=True))
        output_biases = {k: bias_H.to(dtype) for k, bias_H in biases.items()}
        value_bytes, index_bytes = _bytes_by_kind(residuals, output_biases)
        record: dict[str, Any] = {
            "experts": list(experts),
            "squared_errors": [_rounded(loss.squared_error) for loss in losses],
            "squared_norms": [_rounded(loss.squared_norm) for loss in losses],
            "source_bytes": experts_NID.nbytes + sum(bias.nbytes for bias in biases.values()),
            "center_bytes": 0 if encoded.center_ID is None else encoded.center_ID.nbytes,
            "value_bytes": value_bytes,
            "index_bytes": index_bytes,
            "objective": _rounded(plan.alignment.objective),
        }
        if codec.chooses_entries:
            kept = sum(loss.kept for loss in losses)
            record["keep"] = _rounded(kept / (aligned.count * aligned.entries))
        if aligned.weights is not None:
            record["weighted_squared_errors"] = [
                _rounded(loss.weighted_squared_error) for loss in losses
            ]
            record["weighted_squared_norms"] = [
                _rounded(loss.weighted_squared_norm) for loss in losses
            ]
        return CompressedGroup(group_tensors(encoded.center_ID, residuals, output_biases), record)

    def _read(
        self, layer: int, experts: Sequence[int], keep: float
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Design matrices [N, I, D] as stored, and the output biases of those that have one.

        keep: what will be encoded of them, for which there must be room too.
        """
        shape, dtype = self.source.sites[layer].shape, self.source.dtype(layer)
        codec = self.codec(layer)
        need = GroupMemory.estimate(
            len(experts),
            shape.rows,
            shape.columns,
            dtype.itemsize,
            stored_bytes=self.size(layer, len(experts)).bytes_at(keep),
            aligns=codec.uses_center and self.settings.align != "none" and len(experts) > 1,
        )
        matrix_shape = (len(experts), shape.rows, shape.columns)
        experts_NID = self.store.allocate(need, matrix_shape, dtype)
        biases = {}
        for k, matrix_ID in zip(experts, experts_NID, strict=True):
            bias_H = self.source.read_expert_into(layer, k, matrix_ID)
            if bias_H is not None:
                biases[k] = bias_H
        return experts_NID, biases

    def _plan(
        self, layer: int, experts: Sequence[int], experts_NID: Tensor
    ) -> tuple[GroupPlan, AlignedExperts]:
        codec, settings = self.codec(layer), self.settings
        if codec.uses_center and settings.center != "none":
            alignment = align(
                experts_NID, settings.align, solver=settings.solver, device=self.device
            )
        else:
            alignment = Alignment(rows_as_stored(experts_NID), 0.0)
        aligned = self._aligned(layer, experts, experts_NID, alignment)
        center, keep = settings.center, settings.keep
        if center == "auto":
            center = "joint"
            if codec.chooses_entries and not center_pays(aligned, keep):
                center, keep = "none", centerless_keep(keep, len(experts))
        return GroupPlan(alignment, center, keep), aligned

    def _aligned(
        self, layer: int, experts: Sequence[int], experts_NID: Tensor, alignment: Alignment
    ) -> AlignedExperts:
        permutations_NI = alignment.permutations_NI
        if self.activations is None or layer not in self.settings.layers:
            return AlignedExperts(experts_NID, permutations_NI, device=self.device)
        shape, measured = self.source.sites[layer].shape, self.activations[layer]
        weights = entry_weights(shape, measured, experts, permutations_NI)
        return AlignedExperts(experts_NID, permutations_NI, weights, self.device)


def entry_weights(
    shape: ExpertShape,
    measured: LayerActivations,
    experts: Sequence[int],
    permutations_NI: Tensor,
) -> EntryWeights:
    """Weights of a group's entries: what each one is multiplied by when the model runs.

    One weight for all experts at an entry, so that the joint centre stays exact: of a neuron, the
    root mean square over the aligned experts. Inputs and neurons are each scaled to a mean square
    of 1: an error before the activation and one after it have no common unit.
    """
    neuron_NI = measured.neuron_rms_EI[list(experts)].gather(1, permutations_NI)
    inputs = len(shape.inputs)
    column_D = torch.ones(shape.columns)
    column_D[: inputs * shape.hidden] = _unit_weights(measured.input_rms_H).repeat(inputs)
    row_I = _unit_weights(neuron_NI.square().mean(0).sqrt())
    return EntryWeights(column_D, row_I, slice(inputs * shape.hidden, (inputs + 1) * shape.hidden))


def _unit_weights(rms: Tensor) -> Tensor:
    """Scaled to a mean square of 1; what was never active keeps a little weight."""
    scaled = rms / (float(rms.square().mean().sqrt()) or 1.0)
    return scaled.clamp(min=_LEAST_WEIGHT)


def _bytes_by_kind(
    residuals: dict[int, EncodedResidual], output_biases: dict[int, Tensor]
) -> tuple[int, int]:
    """Bytes of stored values, and of the indices that say where they belong."""
    tensors = [tensor for residual in residuals.values() for tensor in residual.buffers()]
    tensors += output_biases.values()
    values = sum(tensor.nbytes for tensor in tensors if tensor.is_floating_point())
    return values, sum(tensor.nbytes for tensor in tensors) - values


def _rounded(measured: float) -> float:
    """To nine digits: the last of sixteen depend on how many threads shared a sum."""
    return float(f"{measured:.9g}")
