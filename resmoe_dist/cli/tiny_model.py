"""`tiny-model`: train one of the embedded models."""

from __future__ import annotations

from resmoe_dist.config.commands import TinyModelConfig
from resmoe_dist.parallel.entry_point import quiet_libraries
from resmoe_dist.testing import train_tiny_model


def run_tiny_model(config: TinyModelConfig) -> int:
    """Train and report; exit code 0."""
    quiet_libraries()
    report = train_tiny_model(config.directory, config.family, config.seed)
    print(
        f"{config.directory}: {report.family}, {report.parameters / 1e6:.1f} M parameters, trained "
        f"in {report.seconds:.0f} s; held-out {report.held_out_nll:.3f} nats per byte "
        f"(unigram {report.unigram_nll:.3f})"
    )
    return 0
