"""The weights of a Hugging Face folder, read and written: shards, their index, the dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from resmoe_dist.checkpoints.tensor_files import TensorFile, read_json, tensor_bytes, write_json
from resmoe_dist.errors import UserError
from resmoe_dist.model_paths import is_plain_name

SINGLE_FILE = "model.safetensors"
SHARD_INDEX = "model.safetensors.index.json"


class ModelFiles:
    """The safetensors files of a Hugging Face folder: `model.safetensors`, or shards and an index.

    locations: tensor name -> file name. Raises UserError if the folder has no safetensors weights,
    the index names a file outside the folder, or a shard is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, TensorFile] = {}
        index = folder / SHARD_INDEX
        if index.is_file():
            self.locations = _weight_map(index)
        elif (folder / SINGLE_FILE).is_file():
            self.locations = dict.fromkeys(self.file(SINGLE_FILE).names, SINGLE_FILE)
        else:
            raise UserError(
                f"{folder}: holds neither {SINGLE_FILE} nor {SHARD_INDEX}; only safetensors "
                "checkpoints are read"
            )
        for tensor, name in self.locations.items():
            if tensor not in self.file(name).names:
                raise UserError(f"{folder / name}: tensor {tensor!r} is missing; fetch it again")

    def file(self, name: str) -> TensorFile:
        """One of the folder's files, opened once."""
        if name not in self._open:
            self._open[name] = TensorFile(self.folder / name)
        return self._open[name]

    def holding(self, tensor: str) -> TensorFile:
        """The file that holds a tensor."""
        return self.file(self.locations[tensor])


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


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index of a sharded model."""
    try:
        weight_map = read_json(index)["weight_map"]
        files = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not a safetensors index ({error}); fetch it again") from error
    for name in files:
        if not is_plain_name(name):
            raise UserError(f"{index}: {name!r} is not a plain file name")
    return weight_map
