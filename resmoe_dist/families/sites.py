"""Where a model keeps its experts, read off the model itself.

In transformers v5 some sixty families build their experts as one module of fused 3-D weights that
says how it lays them out (`is_transposed`, `is_concatenated`, `has_bias`, `has_gate`); Switch
Transformers keeps a ModuleDict of small MLPs. Building the model on the meta device costs no memory
and tells, for every family alike, which modules hold experts and of what shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from resmoe_dist.design_matrix import ExpertShape
from resmoe_dist.errors import UserError


@dataclass(frozen=True)
class ExpertSite:
    """One module of a model that holds the experts of one layer.

    module: its dotted name. transposed and interleaved: how its *fused* tensors are laid out
    ([in, out] rather than [out, in]; gate and up rows alternating rather than one after the other).
    """

    module: str
    num_experts: int
    shape: ExpertShape
    transposed: bool = False
    interleaved: bool = False


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The transformers class that a config's `architectures` names.

    Raises UserError when it names none that transformers has.
    """
    for name in config.architectures or []:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    raise UserError(
        f"config.json: 'architectures' is {config.architectures!r}, which transformers "
        f"{transformers.__version__} does not have; name a class such as 'MixtralForCausalLM'"
    )


def load_config(folder: str) -> PretrainedConfig:
    """The config of a model folder. Raises UserError where there is none that can be read."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # what transformers raises for a bad config has no common class
        raise UserError(
            f"{folder}: not a readable Hugging Face model folder ({_reason(error)})"
        ) from error


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a config with its parameters on the meta device: names and shapes, no memory.

    Raises UserError for a config of which transformers cannot make its model.
    """
    kind = model_class(config)
    try:
        with torch.device("meta"):
            return kind._from_config(config)
    except Exception as error:  # as in load_config
        raise UserError(
            f"{config.name_or_path}: config.json does not describe a {kind.__name__} "
            f"({_reason(error)})"
        ) from error


def find_expert_sites(model: nn.Module) -> list[ExpertSite]:
    """All expert modules of a model, in the order of its modules.

    Raises UserError for experts that are laid out in a way this project does not read.
    """
    sites = []
    for name, module in model.named_modules():
        if is_fused_experts(module):
            sites.append(_fused_site(name, module))
        elif is_switch_experts(module):
            sites.append(_switch_site(name, module))
    return sites


def is_fused_experts(module: nn.Module) -> bool:
    """Whether a module is one of transformers v5's fused expert modules."""
    return hasattr(module, "is_transposed") and isinstance(
        getattr(module, "down_proj", None), Tensor
    )


def is_switch_experts(module: nn.Module) -> bool:
    """Whether a module is Switch Transformers' ModuleDict of experts."""
    return isinstance(module, nn.ModuleDict) and "expert_0" in module


def _reason(error: Exception) -> str:
    """What an error says, in one line: of a longer story the beginning."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(said[:2])}"


def _fused_site(name: str, module: nn.Module) -> ExpertSite:
    if getattr(module, "has_post_expert_norm", False):
        raise UserError(
            f"{name} ({type(module).__name__}) normalises each expert's output, which a sum of "
            "rows cannot express; this family is not supported"
        )
    down_shape = module.down_proj.shape
    num_experts = down_shape[0]
    rows, hidden = down_shape[1:] if module.is_transposed else reversed(down_shape[1:])
    shape = ExpertShape(
        rows=rows,
        hidden=hidden,
        gated=module.has_gate,
        row_bias=module.has_bias,
        output_bias=module.has_bias,
    )
    return ExpertSite(
        name,
        num_experts,
        shape,
        transposed=module.is_transposed,
        interleaved=not module.is_concatenated,
    )


def _switch_site(name: str, module: nn.ModuleDict) -> ExpertSite:
    rows, hidden = module["expert_0"].wi.weight.shape
    return ExpertSite(name, len(module), ExpertShape(rows=rows, hidden=hidden, gated=False))
