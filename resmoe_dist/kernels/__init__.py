"""Running compressed experts: one interface, and a backend for each kind of device."""

from resmoe_dist.kernels.backends import backend_for
from resmoe_dist.kernels.interface import Backend
from resmoe_dist.kernels.layer import Activation, LayerWeights

__all__ = ["Activation", "Backend", "LayerWeights", "backend_for"]
