"""`from_pretrained` for compressed checkpoints: quantization method `resmoe` in transformers.

transformers builds the model on the meta device and loads everything that is no expert; before
that this module takes each experts module out, afterwards it puts a loaded `ResMoE` in its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from resmoe_dist.checkpoints.compressed import CompressedCheckpoint
from resmoe_dist.checkpoints.format import QUANT_METHOD, LayerEntry
from resmoe_dist.errors import UserError
from resmoe_dist.families.activations import activation_of
from resmoe_dist.families.sites import is_fused_experts, is_switch_experts
from resmoe_dist.parallel.topology import SINGLE_PROCESS, Topology
from resmoe_dist.runtime.execution import Execution
from resmoe_dist.runtime.experts import CompressedExperts
from resmoe_dist.runtime.layer import ResMoE, SwitchResMoE
from resmoe_dist.runtime.planning import execution_for

# transformers calls the quantizer from inside `from_pretrained`, which has no argument for these.
_topology: ContextVar[Topology] = ContextVar("topology", default=SINGLE_PROCESS)
_execution: ContextVar[Execution | None] = ContextVar("execution", default=None)


@contextmanager
def loading_on(topology: Topology, execution: Execution | None = None) -> Iterator[None]:
    """`from_pretrained` inside this block loads the shard of `topology`'s rank.

    execution: how its experts are run; None is `auto`.
    """
    tokens = _topology.set(topology), _execution.set(execution)
    try:
        yield
    finally:
        _topology.reset(tokens[0])
        _execution.reset(tokens[1])


class ResMoEQuantizationConfig(QuantizationConfigMixin):
    """The "quantization_config" entry of a compressed checkpoint's config.json."""

    def __init__(self, **values: Any) -> None:
        self.quant_method = values.pop("quant_method", QUANT_METHOD)
        vars(self).update(values)


class _Placeholder(nn.Module):
    """Holds an experts module's place, and its activation, while the rest of a model loads."""

    def __init__(self, switch: bool, activation: nn.Module) -> None:
        super().__init__()
        self.switch = switch
        self.activation = activation


def replace_experts(model: PreTrainedModel, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the experts called `name`, before weights are loaded."""
    model.set_submodule(name, module)
    # transformers initialises what no checkpoint file filled, block by block, and would look for
    # the original experts in theirs.
    block = model.get_submodule(name.rpartition(".")[0])
    for part in (block, *module.modules()):
        part._is_hf_initialized = True


class ResMoEQuantizer(HfQuantizer):
    """Puts compressed experts into a model that `from_pretrained` is loading."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        folder = _folder_of(model, kwargs.get("checkpoint_files"))
        self._checkpoint = CompressedCheckpoint(folder)
        for layer in self._checkpoint.index.layers:
            original = _experts_module(model, layer)
            placeholder = _Placeholder(is_switch_experts(original), activation_of(original))
            replace_experts(model, layer.module, placeholder)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        # Only now: transformers empties all buffers that its checkpoint files do not fill.
        topology, execution = _topology.get(), _execution.get() or execution_for()
        for layer in self._checkpoint.index.layers:
            placeholder = model.get_submodule(layer.module)
            experts = CompressedExperts.load(
                self._checkpoint, layer, topology, placeholder.activation, execution
            )
            kind = SwitchResMoE if placeholder.switch else ResMoE
            moe = kind(
                layer.hidden,
                experts.to(model.dtype),
                layer.num_experts,
                topology,
                expert_map=layer.expert_map,
            )
            model.set_submodule(layer.module, moe.to(model.device).eval())

    def is_serializable(self) -> bool:
        """A loaded model holds one rank's shard; the checkpoint on disk is what to copy."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Inference only."""
        return False


if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(QUANT_METHOD)(ResMoEQuantizationConfig)
    register_quantizer(QUANT_METHOD)(ResMoEQuantizer)


def _folder_of(model: PreTrainedModel, checkpoint_files: list[str] | None) -> Path:
    if checkpoint_files:
        return Path(checkpoint_files[0]).parent
    return Path(model.config.name_or_path)


def _experts_module(model: PreTrainedModel, layer: LayerEntry) -> nn.Module:
    try:
        module = model.get_submodule(layer.module)
    except AttributeError as error:
        raise UserError(
            f"{layer.module}: the checkpoint has experts here, {type(model).__name__} has none; "
            "config.json and resmoe.json do not belong together"
        ) from error
    if not (is_fused_experts(module) or is_switch_experts(module)):
        raise UserError(f"{layer.module}: a {type(module).__name__} holds no experts")
    return module
