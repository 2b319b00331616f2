"""Counts what goes through PyTorch's communication library: collectives, and bytes on the wire.

The count is made where all libraries meet, at the operators `c10d` and `_c10d_functional`:
`deepspeed.comm`, `torch.distributed`, functional collectives and DTensor end there.

Bytes on the wire are those that leave a rank for others, with P ranks in the group:

    all-to-all       what it gives, without the part that it keeps
    all-gather       what it gives, P - 1 times
    reduce-scatter   what it gives, without its own part
    all-reduce       2 (P - 1) / P of the tensor: a ring, the least that a good algorithm sends
    broadcast, send  what it gives (broadcast: shared among the P ranks, (P - 1) / P each)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_SPACES = ("c10d", "_c10d_functional")
# Operators with a group that send no tensor.
_SILENT = ("barrier", "monitored_barrier_", "recv_", "recv_any_source_", "irecv")


class Message(NamedTuple):
    """One collective: its operator, the ranks of its group, and the bytes that this rank sends.

    rows, empty_rows: of the matrices that this rank gives, all and those of zeros, its own part
    included. A row is the last dimension.
    """

    operator: str
    ranks: tuple[int, ...]
    bytes: int
    rows: int = 0
    empty_rows: int = 0


class WireCount(TorchDispatchMode):
    """Notes the collectives that this rank takes part in while entered, as `messages`."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[Message] = []

    @property
    def calls(self) -> Counter[str]:
        """How many of each operator."""
        return Counter(message.operator for message in self.messages)

    @property
    def collectives(self) -> int:
        """Calls of all operators."""
        return len(self.messages)

    @property
    def bytes(self) -> int:
        """Sent by this rank to others."""
        return sum(message.bytes for message in self.messages)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in _SPACES:
            name = func._schema.name.split("::")[-1]
            names = [argument.name for argument in func._schema.arguments]
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            if name not in _SILENT and ("process_group" in given or "group_name" in given):
                ranks = torch.distributed.get_process_group_ranks(_group_of(given))
                # Before the call, which may change what it is given.
                rows = count_rows(given_tensors(given))
                self.messages.append(Message(name, tuple(ranks), sent_bytes(name, given), *rows))
        return func(*args, **(kwargs or {}))


def sent_bytes(operator: str, given: dict[str, Any]) -> int:
    """Bytes that one collective sends from this rank to others.

    given: the operator's arguments by name. Raises ValueError for an operator without a rule.
    """
    group = _group_of(given)
    ranks, rank = group.size(), group.rank()
    tensors = given_tensors(given)
    size = sum(tensor.nbytes for tensor in tensors)
    kind = operator.replace("_", "")
    if kind.startswith("alltoall"):
        if "input_tensors" in given:
            return size - tensors[rank].nbytes
        sizes = given["input_split_sizes"]
        if not sizes:
            return size * (ranks - 1) // ranks
        rows = sum(sizes)
        return size * (rows - sizes[rank]) // rows if rows else 0
    if kind.startswith("allgather"):
        return size * (ranks - 1)
    if kind.startswith(("reducescatter", "broadcast")):
        return size * (ranks - 1) // ranks
    if kind.startswith("allreduce"):
        return 2 * size * (ranks - 1) // ranks
    if kind in ("send", "isend"):
        return size
    raise ValueError(f"no rule for the bytes of {operator}")


def given_tensors(given: dict[str, Any]) -> list[Tensor]:
    """What a rank gives to a collective. given: the operator's arguments by name."""
    sources = ("inputs", "input", "input_tensors", "input_tensor", "input_list", "tensors")
    return list(_tensors(next(given[name] for name in sources if name in given)))


def count_rows(tensors: Sequence[Tensor]) -> tuple[int, int]:
    """Rows of the tensors that have two dimensions or more, and how many of them are zero."""
    matrices = [tensor.flatten(0, -2) for tensor in tensors if tensor.dim() > 1]
    rows = sum(map(len, matrices))
    return rows, rows - sum(int((matrix != 0).any(1).sum()) for matrix in matrices)


def _group_of(given: dict[str, Any]) -> torch.distributed.ProcessGroup:
    if "process_group" in given:
        return torch.distributed.ProcessGroup.unbox(given["process_group"])
    group = given["group_name"]
    if isinstance(group, str):
        return torch.distributed.distributed_c10d._resolve_process_group(group)
    return group


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of an argument: one, a list, or lists of lists."""
    if isinstance(value, Tensor):
        yield value
    else:
        for each in value:
            yield from _tensors(each)
