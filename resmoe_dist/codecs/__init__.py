"""How residuals are stored: one file per codec, found by name through `codec_named`."""

from __future__ import annotations

from resmoe_dist.codecs.base import EncodedResidual, TensorReader, Weights
from resmoe_dist.codecs.dense import DenseResidual
from resmoe_dist.codecs.low_rank import LowRankResidual
from resmoe_dist.codecs.pruned import PrunedResidual

CODECS: dict[str, type[EncodedResidual]] = {
    codec.name: codec for codec in (PrunedResidual, LowRankResidual, DenseResidual)
}


def codec_named(name: str) -> type[EncodedResidual]:
    """The codec class called `name`. Raises KeyError for a name that is not in `CODECS`."""
    return CODECS[name]


__all__ = [
    "CODECS",
    "DenseResidual",
    "EncodedResidual",
    "LowRankResidual",
    "PrunedResidual",
    "TensorReader",
    "Weights",
    "codec_named",
]
