"""Compress Mixture-of-Experts models into centres and residuals, and serve them on many devices.

Importing the package makes `AutoModelForCausalLM.from_pretrained` read compressed checkpoints. It
imports neither torch nor transformers: the names below are imported on first use.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from resmoe_dist.registration import register
from resmoe_dist.version import __version__

if TYPE_CHECKING:
    from resmoe_dist.errors import UserError
    from resmoe_dist.parallel.topology import Topology, build_topology
    from resmoe_dist.runtime.layer import ResMoE
    from resmoe_dist.runtime.loading import load_model

__all__ = ["ResMoE", "Topology", "UserError", "__version__", "build_topology", "load_model"]

_MODULES = {
    "ResMoE": "resmoe_dist.runtime.layer",
    "Topology": "resmoe_dist.parallel.topology",
    "UserError": "resmoe_dist.errors",
    "build_topology": "resmoe_dist.parallel.topology",
    "load_model": "resmoe_dist.runtime.loading",
}

register()
# DeepSpeed warns in every process of a machine without accelerators; our tables say it once.
logging.getLogger("DeepSpeed").addFilter(
    lambda record: "Setting accelerator to CPU" not in record.getMessage()
)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
