"""Load a compressed checkpoint as a transformers model, in one process or on a grid."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from transformers import PreTrainedModel

from resmoe_dist.errors import UserError
from resmoe_dist.families.models import model_class
from resmoe_dist.heap import return_freed_memory
from resmoe_dist.parallel.dispatch import AutoDispatcher, check_form, measure_decode_limit
from resmoe_dist.parallel.topology import SINGLE_PROCESS, Topology, build_topology
from resmoe_dist.runtime.execution import Execution
from resmoe_dist.runtime.experts import CompressedExperts
from resmoe_dist.runtime.folder_checks import check_loadable, check_values, refusing
from resmoe_dist.runtime.layer import ResMoE
from resmoe_dist.runtime.quantizer import LoadingOptions, loading_with, undivided_parts
from resmoe_dist.runtime.served_folder import ServedFolder

logger = logging.getLogger(__name__)


def load_model(
    path: str | Path | ServedFolder,
    ep: int = 1,
    tp: int = 1,
    dtype: torch.dtype | None = None,
    topology: Topology | None = None,
    execution: Execution | None = None,
    lanes: int | None = None,
    dispatch: str = "auto",
    *,
    verify: bool = False,
    experts_of: PreTrainedModel | None = None,
    quiet: bool = False,
) -> PreTrainedModel:
    """The transformers model of a folder, its experts compressed and sharded ep x tp.

    path: a compressed checkpoint, or a plain model folder (for comparison, only ep = tp = 1), by
    name or as it was read before. dtype: to compute in; None keeps the checkpoint's. topology: an
    existing grid instead of ep, tp and lanes. execution: how compressed experts are run
    (`execution_for`); None is `auto`. lanes: batches that the grid carries at a time; None is
    ep·dp. dispatch: how tokens travel (one of `resmoe_dist.parallel.dispatch.FORMS`). verify:
    compare the files that are read with their digests. experts_of: a model that this call loaded
    from the same folder, on the same ep x tp grid with other lanes; its experts are used and not
    read again. quiet: leave `warn_of_whole_parts` to the caller.

    With ep·tp > 1 `deepspeed.init_distributed` must have run, and all ranks call this together.
    The model is in eval mode on this rank's device. Raises UserError for a folder without a model,
    damaged or incomplete files, values that are not finite, or a grid that the experts do not
    divide over. Code that the folder brings along is never run.
    """
    served = path if isinstance(path, ServedFolder) else ServedFolder.read(Path(path))
    folder, config = served.path, served.config
    if topology is not None:
        ep, tp = topology.ep, topology.tp
    served.check_grid(ep, tp)
    if topology is None:
        topology = build_topology(ep, tp, lanes) if ep * tp > 1 else SINGLE_PROCESS
    check_form(dispatch, topology)
    if verify and served.index is None:
        raise UserError(f"{folder}: has no digests to verify; leave --verify out")
    check_loadable(served)
    # transformers' grouped products refuse odd expert sizes; its plain loop takes all sizes.
    options = {} if served.index else {"experts_implementation": "eager"}
    held = {} if experts_of is None else experts_by_module(experts_of)
    loading = LoadingOptions(topology, execution, dispatch, verify, held, served.index)
    with refusing(folder, "cannot be loaded"), loading_with(loading):
        model, found = model_class(config).from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    _refuse_incomplete(folder, found)
    check_values(folder, model)
    model = model.to(get_accelerator().current_device_name()).eval()
    layers = [module for module in model.modules() if isinstance(module, ResMoE)]
    for layer in layers:
        layer.experts.prepare()
    return_freed_memory()
    if not quiet:
        warn_of_whole_parts(model, topology)
    _measure_dispatch(layers, getattr(config.get_text_config(), "num_experts_per_tok", 2), model)
    return model


def warn_of_whole_parts(model: PreTrainedModel, topology: Topology) -> None:
    """Warn, on rank 0, of what could not be divided among the ranks of a lane."""
    remark = undivided_parts(model)
    if remark is not None and topology.rank == 0:
        logger.warning(remark)


def experts_by_module(model: PreTrainedModel) -> dict[str, CompressedExperts]:
    """This rank's experts of each MoE layer of a loaded model."""
    return {name: m.experts for name, m in model.named_modules() if isinstance(m, ResMoE)}


def _measure_dispatch(layers: list[ResMoE], top_k: int, model: PreTrainedModel) -> None:
    """Find out up to how many tokens `decode` pays. Collective if there are several lanes."""
    found = [layer.dispatcher for layer in layers]
    automatic = [each for each in found if isinstance(each, AutoDispatcher)]
    # Without process groups one rank's shard is inspected alone.
    alone = not automatic or automatic[0].topology.replica_group is None
    if alone or math.isinf(automatic[0].steps.decode_limit):
        return
    hidden = layers[0].experts.layer.hidden
    limit = measure_decode_limit(automatic[0], hidden, top_k, model.dtype, model.device)
    for dispatcher in automatic:
        dispatcher.steps.decode_limit = limit


def _refuse_incomplete(folder: Path, found: dict[str, Any]) -> None:
    """Raise UserError for missing tensors, which transformers would fill with random values."""
    missing = sorted(found["missing_keys"])
    wrong = sorted(str(entry[0]) for entry in found["mismatched_keys"])
    for names, what in (
        (missing, "missing"),
        (wrong, "of another shape than config.json asks for"),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(f"{folder}: tensor {names[0]!r}{more} is {what}; fetch the model again")
