"""Where and how a model runs: options of `infer`, `evaluate` and `plan`."""

from __future__ import annotations

from pydantic import model_validator
from typing_extensions import Self

from resmoe_dist.config.options import CommandConfig, option
from resmoe_dist.config.values import Dtype, Size


class ExecutionConfig(CommandConfig):
    """How compressed experts are run."""

    execution: str = option(
        "auto",
        "how compressed experts are run: auto (measured), restore, shared, tiled or cached",
        metavar="MODE",
    )
    cache_size: Size | None = option(
        None,
        "restored experts that --execution cached keeps on each rank: 2GB",
        metavar="SIZE",
    )
    dtype: Dtype | None = option(None, "to compute in (default: the checkpoint's)")
    check: bool = option(
        False,
        "after each step, end all ranks if those of a lane route differently or a value is not "
        "finite",
    )
    verify: bool = option(False, "compare the files that are read with their digests")

    @model_validator(mode="after")
    def _check_cache(self) -> Self:
        if (self.execution == "cached") != (self.cache_size is not None):
            raise ValueError("--execution cached and --cache-size SIZE need each other; give both")
        return self


class GridConfig(CommandConfig):
    """The grid of ranks."""

    ep: int = option(1, "expert-parallel ranks")
    tp: int = option(1, "tensor-parallel ranks")
    lanes: int | None = option(
        None,
        "batches that the grid carries at a time; the ranks of a lane work on one batch together "
        "(default: measured by infer; one per expert-parallel rank otherwise)",
        metavar="L",
        ge=1,
    )
    dispatch: str = option(
        "auto",
        "how tokens travel to experts: auto (measured), exchange, decode or shared_batch",
        metavar="FORM",
    )
    rank_timeout: float = option(
        30, "end all ranks when one has not responded for so long", metavar="SECONDS", ge=1
    )

    @model_validator(mode="after")
    def _check_grid(self) -> Self:
        if self.ep < 1 or self.tp < 1:
            raise ValueError(f"--ep {self.ep} --tp {self.tp}: both must be 1 or more")
        return self
