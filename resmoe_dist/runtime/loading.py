"""Load a compressed checkpoint as a transformers model, in one process or on a grid."""

from __future__ import annotations

from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from safetensors import SafetensorError
from transformers import PreTrainedModel

from resmoe_dist.checkpoints.compressed import is_compressed, read_index
from resmoe_dist.checkpoints.families import load_config, model_class
from resmoe_dist.errors import UserError
from resmoe_dist.parallel.topology import SINGLE_PROCESS, Topology, build_topology, owned_experts
from resmoe_dist.runtime.quantizer import loading_on


def load_model(
    path: str | Path,
    ep: int = 1,
    tp: int = 1,
    dtype: torch.dtype | None = None,
    topology: Topology | None = None,
) -> PreTrainedModel:
    """The transformers model of a folder, its experts compressed and sharded ep x tp.

    path: a compressed checkpoint, or (for comparison, ep = tp = 1 only) a plain model folder.
    dtype: to compute in; None takes the checkpoint's. topology: an existing grid instead of ep, tp.

    With ep·tp > 1 `deepspeed.init_distributed` must have run, and all ranks call this together.
    The model is in eval mode on this rank's device. Raises UserError for a folder that is none,
    damaged files, or a grid that the experts do not divide over.
    """
    folder = Path(path)
    if topology is not None:
        ep, tp = topology.ep, topology.tp
    check_grid(folder, ep, tp)
    if topology is None:
        topology = build_topology(ep, tp) if ep * tp > 1 else SINGLE_PROCESS
    config = load_config(str(folder))
    try:
        with loading_on(topology):
            model = model_class(config).from_pretrained(
                folder, dtype=dtype or "auto", local_files_only=True
            )
    except (OSError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{folder}: cannot be loaded ({reason}); fetch or rebuild it") from error
    return model.to(get_accelerator().current_device_name()).eval()


def check_grid(folder: Path, ep: int, tp: int) -> None:
    """Raise UserError unless a model folder can be loaded on an ep x tp grid, by its index alone.

    Cheap, so that a launch can be refused before any rank is started.
    """
    if ep < 1 or tp < 1:
        raise UserError(f"--ep {ep} --tp {tp}: both must be 1 or more")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a model folder")
    if not is_compressed(folder):
        if ep * tp > 1:
            raise UserError(
                f"{folder}: not compressed, so it cannot be sharded; run resmoe-dist compress first"
            )
        return
    for layer in read_index(folder).layers:
        owned_experts(layer.num_experts, 0, ep)
        if tp > layer.rows:
            raise UserError(
                f"--tp {tp}: {layer.module} has {layer.rows} rows, fewer than ranks to share them"
            )
