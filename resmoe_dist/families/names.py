"""Which stored tensors a model's parameters are made from, as transformers loads them.

transformers' conversion mapping renames stored tensors, and merges, splits, transposes or
interleaves them into parameters. Asking it covers every name that `from_pretrained` understands.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from resmoe_dist.families.storage import ExpertSite

Shapes = Mapping[str, tuple[int, ...]]


@dataclass
class ParameterSource:
    """The stored tensors that one parameter is made from.

    names: by the converter's source pattern, in the order in which they are merged. converter: None
    if the one tensor is only renamed. part: which of the converter's results the parameter is, of
    how many.
    """

    converter: WeightConverter | None = None
    part: tuple[int, int] = (0, 1)
    names: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def operations(self) -> list[ConversionOps]:
        """What is done to the tensors."""
        return [] if self.converter is None else self.converter.operations


@dataclass
class StoredNames:
    """sources: of each parameter and persistent buffer that is stored. unused: all other names."""

    sources: dict[str, ParameterSource]
    unused: list[str]

    def names_of(self, parameters: Iterable[str]) -> set[str]:
        """The stored tensors that parameters are made from."""
        found = (self.sources[name] for name in parameters if name in self.sources)
        return {name for source in found for names in source.names.values() for name in names}

    def sites_of(self, site: ExpertSite) -> list[ExpertSite]:
        """A site by the modules that are stored: usually one, and the others are tied to it."""
        stored = [m for m in site.modules if any(n.startswith(f"{m}.") for n in self.sources)]
        first, *more = stored or [site.module]
        tied = tuple(module for module in site.modules if module not in (first, *more))
        # Tied modules that are all stored are tied only if they are equal, so they are kept apart.
        apart = [replace(site.at(module), tied=()) for module in more]
        return [replace(site.at(first), tied=tied), *apart]


def map_names(model: PreTrainedModel, names: Iterable[str]) -> StoredNames:
    """Assign every stored tensor to the model's parameters, as `from_pretrained` would.

    model: may be on the meta device.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    parameters = model.state_dict()
    prefix = model.base_model_prefix
    mapped = StoredNames({}, [])
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, parameters)
        if target not in parameters and name in parameters:
            # It looks like another version's name, and is the current one.
            target, pattern = rename_source_key(name, [], [], prefix, parameters)
        if target not in parameters:
            mapped.unused.append(name)
        elif pattern is None:
            mapped.sources.setdefault(target, ParameterSource()).names[name].append(name)
        else:
            converter = by_pattern[pattern]
            patterns = converter.target_patterns
            for i, other in enumerate(patterns):
                part = (i, len(patterns))
                parameter = target.replace(patterns[0], other)
                source = mapped.sources.setdefault(parameter, ParameterSource(converter, part))
                source.names[pattern].append(name)
    return mapped


def missing_parameters(model: PreTrainedModel, stored: StoredNames) -> list[str]:
    """Parameters and buffers that are neither stored nor tied to one that is."""
    missing = model.state_dict().keys() - stored.sources.keys()
    tied: dict[str, set[str]] = defaultdict(set)
    for target, source in model.all_tied_weights_keys.items():
        tied[source] |= {source, target}
    for names in tied.values():
        if not names <= missing:
            missing -= names
    return sorted(
        name for name in missing if not _matches(model._keys_to_ignore_on_load_missing, name)
    )


def converted_shape(
    model: PreTrainedModel, parameter: str, source: ParameterSource, shapes: Shapes
) -> tuple[int, ...] | None:
    """The shape that a converter makes of stored tensors, on the meta device; None if unknown."""
    converter = deepcopy(source.converter)
    assert converter is not None
    first = parameter
    if source.part[0]:
        patterns = converter.target_patterns
        first = parameter.replace(patterns[source.part[0]], patterns[0])
    for pattern, names in source.names.items():
        for name in names:
            tensor = torch.empty(shapes[name], device="meta")
            converter.add_tensor(first, name, pattern, tensor)
    try:
        made = converter.convert(first, model=model, config=model.config)[parameter]
    except Exception:  # an operation that needs values, or that fails on what it gets
        return None
    return tuple((made[0] if isinstance(made, list) else made).shape)


def ignored_if_unused(model: PreTrainedModel, name: str) -> bool:
    """Whether a stored tensor is a buffer that transformers computes itself in this version."""
    buffers = {buffer.rpartition(".")[2] for buffer, _ in model.named_buffers()}
    return name.rpartition(".")[2] in buffers & {"inv_freq", "position_ids"}


def _matches(patterns: Iterable[str] | None, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())
