"""Compress Mixture-of-Experts models into centres and residuals, and serve them on many devices.

Importing the package registers quantization method `resmoe` with transformers, so that
`AutoModelForCausalLM.from_pretrained` reads compressed checkpoints.
"""

import logging

__version__ = "0.1.0"

# On a machine without accelerators DeepSpeed warns so in every process; the tables here say it.
logging.getLogger("DeepSpeed").addFilter(
    lambda record: "Setting accelerator to CPU" not in record.getMessage()
)

from resmoe_dist.errors import UserError  # noqa: E402
from resmoe_dist.parallel.topology import Topology, build_topology  # noqa: E402
from resmoe_dist.runtime.layer import ResMoE  # noqa: E402
from resmoe_dist.runtime.loading import load_model  # noqa: E402

__all__ = ["ResMoE", "Topology", "UserError", "__version__", "build_topology", "load_model"]
