"""Write the dense model of a compressed checkpoint, for plain transformers.

Legend: I rows, D columns, H hidden.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from resmoe_dist.checkpoints.companions import copy_companions
from resmoe_dist.checkpoints.completeness import check_present, check_range
from resmoe_dist.checkpoints.compressed import CompressedCheckpoint, GroupFile
from resmoe_dist.checkpoints.format import DROPPED, LayerEntry
from resmoe_dist.checkpoints.model_folder import (
    ModelFiles,
    drop_quantization,
    set_dtype,
    shard_name,
    write_shard_index,
)
from resmoe_dist.checkpoints.tensor_files import (
    TensorFile,
    copy_file,
    largest_magnitude,
    read_json_object,
    write_json,
    write_tensors,
)
from resmoe_dist.errors import UserError
from resmoe_dist.families.models import load_config, make_unquantized, meta_model
from resmoe_dist.families.names import map_names


def restore_checkpoint(folder: Path, output: Path, dtype: torch.dtype | None = None) -> None:
    """Write the model of a compressed checkpoint with dense experts to OUTPUT.

    Experts get the source's tensor names and layout, one file per layer. Rows stay in aligned
    order, which does not change an expert. Experts of the model that share a stored expert are each
    written in full. dtype: of the experts; None keeps the stored one, in which C + R is rounded
    once.

    Raises UserError if OUTPUT exists, a file is damaged, or an expert was dropped. OUTPUT is then
    not created.
    """
    checkpoint = CompressedCheckpoint(folder)
    for layer in checkpoint.index.layers:
        _check_no_expert_dropped(folder, layer)
    staging = output.parent / f"{output.name}.partial"
    for path in (output, staging):
        if path.exists():
            raise UserError(f"{path}: exists already; remove it or choose another folder")
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{staging}: cannot be made ({error.strerror})") from error
    try:
        _write_model(checkpoint, staging, dtype)
        staging.rename(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def restored_expert(
    file: GroupFile, expert: int, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None]:
    """Dense design matrix [I, D] of one stored expert, C + decode(R_k), and its output bias [H].

    The bias is None for families without output biases.
    """
    rows = file.layer.rows
    residual = file.read_residual(expert, 0, rows)
    center = file.read_center(0, rows)
    bias_H = file.read_output_bias(expert)
    if dtype is not None:
        residual = residual.to(dtype)
        center = None if center is None else center.to(dtype)
        bias_H = None if bias_H is None else bias_H.to(dtype)
    if center is None:
        return residual.decode(), bias_H
    dense_ID = center.decode().clone()
    residual.add_to(dense_ID)
    return dense_ID, bias_H


def _check_no_expert_dropped(folder: Path, layer: LayerEntry) -> None:
    for expert in range(layer.num_experts):
        if layer.stored_expert(expert) == DROPPED:
            raise UserError(
                f"{folder}: {layer.module}: expert {expert} was dropped by the compression, so no "
                "dense model can be written; serve the compressed folder instead"
            )


def _write_model(
    checkpoint: CompressedCheckpoint, staging: Path, dtype: torch.dtype | None
) -> None:
    others = ModelFiles(checkpoint.folder)
    config = read_json_object(checkpoint.folder / "config.json")
    _check_complete(checkpoint, others)
    other_shards = sorted(set(others.locations.values()))
    layers = checkpoint.index.layers
    count = len(other_shards) + len(layers)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(other_shards):
        name = shard_name(i, count)
        if dtype is not None:
            _check_values(others.file(shard), dtype)
        copy_file(checkpoint.folder / shard, staging / name)
        weight_map |= {tensor: name for tensor, where in others.locations.items() if where == shard}
    for i, layer in enumerate(layers, start=len(other_shards)):
        name = shard_name(i, count)
        tensors = _dense_layer(checkpoint, layer, dtype)
        write_tensors(staging / name, tensors, {})
        weight_map |= dict.fromkeys(tensors, name)
    write_shard_index(staging, weight_map)
    drop_quantization(config)
    if dtype is not None:
        set_dtype(config, str(dtype).removeprefix("torch."))
    write_json(staging / "config.json", config)
    copy_companions(checkpoint.folder, staging)


def _check_complete(checkpoint: CompressedCheckpoint, others: ModelFiles) -> None:
    """Raise UserError if the dense model would lack a tensor."""
    config = load_config(str(checkpoint.folder))
    make_unquantized(config)
    model = meta_model(config)
    names = [
        name for layer in checkpoint.index.layers for name in layer.storage.names(layer.num_experts)
    ]
    check_present(checkpoint.folder, model, map_names(model, [*others.locations, *names]))


def _check_values(file: TensorFile, dtype: torch.dtype) -> None:
    """Raise UserError if a tensor outside the experts has values beyond a dtype's range."""
    for name in sorted(file.names):
        check_range(file.path, name, largest_magnitude(file.read(name)), dtype)


def _dense_layer(
    checkpoint: CompressedCheckpoint, layer: LayerEntry, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    files = {
        k: file
        for group in layer.groups
        for file in (checkpoint.open_group(layer, group),)
        for k in group.experts
    }
    # One after the other, also if two share a stored expert: files hold no shared tensors.
    stored = (layer.stored_expert(k) for k in range(layer.num_experts))
    tensors = layer.storage.write(
        layer.shape, (restored_expert(files[k], k, dtype) for k in stored)
    )
    for name, tensor in tensors.items():
        if dtype is not None:
            check_range(checkpoint.folder, name, largest_magnitude(tensor), dtype)
    return tensors
