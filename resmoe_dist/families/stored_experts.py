"""How a checkpoint lays out a model's experts, from the operations by which they are loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    ErnieFuseAndSplitTextVisionExperts,
    Interleave,
    MergeModulelist,
    Transpose,
)

from resmoe_dist.errors import UserError
from resmoe_dist.families.names import ParameterSource, StoredNames
from resmoe_dist.families.storage import BIAS, EXPERT, INPUTS, ExpertSite, ExpertStorage, is_output

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class _Layout:
    """The layout of what one key of a site's storage is made from. keys: of the stored tensors."""

    keys: tuple[str, ...]
    transposed: bool
    interleaved: bool
    merged: bool = False

    @property
    def rows_dim(self) -> int:
        """The dimension of a fused tensor that counts the rows of its projections."""
        return 2 if self.transposed else 1


def find_storage(site: ExpertSite, stored: StoredNames, shapes: Shapes) -> ExpertStorage:
    """How the experts of a site are laid out in a checkpoint.

    shapes: of the stored tensors. Raises UserError if a parameter is not stored, or in a way that
    is not supported. That all experts are there is for the caller to check.
    """
    if not site.storage.fused:
        return _separate_storage(site, stored)
    found = [_Found.of(site, key, stored, shapes) for key in site.storage.tensors]
    if len({(part.layout.merged, part.first_expert) for part in found}) > 1:
        raise _unsupported(site, "its tensors are numbered in different ways")
    inputs = [part.layout for part in found if not part.is_output and not part.is_bias]
    (output,) = (part.layout for part in found if part.is_output and not part.is_bias)
    transposed = inputs[0].transposed
    return ExpertStorage(
        tensors={key: name for part in found for key, name in part.tensors.items()},
        fused=not found[0].layout.merged,
        transposed=transposed,
        output_transposed=None if output.transposed == transposed else output.transposed,
        interleaved=inputs[0].interleaved,
        stacked=site.storage.stacked,
        first_expert=found[0].first_expert,
    )


@dataclass(frozen=True)
class _Found:
    """What one key of a site's storage is made from: tensor names by key, and their layout."""

    key: str
    is_output: bool
    layout: _Layout
    tensors: dict[str, str]
    first_expert: int = 0

    @property
    def is_bias(self) -> bool:
        return self.key.endswith(BIAS)

    @classmethod
    def of(cls, site: ExpertSite, key: str, stored: StoredNames, shapes: Shapes) -> _Found:
        """Undo the operations by which the parameter of a key is loaded, the last one first."""
        own = site.storage
        parameter = own.tensors[key]
        source = stored.sources.get(parameter)
        if source is None:
            raise _missing(site, parameter)
        of_output = is_output(site.shape, key.removesuffix(BIAS))
        layout = _Layout(
            (key,),
            transposed=own.is_transposed(site.shape, key),
            interleaved=own.interleaved and not of_output,
        )
        expected = own.expected_shapes(site.shape, site.num_experts)[parameter]
        for operation in reversed(source.operations):
            layout = _undo(site, layout, operation, _has_shape(source, shapes, expected))
        patterns = [parameter] if source.converter is None else source.converter.source_patterns
        names = list(source.names.values())
        if source.converter is not None:
            names = [source.names[pattern] for pattern in patterns if pattern in source.names]
        if len(names) > len(layout.keys):
            raise _unsupported(site, f"too many tensors become {parameter}, such as {names[-1][0]}")
        if len(names) < len(layout.keys):
            raise _missing(site, parameter)
        if not layout.merged:
            if any(len(each) != 1 for each in names):
                raise _unsupported(site, f"several tensors become {parameter}: {names[0]}")
            tensors = {key: each[0] for key, each in zip(layout.keys, names, strict=True)}
            return cls(key, of_output, layout, tensors)
        part, parts = source.part
        tensors, first = {}, set()
        for each_key, each in zip(layout.keys, names, strict=True):
            size = -(-len(each) // parts)
            mine = each[part * size : (part + 1) * size]
            if not mine:
                raise _missing(site, parameter)
            tensors[each_key], number = numbered_name(mine)
            # Transformers counts what it finds. If an expert is missing, the first one is 0.
            first.add(number if len(mine) == site.num_experts else part * site.num_experts)
        return cls(key, of_output, layout, tensors, min(first))


def _undo(site: ExpertSite, layout: _Layout, operation: ConversionOps, fits: bool) -> _Layout:
    """The layout before an operation. fits: the stored tensor has the parameter's shape already."""
    (key, *more) = layout.keys
    ending = BIAS if key.endswith(BIAS) else ""
    has_inputs = not more and key == f"{INPUTS}{ending}"
    inputs = tuple(f"{name}{ending}" for name in site.shape.inputs)
    match operation:
        case MergeModulelist(dim=0) if not layout.merged:
            return replace(layout, merged=True)
        case Concatenate(dim=layout.rows_dim) if has_inputs and not layout.interleaved:
            return replace(layout, keys=inputs)
        case Interleave(dim=layout.rows_dim, inverse=layout.interleaved) if has_inputs:
            return replace(layout, interleaved=not layout.interleaved)
        case Transpose(dim0=1, dim1=2) | Transpose(dim0=2, dim1=1):
            if operation.check_dims and fits:
                return layout
            return replace(layout, transposed=not layout.transposed)
        case ErnieFuseAndSplitTextVisionExperts(stack_dim=0, concat_dim=layout.rows_dim):
            return replace(layout, merged=True, keys=inputs if has_inputs else layout.keys)
    raise _unsupported(site, f"transformers loads them by {operation!r}")


def _has_shape(source: ParameterSource, shapes: Shapes, expected: tuple[int, ...]) -> bool:
    names = [name for names in source.names.values() for name in names]
    return shapes[names[0]] == expected


def _separate_storage(site: ExpertSite, stored: StoredNames) -> ExpertStorage:
    """The storage of a module that has a parameter for each projection of each expert."""
    tensors = {}
    for key in site.storage.tensors:
        parameters = [site.storage.name(key, k) for k in range(site.num_experts)]
        names = [name for each in parameters for name in sorted(stored.names_of([each]))]
        if not names:
            raise _missing(site, parameters[0])
        tensors[key], _ = numbered_name(names)
    return site.storage.model_copy(update={"tensors": tensors})


def numbered_name(names: list[str]) -> tuple[str, int]:
    """The common form of per-expert names, with `{expert}` for the number, and the first number."""
    parts = [name.split(".") for name in names]
    varying = [i for i, each in enumerate(zip(*parts, strict=False)) if len(set(each)) > 1]
    if not varying:
        varying = [i for i, part in enumerate(parts[0]) if re.search(r"(^|_)\d+$", part)][-1:]
    place = varying[0]
    match = re.search(r"\d+$", parts[0][place])
    if match is None:
        raise UserError(f"tensor {names[0]!r}: its name has no number of an expert")
    prefix = parts[0][place][: match.start()]
    common = [*parts[0][:place], f"{prefix}{EXPERT}", *parts[0][place + 1 :]]
    return ".".join(common), int(match[0])


def _missing(site: ExpertSite, parameter: str) -> UserError:
    return UserError(
        f"{site.module}: no tensors of the checkpoint become {parameter!r}; it is incomplete, or "
        "does not fit its config.json"
    )


def _unsupported(site: ExpertSite, why: str) -> UserError:
    return UserError(f"{site.module}: the layout of its experts is not supported ({why})")
