"""The blocks that route to experts: which part of a model counts the experts of one layer."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile

from resmoe_dist.errors import UserError
from resmoe_dist.families.smaller import PerExpert, SmallerModel


@dataclass(frozen=True)
class RouterBlock:
    """The smallest module that holds the experts of a layer and all that counts them.

    name: of the module. tensors: by full name, those outside the experts with entries per expert.
    """

    name: str
    tensors: dict[str, PerExpert]


def router_blocks(smaller: SmallerModel) -> dict[str, RouterBlock]:
    """The block of each experts module that is smaller, by that module's name.

    A tensor belongs to the experts whose module shares the longest part of its name with it.

    Raises UserError if a tensor could belong to several layers, a router does not count its experts
    in a tensor, or it keeps numbers of experts in one.
    """
    modules = sorted(smaller.modules)
    tensors: dict[str, dict[str, PerExpert]] = {module: {} for module in modules}
    for name, tensor in smaller.per_expert.items():
        shared = {module: len(_common([module, name])) for module in modules}
        nearest = [module for module in modules if shared[module] == max(shared.values())]
        if len(nearest) > 1:
            raise _not_removable(name, f"belongs to {nearest[0]} and {nearest[1]}")
        tensors[nearest[0]][name] = tensor
    blocks = {}
    for module in modules:
        if not tensors[module]:
            raise _not_removable(module, "no router counts these experts")
        block = ".".join(_common([module, *(n.rpartition(".")[0] for n in tensors[module])]))
        others = [other for other in modules if other != module]
        if not block or any(other.startswith(f"{block}.") for other in others):
            raise _not_removable(module, "shares its router with other experts")
        blocks[module] = RouterBlock(block, tensors[module])
    for name, value in smaller.model.state_dict().items():
        in_block = any(name.startswith(f"{block.name}.") for block in blocks.values())
        if in_block and not value.is_floating_point():
            raise _not_removable(name, "may hold numbers of experts")
    return blocks


def _common(names: list[str]) -> list[str]:
    """The parts that dotted names share at their start."""
    places = zip(*(name.split(".") for name in names), strict=False)
    return [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, places)]


def _not_removable(name: str, why: str) -> UserError:
    return UserError(
        f"{name}: {why}, so experts cannot be dropped from this model; compress it without dropping"
    )
