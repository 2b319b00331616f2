"""Ways to compress a layer: one file per method, found by name."""

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
from resmoe_dist.methods.dense import Dense
from resmoe_dist.methods.plan import GroupPlan
from resmoe_dist.methods.resmoe import ResMoE, ResMoEConfig

__all__ = [
    "METHODS",
    "Dense",
    "EncodedGroup",
    "GroupCodecs",
    "GroupPlan",
    "Method",
    "MethodConfig",
    "MethodSpec",
    "ResMoE",
    "ResMoEConfig",
    "SourceGroup",
    "method_named",
    "method_of",
    "register_method",
]
