"""The tasks of a compress run, and the files that record which of them are finished."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from resmoe_dist.checkpoints.entries import RouterEntry
from resmoe_dist.checkpoints.format import group_file_name
from resmoe_dist.checkpoints.tensor_files import TensorFile, read_json, write_json, write_tensors
from resmoe_dist.compression.stages import stage
from resmoe_dist.errors import UserError
from resmoe_dist.jobs.group import CompressedGroup
from resmoe_dist.jobs.model_files import Shard
from resmoe_dist.jobs.staging import StagingFolder
from resmoe_dist.methods import GroupPlan

_RECORD = "resmoe_record"


@dataclass(frozen=True)
class GroupTask:
    """One group of one layer, counted from 0, and its experts' numbers in the layer."""

    layer: int
    group: int
    experts: tuple[int, ...]


class TaskFiles:
    """Where tasks put their results in the staging folder. num_layers: MoE layers of the model."""

    def __init__(self, staging: StagingFolder, num_layers: int) -> None:
        self._staging, self._num_layers = staging, num_layers

    def path(self, task: GroupTask | Shard) -> Path:
        """The file that a task makes."""
        if isinstance(task, Shard):
            return self._staging.model / task.file
        return self._staging.model / group_file_name(task.layer, self._num_layers, task.group)

    def is_finished(self, task: GroupTask | Shard) -> bool:
        """Whether an earlier run made the task's file, and it is whole."""
        if isinstance(task, Shard):
            return is_whole(self.path(task))
        return self.record(task) is not None

    def record(self, task: GroupTask) -> dict[str, Any] | None:
        """The record in the header of a finished group file; None if it is not finished."""
        try:
            return json.loads(TensorFile(self.path(task)).metadata[_RECORD])
        except (UserError, KeyError, ValueError):
            return None

    @stage("write")
    def write_group(self, task: GroupTask, made: CompressedGroup) -> None:
        """Write a group file with its record in the header, atomically."""
        write_tensors(self.path(task), made.tensors, {_RECORD: json.dumps(made.record)})

    def plan(self, task: GroupTask) -> GroupPlan | None:
        """The plan of a group; None if it has not been made."""
        return GroupPlan.load(self._plan_path(task))

    def write_plan(self, task: GroupTask, plan: GroupPlan) -> None:
        """Keep the plan of a group for the other ranks and a resumed run."""
        plan.save(self._plan_path(task))

    def router_entries(self, shard: Shard) -> list[RouterEntry | None] | None:
        """Each layer's entry of its refitted router; None if their file is not finished."""
        try:
            found = read_json(self._routers_path)
            entries = [None if entry is None else RouterEntry(**entry) for entry in found]
        except (UserError, TypeError, ValueError):
            return None
        return entries if is_whole(self.path(shard)) else None

    def write_routers(
        self, shard: Shard, tensors: dict[str, Tensor], entries: Sequence[RouterEntry | None]
    ) -> None:
        """Write the file of all routers, then each layer's entry: both are then finished."""
        write_tensors(self.path(shard), tensors, {})
        write_json(self._routers_path, [entry and entry.model_dump() for entry in entries])

    @property
    def _routers_path(self) -> Path:
        return self._staging.scratch / "routers.json"

    def _plan_path(self, task: GroupTask) -> Path:
        # Groups of different partitions of a layer differ in how many experts they have.
        name = f"plan-{task.layer:05d}-{task.group:05d}-of-{len(task.experts)}.safetensors"
        return self._staging.scratch / name


def is_whole(path: Path) -> bool:
    """Whether a safetensors file was finished by an earlier run."""
    try:
        TensorFile(path)
    except UserError:
        return False
    return True
