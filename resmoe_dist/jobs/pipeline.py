"""Source checkpoint to compressed checkpoint: one (layer, group) at a time, one file each.

    cluster     where a rank has several centres: which of its experts share one
    plan        where the whole model shares one budget: align, and price each group's entries
    compress    read, align, choose the centre, encode, write

Each phase hands its tasks to the ranks as they become free. The run works in `OUTPUT.partial` (see
`staging`); each file appears there at once, under its final name and with the same bytes whichever
rank made it, and a resumed run keeps those.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from resmoe_dist.checkpoints.compressed import (
    FORMAT_VERSION,
    CheckpointIndex,
    CompressionSettings,
    FileEntry,
    GroupEntry,
    LayerEntry,
    group_file_name,
    read_index,
)
from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.checkpoints.tensor_files import TensorFile, write_tensors
from resmoe_dist.compression.activations import (
    LayerActivations,
    load_activations,
    save_activations,
)
from resmoe_dist.compression.blocks import CPU
from resmoe_dist.compression.budget import allocate_over_model, keep_for
from resmoe_dist.compression.encoding import BALANCED_RUN
from resmoe_dist.errors import UserError
from resmoe_dist.jobs.claims import Claims
from resmoe_dist.jobs.group import GroupCompressor, GroupPlan
from resmoe_dist.jobs.memory_budget import ExpertStore
from resmoe_dist.jobs.model_files import (
    PRODUCER,
    Shard,
    file_entry,
    shards_of,
    write_model_files,
)
from resmoe_dist.jobs.scheduling import Schedule
from resmoe_dist.jobs.staging import StagingFolder
from resmoe_dist.jobs.workers import RetryableError, SingleWorker, Workers, gather_or_raise

_RECORD = "resmoe_record"
_ACTIVATIONS = "activations.safetensors"


def parse_layers(text: str, count: int) -> list[int]:
    """Positions among `count` MoE layers named by `all`, `last:N`, `A-B` (inclusive) or `A,B,…`.

    Raises UserError for anything else, or a position that does not exist.
    """
    if text == "all":
        return list(range(count))
    chosen: Sequence[int]
    if match := re.fullmatch(r"last:(\d+)", text):
        chosen = range(count - int(match[1]), count)
    elif match := re.fullmatch(r"(\d+)-(\d+)", text):
        chosen = range(int(match[1]), int(match[2]) + 1)
    elif re.fullmatch(r"\d+(,\d+)*", text):
        chosen = sorted({int(part) for part in text.split(",")})
    else:
        raise UserError(f"--layers {text}: not understood; write all, last:24, 8-31 or 0,2")
    if not chosen or chosen[0] < 0 or chosen[-1] >= count:
        raise UserError(f"--layers {text}: this model has {count} MoE layers, 0 to {count - 1}")
    return list(chosen)


@dataclass(frozen=True)
class _GroupTask:
    """One group of one layer, counted from 0, and its experts' numbers in the layer."""

    layer: int
    group: int
    experts: tuple[int, ...]


