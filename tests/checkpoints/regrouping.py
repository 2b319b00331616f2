"""Compressed checkpoints whose groups are any partition of the experts, some without a centre."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from resmoe_dist.checkpoints.compressed import (
    CompressedCheckpoint,
    group_tensors,
    residual_bytes,
)
from resmoe_dist.checkpoints.format import INDEX_FILE, FileEntry, GroupEntry, group_file_name
from resmoe_dist.checkpoints.restore import restored_expert
from resmoe_dist.checkpoints.tensor_files import sha256_of, write_json, write_tensors
from resmoe_dist.codecs import CodecSpec
from tests.checkpoints.damage import copy_of


def regroup(
    folder: Path,
    target: Path,
    partition: list[list[int]],
    *,
    centerless: Collection[int] = (),
    codec: str = "pruned",
    center_codec: str = "dense",
    keep: float = 1.0,
) -> Path:
    """A copy of a compressed checkpoint, its restored experts in the groups of `partition`.

    centerless: positions of the groups to store without a centre; with codec `dense`, all are.
    keep = 1 leaves every expert as it was, up to rounding.
    """
    copy_of(folder, target)
    checkpoint = CompressedCheckpoint(folder)
    residual = CodecSpec.parse(codec)
    if residual.keep is not None:
        residual = residual.with_keep(keep)
    center = None if residual.codec.is_dense else CodecSpec.parse(center_codec)
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
            groups.append(
                _write_group(path, members, None if g in centerless else center, residual)
            )
        codecs = {
            "center_codec": None if center is None else center.name,
            "residual_codec": residual.name,
        }
        layers.append(layer.model_copy(update={**codecs, "groups": groups}))
    index = checkpoint.index.model_copy(update={"layers": layers})
    write_json(target / INDEX_FILE, index.model_dump())
    return target


def _write_group(
    path: Path,
    experts: dict[int, tuple[Tensor, Tensor | None]],
    center_codec: CodecSpec | None,
    residual_codec: CodecSpec,
) -> GroupEntry:
    matrices = {k: matrix_ID for k, (matrix_ID, _) in experts.items()}
    biases = {k: bias_H for k, (_, bias_H) in experts.items() if bias_H is not None}
    dtype = next(iter(matrices.values())).dtype
    center = None
    if center_codec is not None:
        mean_ID = torch.stack(list(matrices.values())).float().mean(0)
        center = center_codec.codec.encode(mean_ID, center_codec.config, dtype)
    residuals, squared_errors = {}, []
    for k, matrix_ID in matrices.items():
        target_ID = matrix_ID.float()
        if center is not None:
            target_ID = target_ID - center.decode().float()
        residuals[k] = residual_codec.codec.encode(target_ID, residual_codec.config, dtype)
        squared_errors.append(float((target_ID - residuals[k].decode().float()).square().sum()))
    write_tensors(path, group_tensors(center, residuals, biases), {})
    return GroupEntry(
        file=FileEntry(file=path.name, bytes=path.stat().st_size, sha256=sha256_of(path)),
        experts=list(experts),
        squared_errors=squared_errors,
        squared_norms=[float(matrix_ID.float().square().sum()) for matrix_ID in matrices.values()],
        source_bytes=sum(t.nbytes for t in (*matrices.values(), *biases.values())),
        center_bytes=0 if center is None else center.nbytes,
        residual_bytes=residual_bytes(residuals, biases),
        objective=0.0,
    )
