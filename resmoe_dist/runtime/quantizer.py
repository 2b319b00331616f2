"""`from_pretrained` for compressed checkpoints: quantization method `resmoe` in transformers.

transformers builds the model on the meta device and loads everything except the experts. Before
that, a placeholder takes the place of each experts module; afterwards, a loaded `ResMoE` does.
`resmoe_dist.registration` registers the classes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from resmoe_dist.checkpoints.compressed import CompressedCheckpoint
from resmoe_dist.checkpoints.entries import LayerEntry
from resmoe_dist.checkpoints.format import INDEX_FILE, CheckpointIndex
from resmoe_dist.checkpoints.model_folder import SHARD_INDEX, ModelFiles
from resmoe_dist.errors import UserError
from resmoe_dist.families.adapters import ExpertsAdapter, adapter_for
from resmoe_dist.families.sites import find_expert_sites, replace_experts
from resmoe_dist.heap import return_freed_memory
from resmoe_dist.parallel.dispatch import StepSizes, dispatcher_for
from resmoe_dist.parallel.topology import SINGLE_PROCESS, Topology
from resmoe_dist.registration import QUANT_METHOD
from resmoe_dist.runtime.execution import Execution
from resmoe_dist.runtime.experts import CompressedExperts
from resmoe_dist.runtime.kept_experts import KeptExperts
from resmoe_dist.runtime.layer import ResMoE
from resmoe_dist.runtime.planning import execution_for
from resmoe_dist.runtime.tensor_parallel import LaneSharding


@dataclass(frozen=True)
class LoadingOptions:
    """What `from_pretrained` has no argument for.

    topology: the grid, and this rank's place in it. execution: how experts are run; None is `auto`.
    dispatch: how tokens travel, one of `FORMS`. verify: compare files with their digests. experts:
    by module, experts of this rank that need not be read. index: of the folder, if it was read.
    """

    topology: Topology = SINGLE_PROCESS
    execution: Execution | None = None
    dispatch: str = "auto"
    verify: bool = False
    experts: Mapping[str, CompressedExperts] = field(default_factory=dict)
    index: CheckpointIndex | None = None


_DEFAULTS = LoadingOptions()
_options: ContextVar[LoadingOptions] = ContextVar("options", default=_DEFAULTS)


@contextmanager
def loading_with(options: LoadingOptions) -> Iterator[None]:
    """`from_pretrained` inside this block loads the shard of the rank of `options.topology`."""
    token = _options.set(options)
    try:
        yield
    finally:
        _options.reset(token)


class ResMoEQuantizationConfig(QuantizationConfigMixin):
    """The "quantization_config" entry of a compressed checkpoint's config.json."""

    def __init__(self, **values: Any) -> None:
        self.quant_method = values.pop("quant_method", QUANT_METHOD)
        self.__dict__.update(values)


class _Placeholder(nn.Module):
    """Stands for an experts module, and keeps its activation, while the rest of a model loads."""

    def __init__(self, adapter: ExpertsAdapter, activation: nn.Module) -> None:
        super().__init__()
        self.adapter = adapter
        self.activation = activation


