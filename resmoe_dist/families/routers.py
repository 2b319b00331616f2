"""Where a model computes its routers' logits: transformers records them for its auxiliary losses.

Legend: T tokens, E experts, H hidden.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from resmoe_dist.families.storage import ExpertSite

# Tokens of a router's trial, and how far its logits may be from a product, relative to the largest.
_TRIAL_TOKENS = 7
_TRIAL_TOLERANCE = 1e-4


@dataclass(frozen=True)
class RouterOutput:
    """A module whose output holds the router's logits, at a position."""

    module: nn.Module
    position: int

    def logits(self, output: Any, num_experts: int) -> Tensor:
        """The logits [T, E] of a forward pass, float32.

        Some routers also choose among experts without weights, which come last: left out.
        """
        found = output[self.position] if isinstance(output, tuple) else output
        return found.detach().flatten(0, -2)[:, :num_experts].float()

    @torch.no_grad()
    def linear_weight(self, num_experts: int) -> str | None:
        """The name, in `module`, of a weight [E, H] whose product with the input is the logits.

        A bias may be added to them. None if there is no such weight, which a trial with random
        values finds out. `module` may be on the meta device.
        """
        names = [
            name
            for name, weight in self.module.named_parameters()
            if weight.dim() == 2 and len(weight) == num_experts
        ]
        if len(names) != 1:
            return None
        router = copy.deepcopy(self.module).to_empty(device="cpu").float().eval()
        generator = torch.Generator().manual_seed(0)
        for tensor in (*router.parameters(), *router.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(generator=generator)
            else:
                tensor.zero_()
        weight_EH = router.get_parameter(names[0])
        x_TH = torch.randn(_TRIAL_TOKENS, weight_EH.shape[1], generator=generator)
        expected_TE = x_TH @ weight_EH.T
        # Some routers get the bias of their choice from their block.
        _, *others = inspect.signature(router.forward).parameters
        for biases in ([], [torch.zeros(num_experts)] * len(others)):
            try:
                logits_TE = self.logits(router(x_TH.unsqueeze(0), *biases), num_experts)
                bias_TE = logits_TE - expected_TE
            except Exception:  # other arguments are needed, or something else is returned
                continue
            difference = (bias_TE - bias_TE[:1]).abs().max()
            if difference <= _TRIAL_TOLERANCE * logits_TE.abs().max():
                return names[0]
        return None


def router_outputs(
    model: PreTrainedModel, sites: Sequence[ExpertSite]
) -> list[RouterOutput | None]:
    """Of each site, where its router's logits are; None if transformers does not say."""
    recorders = list(_recorders(model))
    return [_router_of(model, site, recorders) for site in sites]


def _recorders(model: PreTrainedModel) -> Iterator[OutputRecorder]:
    """What transformers records as router logits, anywhere in a model."""
    for kind in {type(module) for module in model.modules() if isinstance(module, PreTrainedModel)}:
        recorded = (getattr(kind, "_can_record_outputs", None) or {}).get("router_logits", [])
        for recorder in recorded if isinstance(recorded, list) else [recorded]:
            # transformers reads the second output of a class that is given alone.
            is_full = isinstance(recorder, OutputRecorder)
            yield recorder if is_full else OutputRecorder(recorder, index=1)


def _router_of(
    model: PreTrainedModel, site: ExpertSite, recorders: Sequence[OutputRecorder]
) -> RouterOutput | None:
    """The router in the smallest block around the experts that has one."""
    block = site.module
    while block := block.rpartition(".")[0]:
        module = model.get_submodule(block)
        if isinstance(module, nn.ModuleList):
            return None
        for name, part in module.named_modules(prefix=block):
            for recorder in recorders:
                if _records(recorder, name, part):
                    return RouterOutput(part, recorder.index)
    return None


def _records(recorder: OutputRecorder, name: str, module: nn.Module) -> bool:
    named = recorder.layer_name is None or f".{recorder.layer_name.strip('.')}." in f"{name}."
    kind = recorder.target_class
    return named and kind is not None and isinstance(module, kind)
