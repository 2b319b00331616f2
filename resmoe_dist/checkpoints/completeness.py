"""Whether a checkpoint's tensors are those that its model needs, told from the headers alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from pathlib import Path

import torch
from transformers import PreTrainedModel

from resmoe_dist.checkpoints.model_folder import ModelFiles
from resmoe_dist.errors import UserError
from resmoe_dist.families.names import StoredNames, converted_shape, missing_parameters
from resmoe_dist.families.storage import ExpertSite

Shapes = Mapping[str, tuple[int, ...]]
DtypeOf = Callable[[str], str]

_FLOATS = ("F64", "F32", "F16", "BF16")


def check_experts(
    files: ModelFiles,
    site: ExpertSite,
    expected: Shapes,
    dtype_of: DtypeOf,
    supported: Iterable[str],
) -> None:
    """Raise UserError if a tensor of a site is missing or has another shape or dtype.

    expected: the shapes of all its tensors.
    """
    dtype = None
    for name, shape in expected.items():
        if name not in files.locations:
            raise UserError(f"{files.folder}: tensor {name!r} is missing; fetch the model again")
        file = files.holding(name)
        if file.shape(name) != shape:
            raise UserError(
                f"{file.path}: tensor {name!r} has shape {list(file.shape(name))}, "
                f"config.json asks for {list(shape)}"
            )
        found_dtype = dtype_of(name)
        if found_dtype not in supported:
            raise UserError(
                f"{file.path}: tensor {name!r} is stored as {found_dtype}; supported are "
                f"{', '.join(supported)}"
            )
        dtype = dtype or found_dtype
        if found_dtype != dtype:
            raise UserError(
                f"{file.path}: tensor {name!r} is stored as {found_dtype}, others of "
                f"{site.module} as {dtype}; convert them to one dtype"
            )


def check_present(folder: Path, model: PreTrainedModel, stored: StoredNames) -> None:
    """Raise UserError if a parameter is neither stored nor tied to one that is."""
    if missing := missing_parameters(model, stored):
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(
            f"{folder}: no tensor of the checkpoint becomes {missing[0]!r}{more}, which a "
            f"{type(model).__name__} needs; fetch the model again"
        )


def check_complete(
    files: ModelFiles,
    model: PreTrainedModel,
    stored: StoredNames,
    shapes: Shapes,
    of_experts: Set[str],
    dtype_of: DtypeOf,
) -> None:
    """Raise UserError if a parameter outside the experts is not stored as the model needs it.

    of_experts: the stored tensors of experts, which `check_experts` has seen.
    """
    check_present(files.folder, model, stored)
    parameters = model.state_dict()
    for parameter, source in stored.sources.items():
        names = {name for names in source.names.values() for name in names} - of_experts
        if parameter not in parameters or not names:
            continue
        wanted = parameters[parameter]
        for name in names:
            if wanted.is_floating_point() and dtype_of(name) not in _FLOATS:
                raise UserError(
                    f"{files.holding(name).path}: tensor {name!r} is stored as {dtype_of(name)}: "
                    "the model is quantised in a way that is not supported; give the unquantised "
                    "checkpoint"
                )
        name = min(names)
        found = (
            shapes[name]
            if source.converter is None
            else converted_shape(model, parameter, source, shapes)
        )
        if found is not None and found != tuple(wanted.shape):
            what = f"tensor {name!r} has" if source.converter is None else f"{parameter!r} gets"
            raise UserError(
                f"{files.holding(name).path}: {what} shape {list(found)}, config.json asks for "
                f"{list(wanted.shape)}; fetch the model again"
            )


def check_range(path: Path, name: str, largest: float, dtype: torch.dtype) -> None:
    """Raise UserError if a tensor's largest magnitude becomes infinite in `dtype`."""
    if not torch.tensor(largest, dtype=torch.float64).to(dtype).isfinite():
        raise UserError(
            f"{path}: tensor {name!r} holds values too large for {dtype}; choose --dtype bfloat16 "
            "or float32"
        )
