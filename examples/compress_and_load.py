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
from resmoe_dist.config.commands import CompressConfig
from resmoe_dist.launch.compress import compress


def main() -> None:
    """Compress, load, compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, help="Hugging Face model folder")
    parser.add_argument("output", type=Path, help="folder to write; must not exist")
    parser.add_argument("--groups", type=int, default=2, help="groups per layer (default 2)")
    parser.add_argument("--keep", type=float, default=0.25, help="share of residual entries kept")
    args = parser.parse_args()

    # The options of `resmoe-dist compress`.
    config = CompressConfig(source=args.source, output=args.output, ep=args.groups, keep=args.keep)
    groups = [group for layer in compress(config).layers for group in layer.groups]
    before = sum(group.source_bytes for group in groups)
    after = sum(group.stored_bytes for group in groups)
    print(f"experts: {before} bytes before, {after} after ({after / before:.1%})")

    # `import resmoe_dist` has registered the format with transformers.
    compressed = AutoModelForCausalLM.from_pretrained(args.output, trust_remote_code=False).eval()
    dense = load_model(args.source)
    tokens = torch.randint(dense.config.vocab_size, (1, 16))
    with torch.no_grad():
        expected, found = dense(tokens).logits, compressed(tokens).logits
    difference = (found - expected).abs().max() / expected.abs().max()
    print(f"largest difference of the logits, relative to the largest logit: {difference:.2e}")


if __name__ == "__main__":
    main()
