"""Compress Mixture-of-Experts models into centres and residuals, and serve them on many devices."""

__version__ = "0.1.0"
