"""Whether all ranks of a grid were started alike: options, checkpoint, versions of libraries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from resmoe_dist.errors import DisagreementError
from resmoe_dist.version import __version__

_LIBRARIES = ("torch", "transformers", "deepspeed")


def library_versions() -> dict[str, str]:
    """Versions of what must be equal on all ranks, by name."""
    found = {"resmoe-dist": __version__}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def check_agreement(facts: Mapping[str, str]) -> None:
    """Raise DisagreementError on every rank unless all ranks have the same facts. Collective.

    It names the first rank that differs from the most; of two, rank 1. facts: name and value, as
    the user knows them.
    """
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, dict(facts))
    for name in sorted(set().union(*everyone)):
        values = [theirs.get(name) for theirs in everyone]
        usual = Counter(values).most_common(1)[0][0]
        for rank, value in enumerate(values):
            if value != usual:
                other = values.index(usual)
                raise DisagreementError(
                    f"rank {rank} disagrees with rank {other}: {name} is {value} on rank {rank}, "
                    f"{usual} on rank {other}; start all ranks alike"
                )
