"""`python -m benchmarks.compression BENCHMARK`."""

from benchmarks.compression import BENCHMARKS
from benchmarks.harness import main

if __name__ == "__main__":
    main(BENCHMARKS)
