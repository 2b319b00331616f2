"""Parts of every Hugging Face folder that we write: shards, their index, the config's dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from resmoe_dist.checkpoints.tensor_files import tensor_bytes, write_json

SINGLE_FILE = "model.safetensors"
SHARD_INDEX = "model.safetensors.index.json"


def shard_name(number: int, count: int) -> str:
    """File name of shard `number` (from 0) of `count`; names count from 1."""
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def write_shard_index(folder: Path, weight_map: dict[str, str]) -> None:
    """Write the index of the shards in `folder`. weight_map: tensor name -> file name."""
    size = sum(sum(tensor_bytes(folder / name).values()) for name in set(weight_map.values()))
    write_json(folder / SHARD_INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Set the dtype in which transformers loads the model, in the content of a config.json."""
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
