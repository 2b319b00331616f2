"""The weights of a Hugging Face folder, read and written: shards, their index, the dtype."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from resmoe_dist.checkpoints.tensor_files import (
    TensorFile,
    read_json,
    tensor_bytes,
    write_json,
)
from resmoe_dist.errors import UserError
from resmoe_dist.model_paths import is_plain_name

SINGLE_FILE = "model.safetensors"
SHARD_INDEX = "model.safetensors.index.json"
# `compression_config` is what compressed-tensors called it.
_QUANTIZATION_KEYS = ("quantization_config", "compression_config")


class ModelFiles:
    """The safetensors files of a Hugging Face folder: `model.safetensors`, or shards and an index.

    listed: tensor name -> file name, as the index says. locations: the same of all tensors in these
    files. As in transformers, the index may omit some of them, and may list names that no file
    holds, because the model ties them.

    Raises UserError if the folder has no safetensors weights, the index names a file outside the
    folder, a shard is missing, or a tensor is in another file than the index says or in several.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, TensorFile] = {}
        index = folder / SHARD_INDEX
        if index.is_file():
            self.listed = _weight_map(index)
        elif (folder / SINGLE_FILE).is_file():
            self.listed = dict.fromkeys(self.file(SINGLE_FILE).names, SINGLE_FILE)
        else:
            raise UserError(
                f"{folder}: holds neither {SINGLE_FILE} nor {SHARD_INDEX}; only safetensors "
                "checkpoints are read"
            )

        self.locations = self._locations()

    def _locations(self) -> dict[str, str]:
        """Where each tensor of the listed files is."""
        found: dict[str, str] = {}
        for file in sorted(set(self.listed.values())):
            for tensor in sorted(self.file(file).names):
                if tensor in found:
                    raise UserError(
                        f"{self.folder}: tensor {tensor!r} is in {found[tensor]} and in {file}; "
                        "fetch the model again"
                    )
                said = self.listed.get(tensor, file)
                if said != file:
                    raise UserError(
                        f"{self.folder / said}: tensor {tensor!r} is missing, {file} holds it; "
                        "fetch the model again"
                    )
                found[tensor] = file
        return found

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


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """How a model is quantised, by its config.json or a part of it, such as `text_config`.

    Raises UserError if its parts are quantised in different ways.
    """
    found = list(_quantizations(read_json(folder / "config.json")))
    if any(other != found[0] for other in found):
        raise UserError(f"{folder}: config.json quantises parts of the model in different ways")
    return found[0] if found else None


def drop_quantization(config: dict[str, Any]) -> None:
    """Remove `quantization_config` from the content of a config.json and all its parts."""
    for key in _QUANTIZATION_KEYS:
        config.pop(key, None)
    for part in config.values():
        if isinstance(part, dict):
            drop_quantization(part)


def _quantizations(config: Any) -> Iterator[dict[str, Any]]:
    if not isinstance(config, dict):
        return
    for key, value in config.items():
        if key not in _QUANTIZATION_KEYS:
            yield from _quantizations(value)
        elif isinstance(value, dict) and value:
            yield value


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
