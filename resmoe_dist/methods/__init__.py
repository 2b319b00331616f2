"""Ways to compress a layer: one file per method, found by name."""

from resmoe_dist.methods.averaging import Averaging
from resmoe_dist.methods.base import (
    METHODS,
    EncodedGroup,
    GroupCodecs,
    Method,
    MethodConfig,
    MethodSpec,
    SourceGroup,
    method_named,
    method_of,
    register_method,
)
from resmoe_dist.methods.d2_moe import D2MoE
from resmoe_dist.methods.dense import Dense
from resmoe_dist.methods.frequency_merging import FrequencyMerging
from resmoe_dist.methods.frequency_pruning import FrequencyPruning
from resmoe_dist.methods.git_rebasin import GitRebasin
from resmoe_dist.methods.hc_smoe import HCSMoE
from resmoe_dist.methods.m_smoe import MSMoE
from resmoe_dist.methods.mc_smoe import MCSMoE
from resmoe_dist.methods.mlp_fusion import MlpFusion
from resmoe_dist.methods.mobe import Mobe
from resmoe_dist.methods.plan import GroupPlan
from resmoe_dist.methods.reap import Reap
from resmoe_dist.methods.repair import Repair
from resmoe_dist.methods.resmoe import ResMoE, ResMoEConfig
from resmoe_dist.methods.rtn import Rtn
from resmoe_dist.methods.structured_pruning import StructuredPruning
from resmoe_dist.methods.truncated_svd import TruncatedSvd
from resmoe_dist.methods.uncurl import Uncurl
from resmoe_dist.methods.unstructured_pruning import UnstructuredPruning
from resmoe_dist.methods.zipit import ZipIt

__all__ = [
    "METHODS",
    "Averaging",
    "D2MoE",
    "Dense",
    "EncodedGroup",
    "FrequencyMerging",
    "FrequencyPruning",
    "GitRebasin",
    "GroupCodecs",
    "GroupPlan",
    "HCSMoE",
    "MCSMoE",
    "MSMoE",
    "Method",
    "MethodConfig",
    "MethodSpec",
    "MlpFusion",
    "Mobe",
    "Reap",
    "Repair",
    "ResMoE",
    "ResMoEConfig",
    "Rtn",
    "SourceGroup",
    "StructuredPruning",
    "TruncatedSvd",
    "Uncurl",
    "UnstructuredPruning",
    "ZipIt",
    "method_named",
    "method_of",
    "register_method",
]
