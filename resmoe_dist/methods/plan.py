"""What a method decides about a group before encoding it, and the file that stores it.

Legend: E experts of the group, I rows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from resmoe_dist.checkpoints.tensor_files import TensorFile, write_tensors
from resmoe_dist.compression.bits import GroupBits, GroupEnergies
from resmoe_dist.compression.budget import PriceCurve
from resmoe_dist.errors import UserError

_PLAN = "resmoe_plan"


@dataclass(frozen=True)
class GroupPlan:
    """permutations_EI: of the experts' rows (see `Alignment`). objective: of the alignment.

    center: what `GroupEncoding` takes. keep: the group's budget, None if its codec has none.
    curve: prices of the group's entries, if budgets are shared over the model. energies: what bits
    are chosen by, if the residuals' codec spends bits. bits: what was chosen; None: as many as the
    codecs say.
    """

    permutations_EI: Tensor
    objective: float
    center: str
    keep: float | None
    curve: PriceCurve | None = None
    energies: GroupEnergies | None = None
    bits: GroupBits | None = None

    def without_permutations(self) -> GroupPlan:
        """The same plan without the permutations, which may take megabytes."""
        return replace(self, permutations_EI=torch.empty(0, 0, dtype=torch.int64))

    def save(self, path: Path) -> None:
        """Write the plan to a safetensors file, atomically."""
        decided = {
            "objective": self.objective,
            "center": self.center,
            "keep": self.keep,
            "curve": None if self.curve is None else vars(self.curve),
            "energies": None if self.energies is None else vars(self.energies),
        }
        permutations_EI = self.permutations_EI.int()
        write_tensors(path, {"permutations": permutations_EI}, {_PLAN: json.dumps(decided)})

    @classmethod
    def load(cls, path: Path) -> GroupPlan | None:
        """Read a plan that `save` wrote. None if the file is missing or not a plan."""
        try:
            file = TensorFile(path)
            decided = json.loads(file.metadata[_PLAN])
        except (UserError, KeyError, ValueError):
            return None
        curve = decided.pop("curve")
        if curve is not None:
            curve = PriceCurve(**curve | {"prices": tuple(curve["prices"])})
        energies = decided.pop("energies")
        if energies is not None:
            energies = GroupEnergies.from_lists(energies)
        permutations_EI = file.read("permutations").long()
        return cls(permutations_EI, curve=curve, energies=energies, **decided)
