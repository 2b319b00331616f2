"""The embedded models: tiny MoE language models that any machine can train in about a minute.

They read bytes and learn from the source of Python's standard library, so nothing is downloaded.
Like Mixtral, they are *upcycled*: a dense model is trained first, its MLP becomes every expert of
an MoE model, and training goes on (Komatsuzaki et al. 2022, arXiv:2212.05055). The experts are
therefore related but different, like those of real models.
"""

from resmoe_dist.testing.cache import cached_tiny_model
from resmoe_dist.testing.recipes import FAMILIES
from resmoe_dist.testing.training import TrainingReport, train_tiny_model

__all__ = ["FAMILIES", "TrainingReport", "cached_tiny_model", "train_tiny_model"]
