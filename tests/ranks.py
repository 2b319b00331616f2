"""Ranks of a test: child processes that start with the tests' own modules imported."""

from __future__ import annotations

from resmoe_dist.testing.child_ranks import RankError, preload, run_on_ranks

__all__ = ["RankError", "run_on_ranks"]

preload("tests.models")
