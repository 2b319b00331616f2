"""Layouts of one layer's experts in a Hugging Face checkpoint: to rows and back.

Two layouts exist: *per expert* (one tensor per projection of each expert) and *fused* (one 3-D
tensor over all experts, gate and up in one). Fused tensors may be transposed or interleaved.

Legend: E experts, I rows, H hidden.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from resmoe_dist.design_matrix import ExpertShape, from_rows
from resmoe_dist.errors import UserError
from resmoe_dist.families.sites import ExpertSite

# Names of an expert's projections across families.
_PROJECTION_NAMES = {
    "gate": ("gate_proj", "w1"),
    "up": ("up_proj", "w3"),
    "down": ("down_proj", "w2"),
    "in": ("wi", "up_proj", "w1"),
    "out": ("wo", "down_proj", "w2"),
}
_PER_EXPERT = re.compile(
    r"^(?P<module>.+\.experts)\.(?P<prefix>expert_)?(?P<expert>\d+)\.(?P<projection>\w+)\.(?P<kind>weight|bias)$"
)
_FUSED = re.compile(r"^(?P<module>.+\.experts)\.(?P<name>(gate_up|up|down)_proj(_bias)?)$")

_EXPERT = "{expert}"

# fetch(name, expert, start, stop) reads rows [start, stop) of one tensor, or of its slice `expert`
# along the first dimension.
Fetch = Callable[[str, "int | None", int, int], Tensor]

# Entries to read at a time (8 MiB in bfloat16), so that a tensor is never held twice.
BLOCK_ENTRIES = 1 << 22


class _Part(NamedTuple):
    """Rows of a stored tensor, and the view of a design matrix that they fill.

    Stored rows from `first` on fill `target`; `rows` of them fill one element of its first
    dimension.
    """

    name: str
    target: Tensor
    first: int = 0
    rows: int = 1


class ExpertStorage(BaseModel):
    """Tensor names and layout of one layer's experts.

    tensors: tensor names by key. Per-expert names contain `{expert}`, with the keys of `to_rows`.
    Fused tensors have the keys `inputs`, `output`, `inputs_bias` and `output_bias`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tensors: dict[str, str]
    fused: bool
    transposed: bool = False
    interleaved: bool = False

    def names(self, num_experts: int) -> list[str]:
        """All tensor names, of all experts."""
        if self.fused:
            return list(self.tensors.values())
        return [_named(name, k) for k in range(num_experts) for name in self.tensors.values()]

    def expected_shapes(self, shape: ExpertShape, num_experts: int) -> dict[str, tuple[int, ...]]:
        """The shape every tensor of this layer must have, by name."""
        width = len(shape.inputs) * shape.rows
        if not self.fused:
            per_expert: dict[str, tuple[int, ...]] = {shape.output: (shape.hidden, shape.rows)}
            for name in shape.inputs:
                per_expert[name] = (shape.rows, shape.hidden)
                per_expert[f"{name}_bias"] = (shape.rows,)
            per_expert[f"{shape.output}_bias"] = (shape.hidden,)
            return {
                _named(name, k): per_expert[key]
                for k in range(num_experts)
                for key, name in self.tensors.items()
            }
        fused: dict[str, tuple[int, ...]] = {
            "inputs": (width, shape.hidden),
            "output": (shape.hidden, shape.rows),
        }
        if self.transposed:
            fused = {key: dims[::-1] for key, dims in fused.items()}
        fused |= {"inputs_bias": (width,), "output_bias": (shape.hidden,)}
        return {name: (num_experts, *fused[key]) for key, name in self.tensors.items()}

    def read_into(
        self,
        shape: ExpertShape,
        expert: int,
        fetch: Fetch,
        out_ID: Tensor,
        block_entries: int = BLOCK_ENTRIES,
    ) -> Tensor | None:
        """Fill out_ID [I, D] with the design matrix of one expert, cast to its dtype.

        block_entries: how many entries to read at a time. Returns the output bias [H] as stored,
        or None.
        """
        index = expert if self.fused else None
        for name, target, first, rows in self._parts(shape, out_ID):
            fetch_rows = partial(fetch, _named(name, expert), index)
            copy_in_blocks(target, fetch_rows, first, rows, block_entries=block_entries)
        bias = self.tensors.get("output_bias" if self.fused else f"{shape.output}_bias")
        return None if bias is None else fetch(_named(bias, expert), index, 0, shape.hidden)

    def _parts(self, shape: ExpertShape, out_ID: Tensor) -> list[_Part]:
        """The stored rows of one expert, except the output bias, and their places in out_ID."""
        views = from_rows(shape, out_ID)
        if not self.fused:
            return [_Part(self.tensors[key], view) for key, view in views.items()]
        output = views[shape.output].T if self.transposed else views[shape.output]
        parts = [_Part(self.tensors["output"], output)]
        G, H = len(shape.inputs), shape.hidden
        inputs_IGH = out_ID[:, : G * H].unflatten(1, (G, H))
        if self.transposed:
            order = (2, 0, 1) if self.interleaved else (2, 1, 0)
            parts.append(_Part(self.tensors["inputs"], inputs_IGH.permute(order)))
        else:
            parts += self._rows_of_inputs("inputs", inputs_IGH)
        if shape.row_bias:
            parts += self._rows_of_inputs("inputs_bias", out_ID[:, (G + 1) * H :])
        return parts

    def _rows_of_inputs(self, key: str, target_IG: Tensor) -> list[_Part]:
        """Stored rows of G projections, consecutive or interleaved. target_IG: [I, G, …]."""
        name, (rows, count) = self.tensors[key], target_IG.shape[:2]
        if self.interleaved:
            return [_Part(name, target_IG, rows=count)]
        return [_Part(name, target_IG[:, g], first=g * rows) for g in range(count)]

    def write(
        self, shape: ExpertShape, experts: Iterable[tuple[Tensor, Tensor | None]]
    ) -> dict[str, Tensor]:
        """All tensors of a layer by name, from its experts' design matrices and output biases."""
        if not self.fused:
            written = {}
            for k, (matrix_ID, output_bias) in enumerate(experts):
                projections = from_rows(shape, matrix_ID)
                if output_bias is not None:
                    projections[f"{shape.output}_bias"] = output_bias
                for key, name in self.tensors.items():
                    written[_named(name, k)] = projections[key].contiguous()
            return written
        stacked: dict[str, list[Tensor]] = {key: [] for key in self.tensors}
        for matrix_ID, output_bias in experts:
            projections = from_rows(shape, matrix_ID)
            inputs = self._join([projections[name] for name in shape.inputs])
            output = projections[shape.output]
            stacked["inputs"].append(inputs.T if self.transposed else inputs)
            stacked["output"].append(output.T if self.transposed else output)
            if shape.row_bias:
                stacked["inputs_bias"].append(
                    self._join([projections[f"{name}_bias"] for name in shape.inputs])
                )
            if output_bias is not None:
                stacked["output_bias"].append(output_bias)
        return {name: torch.stack(stacked[key]) for key, name in self.tensors.items()}

    def _join(self, parts: list[Tensor]) -> Tensor:
        """Rows of several projections in the order in which they are stored."""
        return torch.stack(parts, 1).flatten(0, 1) if self.interleaved else torch.cat(parts)


