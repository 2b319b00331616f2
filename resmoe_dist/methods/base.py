"""What every compression method offers: plan a group, then encode it.

A method takes the experts of one group and returns what is stored: a centre, a residual per stored
expert, and the losses. A new method is one file: a subclass of `Method` with a typed config,
registered with `register_method`. Reading the source, memory bounds, files and the index are the
same for all methods (`resmoe_dist.jobs`).

Legend: E experts of the group, I rows, D columns, H hidden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
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
from resmoe_dist.compression.weighting import entry_weights
from resmoe_dist.design_matrix import ExpertShape
from resmoe_dist.methods.plan import GroupPlan
from resmoe_dist.registry import Registry


class MethodConfig(BaseModel):
    """The options of a method. A subclass adds a field per option."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class SourceGroup:
    """The experts of one group as the source stores them.

    experts_EID: any float dtype. activations: of these experts, in the same order; None weighs all
    entries alike. device: where to compute.
    """

    experts_EID: Tensor
    shape: ExpertShape
    activations: LayerActivations | None = None
    device: torch.device = CPU

    def aligned(self, permutations_EI: Tensor) -> AlignedExperts:
        """The experts with their rows permuted, and the weights of their entries."""
        weights = None
        if self.activations is not None:
            weights = entry_weights(self.shape, self.activations, permutations_EI)
        return AlignedExperts(self.experts_EID, permutations_EI, weights, self.device)


@dataclass(frozen=True)
class EncodedGroup:
    """What a method stores of a group.

    center: None if the group has none. residuals and losses: per stored expert. objective: of the
    row alignment. expert_map: the stored expert of each of the group's experts, for methods that
    merge or drop experts; reserved, only None (each expert is stored) is supported.
    """

    center: EncodedMatrix | None
    residuals: list[EncodedMatrix]
    losses: list[Loss]
    objective: float
    expert_map: list[int] | None = None


class Method(ABC):
    """A way to compress the groups of a layer, with its options."""

    name: ClassVar[str]
    config: ClassVar[type[MethodConfig]] = MethodConfig

    def __init__(self, options: MethodConfig) -> None:
        self.options: Any = options

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

    @abstractmethod
    def plan(self, group: SourceGroup, codecs: GroupCodecs) -> GroupPlan:
        """Decide how a group will be encoded."""

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
