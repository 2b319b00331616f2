"""A source model on disk: which tensors are experts, and reading them one expert at a time."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from torch import Tensor

from resmoe_dist.checkpoints.compressed import is_compressed
from resmoe_dist.checkpoints.expert_storage import ExpertStorage, expert_module_of, find_storage
from resmoe_dist.checkpoints.families import ExpertSite, find_expert_sites, load_config, meta_model
from resmoe_dist.checkpoints.model_folder import SHARD_INDEX, SINGLE_FILE
from resmoe_dist.checkpoints.tensor_files import TensorFile
from resmoe_dist.errors import UserError

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class ModelFiles:
    """The safetensors files of a Hugging Face folder: `model.safetensors`, or shards and an index.

    locations: tensor name -> file name. Raises UserError for a folder without safetensors weights,
    an index that names a file outside the folder, or a shard that is missing.
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
        """The file that a tensor lies in."""
        return self.file(self.locations[tensor])


class SourceCheckpoint:
    """A model to compress.

    sites: its expert modules, in order; storages: how each one's tensors are laid out on disk;
    other_names: every tensor that is no expert's. Nothing is read but headers until asked for.

    Raises UserError for a model without experts, a damaged or incomplete checkpoint, tensors that
    do not fit the config, or a dtype that is not supported.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give a Hugging Face model folder")
        self.folder = folder
        self.config = load_config(str(folder))
        if is_compressed(folder):
            raise UserError(f"{folder}: compressed already; give the model it was made from")
        if getattr(self.config, "quantization_config", None):
            raise UserError(
                f"{folder}: the model is quantised already; compress the unquantised checkpoint"
            )
        self.sites = find_expert_sites(meta_model(self.config))
        if not self.sites:
            raise UserError(
                f"{folder}: a {self.config.model_type!r} model has no experts to compress; give a "
                "Mixture-of-Experts model"
            )
        self.files = ModelFiles(folder)
        names_of, self.other_names = self._sort_tensors()
        self.storages: list[ExpertStorage] = []
        for site in self.sites:
            storage = find_storage(site, names_of[site.module])
            self._check(site, storage, names_of[site.module])
            self.storages.append(storage)

    def dtype(self, layer: int) -> torch.dtype:
        """Dtype in which a layer's experts are stored."""
        storage, site = self.storages[layer], self.sites[layer]
        name = storage.names(site.num_experts)[0]
        return _DTYPES[self.files.holding(name).dtype(name)]

    def read_expert(self, layer: int, expert: int) -> tuple[Tensor, Tensor | None]:
        """Design matrix [I, D] of one expert, rows as stored, and its output bias [H] if any.

        Raises UserError, with the tensor's name, where a value is NaN or infinite.
        """
        return self.storages[layer].read(self.sites[layer].shape, expert, self._fetch)

    def read_other(self, name: str) -> Tensor:
        """A tensor that is no expert's; checked as `read_expert` does."""
        return self._fetch(name, None)

    def _fetch(self, name: str, expert: int | None) -> Tensor:
        file = self.files.holding(name)
        tensor = file.read(name) if expert is None else file.read_index(name, expert)
        if tensor.dtype in _DTYPES.values() and not torch.isfinite(tensor).all():
            where = name if expert is None else f"{name}[{expert}]"
            raise UserError(
                f"{file.path}: tensor {where!r} holds NaN or infinite values; the source "
                "checkpoint is damaged or was saved from a diverged run"
            )
        return tensor

    def _sort_tensors(self) -> tuple[dict[str, list[str]], list[str]]:
        """Tensor names of each expert module, and all the others."""
        site_of = {_block(site.module): site.module for site in self.sites}
        names_of: dict[str, list[str]] = {site.module: [] for site in self.sites}
        others = []
        for name in self.files.locations:
            module = expert_module_of(name)
            site = None if module is None else site_of.get(_block(module))
            if site is None:
                others.append(name)
            else:
                names_of[site].append(name)
        return names_of, others

    def _check(self, site: ExpertSite, storage: ExpertStorage, found: list[str]) -> None:
        expected = storage.expected_shapes(site.shape, site.num_experts)
        if surplus := sorted(set(found) - expected.keys()):
            raise UserError(
                f"{self.folder}: tensor {surplus[0]!r} has no place in {site.module}, which has "
                f"{site.num_experts} experts by config.json"
            )
        dtype = None
        for name, shape in expected.items():
            if name not in self.files.locations:
                raise UserError(f"{self.folder}: tensor {name!r} is missing; fetch the model again")
            file = self.files.holding(name)
            if file.shape(name) != shape:
                raise UserError(
                    f"{file.path}: tensor {name!r} has shape {list(file.shape(name))}, "
                    f"config.json asks for {list(shape)}"
                )
            if file.dtype(name) not in _DTYPES:
                raise UserError(
                    f"{file.path}: tensor {name!r} is stored as {file.dtype(name)}; supported are "
                    f"{', '.join(_DTYPES)}"
                )
            dtype = dtype or file.dtype(name)
            if file.dtype(name) != dtype:
                raise UserError(
                    f"{file.path}: tensor {name!r} is stored as {file.dtype(name)}, others of "
                    f"{site.module} as {dtype}; convert them to one dtype"
                )


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, as the index of a sharded model says."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not a safetensors index ({error}); fetch it again") from error
    for name in files:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
            raise UserError(f"{index}: {name!r} is not a plain file name")
    return weight_map


def _block(module: str) -> str:
    """A module's name up to its last number: `model.layers.3.mlp.experts` -> `model.layers.3`.

    Checkpoints may call the block between layer and experts otherwise than the model does (Mixtral:
    `block_sparse_moe`, in the model `mlp`); the layer is what identifies it.
    """
    match = re.match(r"^(.*\.\d+)\.", module)
    return match[1] if match else module
