"""The `resmoe-dist` command."""

from resmoe_dist.cli.main import main

__all__ = ["main"]
