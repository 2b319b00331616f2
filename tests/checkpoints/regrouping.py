"""Compressed checkpoints whose groups are any partition of the experts, some without a centre."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from resmoe_dist.checkpoints.compressed import (
    FORMAT_VERSION,
    INDEX_FILE,
    CompressedCheckpoint,
    FileEntry,
    GroupEntry,
    group_file_name,
    group_tensors,
)
from resmoe_dist.checkpoints.restore import restored_expert
from resmoe_dist.checkpoints.tensor_files import sha256_of, write_json, write_tensors
from resmoe_dist.codecs import codec_named
from tests.checkpoints.damage import copy_of


def regroup(
    folder: Path,
    target: Path,
    partition: list[list[int]],
    *,
    centerless: Collection[int] = (),
    codec: str = "pruned",
    keep: float = 1.0,
) -> Path:
    """A copy of a compressed checkpoint, its restored experts in the groups of `partition`.

    centerless: positions of the groups to store without a centre. keep = 1 leaves every expert what
    it was, up to rounding.
    """
    copy_of(folder, target)
    checkpoint = CompressedCheckpoint(folder)
    layers = []
    for i, layer in enumerate(checkpoint.index.layers):
        experts: dict[int, tuple[Tensor, Tensor | None]] = {}
        for group in layer.groups:
            file = checkpoint.open_group(layer, group)
            experts |= {k: restored_expert(file, k) for k in group.experts}
            (target / group.file.file).unlink()
        groups = []
        for g, numbers in enumerate(partition):
            path = target / group_file_name(i, len(checkpoint.index.layers), g)
            members = {k: experts[k] for k in numbers}
            groups.append(_write_group(path, members, g not in centerless, codec, keep))
        layers.append(layer.model_copy(update={"codec": codec, "groups": groups}))
    index = checkpoint.index.model_copy(update={"format_version": FORMAT_VERSION, "layers": layers})
    write_json(target / INDEX_FILE, index.model_dump())
    return target


def _write_group(
    path: Path,
    experts: dict[int, tuple[Tensor, Tensor | None]],
    has_center: bool,
    codec_name: str,
    keep: float,
) -> GroupEntry:
    codec = codec_named(codec_name)
    matrices = {k: matrix_ID for k, (matrix_ID, _) in experts.items()}
    biases = {k: bias_H for k, (_, bias_H) in experts.items() if bias_H is not None}
    center_ID = None
    if has_center and codec.uses_center:
        center_ID = torch.stack(list(matrices.values())).mean(0)
    residuals, squared_errors = {}, []
    for k, matrix_ID in matrices.items():
        target_ID = matrix_ID if center_ID is None else matrix_ID - center_ID
        residuals[k] = codec.encode(target_ID, keep=keep, dtype=matrix_ID.dtype)
        squared_errors.append(float((target_ID - residuals[k].decode()).square().sum()))
    write_tensors(path, group_tensors(center_ID, residuals, biases), {})
    stored = [t for residual in residuals.values() for t in residual.buffers()]
    stored += biases.values()
    return GroupEntry(
        file=FileEntry(file=path.name, bytes=path.stat().st_size, sha256=sha256_of(path)),
        experts=list(experts),
        squared_errors=squared_errors,
        squared_norms=[float(matrix_ID.square().sum()) for matrix_ID in matrices.values()],
        source_bytes=sum(t.nbytes for t in (*matrices.values(), *biases.values())),
        center_bytes=0 if center_ID is None else center_ID.nbytes,
        value_bytes=sum(t.nbytes for t in stored if t.is_floating_point()),
        index_bytes=sum(t.nbytes for t in stored if not t.is_floating_point()),
        objective=0.0,
    )
