"""The shape of the dense model that `restore` writes, if experts or rows of it were removed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from resmoe_dist.checkpoints.completeness import check_complete, check_present
from resmoe_dist.checkpoints.compressed import CompressedCheckpoint
from resmoe_dist.checkpoints.entries import LayerEntry
from resmoe_dist.checkpoints.model_folder import ModelFiles, drop_quantization
from resmoe_dist.checkpoints.tensor_files import read_json_object
from resmoe_dist.errors import UserError
from resmoe_dist.families.models import load_config, make_unquantized, meta_model
from resmoe_dist.families.names import StoredNames, map_names
from resmoe_dist.families.router_blocks import router_blocks
from resmoe_dist.families.smaller import (
    Cut,
    SmallerModel,
    check_routable,
    fewer_experts,
    fewer_rows,
    write_field,
)
from resmoe_dist.families.storage import ExpertStorage

_SERVE = "serve the compressed folder instead"


@dataclass
class DenseModel:
    """The dense model of a compressed checkpoint.

    config: the content of its config.json. rows: of each expert, by the layer's module. cuts: of
    stored tensors outside the experts. remarks: what a user should know, one line each.
    """

    config: dict[str, Any]
    rows: dict[str, int] = field(default_factory=dict)
    cuts: dict[str, Cut] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def check(self, folder: Path) -> None:
        """Raise UserError if `folder`, once written, is not what its own config asks for."""
        model = meta_model(load_config(str(folder)))
        files = ModelFiles(folder)
        shapes = {name: files.holding(name).shape(name) for name in files.locations}
        check_complete(
            files,
            model,
            map_names(model, shapes),
            shapes,
            frozenset(),
            lambda name: files.holding(name).dtype(name),
        )


def plan_dense_model(
    checkpoint: CompressedCheckpoint, files: ModelFiles, *, full_rows: bool = False
) -> DenseModel:
    """The dense model of a checkpoint: no dropped experts, and as few rows as it can have.

    files: the checkpoint's tensors outside the experts. full_rows: keep the source's rows. Where
    config.json cannot say how many rows are stored, zeros fill them up, which changes no expert.

    Raises UserError if a tensor is missing, or no config.json can describe the kept experts.
    """
    raw = read_json_object(checkpoint.folder / "config.json")
    drop_quantization(raw)
    planned = DenseModel(raw)
    config = load_config(str(checkpoint.folder))
    make_unquantized(config)
    model = meta_model(config)
    layers = checkpoint.index.layers
    names = [name for layer in layers for name in layer.storage.names(layer.num_experts)]
    stored = map_names(model, [*files.locations, *names])
    check_present(checkpoint.folder, model, stored)
    if any(layer.has_dropped for layer in layers):
        smaller = _without_dropped(checkpoint.folder, model, layers)
        planned.cuts = _cuts(smaller, layers, stored, files)
        _adopt(planned, model, smaller, layers[0].num_experts)
        model = smaller.model
    _plan_rows(planned, model, layers, full_rows)
    return planned


def storage_in_dense(layer: LayerEntry) -> ExpertStorage:
    """Names and layout of a layer's experts in the dense model."""
    first, num_experts = layer.storage.first_expert, layer.num_experts
    # Ernie 4.5 VL numbers the vision experts of a layer after its text experts.
    moved = first // num_experts * len(layer.kept_experts) + first % num_experts
    return layer.storage.model_copy(update={"first_expert": moved})


def padded(matrix_ID: Tensor, rows: int) -> Tensor:
    """A design matrix with rows of zeros at its end: neurons that add nothing to the output."""
    missing = rows - len(matrix_ID)
    return torch.cat([matrix_ID, matrix_ID.new_zeros(missing, matrix_ID.shape[1])])


def _without_dropped(
    folder: Path, model: PreTrainedModel, layers: Sequence[LayerEntry]
) -> SmallerModel:
    """The model with the kept experts only. Raises UserError if there is no such model."""
    sizes = sorted({(layer.num_experts, len(layer.kept_experts)) for layer in layers})
    if len(sizes) > 1:
        numbers = " and ".join(f"{kept} of {num_experts}" for num_experts, kept in sizes)
        raise UserError(
            f"{folder}: layers keep {numbers} experts, and config.json has one number for all; "
            f"{_SERVE}"
        )
    num_experts, count = sizes[0]
    kind = type(model).__name__
    smaller = fewer_experts(model, num_experts, count)
    if smaller is None:
        raise UserError(
            f"{folder}: {count} of {num_experts} experts are stored, and no field of config.json "
            f"gives a {kind} fewer; compress it without dropping"
        )
    if surplus := [layer.module for layer in layers if layer.module not in smaller.modules]:
        raise UserError(
            f"{folder}: no field of config.json gives all layers of a {kind} fewer experts (not "
            f"{surplus[0]}); {_SERVE}"
        )
    for layer in layers:
        check_routable(smaller, num_experts, layer.kept_experts)
    return smaller


def _cuts(
    smaller: SmallerModel, layers: Sequence[LayerEntry], stored: StoredNames, files: ModelFiles
) -> dict[str, Cut]:
    """What stays of each stored tensor that has entries for each expert."""
    by_module = {layer.module: layer for layer in layers}
    blocks = router_blocks(smaller)
    cuts = {}
    for site in smaller.sites:
        (usual, *_) = (by_module[module] for module in site.modules if module in by_module)
        for module in site.modules:
            layer = by_module.get(module, usual)
            for parameter, tensor in blocks[module].tensors.items():
                entries = tensor.kept(layer.num_experts, layer.kept_experts)
                for name in stored.names_of([parameter]):
                    shape = files.holding(name).shape(name)
                    dims = [i for i, size in enumerate(shape) if size == tensor.size]
                    # Almost always the same; a converter may have transposed it.
                    dim = tensor.dim if tensor.dim in dims else min(dims, default=None)
                    if dim is None:
                        raise UserError(
                            f"{files.holding(name).path}: tensor {name!r} has shape {list(shape)}, "
                            f"and no dimension that counts {tensor.size} experts; {_SERVE}"
                        )
                    cuts[name] = Cut(dim, entries)
    return cuts


def _plan_rows(
    planned: DenseModel, model: PreTrainedModel, layers: Sequence[LayerEntry], full_rows: bool
) -> None:
    """Decide how many rows experts get, and note it."""
    planned.rows = {layer.module: layer.source_shape.rows for layer in layers}
    (source, *others), most = {*planned.rows.values()}, max(layer.rows for layer in layers)
    if not (full_rows or others) and most < source:
        smaller = fewer_rows(model, source, most)
        if smaller is not None and smaller.modules >= planned.rows.keys():
            planned.rows = dict.fromkeys(planned.rows, most)
            _adopt(planned, model, smaller, source)
    short = [layer for layer in layers if layer.rows < planned.rows[layer.module]]
    if short:
        example = short[0]
        why = "as asked for" if full_rows else "config.json cannot say how many each layer has"
        planned.remarks.append(
            f"{len(short)} of {len(layers)} layers: zero rows are added to experts, from "
            f"{example.rows} to {planned.rows[example.module]} in {example.module} ({why})"
        )


def _adopt(planned: DenseModel, model: PreTrainedModel, smaller: SmallerModel, before: int) -> None:
    """Set the number that makes the model smaller in its config.json."""
    write_field(planned.config, model.config, smaller.field, smaller.value)
    planned.remarks.append(
        f"config.json: {'.'.join(smaller.field)} is {smaller.value} instead of {before}"
    )