class ResMoEQuantizer(HfQuantizer):
    """Puts compressed experts into a model that `from_pretrained` is loading."""

    requires_calibration = True
    # What could not be divided among the ranks of a lane, or None.
    remark: str | None = None

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        folder = _folder_of(model, kwargs.get("checkpoint_files"))
        options = _options.get()
        self._checkpoint = CompressedCheckpoint(folder, options.index, verify=options.verify)
        self._modules = _modules_of_layers(model, self._checkpoint.index.layers)
        self._kept = KeptExperts(self._checkpoint.index.layers)
        self._kept.plan(model)
        for layer in self._checkpoint.index.layers:
            original, adapter = _experts_module(model, layer)
            placeholder = _Placeholder(adapter, adapter.activation(original))
            for module in self._modules[layer.module]:
                replace_experts(model, module, placeholder)
        experts = [module for modules in self._modules.values() for module in modules]
        self._sharding = LaneSharding(options.topology, experts)
        self._sharding.plan(model)
        self.remark = self._sharding.remark

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        # Not earlier: transformers empties all buffers that its checkpoint files do not fill.
        self._sharding.finish(model)
        self._kept.finish(model)
        options = _options.get()
        topology, execution = options.topology, options.execution or execution_for()
        steps_of_stack: dict[str, StepSizes] = {}
        for layer in self._checkpoint.index.layers:
            placeholder = model.get_submodule(layer.module)
            held = options.experts.get(layer.module)
            experts = held or CompressedExperts.load(
                self._checkpoint, layer, topology, placeholder.activation, execution
            ).to(model.dtype)
            for module in self._modules[layer.module]:
                # The layers of a stack (a decoder, an encoder) see the same tokens.
                stack = re.split(r"\.\d+\.", module, maxsplit=1)[0]
                leads = stack not in steps_of_stack
                steps = steps_of_stack.setdefault(stack, StepSizes.for_form(options.dispatch))
                moe = ResMoE(
                    layer.hidden,
                    experts,
                    len(layer.kept_experts),
                    topology,
                    expert_map=layer.kept_map,
                    dispatcher=dispatcher_for(
                        layer.stored_experts,
                        topology,
                        options.dispatch,
                        steps,
                        leads=leads,
                    ),
                    adapter=placeholder.adapter,
                )
                # Experts that another model runs stay where they are.
                model.set_submodule(module, (moe if held else moe.to(model.device)).eval())
            return_freed_memory()

    def is_serializable(self) -> bool:
        """A loaded model holds one rank's shard; the checkpoint on disk is what to copy."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Inference only."""
        return False


def undivided_parts(model: PreTrainedModel) -> str | None:
    """What of a loaded model could not be divided among the ranks of a lane; None if nothing."""
    return getattr(getattr(model, "hf_quantizer", None), "remark", None)


def _folder_of(model: PreTrainedModel, checkpoint_files: list[str] | None) -> Path:
    """The folder that is loaded. Raises UserError if transformers reads weights from elsewhere."""
    folder = Path(model.config.name_or_path)
    if not checkpoint_files:
        return folder
    if not folder.is_dir():
        # A model of the Hugging Face hub, in its cache.
        folder = Path(checkpoint_files[0]).parent
    expected = {os.path.abspath(folder / name) for name in ModelFiles(folder).locations.values()}
    if surplus := sorted({os.path.abspath(file) for file in checkpoint_files} - expected):
        raise UserError(
            f"{surplus[0]}: not one of the files that {folder / SHARD_INDEX} should name"
        )
    return folder


def _modules_of_layers(
    model: PreTrainedModel, layers: Sequence[LayerEntry]
) -> dict[str, tuple[str, ...]]:
    """By the module of each layer: all modules that share its experts, itself first."""
    stored = {layer.module for layer in layers}
    modules: dict[str, tuple[str, ...]] = {module: (module,) for module in stored}
    for site in find_expert_sites(model):
        owners = [module for module in site.modules if module in stored]
        if owners:
            tied = [module for module in site.modules if module not in stored]
            modules[owners[0]] = (owners[0], *tied)
    return modules


def _experts_module(model: PreTrainedModel, layer: LayerEntry) -> tuple[nn.Module, ExpertsAdapter]:
    try:
        module = model.get_submodule(layer.module)
    except AttributeError as error:
        raise UserError(
            f"{layer.module}: the checkpoint has experts here, {type(model).__name__} has none; "
            "config.json and resmoe.json do not belong together"
        ) from error
    adapter = adapter_for(module)
    if adapter is None:
        raise UserError(f"{layer.module}: a {type(module).__name__} holds no experts")
    site = adapter.site(layer.module, module)
    kept = len(layer.kept_experts)
    if (site.num_experts, site.shape) != (kept, layer.source_shape):
        raise UserError(
            f"{layer.module}: {INDEX_FILE} has {kept} experts of {layer.source_shape}, "
            f"config.json asks for {site.num_experts} of {site.shape}; they do not belong together"
        )
    return module, adapter
