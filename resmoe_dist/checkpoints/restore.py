"""Write the dense model of a compressed checkpoint, for plain transformers.

Legend: I rows, D columns, H hidden.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from resmoe_dist.checkpoints.companions import copy_companions
from resmoe_dist.checkpoints.completeness import check_range
from resmoe_dist.checkpoints.compressed import CompressedCheckpoint, GroupFile
from resmoe_dist.checkpoints.entries import LayerEntry
from resmoe_dist.checkpoints.model_folder import (
    ModelFiles,
    set_dtype,
    shard_name,
    write_shard_index,
)
from resmoe_dist.checkpoints.smaller import (
    DenseModel,
    padded,
    plan_dense_model,
    storage_in_dense,
)
from resmoe_dist.checkpoints.tensor_files import (
    TensorFile,
    copy_file,
    largest_magnitude,
    write_json,
    write_tensors,
)
from resmoe_dist.errors import UserError


def restore_checkpoint(
    folder: Path, output: Path, dtype: torch.dtype | None = None, *, full_rows: bool = False
) -> list[str]:
    """Write the model of a compressed checkpoint with dense experts to OUTPUT.

    Experts get the source's tensor names and layout, one file per layer. Rows stay in aligned
    order, which does not change an expert. Experts of the model that share a stored expert are each
    written in full. Dropped experts are left out: the model has fewer, and its routers know the
    others alone. If experts are stored with fewer rows, the model has fewer, or else rows of zeros.
    full_rows: always fill up to the source's rows. dtype: of the experts; None keeps the stored
    one, in which C + R is rounded once.

    Returns what differs from the source's model, one line each. Raises UserError if OUTPUT exists,
    a file is damaged, or no config.json can describe the model. OUTPUT is then not created.
    """
    checkpoint = CompressedCheckpoint(folder)
    staging = output.parent / f"{output.name}.partial"
    for path in (output, staging):
        if path.exists():
            raise UserError(f"{path}: exists already; remove it or choose another folder")
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{staging}: cannot be made ({error.strerror})") from error
    try:
        remarks = _write_model(checkpoint, staging, dtype, full_rows)
        staging.rename(output)
        return remarks
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def restored_expert(
    file: GroupFile, expert: int, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None]:
    """Dense design matrix [I, D] of one stored expert, C + decode(R_k), and its output bias [H].

    The bias is None for families without output biases.
    """
    rows = file.layer.rows
    center = file.read_center(0, rows)
    residual = file.read_residual(expert, 0, rows, center)
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


def _write_model(
    checkpoint: CompressedCheckpoint, staging: Path, dtype: torch.dtype | None, full_rows: bool
) -> list[str]:
    others = ModelFiles(checkpoint.folder)
    dense = plan_dense_model(checkpoint, others, full_rows=full_rows)
    if dtype is not None:
        set_dtype(dense.config, str(dtype).removeprefix("torch."))
    write_json(staging / "config.json", dense.config)
    other_shards = sorted(set(others.locations.values()))
    layers = checkpoint.index.layers
    count = len(other_shards) + len(layers)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(other_shards):
        name = shard_name(i, count)
        if dtype is not None:
            _check_values(others.file(shard), dtype)
        _copy_shard(others.file(shard), staging / name, dense)
        weight_map |= {tensor: name for tensor, where in others.locations.items() if where == shard}
    for i, layer in enumerate(layers, start=len(other_shards)):
        name = shard_name(i, count)
        tensors = _dense_layer(checkpoint, layer, dense.rows[layer.module], dtype)
        write_tensors(staging / name, tensors, {})
        weight_map |= dict.fromkeys(tensors, name)
    write_shard_index(staging, weight_map)
    copy_companions(checkpoint.folder, staging)
    if dense.remarks:
        _check_written(checkpoint.folder, staging, dense)
    return dense.remarks


def _copy_shard(file: TensorFile, target: Path, dense: DenseModel) -> None:
    """Copy a file of tensors outside the experts, some of which may get smaller."""
    if dense.cuts.keys().isdisjoint(file.names):
        copy_file(file.path, target)
        return
    tensors = {name: file.read(name) for name in sorted(file.names)}
    for name in tensors.keys() & dense.cuts.keys():
        tensors[name] = dense.cuts[name].of(tensors[name]).contiguous()
    write_tensors(target, tensors, {})


def _check_written(folder: Path, staging: Path, dense: DenseModel) -> None:
    """Raise UserError if transformers would not load what was written as the smaller model."""
    try:
        dense.check(staging)
    except UserError as error:
        raise UserError(
            f"{folder}: the smaller model is not one that transformers loads ({error}); serve the "
            "compressed folder instead"
        ) from error


def _check_values(file: TensorFile, dtype: torch.dtype) -> None:
    """Raise UserError if a tensor outside the experts has values beyond a dtype's range."""
    for name in sorted(file.names):
        check_range(file.path, name, largest_magnitude(file.read(name)), dtype)


def _dense_layer(
    checkpoint: CompressedCheckpoint, layer: LayerEntry, rows: int, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """The tensors of a layer's kept experts, with `rows` rows each."""
    files = {
        k: file
        for group in layer.groups
        for file in (checkpoint.open_group(layer, group),)
        for k in group.experts
    }

    def dense_expert(k: int) -> tuple[Tensor, Tensor | None]:
        matrix_ID, bias_H = restored_expert(files[k], k, dtype)
        return (padded(matrix_ID, rows) if len(matrix_ID) < rows else matrix_ID), bias_H

    # One after the other, also if two share a stored expert: files hold no shared tensors.
    stored = (layer.stored_expert(k) for k in layer.kept_experts)
    tensors = storage_in_dense(layer).write(
        replace(layer.shape, rows=rows), (dense_expert(k) for k in stored)
    )
    for name, tensor in tensors.items():
        if dtype is not None:
            check_range(checkpoint.folder, name, largest_magnitude(tensor), dtype)
    return tensors
