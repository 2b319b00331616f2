"""A source model on disk: which tensors are experts, and reading them one expert at a time."""

from __future__ import annotations

import hashlib
import math
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from resmoe_dist.checkpoints.completeness import check_complete, check_experts, check_range
from resmoe_dist.checkpoints.format import is_compressed
from resmoe_dist.checkpoints.fp8 import DEQUANTIZED, SCALE_SUFFIX, blocks_of, find_scaled
from resmoe_dist.checkpoints.model_folder import ModelFiles, quantization_of
from resmoe_dist.checkpoints.tensor_files import largest_magnitude
from resmoe_dist.errors import UserError
from resmoe_dist.families.adapters import adapter_for
from resmoe_dist.families.models import load_config, make_unquantized, meta_model
from resmoe_dist.families.names import ignored_if_unused, map_names
from resmoe_dist.families.sites import find_expert_sites
from resmoe_dist.families.storage import BLOCK_ENTRIES, ExpertStorage, copy_in_blocks
from resmoe_dist.families.stored_experts import find_storage
from resmoe_dist.families.unsupported import no_experts

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class SourceCheckpoint:
    """A model to compress.

    sites: its expert modules, in order. storages: how the tensors of each are laid out on disk.
    other_names: all tensors to copy, which do not belong to experts. unused_names: those that
    transformers does not load; they are copied too unless `drop_unused`. Only headers are read
    until a tensor is asked for. Float8 weights are read as bfloat16 with their scales applied; the
    scales are not listed as tensors. block_entries: how many entries of an expert to read at a
    time.

    Raises UserError for a model without experts, a damaged or incomplete checkpoint, tensors that
    do not fit the config, or an unsupported dtype or quantisation.
    """

    def __init__(
        self, folder: Path, *, drop_unused: bool = False, block_entries: int = BLOCK_ENTRIES
    ) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give a Hugging Face model folder")
        self.folder, self.drop_unused = folder, drop_unused
        self._block_entries = block_entries
        self.config = load_config(str(folder))
        if is_compressed(folder):
            raise UserError(f"{folder}: compressed already; give the model it was made from")
        self._blocks = blocks_of(folder, quantization_of(folder))
        make_unquantized(self.config)
        model = meta_model(self.config)
        self.sites = find_expert_sites(model)
        if not self.sites:
            raise no_experts(str(folder), model)
        self.files = ModelFiles(folder)
        self._scaled = find_scaled(self.files, self._blocks)
        self._served_dtype: torch.dtype | None = None
        self._activations: dict[int, nn.Module] = {}
        self.storages: list[ExpertStorage] = []
        self._sort_tensors(model)

    def dtype(self, layer: int) -> torch.dtype:
        """Dtype in which a layer's experts are read."""
        storage, site = self.storages[layer], self.sites[layer]
        return _DTYPES[self._dtype_name(storage.names(site.num_experts)[0])]

    def activation(self, layer: int) -> nn.Module:
        """What lies between the projections of a layer's experts."""
        if layer not in self._activations:
            module = self._meta_model.get_submodule(self.sites[layer].module)
            adapter = adapter_for(module)
            assert adapter is not None, "a site has an adapter"
            self._activations[layer] = adapter.activation(module)
        return self._activations[layer]

    @cached_property
    def _meta_model(self) -> PreTrainedModel:
        """The model without weights, whose modules give activations. Building it takes seconds."""
        return meta_model(self.config)

    def unused_line(self) -> str | None:
        """One line about the tensors that transformers does not load; None if it loads all."""
        if not self.unused_names:
            return None
        experts = [name for name in self.unused_names if ".experts." in name]
        size = sum(self.files.holding(name).size(name) for name in self.unused_names)
        fate = "left out" if self.drop_unused else "copied as they are; --drop-unused drops them"
        return (
            f"{self.folder}: {len(self.unused_names)} tensors ({size / 2**20:.1f} MiB, "
            f"{len(experts)} of experts) are not used by transformers, such as "
            f"{(experts or self.unused_names)[0]!r}: {fate}"
        )

    def serve_as(self, dtype: torch.dtype | None) -> None:
        """From now on, refuse values beyond the range of the dtype the model will be loaded in.

        Modules that transformers keeps in float32 are exempt. None: the config's dtype.
        """
        self._served_dtype = dtype or self.config.dtype or self.config.get_text_config().dtype

    @property
    def may_overflow(self) -> bool:
        """Whether tensors outside the experts are stored in a wider range than they are served."""
        names = () if self._served_dtype is not torch.float16 else self.other_names
        return any(self._dtype_name(name) in ("F64", "F32", "BF16") for name in names)

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
        largest = largest_magnitude(tensor)
        if not math.isfinite(largest):
            where = name if expert is None else f"{name}[{expert}]"
            raise UserError(
                f"{self.files.holding(name).path}: tensor {where!r} holds NaN or infinite values; "
                "the source checkpoint is damaged or was saved from a diverged run"
            )
        bound = self._served_dtype
        if bound is not None and name not in self._kept_in_float32:
            check_range(self.files.holding(name).path, name, largest, bound)

    def _dtype_name(self, name: str) -> str:
        """Safetensors' name of the dtype in which a tensor is read."""
        return DEQUANTIZED if name in self._scaled else self.files.holding(name).dtype(name)

    def _sort_tensors(self, model: PreTrainedModel) -> None:
        """Find the tensors of each site, all others, and whether any is missing."""
        scales = {name + SCALE_SUFFIX for name in self._scaled}
        shapes = {
            name: self.files.holding(name).shape(name)
            for name in self.files.locations
            if name not in scales
        }
        try:
            stored = map_names(model, shapes)
        except ValueError as error:  # transformers reads numbers in names
            raise UserError(f"{self.folder}: names of tensors are damaged ({error})") from error
        self.sites = [found for site in self.sites for found in stored.sites_of(site)]
        of_experts: set[str] = set()
        for site in self.sites:
            storage = find_storage(site, stored, shapes)
            expected = storage.expected_shapes(site.shape, site.num_experts)
            check_experts(self.files, site, expected, self._dtype_name, tuple(_DTYPES))
            of_experts |= expected.keys()
            self.storages.append(storage)
        # The weights of spare experts are copied with the other tensors.
        parameters = [name for site in self.sites if not site.spare for name in site.parameters]
        if surplus := sorted(stored.names_of(parameters) - of_experts):
            raise UserError(
                f"{self.folder}: tensor {surplus[0]!r} has no place in {self.sites[0].module} or "
                f"its like, which has {self.sites[0].num_experts} experts by config.json"
            )
        check_complete(self.files, model, stored, shapes, of_experts, self._dtype_name)
        kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
        self._kept_in_float32 = (
            stored.names_of(n for n in stored.sources if not kept.isdisjoint(n.split(".")))
            - of_experts
        )
        self.unused_names = [n for n in stored.unused if not ignored_if_unused(model, n)]
        unused = set(stored.unused) if self.drop_unused else set()
        self.other_names = [name for name in shapes if name not in of_experts | unused]
