"""Measure compression: one file per benchmark, which is also its name on the command line."""

from benchmarks.compression import alignment, center, large, layer, models, spread

BENCHMARKS = (alignment, center, layer, large, spread, models)
