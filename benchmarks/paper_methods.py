"""The methods of the papers' tables as `compress` runs them, and the layers they compress."""

from __future__ import annotations

from math import ceil
from typing import Any

from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.comparison.contenders import CONTENDERS, LOW_RANK, OURS, Contender

KEEP = 0.25
TOP_LAYERS_OF_HALF = 4
TOP_SHARE = 24 / 32

_PAPER = CONTENDERS["resmoe-barycenter"].options
# By the tables' names; the last three are ours.
METHODS: dict[str, Contender] = {
    "UP": CONTENDERS["up"],
    "UP (sep)": CONTENDERS["up-sep"],
    "SP": CONTENDERS["sp"],
    "SP (sep)": CONTENDERS["sp-sep"],
    "SVD": CONTENDERS["svd"],
    "SVD (sep)": CONTENDERS["svd-sep"],
    "M-SMoE": CONTENDERS["m_smoe"],
    "Git Re-Basin": CONTENDERS["git_rebasin"],
    "MLP Fusion": CONTENDERS["mlp_fusion"],
    "Average + UP": Contender(
        OURS, "mean of the experts as stored", {"center": "mean", "allocate": "expert"}
    ),
    "ResMoE (UP)": CONTENDERS["resmoe-barycenter"],
    "ResMoE (SVD)": Contender(
        LOW_RANK, "the papers' centre, low-rank residuals", {**_PAPER, "codec": "low_rank"}
    ),
    "resmoe": CONTENDERS["resmoe"],
    "resmoe-svd": CONTENDERS["resmoe-svd"],
    "resmoe-no-center": CONTENDERS["resmoe-no-center"],
}
# Of their tables 1 to 5, and not in this package.
MISSING = ("MEO",)


def papers_layers(source: SourceCheckpoint) -> str:
    """The layers that the papers compress, as `--layers` names them (001, appendix A.1).

    Of an encoder-decoder the last four MoE layers of each half; otherwise the last three quarters,
    which are 24 of Mixtral's 32.
    """
    modules = [site.module for site in source.sites]
    if not source.config.is_encoder_decoder:
        return f"last:{ceil(TOP_SHARE * len(modules))}"
    chosen: list[int] = []
    for half in ("encoder.", "decoder."):
        positions = [i for i, module in enumerate(modules) if module.startswith(half)]
        chosen += positions[-TOP_LAYERS_OF_HALF:]
    return ",".join(map(str, chosen))


def papers_model(config: Any) -> str | None:
    """The name in 001's tables of a model with this config; None if 001 has no such model."""
    kind = config.model_type
    if kind == "mixtral" and (config.hidden_size, config.num_local_experts) == (4096, 8):
        return "Mixtral"
    if kind == "switch_transformers" and (config.d_model, config.num_experts) == (768, 8):
        return "Switch"
    return None
