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
from resmoe_dist.codecs.bases import BasesConfig, BasesMatrix
from resmoe_dist.codecs.dense import DENSE, DenseMatrix
from resmoe_dist.codecs.empty import EmptyMatrix
from resmoe_dist.codecs.low_rank import LowRankConfig, LowRankMatrix
from resmoe_dist.codecs.low_rank_blocks import LowRankBlocksConfig, LowRankBlocksMatrix
from resmoe_dist.codecs.low_rank_columns import (
    LowRankColumnsConfig,
    LowRankColumnsMatrix,
    SharesConfig,
)
from resmoe_dist.codecs.mobe import MobeMatrix
from resmoe_dist.codecs.moments import Moments
from resmoe_dist.codecs.pruned import PrunedConfig, PrunedMatrix
from resmoe_dist.codecs.quantized import QuantizedConfig, QuantizedMatrix
from resmoe_dist.codecs.registry import CODECS, CodecSpec, codec_named, register_codec
from resmoe_dist.codecs.rtn import RtnConfig, RtnMatrix

__all__ = [
    "BYTE_KINDS",
    "CODECS",
    "DENSE",
    "BasesConfig",
    "BasesMatrix",
    "BudgetConfig",
    "ByteKind",
    "CodecConfig",
    "CodecSpec",
    "DenseMatrix",
    "EmptyMatrix",
    "EncodedMatrix",
    "LowRankBlocksConfig",
    "LowRankBlocksMatrix",
    "LowRankColumnsConfig",
    "LowRankColumnsMatrix",
    "LowRankConfig",
    "LowRankMatrix",
    "MobeMatrix",
    "Moments",
    "PrunedConfig",
    "PrunedMatrix",
    "QuantizedConfig",
    "QuantizedMatrix",
    "RtnConfig",
    "RtnMatrix",
    "SharesConfig",
    "StoredTensor",
    "TensorReader",
    "codec_named",
    "register_codec",
]
