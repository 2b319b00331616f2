"""Compress a model folder from Python, then load the result as an ordinary transformers model.

    python examples/compress_and_load.py SOURCE OUTPUT --groups 2 --keep 0.25

Prints how much smaller the experts are, and how far the logits of random tokens move.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from resmoe_dist import load_model
from resmoe_dist.checkpoints.compressed import CompressionSettings
from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.jobs.pipeline import Compression


def compress(source_folder: Path, output: Path, groups: int, keep: float) -> tuple[int, int]:
    """Compress all MoE layers. Returns the bytes of the experts before and after."""
    source = SourceCheckpoint(source_folder)
    settings = CompressionSettings(
        groups=groups,
        keep=keep,
        codec="pruned",
        align="loo",
        center="auto",
        layers=list(range(len(source.sites))),
    )
    index = Compression(source, output, settings).run()
    stored_groups = [group for layer in index.layers for group in layer.groups]
    before = sum(group.source_bytes for group in stored_groups)
    return before, sum(group.stored_bytes for group in stored_groups)


def main() -> None:
    """Compress, load, compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, help="Hugging Face model folder")
    parser.add_argument("output", type=Path, help="folder to write; must not exist")
    parser.add_argument("--groups", type=int, default=2, help="groups per layer (default 2)")
    parser.add_argument("--keep", type=float, default=0.25, help="share of residual entries kept")
    args = parser.parse_args()

    before, after = compress(args.source, args.output, args.groups, args.keep)
    print(f"experts: {before} bytes before, {after} after ({after / before:.1%})")

    # `import resmoe_dist` has registered the format with transformers.
    compressed = AutoModelForCausalLM.from_pretrained(args.output).eval()
    dense = load_model(args.source)
    tokens = torch.randint(dense.config.vocab_size, (1, 16))
    with torch.no_grad():
        expected, found = dense(tokens).logits, compressed(tokens).logits
    difference = (found - expected).abs().max() / expected.abs().max()
    print(f"largest difference of the logits, relative to the largest logit: {difference:.2e}")


if __name__ == "__main__":
    main()
