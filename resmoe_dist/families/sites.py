"""Where a model keeps its experts, read off the model itself.

A model on the meta device costs no memory and is enough to find them.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from resmoe_dist.families.adapters import adapter_for
from resmoe_dist.families.storage import ExpertSite


def find_expert_sites(model: PreTrainedModel) -> list[ExpertSite]:
    """All experts of a model, in the order of its modules; tied modules are one site.

    Raises UserError for experts whose layout is not supported.
    """
    sites = {
        name: adapter.site(name, module)
        for name, module in model.named_modules()
        if (adapter := adapter_for(module)) is not None
    }
    ties = model.all_tied_weights_keys
    tied: dict[str, str] = {}
    for name, site in sites.items():
        owners = {_owner(ties.get(parameter), sites) for parameter in site.parameters}
        if len(owners) == 1 and (owner := owners.pop()) is not None:
            tied[name] = owner
    return [
        replace(site, tied=tuple(other for other, owner in tied.items() if owner == name))
        for name, site in sites.items()
        if name not in tied
    ]


def _owner(parameter: str | None, sites: dict[str, ExpertSite]) -> str | None:
    """The site that a parameter belongs to; None for other parameters, or none at all."""
    if parameter is None:
        return None
    return next((name for name in sites if parameter.startswith(f"{name}.")), None)


def replace_experts(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the experts called `name`, before weights are loaded."""
    model.set_submodule(name, module)
    # transformers would tie the parameters that the original experts had.
    ties = getattr(model, "all_tied_weights_keys", {})
    for target in [tensor for tensor in ties if tensor.startswith(f"{name}.")]:
        del ties[target]
    # transformers initialises, block by block, what no checkpoint file filled, and would look for
    # the original experts.
    block = model.get_submodule(name.rpartition(".")[0])
    for part in (block, *module.modules()):
        part._is_hf_initialized = True  # type: ignore[assignment]
