"""Plain models with fewer experts or rows, made by slicing the tensors of a model folder.

Written per family from the names and shapes that transformers saves, without resmoe_dist.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints.damage import copy_of

NUM_EXPERTS = 6

# By family: what the config may call the number of experts.
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
_NUMBER = re.compile(r"(\.experts\.(?:expert_)?)(\d+)(\.)")
_ROUTER = re.compile(r"\.(gate|router|router\.classifier)\.(weight|bias|e_score_correction_bias)$")

# Six experts, so that some can go and a choice of two is left.
OVERRIDES = {
    "mixtral": {"num_local_experts": NUM_EXPERTS},
    "qwen3_moe": {"num_experts": NUM_EXPERTS},
    "deepseek_v3": {"n_routed_experts": NUM_EXPERTS},
    "switch": {"num_experts": NUM_EXPERTS},
    "gpt_oss": {"num_local_experts": NUM_EXPERTS},
}


def without_experts(source: Path, target: Path, kept: Sequence[int]) -> Path:
    """A copy of a model folder that has only the experts numbered in `kept`."""
    copy_of(source, target)
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        number = _NUMBER.search(name)
        if number is not None:
            if int(number[2]) in kept:
                new = kept.index(int(number[2]))
                tensors[_NUMBER.sub(rf"\g<1>{new}\g<3>", name)] = tensor
        elif ".experts." in name or _ROUTER.search(name):
            tensors[name] = tensor[list(kept)].clone()
        else:
            tensors[name] = tensor
    _save(target, tensors)
    edit_config(target, len(kept), *_COUNTS)
    return target


def without_rows(source: Path, target: Path, kept: Sequence[int], *, zero: bool) -> Path:
    """A copy of a model folder whose experts have only the rows numbered in `kept`.

    zero: leave the other rows in place, and make their weights in the output projection zero.
    Tensors must be those of single experts, or gpt_oss's, which has gate and up in turn.
    """
    copy_of(source, target)
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if ".experts." not in name:
            tensors[name] = tensor
            continue
        dim, rows = _rows_of(name, list(kept))
        if not zero and dim is not None:
            tensor = tensor.index_select(dim, torch.tensor(rows))
        elif zero and re.search(r"(w2|down_proj|wo)(\.weight)?$", name):
            mask = torch.zeros(tensor.shape[dim])
            mask[rows] = 1
            tensor = tensor * (mask if dim == tensor.dim() - 1 else mask.unsqueeze(-1))
        tensors[name] = tensor.contiguous()
    _save(target, tensors)
    return target


def edit_config(folder: Path, value: int, *names: str) -> None:
    """Set the entry of a config.json that has one of these names."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    (found,) = (name for name in names if name in config)
    path.write_text(json.dumps(config | {found: value}))


def _rows_of(name: str, kept: list[int]) -> tuple[int | None, list[int]]:
    """The dimension that counts rows, and the entries of it to keep."""
    both = [2 * row + i for row in kept for i in range(2)]
    if name.endswith("experts.gate_up_proj"):
        return 2, both
    if name.endswith("experts.gate_up_proj_bias"):
        return 1, both
    if name.endswith("experts.down_proj"):
        return 1, kept
    if name.endswith("experts.down_proj_bias"):
        return None, []
    return (1 if re.search(r"(w2|down_proj|wo)\.weight$", name) else 0), kept


def _save(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
