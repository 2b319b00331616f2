"""Use one compressed MoE layer, with DeepSpeed's gate, in your own DeepSpeed model.

    deepspeed --num_gpus 2 examples/layer_in_deepspeed_model.py COMPRESSED --ep 2

`ResMoE` takes the place of `deepspeed.moe.layer.MoE`: same gate, same three results. All lanes get
the same tokens here, so every rank prints the same line, on any grid.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import groups
from torch import Tensor, nn

from resmoe_dist import ResMoE, Topology
from resmoe_dist.parallel.entry_point import quiet_libraries, run_entry_point
from resmoe_dist.parallel.launcher import start_grid

TOKENS = 12


class Block(nn.Module):
    """A residual block around one MoE layer."""

    def __init__(self, folder: Path, layer: int, topology: Topology) -> None:
        super().__init__()
        self.moe = ResMoE.from_checkpoint(
            folder, layer, topology, k=2, drop_tokens=False, top2_2nd_expert_sampling=False
        )
        self.router = self.moe.deepspeed_moe.gate.wg
        self.norm = nn.LayerNorm(self.router.in_features)

    def forward(self, x_BSH: Tensor) -> tuple[Tensor, Tensor]:
        """Output, and how many tokens each expert got. [B, S, H] -> [B, S, H], [E]."""
        # The second result is the gate's load-balancing loss, which inference does not need.
        out_BSH, _, counts_E = self.moe(self.norm(x_BSH))
        return x_BSH + out_BSH, counts_E


def main() -> None:
    """One rank."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="compressed checkpoint")
    parser.add_argument("--layer", type=int, default=0, help="position among the MoE layers")
    parser.add_argument("--ep", type=int, default=1, help="expert-parallel ranks")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks")
    # The `deepspeed` launcher adds it to every command line.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    args = parser.parse_args()
    quiet_libraries()

    topology = start_grid(args.ep, args.tp)
    torch.manual_seed(0)
    block = Block(args.folder, args.layer, topology)
    # In your model: the router's weights, the same on all ranks.
    nn.init.normal_(block.router.weight)
    config = {"train_micro_batch_size_per_gpu": 1}
    engine, *_ = deepspeed.initialize(model=block, config=config, mpu=groups)
    engine.eval()
    x_BSH = torch.randn(1, TOKENS, block.router.in_features, device=engine.device)
    with torch.no_grad():
        out_BSH, counts_E = engine(x_BSH)
    report = f"norm of the output {out_BSH.norm():.3f}, tokens per expert {counts_E.tolist()}"
    # One write per rank: the ranks share this terminal.
    print(f"{report}\n", end="", flush=True)


if __name__ == "__main__":
    run_entry_point(main)
