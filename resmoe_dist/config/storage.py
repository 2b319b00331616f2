"""How compressed experts are stored: options of `compress` and `plan`."""

from __future__ import annotations

import re

from pydantic import model_validator
from typing_extensions import Self

from resmoe_dist.config.options import CommandConfig, option
from resmoe_dist.config.values import Dtype, Layers, Share


def with_option(codec: str, option: str) -> str:
    """A codec's text with another option."""
    return f"{codec}{',' if ':' in codec else ':'}{option}"


class StorageConfig(CommandConfig):
    """How compressed experts are stored."""

    groups_per_rank: int | None = option(
        None,
        "centres per EP rank; its experts are clustered by similarity (default: 1, or for bits and "
        "a size one for all ranks where that loses less)",
        metavar="M",
    )
    codec: str | None = option(
        None,
        "how residuals are stored: pruned, quantized, low_rank, or NAME:option=value,… (default: "
        "quantized for bits or a size, otherwise pruned)",
    )
    center_codec: str | None = option(
        None,
        "how centres are stored, written like --codec (default: dense; as residuals with 4 bits if "
        "these are quantized)",
        metavar="CODEC",
        exclusive="center",
    )
    bits: int | None = option(
        None, "per entry of the residuals, with --codec quantized", exclusive="budget"
    )
    center_bits: int | None = option(
        None, "per entry of the centres, with --codec quantized", exclusive="center"
    )
    keep: float | None = option(
        None, "share of residual entries kept (default: 0.25)", exclusive="budget"
    )
    target_bytes: Share | None = option(
        None,
        "size of the experts as a share of the dense ones, everything counted: chooses the bits of "
        "every centre and residual, or how much to keep if --codec keeps entries",
        metavar="SHARE",
        exclusive="budget",
    )
    target_bits: float | None = option(
        None,
        "the same as bits per expert weight",
        metavar="BITS",
        exclusive="budget",
        gt=0,
    )
    layers: Layers = option("all", "MoE layers to compress: all, last:24, 8-31 or 0,2")
    dtype: Dtype | None = option(None, "of stored values (default: the source's)")

    @property
    def clusters(self) -> int:
        """Centres per EP rank, unless one for all ranks loses less."""
        return 1 if self.groups_per_rank is None else self.groups_per_rank

    @property
    def residual_text(self) -> str:
        """The residuals' codec as `--codec` is written, with `--bits`."""
        codec = self.codec or self._default_codec
        return codec if self.bits is None else with_option(codec, f"bits={self.bits}")

    @property
    def _default_codec(self) -> str:
        asks_bits = (self.bits, self.center_bits, self.target_bits, self.target_bytes)
        return "pruned" if all(each is None for each in asks_bits) else "quantized"

    @property
    def center_text(self) -> str | None:
        """The centres' codec as `--center-codec` is written; None leaves it to the residuals'."""
        if self.center_bits is None:
            return self.center_codec
        return with_option(self.residual_text.partition(":")[0], f"bits={self.center_bits}")

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        given = {"--keep": self.keep, "--target-bytes": self.target_bytes}
        for name, value in given.items():
            if value is not None and re.search("[:,]keep=", self.codec or ""):
                raise ValueError(f"{name} and --codec {self.codec} both say how much to keep")
        if self.bits is not None and re.search("[:,]bits=", self.codec or ""):
            raise ValueError(f"--bits {self.bits} and --codec {self.codec} both say how many bits")
        return self
