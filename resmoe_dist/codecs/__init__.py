"""How matrices (centres and residuals) are stored: one file per codec, found by name."""

from resmoe_dist.codecs.base import (
    BYTE_KINDS,
    BudgetConfig,
    ByteKind,
    CodecConfig,
    EncodedMatrix,
    StoredTensor,
    TensorReader,
)
from resmoe_dist.codecs.dense import DENSE, DenseMatrix
from resmoe_dist.codecs.empty import EmptyMatrix
from resmoe_dist.codecs.low_rank import LowRankConfig, LowRankMatrix
from resmoe_dist.codecs.low_rank_blocks import LowRankBlocksConfig, LowRankBlocksMatrix
from resmoe_dist.codecs.moments import Moments
from resmoe_dist.codecs.pruned import PrunedConfig, PrunedMatrix
from resmoe_dist.codecs.quantized import QuantizedConfig, QuantizedMatrix
from resmoe_dist.codecs.registry import CODECS, CodecSpec, codec_named, register_codec

__all__ = [
    "BYTE_KINDS",
    "CODECS",
    "DENSE",
    "BudgetConfig",
    "ByteKind",
    "CodecConfig",
    "CodecSpec",
    "DenseMatrix",
    "EmptyMatrix",
    "EncodedMatrix",
    "LowRankBlocksConfig",
    "LowRankBlocksMatrix",
    "LowRankConfig",
    "LowRankMatrix",
    "Moments",
    "PrunedConfig",
    "PrunedMatrix",
    "QuantizedConfig",
    "QuantizedMatrix",
    "StoredTensor",
    "TensorReader",
    "codec_named",
    "register_codec",
]
