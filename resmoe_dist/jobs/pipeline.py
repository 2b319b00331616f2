"""Source checkpoint to compressed checkpoint: one (layer, group) at a time, one file each.

    calibrate   measure activations, if errors are weighted, and which layers matter most
    plan        which experts share a centre, and what budget each group gets (`group_planning`)
    compress    read a group, compress it by the layer's method, write it
    refit       run the compressed model and write its routers, if they are to be refitted

Each phase hands its tasks to the ranks as they become free. The run works in `OUTPUT.partial` (see
`staging`). Each file appears there atomically, under its final name and with the same bytes
whichever rank makes it. A resumed run keeps finished files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from resmoe_dist.checkpoints.entries import (
    STORED_DTYPES,
    FileEntry,
    GroupEntry,
    LayerEntry,
    RouterEntry,
)
from resmoe_dist.checkpoints.format import CheckpointIndex, CompressionSettings, read_index
from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.checkpoints.tensor_files import read_json, write_json, write_tensors
from resmoe_dist.checkpoints.upgrade import FORMAT_VERSION
from resmoe_dist.compression.activations import (
    LayerActivations,
    load_activations,
    save_activations,
)
from resmoe_dist.compression.blocks import CPU
from resmoe_dist.compression.samples import SampleFiles
from resmoe_dist.errors import UserError
from resmoe_dist.jobs.claims import Claims
from resmoe_dist.jobs.group import EXPERT_MAP, GroupCompressor
from resmoe_dist.jobs.group_planning import GroupPlanning
from resmoe_dist.jobs.layer_entries import FinishedGroup, layer_entries
from resmoe_dist.jobs.memory_budget import ExpertStore
from resmoe_dist.jobs.model_files import (
    PRODUCER,
    Shard,
    file_entry,
    shards_of,
    write_model_files,
)
from resmoe_dist.jobs.router_refit import RouterRefit
from resmoe_dist.jobs.scheduling import Schedule
from resmoe_dist.jobs.settings import check_settings, keep_for_target
from resmoe_dist.jobs.staging import StagingFolder
from resmoe_dist.jobs.tasks import GroupTask, TaskFiles, is_whole
from resmoe_dist.jobs.workers import RetryableError, SingleWorker, Workers, gather_or_raise
from resmoe_dist.methods import GroupPlan, method_of

_ACTIVATIONS = "activations.safetensors"
_SENSITIVITY = "sensitivity.json"


# Measures activations, and stores samples if it is given files for them.
Measure = Callable[[SampleFiles | None], Sequence[LayerActivations]]
# Measures the sensitivity of some layers (see `jobs/sensitivity.py`).
MeasureSensitivity = Callable[[Sequence[int]], Sequence[float] | None]


class Compression:
    """One run of `resmoe-dist compress`.

    device: where to compute. max_memory: bytes of anonymous memory that each rank may take.
    measure: returns the activations of each MoE layer, to weigh errors by; measure_sensitivity:
    of layers that are to share a number of bytes. Both are called on one rank. may_join: see
    `GroupPlanning`. routers: to refit, if the settings say so.

    Raises UserError for a source that cannot be compressed (see `SourceCheckpoint`), settings that
    do not fit the model or each other, and an output folder that exists; ValueError for an unknown
    method or option of it.
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
        measure: Measure | None = None,
        measure_sensitivity: MeasureSensitivity | None = None,
        may_join: bool = False,
        routers: RouterRefit | None = None,
    ) -> None:
        self.source, self.output = source, output
        self._measure, self._routers = measure, routers
        self._measure_sensitivity = measure_sensitivity
        source.serve_as(STORED_DTYPES[settings.dtype] if settings.dtype else None)
        self.workers = workers or SingleWorker()
        self._staging = StagingFolder(output)
        self._files = TaskFiles(self._staging, len(source.sites))
        self._samples = SampleFiles(self._staging.scratch)
        # Defaults are written out, so that the checkpoint records all options that made it.
        settings = settings.model_copy(update={"method": method_of(settings.method).spec})
        store = ExpertStore(self._staging.scratch, max_memory)
        compressor = GroupCompressor(source, settings, store, device=device)
        check_settings(source, settings, compressor)
        # Other budgets ignore it: such runs are the same with and without it.
        self._may_join = may_join and settings.chooses_bits
        if settings.target_bytes is not None and not settings.chooses_bits:
            sizes = [compressor.size(i, site.num_experts) for i, site in enumerate(source.sites)]
            keep = keep_for_target(settings, sizes)
            residual_codec = settings.residual_codec.with_keep(keep)
            settings = settings.model_copy(update={"residual_codec": residual_codec})
            compressor = GroupCompressor(source, settings, store, device=device)
            check_settings(source, settings, compressor)
        self.settings, self._compressor = settings, compressor
        assert settings.recalibrate_router == (routers is not None)

    def run(self, *, resume: bool = False) -> CheckpointIndex:
        """Compress everything and return the index, on every rank.

        Invalid input leaves nothing behind, unless `resume` is set. A run that is interrupted, or
        meets a full disk after something was finished, leaves `OUTPUT.partial`, from which `resume`
        continues.
        """
        schedule = None
        try:
            claims = gather_or_raise(
                self.workers, lambda: self._begin(resume) if self._is_first else None
            )[0]
            if claims is not None:
                schedule = Schedule(self.workers, claims)
                self._compress(schedule, resume)
        except KeyboardInterrupt as interruption:
            # If several ranks are interrupted, the one that closes the claims reports it. If a
            # failed rank has closed them, its error is reported instead.
            if self._is_first if schedule is None else schedule.claims.close():
                interruption.args = ("interrupted; continue with --resume",)
            raise
        finally:
            self._staging.release()
        return read_index(self.output)

    def compress_group(
        self, task: GroupTask, planned: dict[GroupTask, GroupPlan] | None = None
    ) -> FinishedGroup:
        """Make the file of one group, unless it is finished.

        planned: groups with a plan in a file, whose budgets replace those of the file.
        """
        record = self._files.record(task)
        if record is None:
            plan = None
            if planned and task in planned:
                plan = self._files.plan(task)
                assert plan is not None
                plan = replace(plan, keep=planned[task].keep, bits=planned[task].bits)
            made = self._compressor.compress(task.layer, task.experts, plan)
            record = made.record
            self._files.write_group(task, made)
        path = self._files.path(task)
        expert_map = record.pop(EXPERT_MAP, None)
        entry = GroupEntry(file=file_entry(path.parent, path.name), **record)
        return FinishedGroup(entry, expert_map)

    def copy_shard(self, shard: Shard) -> FileEntry:
        """Copy tensors that are not experts' to a file, unless it is finished."""
        path = self._files.path(shard)
        if not is_whole(path):
            write_tensors(path, {n: self.source.read_other(n) for n in shard.names}, {})
        return file_entry(path.parent, path.name)

    @property
    def _is_first(self) -> bool:
        return self.workers.rank == 0

    def _identity(self) -> dict[str, Any]:
        """What a run must have in common with a run that it continues."""
        return self.settings.model_dump() | {
            "source": self.source.fingerprint(),
            "drop_unused": self.source.drop_unused,
            "may_join": self._may_join,
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
        """All phases, then what only rank 0 writes."""
        try:
            if self._measure is not None:
                self._compressor.activations = self._calibrate(schedule, self._measure)
            sensitivity = self._sensitivity(schedule)
            planning = GroupPlanning(
                self.source,
                self.settings,
                self._compressor,
                self._files,
                self._may_join,
                sensitivity,
            )
            tasks, planned = planning.run(schedule)

            def compress(task: GroupTask | Shard) -> FinishedGroup | FileEntry:
                if isinstance(task, Shard):
                    return self.copy_shard(task)
                return self.compress_group(task, planned)

            # Copies are short, so they come last: ranks then finish at about the same time. But
            # what they may refuse is refused before the work.
            shards = shards_of(self.source, self._routers.names if self._routers else ())
            routers = shards.pop() if self._routers else None
            everything: list[GroupTask | Shard] = [*tasks, *shards]
            if self.source.may_overflow:
                everything = [*shards, *tasks]
            entries = schedule.run_phase(
                "compressing", everything, compress, self._files.is_finished
            )

            groups: dict[GroupTask, FinishedGroup] = {}
            files: dict[Shard, FileEntry] = {}
            for task, entry in entries.items():
                if isinstance(task, GroupTask):
                    assert isinstance(entry, FinishedGroup)
                    groups[task] = entry
                else:
                    assert isinstance(entry, FileEntry)
                    files[task] = entry
            layers = layer_entries(self._compressor, groups, sensitivity or {})
            if routers is not None:
                files[routers], layers = self._refit_routers(schedule, routers, layers)

            def finish() -> None:
                if self._is_first:
                    folder = self._staging.model
                    write_model_files(folder, self.source, self.settings, layers, files)
                    self._staging.finish()

            gather_or_raise(self.workers, finish)
        except UserError as error:
            # After invalid input a second run fails too; after a full disk it may succeed.
            retryable = isinstance(error, RetryableError)
            keep = retryable or resume
            kept = gather_or_raise(
                self.workers, lambda: self._is_first and self._staging.give_up(keep=keep)
            )[0]
            if kept and retryable:
                raise UserError(
                    f"{error}; finished work is kept, run again with --resume"
                ) from error
            raise

    def _calibrate(self, schedule: Schedule, measure: Measure) -> list[LayerActivations]:
        """Activations of all MoE layers, measured by one rank or by an earlier run.

        Also the samples, if the method or the routers need them.
        """
        path, sites = self._staging.scratch / _ACTIVATIONS, self.source.sites
        uses_moments = self.settings.residual_codec.codec.uses_moments
        if uses_moments or method_of(self.settings.method).needs_samples:
            self._compressor.samples = self._samples
        samples = self._samples if self._routers else self._compressor.samples

        def calibrate(_: str) -> None:
            if not is_whole(path):
                save_activations(path, sites, measure(samples))
            if self._routers:
                self._routers.check(self._samples)

        schedule.run_phase("calibrating", ["calibration"], calibrate, lambda _: is_whole(path))
        return load_activations(path, sites)

    def _sensitivity(self, schedule: Schedule) -> dict[int, float] | None:
        """Of each compressed layer, measured by one rank or by an earlier run.

        None if nothing depends on it, or it is not known.
        """
        path, layers = self._staging.scratch / _SENSITIVITY, self.settings.layers
        measure = self._measure_sensitivity
        if measure is None or not self.settings.chooses_bits or len(layers) < 2:
            return None

        def run(_: str) -> list[float] | None:
            if not path.exists():
                write_json(path, measure(layers))
            return read_json(path)

        phase = schedule.run_phase("weighing layers", [path.name], run, lambda _: path.exists())
        found = phase[path.name]
        return None if found is None else dict(zip(layers, found, strict=True))

    def _refit_routers(
        self, schedule: Schedule, shard: Shard, layers: list[LayerEntry]
    ) -> tuple[FileEntry, list[LayerEntry]]:
        """The file of all routers, and the layers' entries with what was measured.

        One rank makes it: each router's inputs depend on all routers before it.
        """

        def refit(shard: Shard) -> tuple[FileEntry, list[RouterEntry | None]]:
            entries = self._files.router_entries(shard)
            if entries is None:
                assert self._routers is not None
                dtype = STORED_DTYPES[self.settings.dtype] if self.settings.dtype else None
                tensors, entries = self._routers.run(
                    self._staging.model, layers, self.settings.layers, self._samples, dtype
                )
                self._files.write_routers(shard, tensors, entries)
            path = self._files.path(shard)
            return file_entry(path.parent, path.name), entries

        found = schedule.run_phase(
            "refitting", [shard], refit, lambda s: self._files.router_entries(s) is not None
        )
        entry, entries = found[shard]
        return entry, [
            layer.model_copy(update={"router": router})
            for layer, router in zip(layers, entries, strict=True)
        ]