def copy_in_blocks(
    target: Tensor,
    fetch_rows: Callable[[int, int], Tensor],
    first: int = 0,
    rows: int = 1,
    *,
    block_entries: int = BLOCK_ENTRIES,
) -> None:
    """Copy stored rows into a tensor, about `block_entries` entries at a time.

    fetch_rows(start, stop) reads stored rows [start, stop), of which `rows` make one element of
    target's first dimension; the first element begins at row `first`.
    """
    step = max(1, block_entries // max(target[:1].numel(), 1))
    for start in range(0, target.shape[0], step):
        part = target[start : start + step]
        begin, end = (first + k * rows for k in (start, start + part.shape[0]))
        # Unnamed, so that it is freed before the next rows are read.
        part.copy_(fetch_rows(begin, end).reshape(part.shape))


def find_storage(site: ExpertSite, names: Iterable[str]) -> ExpertStorage:
    """How the tensors `names` (all of one layer's experts) are laid out.

    Raises UserError if a projection is missing or the layout is unknown.
    """
    shape = site.shape
    tensors: dict[str, str] = {}
    fused = False
    for name in sorted(names):
        if match := _PER_EXPERT.match(name):
            ending = f"{match['projection']}.{match['kind']}"
            key = _projection(shape, match["projection"])
            key += "_bias" if match["kind"] == "bias" else ""
            tensors[key] = f"{match['module']}.{match['prefix'] or ''}{_EXPERT}.{ending}"
        elif match := _FUSED.match(name):
            fused = True
            key = "output" if match["name"].startswith("down") else "inputs"
            tensors[key + ("_bias" if match["name"].endswith("_bias") else "")] = name
    wanted = ["inputs", "output"] if fused else [*shape.inputs, shape.output]
    if shape.row_bias:
        wanted += [f"{key}_bias" for key in wanted]
    missing = [key for key in wanted if key not in tensors]
    if missing or len(tensors) != len(wanted):
        raise UserError(
            f"{site.module}: found expert tensors {sorted(tensors) or 'of no known name'}, "
            f"expected {wanted}; the checkpoint does not fit its config.json or its layout is not "
            "supported"
        )
    return ExpertStorage(
        tensors=tensors,
        fused=fused,
        transposed=fused and site.transposed,
        interleaved=fused and site.interleaved,
    )


def expert_module_of(name: str) -> str | None:
    """The experts module that a checkpoint tensor belongs to; None for other tensors."""
    match = _PER_EXPERT.match(name) or _FUSED.match(name)
    return match["module"] if match else None


def _named(name: str, expert: int) -> str:
    return name.replace(_EXPERT, str(expert))


def _projection(shape: ExpertShape, name: str) -> str:
    for key in (*shape.inputs, shape.output):
        if name in _PROJECTION_NAMES[key]:
            return key
    return name
