"""Smaller models of a family: fewer experts per layer, or fewer rows per expert.

No list of families says which field of a config counts experts or rows. Each field that has the
right number is tried on the meta device, and the model that comes out is compared with the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from resmoe_dist.errors import UserError
from resmoe_dist.families.models import meta_model
from resmoe_dist.families.sites import find_expert_sites
from resmoe_dist.families.storage import ExpertSite

# How configs call the number of experts per token, and the number of groups that a router chooses
# among first (DeepSeek-V3, section 2.1.2).
_TOP_K = (
    *("num_experts_per_tok", "num_experts_per_token", "top_k_experts"),
    *("moe_topk", "moe_top_k", "moe_k"),
)
_GROUPS = ("n_group", "num_expert_group")

Build = Callable[[PretrainedConfig], PreTrainedModel]
FieldPath = tuple[str, ...]


@dataclass(frozen=True)
class Cut:
    """The entries of a tensor that stay. dim: along which they are counted."""

    dim: int
    entries: list[int]

    def of(self, tensor: Tensor) -> Tensor:
        """The tensor with these entries alone."""
        entries = torch.tensor(self.entries, device=tensor.device)
        return tensor.index_select(self.dim, entries)


@dataclass(frozen=True)
class PerExpert:
    """A tensor outside the experts that has entries for each expert, such as a router's weight.

    dim: along which they are counted. size: how many there are in the larger model. Entries after
    the last expert's are of something else (shared experts, experts without weights).
    """

    dim: int
    size: int

    def kept(self, num_experts: int, kept: Sequence[int]) -> list[int]:
        """The entries to keep if of `num_experts` experts only those numbered in `kept` are."""
        return [*kept, *range(num_experts, self.size)]


@dataclass(frozen=True)
class SmallerModel:
    """A model on the meta device that differs from a larger one in the size of its experts only.

    field: the place in the config of the one number that differs, from the outermost part inwards.
    value: that number. sites: the experts that are smaller. per_expert: by name, the tensors
    outside the experts that have fewer entries.
    """

    model: PreTrainedModel
    field: FieldPath
    value: int
    sites: tuple[ExpertSite, ...]
    per_expert: dict[str, PerExpert]

    @property
    def modules(self) -> set[str]:
        """Names of all modules whose experts are smaller, with those tied to them."""
        return {module for site in self.sites for module in site.modules}


def fewer_experts(
    model: PreTrainedModel, num_experts: int, count: int, build: Build = meta_model
) -> SmallerModel | None:
    """The same model with `count` experts in layers of `num_experts`; None if no field says so.

    build: makes a model of a config. Whether every layer got smaller is for the caller to see.
    """

    def fits(larger: ExpertSite, smaller: ExpertSite) -> bool:
        return larger.num_experts == num_experts and smaller == replace(larger, num_experts=count)

    return next(_smaller(model, num_experts, count, ("expert",), fits, build), None)


def fewer_rows(
    model: PreTrainedModel, rows: int, count: int, build: Build = meta_model
) -> SmallerModel | None:
    """The same model with `count` rows in experts of `rows`; None if no field says just that."""

    def fits(larger: ExpertSite, smaller: ExpertSite) -> bool:
        shape = replace(larger.shape, rows=count)
        return larger.shape.rows == rows and smaller == replace(larger, shape=shape)

    likely = ("moe", "expert", "intermediate", "ff")
    found = _smaller(model, rows, count, likely, fits, build)
    # A field that also sizes dense or shared MLPs changes tensors outside the experts.
    return next((smaller for smaller in found if not smaller.per_expert), None)


def check_routable(smaller: SmallerModel, num_experts: int, kept: Sequence[int]) -> None:
    """Raise UserError if a router cannot choose among the kept experts as it did among all.

    smaller: with as many experts as are kept. kept: their numbers among `num_experts`.
    """
    part = _part_of(smaller.model.config, smaller.field)
    fields = part if isinstance(part, dict) else part.to_dict()
    choices = len(kept) + min(t.size - num_experts for t in smaller.per_expert.values())
    top_k = _largest(fields, _TOP_K)
    if top_k > choices:
        raise UserError(
            f"{len(kept)} of {num_experts} experts are kept, and each token needs {top_k}; "
            "keep more experts"
        )
    groups = _largest(fields, _GROUPS)
    if groups > 1:
        size = num_experts // groups
        held = [sum(k // size == group for k in kept) for group in range(groups)]
        # A router adds up the two best scores of a group.
        if len(set(held)) > 1 or held[0] < 2:
            raise UserError(
                f"the router chooses among {groups} groups of experts, which keep {held}; keep the "
                "same number in each group, and two or more"
            )
        chosen = _largest(fields, ("topk_group",))
        if top_k > chosen * held[0]:
            raise UserError(
                f"the {chosen} groups that a token chooses keep {held[0]} experts each, and it "
                f"needs {top_k}; keep more experts"
            )


def with_field(config: PretrainedConfig, field: FieldPath, value: int) -> PretrainedConfig:
    """A copy of a config with another number in one place."""
    changed = deepcopy(config)
    part = _part_of(changed, field)
    if isinstance(part, dict):
        part[field[-1]] = value
    else:
        setattr(part, field[-1], value)
    return changed


def write_field(
    raw: dict[str, Any], config: PretrainedConfig, field: FieldPath, value: int
) -> None:
    """Set a number in the content of a config.json, under the name that it has there.

    config: the same config as transformers reads it.
    """
    part = _part_of(config, field)
    for key in field[:-1]:
        raw = raw.setdefault(key, {})
    aliases = getattr(part, "attribute_map", {}).items()
    names = {field[-1], *(alias for alias, name in aliases if name == field[-1])}
    for name in names & raw.keys() or {field[-1]}:
        raw[name] = value


def _smaller(
    model: PreTrainedModel,
    before: int,
    after: int,
    likely: tuple[str, ...],
    fits: Callable[[ExpertSite, ExpertSite], bool],
    build: Build,
) -> Iterator[SmallerModel]:
    """The models that one changed number gives, and that differ in what `fits` wants."""
    fields = list(_fields_with(model.config.to_dict(), before))
    # Building a large model takes seconds, so likely names come first.
    fields.sort(key=lambda field: not any(part in field[-1] for part in likely))
    sites = find_expert_sites(model)
    for field in fields:
        try:
            tried = build(with_field(model.config, field, after))
            found = find_expert_sites(tried)
        except Exception:  # transformers' errors for a bad config have no common class
            continue
        changed = _changed_sites(sites, found, fits)
        per_expert = _per_expert(model, sites, tried, found, before - after)
        if changed and per_expert is not None:
            yield SmallerModel(tried, field, after, changed, per_expert)


def _changed_sites(
    sites: list[ExpertSite], found: list[ExpertSite], fits: Callable[[ExpertSite, ExpertSite], bool]
) -> tuple[ExpertSite, ...]:
    """The sites of `found` that differ; none if one differs in something else."""
    if [site.module for site in sites] != [site.module for site in found]:
        return ()
    pairs = [
        (larger, smaller) for larger, smaller in zip(sites, found, strict=True) if larger != smaller
    ]
    return tuple(smaller for _, smaller in pairs) if all(fits(*pair) for pair in pairs) else ()


def _per_expert(
    model: PreTrainedModel,
    sites: list[ExpertSite],
    tried: PreTrainedModel,
    found: list[ExpertSite],
    fewer: int,
) -> dict[str, PerExpert] | None:
    """The tensors outside the experts that lost `fewer` entries; None if anything else differs."""
    larger, smaller = _outside(model, sites), _outside(tried, found)
    if larger.keys() != smaller.keys():
        return None
    per_expert = {}
    for name, shape in larger.items():
        other = smaller[name]
        if shape == other:
            continue
        if len(shape) != len(other):
            return None
        dims = [i for i, sizes in enumerate(zip(shape, other, strict=True)) if sizes[0] != sizes[1]]
        if len(dims) > 1 or shape[dims[0]] - other[dims[0]] != fewer:
            return None
        per_expert[name] = PerExpert(dims[0], shape[dims[0]])
    return per_expert


def _outside(model: PreTrainedModel, sites: list[ExpertSite]) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters and buffers that belong to no expert."""
    experts = tuple(f"{module}." for site in sites for module in site.modules)
    return {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not name.startswith(experts)
    }


def _fields_with(values: dict[str, Any], number: int) -> Iterator[FieldPath]:
    """Where a number stands in the content of a config."""
    for key, value in values.items():
        if isinstance(value, dict) and key != "quantization_config":
            yield from ((key, *inner) for inner in _fields_with(value, number))
        elif type(value) is int and value == number:
            yield (key,)


def _part_of(config: PretrainedConfig, field: FieldPath) -> Any:
    """The part of a config, itself a config or a dict, that holds a field."""
    part: Any = config
    for key in field[:-1]:
        part = part[key] if isinstance(part, dict) else getattr(part, key)
    return part


def _largest(fields: dict[str, Any], names: Sequence[str]) -> int:
    """The largest number that one of these fields has; 0 if none has one."""
    values = [fields.get(name) for name in names]
    numbers = [n for value in values for n in (value if isinstance(value, list) else [value])]
    return max((n for n in numbers if isinstance(n, int)), default=0)