class Compression:
    """One run of `resmoe-dist compress`.

    device: where products and the choice of centres are computed. max_memory: bytes of anonymous
    memory that each rank may take. measure: the activations of each MoE layer, to weigh errors by;
    called on one rank.

    Raises UserError for whatever the user can mend: see `SourceCheckpoint`; settings that do not
    fit the model or each other; an output folder that exists.
    """

    def __init__(
        self,
        source: SourceCheckpoint,
        output: Path,
        settings: CompressionSettings,
        workers: Workers | None = None,
        *,
        device: torch.device = CPU,
        max_memory: int | None = None,
        measure: Callable[[], Sequence[LayerActivations]] | None = None,
    ) -> None:
        self.source, self.output, self._measure = source, output, measure
        self.workers = workers or SingleWorker()
        self._staging = StagingFolder(output)
        _check_settings(source, settings)

        def compressor(settings: CompressionSettings) -> GroupCompressor:
            store = ExpertStore(self._staging.scratch, max_memory)
            return GroupCompressor(source, settings, store, device=device)

        if settings.target_bytes is not None:
            keep = _keep_for_target(source, compressor(settings), settings)
            settings = settings.model_copy(update={"keep": keep})
        self.settings = settings
        self._compressor = compressor(settings)

    def run(self, *, resume: bool = False) -> CheckpointIndex:
        """Compress everything and return the index, on every rank.

        A mistake in the input leaves nothing behind, unless `resume` is set. An interrupted run, or
        one that met a full disk after something was finished, leaves `OUTPUT.partial`, from which
        `resume` continues.
        """
        schedule = None
        try:
            claims = gather_or_raise(self.workers, lambda: self._is_first and self._begin(resume))[
                0
            ]
            if claims is not None:
                schedule = Schedule(self.workers, claims)
                self._compress(schedule, resume)
        except KeyboardInterrupt as interruption:
            # Of ranks that are interrupted together, the one that closes the claims speaks; where
            # a failed rank has closed them, that is what there is to say.
            if self._is_first if schedule is None else schedule.claims.close():
                interruption.args = ("interrupted; continue with --resume",)
            raise
        finally:
            self._staging.release()
        return read_index(self.output)

    @property
    def _is_first(self) -> bool:
        return self.workers.rank == 0

    def _identity(self) -> dict[str, Any]:
        """What a run must have in common with one that it continues."""
        return self.settings.model_dump() | {
            "source": self.source.fingerprint(),
            "producer": f"{PRODUCER}, format {FORMAT_VERSION}",
        }

    def _begin(self, resume: bool) -> Claims | None:
        """Enter the staging folder; None if OUTPUT is complete already."""
        claims = self._staging.acquire(self._identity(), resume=resume)
        if claims is None:
            if not resume:
                raise UserError(f"{self.output}: exists already; remove it or choose another one")
            if read_index(self.output).settings != self.settings:
                raise UserError(
                    f"{self.output}: was made with other options; choose another folder"
                )
        return claims

    def _compress(self, schedule: Schedule, resume: bool) -> None:
        """All phases, then what rank 0 alone writes."""
        try:
            if self._measure is not None:
                self._compressor.activations = self._calibrate(schedule, self._measure)
            tasks = self._group_tasks(schedule)
            keeps = self._shared_out(schedule, tasks)

            def compress(task: _GroupTask | Shard) -> GroupEntry | FileEntry:
                return self._copy(task) if isinstance(task, Shard) else self._do(task, keeps)

            # Copies last: the last tasks are waited for.
            everything = [*tasks, *shards_of(self.source)]
            entries = schedule.run_phase("compressing", everything, compress, self._is_finished)
            gather_or_raise(self.workers, lambda: self._is_first and self._finish(entries))
        except UserError as error:
            # A second run meets the same mistake in the input, but perhaps more room on the disk.
            hindered = isinstance(error, RetryableError)
            keep = hindered or resume
            kept = gather_or_raise(
                self.workers, lambda: self._is_first and self._staging.give_up(keep=keep)
            )[0]
            if kept and hindered:
                raise UserError(
                    f"{error}; finished work is kept, run again with --resume"
                ) from error
            raise

    def _calibrate(
        self, schedule: Schedule, measure: Callable[[], Sequence[LayerActivations]]
    ) -> list[LayerActivations]:
        """Activations of all MoE layers, measured by one rank, or by an earlier run."""
        path, sites = self._staging.scratch / _ACTIVATIONS, self.source.sites

        def calibrate(_: str) -> None:
            if not _is_whole(path):
                save_activations(path, sites, measure())

        schedule.run_phase("calibrating", ["calibration"], calibrate, lambda _: _is_whole(path))
        return load_activations(path, sites)

    def _group_tasks(self, schedule: Schedule) -> list[_GroupTask]:
        """All groups, from the most work to the least."""
        owned = [
            _GroupTask(layer, rank, tuple(range(rank * size, (rank + 1) * size)))
            for layer, site in enumerate(self.source.sites)
            for size in (site.num_experts // self.settings.groups,)
            for rank in range(self.settings.groups)
        ]
        clusters = self.settings.groups_per_rank
        split = [task for task in owned if clusters > 1 and task.layer in self.settings.layers]

        def cluster(task: _GroupTask) -> list[list[int]]:
            return self._compressor.cluster(task.layer, task.experts, clusters)

        found = schedule.run_phase("clustering", split, cluster) if split else {}
        tasks = [
            _GroupTask(task.layer, task.group * len(parts) + i, tuple(experts))
            for task in owned
            for parts in (found.get(task, [task.experts]),)
            for i, experts in enumerate(parts)
        ]
        return sorted(tasks, key=self._work, reverse=True)

    def _work(self, task: _GroupTask) -> tuple[bool, int]:
        """Orders groups by how long they take: dense ones are only copied."""
        entries = len(task.experts) * self.source.sites[task.layer].shape.entries
        return task.layer in self.settings.layers, entries

    def _shared_out(self, schedule: Schedule, tasks: list[_GroupTask]) -> dict[_GroupTask, float]:
        """The share to keep of each group that does not simply keep the settings' share."""
        if self.settings.allocate != "model":
            return {}
        planned = [task for task in tasks if task.layer in self.settings.layers]

        def plan(task: _GroupTask) -> GroupPlan:
            path = self._plan_path(task)
            found = GroupPlan.load(path)
            if found is None:
                found = self._compressor.plan(task.layer, task.experts)
                found.save(path)
            # The alignment is read again where it is needed: not every rank needs all of them.
            return found.without_alignment()

        plans = schedule.run_phase(
            "planning",
            planned,
            plan,
            lambda task: GroupPlan.load(self._plan_path(task)) is not None,
        )
        curves = [plans[task].curve for task in planned]
        budgets = [plans[task].keep * plans[task].curve.values for task in planned]
        return dict(zip(planned, allocate_over_model(curves, budgets), strict=True))

    def _plan_path(self, task: _GroupTask) -> Path:
        name = f"plan-{task.layer:05d}-{task.group:05d}.safetensors"
        return self._staging.scratch / name

    def _path(self, task: _GroupTask | Shard) -> Path:
        if isinstance(task, Shard):
            return self._staging.model / task.file
        name = group_file_name(task.layer, len(self.source.sites), task.group)
        return self._staging.model / name

    def _is_finished(self, task: _GroupTask | Shard) -> bool:
        """Whether an earlier run made the task's file, and it is whole."""
        path = self._path(task)
        return _is_whole(path) if isinstance(task, Shard) else _record_in(path) is not None

    def _copy(self, shard: Shard) -> FileEntry:
        path = self._path(shard)
        if not _is_whole(path):
            write_tensors(path, {n: self.source.read_other(n) for n in shard.names}, {})
        return file_entry(path)

    def _do(self, task: _GroupTask, keeps: dict[_GroupTask, float]) -> GroupEntry:
        path = self._path(task)
        record = _record_in(path)
        if record is None:
            plan = None
            if task in keeps:
                plan = GroupPlan.load(self._plan_path(task))
                assert plan is not None
                plan = replace(plan, keep=keeps[task])
            made = self._compressor.compress(task.layer, task.experts, plan)
            record = made.record
            write_tensors(path, made.tensors, {_RECORD: json.dumps(record)})
        return GroupEntry(file=file_entry(path), **record)

    def _finish(self, entries: dict[_GroupTask | Shard, GroupEntry | FileEntry]) -> None:
        """Index, config and companions; then the folder gets its name."""
        groups = sorted(
            (task for task in entries if isinstance(task, _GroupTask)),
            key=lambda task: (task.layer, task.group),
        )
        layers = [
            LayerEntry(
                module=site.module,
                num_experts=site.num_experts,
                rows=site.shape.rows,
                hidden=site.shape.hidden,
                gated=site.shape.gated,
                row_bias=site.shape.row_bias,
                output_bias=site.shape.output_bias,
                codec=self._compressor.codec(layer).name,
                dtype=str(self._compressor.dtype(layer)).removeprefix("torch."),
                storage=self.source.storages[layer],
                groups=[entries[task] for task in groups if task.layer == layer],
            )
            for layer, site in enumerate(self.source.sites)
        ]
        shards = {shard: entries[shard] for shard in shards_of(self.source)}
        write_model_files(self._staging.model, self.source, self.settings, layers, shards)
        self._staging.finish()


def _check_settings(source: SourceCheckpoint, settings: CompressionSettings) -> None:
    if settings.groups < 1:
        raise UserError(f"--ep {settings.groups}: must be 1 or more")
    if not 0 < settings.keep <= 1:
        raise UserError(f"--keep {settings.keep}: must lie in (0, 1]")
    if settings.allocate in ("block", "model") and settings.codec != "pruned":
        raise UserError(
            f"--allocate {settings.allocate}: needs --codec pruned, not {settings.codec}"
        )
    if settings.allocate == "block" and int(settings.keep * BALANCED_RUN) < 1:
        raise UserError(
            f"--allocate block: --keep {settings.keep} of {BALANCED_RUN} entries is none; "
            f"give {1 / BALANCED_RUN} or more"
        )
    for site in source.sites:
        if site.num_experts % settings.groups:
            raise UserError(
                f"--ep {settings.groups}: {site.module} has {site.num_experts} experts, which "
                f"do not divide into {settings.groups} groups; choose a divisor"
            )
        owned = site.num_experts // settings.groups
        if not 1 <= settings.groups_per_rank <= owned:
            raise UserError(
                f"--groups-per-rank {settings.groups_per_rank}: a rank has {owned} experts of "
                f"{site.module}; choose 1 to {owned}"
            )


def _keep_for_target(
    source: SourceCheckpoint, compressor: GroupCompressor, settings: CompressionSettings
) -> float:
    """The keep at which all experts' tensors take the share `target_bytes` of what they take dense.

    Raises UserError for a share that centres, indices and dense layers alone exceed.
    """
    assert settings.target_bytes is not None
    fixed = dense = 0
    sizes = []
    for layer, site in enumerate(source.sites):
        size = compressor.size(layer, site.num_experts)
        here = size.fixed + size.count * size.rows * size.columns * size.itemsize
        dense += here
        if layer in settings.layers:
            groups = settings.groups * settings.groups_per_rank
            # Its centres, and its experts, which cost the same in groups of whatever size.
            sizes += [replace(size, count=0, fixed=0)] * groups
            sizes.append(replace(size, has_center=False))
        else:
            fixed += here

    def total(keep: float) -> int:
        return fixed + sum(size.bytes_at(keep) for size in sizes)

    keep = keep_for(settings.target_bytes * dense, total)
    if not keep:
        raise UserError(
            f"--target-bytes {settings.target_bytes}: centres, indices and layers left dense alone "
            f"take {total(0.0) / dense:.3f} of the dense experts; allow more, or use a smaller --ep"
        )
    return keep


def _is_whole(path: Path) -> bool:
    """Whether a file was finished by an earlier run."""
    try:
        TensorFile(path)
    except UserError:
        return False
    return True


def _record_in(path: Path) -> dict[str, Any] | None:
    """The record in the header of a finished group file; None where the file is none."""
    try:
        return json.loads(TensorFile(path).metadata[_RECORD])
    except (UserError, KeyError, ValueError):
        return None
