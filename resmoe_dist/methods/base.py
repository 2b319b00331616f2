"""What every compression method offers: plan a group, then encode it.

A method takes the experts of one group and returns what is stored: a centre, a residual per stored
expert, and the losses. A new method is one file: a subclass of `Method` with a typed config,
registered with `register_method`. Reading the source, memory bounds, files and the index are the
same for all methods (`resmoe_dist.jobs`).

Legend: E experts of the group, I rows, D columns, H hidden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from resmoe_dist.checkpoints.format import MethodSpec
from resmoe_dist.codecs import EncodedMatrix
from resmoe_dist.compression.activations import LayerActivations
from resmoe_dist.compression.blocks import CPU, AlignedExperts
from resmoe_dist.compression.encoding import GroupCodecs
from resmoe_dist.compression.losses import Loss
from resmoe_dist.compression.permutations import identity_permutations
from resmoe_dist.compression.samples import LayerSamples
from resmoe_dist.compression.stored_size import Reduces, StoredSize, share_of
from resmoe_dist.compression.weighting import entry_weights
from resmoe_dist.design_matrix import ExpertShape, from_rows
from resmoe_dist.methods.plan import GroupPlan
from resmoe_dist.registry import Registry


class MethodConfig(BaseModel):
    """The options of a method. A subclass adds a field per option."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class SourceGroup:
    """The experts of one group as the source stores them.

    experts_EID: any float dtype. activations: of these experts, in the same order; None weighs all
    entries alike. device: where to compute. samples: the layer's, and activation: between an
    expert's projections, for methods that need samples. biases_EH: output biases, if the family has
    any. max_stored: how many experts a method that merges or drops experts may store. numbers: of
    the group's experts in the model, as samples number them, and of_layer: how many experts the
    layer has; None if the group holds the whole layer.
    """

    experts_EID: Tensor
    shape: ExpertShape
    activations: LayerActivations | None = None
    device: torch.device = CPU
    samples: LayerSamples | None = None
    activation: Callable[..., Tensor] | None = None
    biases_EH: Tensor | None = None
    max_stored: int | None = None
    numbers: tuple[int, ...] | None = None
    of_layer: int | None = None

    @property
    def layer_experts(self) -> int:
        """Experts of the layer."""
        return len(self.experts_EID) if self.of_layer is None else self.of_layer

    def projections(self, expert: int) -> dict[str, Tensor]:
        """Weights (and row biases) of an expert, float32, oriented as in `torch.nn.Linear`."""
        return from_rows(self.shape, self.experts_EID[expert].float())

    def number(self, expert: int) -> int:
        """The number in the model of an expert of the group."""
        return expert if self.numbers is None else self.numbers[expert]

    def aligned(self, permutations_EI: Tensor) -> AlignedExperts:
        """The experts with their rows permuted, and the weights of their entries."""
        weights = None
        if self.activations is not None:
            weights = entry_weights(self.shape, self.activations, permutations_EI)
        return AlignedExperts(self.experts_EID, permutations_EI, weights, self.device)


@dataclass(frozen=True)
class EncodedGroup:
    """What a method stores of a group.

    center: None if the group has none. residuals: per stored expert. losses: per expert of the
    group. objective: of the row alignment. expert_map: the stored expert of each of the group's
    experts, or DROPPED, for methods that merge or drop experts; None if each expert is stored.
    biases: output biases [H] of the stored experts where these differ from the group's.
    """

    center: EncodedMatrix | None
    residuals: list[EncodedMatrix]
    losses: list[Loss]
    objective: float
    expert_map: list[int] | None = None
    biases: list[Tensor] | None = None


class Method(ABC):
    """A way to compress the groups of a layer, with its options."""

    name: ClassVar[str]
    config: ClassVar[type[MethodConfig]] = MethodConfig
    # What a budget takes away from layers: all experts lose entries, or rows, or there are fewer
    # experts. Fewer experts need all experts of a layer in one group.
    # An instance may differ from its class, if an option decides.
    reduces: Reduces = "entries"
    # Whether it gives each matrix the bits that a target of bytes leaves it.
    chooses_bits: ClassVar[bool] = False
    # Whether groups come with samples, which a calibration text yields.
    needs_samples: ClassVar[bool] = False

    def __init__(self, options: MethodConfig | None = None) -> None:
        self.options: Any = options or self.config()

    @property
    def spec(self) -> MethodSpec:
        """The name and all options, defaults included."""
        return MethodSpec(name=self.name, options=self.options.model_dump(mode="json"))

    @abstractmethod
    def codecs(self, wanted: GroupCodecs) -> GroupCodecs:
        """How this method stores a layer for which `wanted` was asked.

        Raises UserError if its options and the codecs contradict each other.
        """

    @property
    def aligns_rows(self) -> bool:
        """Whether groups of several experts are aligned, which takes memory."""
        return False

    @property
    def shares_budget(self) -> bool:
        """Whether all groups of the model share one budget.

        They are then planned before any is encoded, and their plans have price curves.
        """
        return False

    def size(self, shape: ExpertShape, count: int, codecs: GroupCodecs) -> StoredSize:
        """What decides the bytes of a group of `count` experts stored with `codecs`.

        A group that does without a centre keeps more entries for the same bytes.
        """
        itemsize = codecs.dtype.itemsize
        return StoredSize(
            count,
            shape.rows,
            shape.columns,
            itemsize,
            residual_codec=codecs.residual,
            center_codec=codecs.center,
            bias_bytes=shape.hidden * itemsize if shape.output_bias else 0,
            reduces=self.reduces,
        )

    def stored_rows(self, shape: ExpertShape, keep: float | None) -> int:
        """How many rows each stored expert has."""
        if self.reduces == "rows" and keep is not None:
            return share_of(shape.rows, keep)
        return shape.rows

    def experts_per_layer(
        self, counts: Sequence[int], keep: float, activations: Sequence[LayerActivations] | None
    ) -> list[int]:
        """How many experts each of the compressed layers may store, if the budget reduces experts.

        counts: experts of each layer. activations: of each layer, if they were measured. The sum
        must not exceed that of the same share for every layer, which is the default.
        """
        return [share_of(count, keep) for count in counts]

    def plan(self, group: SourceGroup, codecs: GroupCodecs) -> GroupPlan:
        """Decide how a group will be encoded. By default: rows in stored order, no centre."""
        return GroupPlan(identity_permutations(group.experts_EID), 0.0, "none", None)

    @abstractmethod
    def encode(
        self, group: SourceGroup, codecs: GroupCodecs, plan: GroupPlan | None = None
    ) -> EncodedGroup:
        """Encode a group by `plan`; None makes one."""


METHODS: Registry[Method] = Registry("method")
register_method = METHODS.register
method_named = METHODS.named


def method_of(spec: MethodSpec) -> Method:
    """The method that a spec describes. Raises ValueError for an unknown name, option or value."""
    return METHODS.named(spec.name)(METHODS.options(spec.name, spec.options))
