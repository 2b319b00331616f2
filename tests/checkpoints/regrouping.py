"""Compressed checkpoints that are put together by hand: any groups, codecs and expert maps.

Legend: I rows, D columns, H hidden.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

from resmoe_dist.checkpoints.compressed import (
    CompressedCheckpoint,
    group_tensors,
    residual_bytes,
)
from resmoe_dist.checkpoints.entries import DROPPED, FileEntry, GroupEntry, LayerEntry
from resmoe_dist.checkpoints.format import group_file_name, write_index
from resmoe_dist.checkpoints.restore import restored_expert
from resmoe_dist.checkpoints.tensor_files import sha256_of, write_tensors
from resmoe_dist.checkpoints.upgrade import FORMAT_VERSION
from resmoe_dist.codecs import CodecSpec, EncodedMatrix
from tests.checkpoints.damage import copy_of

Expert = tuple[Tensor, "Tensor | None"]


def regroup(
    folder: Path,
    target: Path,
    partition: list[list[int]],
    *,
    centerless: Collection[int] = (),
    codec: str = "pruned",
    keep: float = 1.0,
    center_codec: str = "dense",
    expert_map: Sequence[int] | None = None,
    kept_rows: Sequence[int] | None = None,
    only_layers: Collection[int] | None = None,
) -> Path:
    """A copy of a compressed checkpoint with its restored experts in other groups.

    partition: the stored experts of each group. centerless: positions of the groups to store
    without a centre. codec, center_codec: names. keep: budget of codecs that have one; with 1,
    every expert stays what it was, up to rounding. expert_map: see `LayerEntry`; a stored expert is
    the mean of the model's experts that it stands for. kept_rows: numbers of the rows to store of
    each expert; None is all. only_layers: positions of the layers to change; None is all.
    """
    residual = _spec(codec, keep)
    # Experts that are stored dense share nothing.
    center = None if residual.codec.is_dense else _spec(center_codec, keep)
    copy_of(folder, target)
    checkpoint = CompressedCheckpoint(folder)
    layers = checkpoint.index.layers
    regrouped = []
    for i, layer in enumerate(layers):
        if only_layers is not None and i not in only_layers:
            regrouped.append(layer)
            continue
        experts = _stored_experts(_restored_experts(checkpoint, layer), expert_map)
        if kept_rows is not None:
            experts = {k: (matrix_ID[kept_rows], bias) for k, (matrix_ID, bias) in experts.items()}
        for group in layer.groups:
            (target / group.file.file).unlink()
        groups = [
            _write_group(
                target / group_file_name(i, len(layers), g),
                {k: experts[k] for k in numbers},
                None if g in centerless else center,
                residual,
            )
            for g, numbers in enumerate(partition)
        ]
        changes = {
            "center_codec": None if center is None else center.name,
            "residual_codec": residual.name,
            "expert_map": None if expert_map is None else list(expert_map),
            "groups": groups,
        }
        if kept_rows is not None:
            changes |= {"rows": len(kept_rows), "source_rows": layer.rows}
        regrouped.append(layer.model_copy(update=changes))
    changes = {"format_version": FORMAT_VERSION, "layers": regrouped}
    write_index(target, checkpoint.index.model_copy(update=changes))
    return target


def _spec(name: str, keep: float) -> CodecSpec:
    spec = CodecSpec(name=name)
    return spec if spec.keep is None else spec.with_keep(keep)


def _restored_experts(checkpoint: CompressedCheckpoint, layer: LayerEntry) -> dict[int, Expert]:
    return {
        k: restored_expert(checkpoint.open_group(layer, group), k)
        for group in layer.groups
        for k in group.experts
    }


def _stored_experts(
    experts: dict[int, Expert], expert_map: Sequence[int] | None
) -> dict[int, Expert]:
    """The experts to store by number: means of those that share one."""
    if expert_map is None:
        return experts
    stored = {}
    for number in sorted(set(expert_map) - {DROPPED}):
        members = [experts[k] for k, stored_as in enumerate(expert_map) if stored_as == number]
        matrices, biases = zip(*members, strict=True)
        bias_H = None if biases[0] is None else torch.stack(biases).mean(0)
        stored[number] = torch.stack(matrices).mean(0), bias_H
    return stored


def _write_group(
    path: Path,
    experts: dict[int, Expert],
    center_codec: CodecSpec | None,
    residual_codec: CodecSpec,
) -> GroupEntry:
    matrices = {k: matrix_ID for k, (matrix_ID, _) in experts.items()}
    biases = {k: bias_H for k, (_, bias_H) in experts.items() if bias_H is not None}
    dtype = next(iter(matrices.values())).dtype
    center: EncodedMatrix | None = None
    if center_codec is not None:
        mean_ID = torch.stack(list(matrices.values())).mean(0)
        center = center_codec.codec.encode(mean_ID, center_codec.config, dtype)
    residuals, squared_errors = {}, []
    for k, matrix_ID in matrices.items():
        exact_ID = matrix_ID if center is None else matrix_ID - center.decode()
        residuals[k] = residual_codec.codec.encode(exact_ID, residual_codec.config, dtype)
        squared_errors.append(float((exact_ID - residuals[k].decode()).square().sum()))
    write_tensors(path, group_tensors(center, residuals, biases), {})
    return GroupEntry(
        file=FileEntry(file=path.name, bytes=path.stat().st_size, sha256=sha256_of(path)),
        experts=list(experts),
        squared_errors=squared_errors,
        squared_norms=[float(matrix_ID.square().sum()) for matrix_ID in matrices.values()],
        source_bytes=sum(t.nbytes for t in (*matrices.values(), *biases.values())),
        center_bytes=0 if center is None else center.nbytes,
        residual_bytes=residual_bytes(residuals, biases),
        objective=0.0,
    )
