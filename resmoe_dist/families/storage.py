"""Layouts of one layer's experts, in a model or in a checkpoint: to rows and back.

Two layouts exist: *per expert* (one tensor per projection of each expert) and *fused* (one tensor
over all experts). A tensor may hold one projection, or gate and up together. It may be transposed;
gate and up may be interleaved.

Legend: E experts, G input projections, I rows, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from resmoe_dist.design_matrix import ExpertShape, from_rows

EXPERT = "{expert}"
INPUTS, OUTPUT, BIAS = "inputs", "output", "_bias"

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

    target: Tensor
    first: int = 0
    rows: int = 1


class ExpertStorage(BaseModel):
    """Tensor names and layout of one layer's experts.

    tensors: tensor names by key. A key is a projection (`gate`, `up`, `down`; `in`, `out`),
    `inputs` (all input projections in one tensor) or `output` (the last projection), and has
    `_bias` at its end for a bias. Names of per-expert tensors contain `{expert}`.

    fused: tensors cover all experts, along a first dimension, or one below the other (`stacked`).
    transposed: [in, out] rather than [out, in]; `output_transposed` is the same for the output
    projection, None if it does not differ. interleaved: gate and up rows alternate in `inputs`.
    first_expert: the number that the first expert has in the names of per-expert tensors.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tensors: dict[str, str]
    fused: bool
    transposed: bool = False
    output_transposed: bool | None = None
    interleaved: bool = False
    stacked: bool = False
    first_expert: int = 0

    def name(self, key: str, expert: int) -> str:
        """The tensor that holds a key of one expert."""
        return self.tensors[key].replace(EXPERT, str(expert + self.first_expert))

    def names(self, num_experts: int) -> list[str]:
        """All tensor names, of all experts."""
        if self.fused:
            return list(self.tensors.values())
        return [self.name(key, k) for k in range(num_experts) for key in self.tensors]

    def expected_shapes(self, shape: ExpertShape, num_experts: int) -> dict[str, tuple[int, ...]]:
        """The shape every tensor of this layer must have, by name."""
        found: dict[str, tuple[int, ...]] = {}
        for key in self.tensors:
            dims = self.expert_shape(shape, key)
            if self.fused:
                stacked = (num_experts * dims[0], *dims[1:])
                found[self.tensors[key]] = stacked if self.stacked else (num_experts, *dims)
            else:
                found |= {self.name(key, k): dims for k in range(num_experts)}
        return found

    def expert_shape(self, shape: ExpertShape, key: str) -> tuple[int, ...]:
        """The shape of one expert's part of the tensor of a key."""
        projection = key.removesuffix(BIAS)
        if is_output(shape, projection):
            dims: tuple[int, ...] = (shape.hidden, shape.rows)
        else:
            count = len(shape.inputs) if projection == INPUTS else 1
            dims = (count * shape.rows, shape.hidden)
        if projection != key:
            return dims[:1]
        return dims[::-1] if self.is_transposed(shape, key) else dims

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
        index = expert if self.fused and not self.stacked else None
        bias = None
        for key in self.tensors:
            name, skipped = self.name(key, expert), 0
            if self.stacked:
                skipped = expert * self.expert_shape(shape, key)[0]
            if key.endswith(BIAS) and is_output(shape, key.removesuffix(BIAS)):
                bias = fetch(name, index, skipped, skipped + shape.hidden)
                continue
            fetch_rows = partial(fetch, name, index)
            for target, first, rows in self._parts(shape, key, out_ID):
                copy_in_blocks(
                    target, fetch_rows, skipped + first, rows, block_entries=block_entries
                )
        return bias

    def _parts(self, shape: ExpertShape, key: str, out_ID: Tensor) -> Iterator[_Part]:
        """The rows of one expert's part of a tensor, and their places in out_ID."""
        projection = key.removesuffix(BIAS)
        if projection == INPUTS:
            G, H = len(shape.inputs), shape.hidden
            if key != projection:
                target_IG = out_ID[:, (G + 1) * H :]
            else:
                target_IG = out_ID[:, : G * H].unflatten(1, (G, H))
            if self.is_transposed(shape, key):
                yield _Part(target_IG.permute((2, 0, 1) if self.interleaved else (2, 1, 0)))
            elif self.interleaved:
                yield _Part(target_IG, rows=G)
            else:
                for g in range(G):
                    yield _Part(target_IG[:, g], first=g * shape.rows)
            return
        views = from_rows(shape, out_ID)
        view = views[shape.output if projection == OUTPUT else key]
        yield _Part(view.T if self.is_transposed(shape, key) else view)

    def write(
        self, shape: ExpertShape, experts: Iterable[tuple[Tensor, Tensor | None]]
    ) -> dict[str, Tensor]:
        """All tensors of a layer by name, from its experts' design matrices and output biases."""
        written: dict[str, Tensor] = {}
        gathered: dict[str, list[Tensor]] = {key: [] for key in self.tensors}
        for k, (matrix_ID, output_bias) in enumerate(experts):
            projections = from_rows(shape, matrix_ID)
            if output_bias is not None:
                projections[f"{shape.output}{BIAS}"] = output_bias
            for key, tensors in gathered.items():
                tensor = self._tensor(shape, key, projections)
                if self.fused:
                    tensors.append(tensor)
                else:
                    written[self.name(key, k)] = tensor.contiguous()
        if not self.fused:
            return written
        join = torch.cat if self.stacked else torch.stack
        return {name: join(gathered[key]) for key, name in self.tensors.items()}

    def _tensor(self, shape: ExpertShape, key: str, projections: dict[str, Tensor]) -> Tensor:
        """One expert's part of the tensor of a key."""
        projection = key.removesuffix(BIAS)
        ending = key.removeprefix(projection)
        if projection == INPUTS:
            parts = [projections[f"{name}{ending}"] for name in shape.inputs]
            tensor = torch.stack(parts, 1).flatten(0, 1) if self.interleaved else torch.cat(parts)
        else:
            name = shape.output if is_output(shape, projection) else projection
            tensor = projections[f"{name}{ending}"]
        return tensor.T if not ending and self.is_transposed(shape, key) else tensor

    def is_transposed(self, shape: ExpertShape, key: str) -> bool:
        """Whether the tensor of a key is [in, out]."""
        if key.endswith(BIAS):
            return False
        if is_output(shape, key) and self.output_transposed is not None:
            return self.output_transposed
        return self.transposed


@dataclass(frozen=True)
class ExpertSite:
    """One module of a model that holds the experts of one layer.

    module: its dotted name. storage: how the module itself lays out its parameters. tied: names of
    further modules that share the same parameters. spare: how many more experts the input
    projections have than the output projection; the model does not use their weights.
    """

    module: str
    num_experts: int
    shape: ExpertShape
    storage: ExpertStorage
    tied: tuple[str, ...] = ()
    spare: int = 0

    @property
    def parameters(self) -> list[str]:
        """The names of the module's parameters."""
        return self.storage.names(self.num_experts)

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of all modules that hold these experts."""
        return (self.module, *self.tied)

    def at(self, module: str) -> ExpertSite:
        """The same experts, found in another of `modules`."""
        tensors = {
            key: module + name.removeprefix(self.module)
            for key, name in self.storage.tensors.items()
        }
        tied = tuple(name for name in self.modules if name != module)
        storage = self.storage.model_copy(update={"tensors": tensors})
        return replace(self, module=module, storage=storage, tied=tied)


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


def is_output(shape: ExpertShape, projection: str) -> bool:
    """Whether a key without `_bias` is that of the output projection."""
    return projection in (OUTPUT, shape.output)
