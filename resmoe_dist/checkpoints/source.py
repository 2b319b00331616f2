"""A source model on disk: which tensors are experts, and reading them one expert at a time."""

from __future__ import annotations

import hashlib
import re
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from resmoe_dist.checkpoints.format import is_compressed
from resmoe_dist.checkpoints.fp8 import DEQUANTIZED, SCALE_SUFFIX, blocks_of, find_scaled
from resmoe_dist.checkpoints.model_folder import ModelFiles
from resmoe_dist.errors import UserError
from resmoe_dist.families.models import load_config, meta_model
from resmoe_dist.families.sites import ExpertSite, find_expert_sites
from resmoe_dist.families.storage import (
    BLOCK_ENTRIES,
    ExpertStorage,
    copy_in_blocks,
    expert_module_of,
    find_storage,
)

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class SourceCheckpoint:
    """A model to compress.

    sites: its expert modules, in order. storages: how the tensors of each are laid out on disk.
    other_names: all tensors that do not belong to experts. Only headers are read until a tensor is
    asked for. Float8 weights are read as bfloat16 with their scales applied; the scales are not
    listed as tensors. block_entries: how many entries of an expert to read at a time.

    Raises UserError for a model without experts, a damaged or incomplete checkpoint, tensors that
    do not fit the config, or an unsupported dtype or quantisation.
    """

    def __init__(self, folder: Path, *, block_entries: int = BLOCK_ENTRIES) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give a Hugging Face model folder")
        self.folder = folder
        self._block_entries = block_entries
        self.config = load_config(str(folder))
        if is_compressed(folder):
            raise UserError(f"{folder}: compressed already; give the model it was made from")
        self._blocks = blocks_of(folder, getattr(self.config, "quantization_config", None))
        self.sites = find_expert_sites(meta_model(self.config))
        if not self.sites:
            raise UserError(
                f"{folder}: a {self.config.model_type!r} model has no experts to compress; give a "
                "Mixture-of-Experts model"
            )
        self.files = ModelFiles(folder)
        self._scaled = find_scaled(self.files, self._blocks)
        names_of, self.other_names = self._sort_tensors()
        self.storages: list[ExpertStorage] = []
        for site in self.sites:
            storage = find_storage(site, names_of[site.module])
            self._check(site, storage, names_of[site.module])
            self.storages.append(storage)

    def dtype(self, layer: int) -> torch.dtype:
        """Dtype in which a layer's experts are read."""
        storage, site = self.storages[layer], self.sites[layer]
        return _DTYPES[self._dtype_name(storage.names(site.num_experts)[0])]

    def fingerprint(self) -> str:
        """A hex digest of the source: config, file sizes, headers, and a sample of the values.

        It does not depend on where the folder is. A different model of the same shape has a
        different digest, but a few changed values may go unnoticed: reading all of them would take
        as long as a run.
        """
        digest = hashlib.sha256()
        parts = [(self.folder / "config.json").read_bytes()]
        for name in sorted(set(self.files.locations.values())):
            file = self.files.file(name)
            size = file.path.stat().st_size
            parts += [name.encode(), str(size).encode(), file.header(), file.glimpse()]
        for part in parts:
            digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()

    def read_expert(self, layer: int, expert: int) -> tuple[Tensor, Tensor | None]:
        """Design matrix [I, D] of one expert, rows as stored, and its output bias [H] if any.

        Raises UserError, naming the tensor, if a value is NaN or infinite.
        """
        shape = self.sites[layer].shape
        matrix_ID = torch.empty(shape.rows, shape.columns, dtype=self.dtype(layer))
        return matrix_ID, self.read_expert_into(layer, expert, matrix_ID)

    def read_expert_into(self, layer: int, expert: int, out_ID: Tensor) -> Tensor | None:
        """Like `read_expert`, into a matrix of any float dtype, with a few MiB of extra memory.

        out_ID: [I, D], filled. Returns the output bias [H] as stored, if any.
        """
        shape = self.sites[layer].shape
        assert out_ID.shape == (shape.rows, shape.columns)
        return self.storages[layer].read_into(
            shape, expert, self._fetch, out_ID, self._block_entries
        )

    def read_other(self, name: str) -> Tensor:
        """A tensor that does not belong to an expert, checked as in `read_expert`."""
        file = self.files.holding(name)
        if name not in self._scaled:
            tensor = file.read(name)
            self._check_finite(name, None, tensor)
            return tensor
        tensor = torch.empty(file.shape(name), dtype=_DTYPES[DEQUANTIZED])
        if tensor.dim() == 2:
            self._copy(name, None, tensor)
        else:
            for k, target in enumerate(tensor):
                self._copy(name, k, target)
        return tensor

    def _copy(self, name: str, expert: int | None, target: Tensor) -> None:
        copy_in_blocks(
            target, partial(self._fetch, name, expert), block_entries=self._block_entries
        )

    def _fetch(self, name: str, expert: int | None, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, or of its slice `expert`, as plain finite floats."""
        rows = self._read_rows(name, expert, start, stop)
        if name in self._scaled:
            blocks, scale_name = self._blocks, name + SCALE_SUFFIX
            assert blocks is not None
            begin, end = start // blocks.rows, -(-stop // blocks.rows)
            scale = self._read_rows(scale_name, expert, begin, end).float()
            self._check_finite(scale_name, expert, scale)
            rows = blocks.dequantize(rows, scale, start - begin * blocks.rows)
        self._check_finite(name, expert, rows)
        return rows

    def _read_rows(self, name: str, expert: int | None, start: int, stop: int) -> Tensor:
        file = self.files.holding(name)
        if expert is None:
            return file.read(name, start, stop)
        return file.read_index(name, expert, start, stop)

    def _check_finite(self, name: str, expert: int | None, tensor: Tensor) -> None:
        if tensor.dtype not in _DTYPES.values() or not tensor.numel():
            return
        # NaN propagates through min and max. torch.isfinite would make three copies.
        least, largest = torch.aminmax(tensor)
        if not (torch.isfinite(least) and torch.isfinite(largest)):
            where = name if expert is None else f"{name}[{expert}]"
            raise UserError(
                f"{self.files.holding(name).path}: tensor {where!r} holds NaN or infinite values; "
                "the source checkpoint is damaged or was saved from a diverged run"
            )

    def _dtype_name(self, name: str) -> str:
        """Safetensors' name of the dtype in which a tensor is read."""
        return DEQUANTIZED if name in self._scaled else self.files.holding(name).dtype(name)

    def _sort_tensors(self) -> tuple[dict[str, list[str]], list[str]]:
        """The tensor names of each expert module, and all other names."""
        site_of = {_block(site.module): site.module for site in self.sites}
        names_of: dict[str, list[str]] = {site.module: [] for site in self.sites}
        others = []
        scales = {name + SCALE_SUFFIX for name in self._scaled}
        for name in self.files.locations:
            if name in scales:
                continue
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
            found_dtype = self._dtype_name(name)
            if found_dtype not in _DTYPES:
                raise UserError(
                    f"{file.path}: tensor {name!r} is stored as {found_dtype}; supported are "
                    f"{', '.join(_DTYPES)}"
                )
            dtype = dtype or found_dtype
            if found_dtype != dtype:
                raise UserError(
                    f"{file.path}: tensor {name!r} is stored as {found_dtype}, others of "
                    f"{site.module} as {dtype}; convert them to one dtype"
                )


def _block(module: str) -> str:
    """A module's name up to its last number: `model.layers.3.mlp.experts` -> `model.layers.3`.

    The block between layer and experts may have another name in the checkpoint than in the model
    (Mixtral: `block_sparse_moe` and `mlp`), so the layer identifies the module.
    """
    match = re.match(r"^(.*\.\d+)\.", module)
    return match[1] if match else module
