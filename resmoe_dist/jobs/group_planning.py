"""Before groups are compressed: which experts share a centre, and what budget each group gets.

    cluster   if a rank has several groups: which of its experts share one
    plan      if the whole model shares one budget: align, and price each group's entries or bits

If bits are chosen for a size, a centre for each rank is compared with one for all ranks: more
experts share its bytes, but it is further from each. The partition that loses less is taken.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from resmoe_dist.checkpoints.format import CompressionSettings
from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.compression.bits import GroupEnergies, error_of
from resmoe_dist.compression.budget import allocate_over_model
from resmoe_dist.jobs.bit_budget import bits_for_target
from resmoe_dist.jobs.group import GroupCompressor
from resmoe_dist.jobs.scheduling import Schedule
from resmoe_dist.jobs.tasks import GroupTask, TaskFiles
from resmoe_dist.methods import GroupPlan

Plans = dict[GroupTask, GroupPlan]


@dataclass(frozen=True)
class GroupPlanning:
    """Makes the tasks of a run.

    may_join: whether one group for all ranks may take the place of one for each. sensitivity: of
    the predictions to the error of each compressed layer (see `jobs/sensitivity.py`); None: all
    errors count alike.
    """

    source: SourceCheckpoint
    settings: CompressionSettings
    compressor: GroupCompressor
    files: TaskFiles
    may_join: bool = False
    sensitivity: Mapping[int, float] | None = None

    def run(self, schedule: Schedule) -> tuple[list[GroupTask], Plans]:
        """All groups, those with the most work first; plans of those that have one."""
        settings = self.settings
        tasks = self._tasks(schedule, settings.groups, settings.groups_per_rank)
        if not settings.chooses_bits:
            return tasks, self._with_shared_keeps(schedule, tasks)
        partitions = [tasks]
        if self.may_join and settings.groups > 1 and self._aligns_rows:
            partitions.append(self._tasks(schedule, 1, 1))
        coded = [[t for t in tasks if t.layer in settings.layers] for tasks in partitions]
        plans = self._plans(schedule, [task for tasks in coded for task in tasks])
        found = [self._with_bits({task: plans[task] for task in tasks}) for tasks in coded]
        best = min(range(len(partitions)), key=lambda i: found[i][1])
        return partitions[best], found[best][0]

    def _tasks(self, schedule: Schedule, groups: int, clusters: int) -> list[GroupTask]:
        """groups: of each compressed layer, before each is split into so many clusters."""
        owned = [
            GroupTask(layer, rank, tuple(range(rank * size, (rank + 1) * size)))
            for layer, site in enumerate(self.source.sites)
            for count in (groups if layer in self.settings.layers else self.settings.groups,)
            for size in (site.num_experts // count,)
            for rank in range(count)
        ]
        split = [task for task in owned if clusters > 1 and task.layer in self.settings.layers]

        def cluster(task: GroupTask) -> list[list[int]]:
            return self.compressor.cluster(task.layer, task.experts, clusters)

        found = schedule.run_phase("clustering", split, cluster) if split else {}
        tasks = [
            GroupTask(task.layer, task.group * len(parts) + i, tuple(experts))
            for task in owned
            for parts in (found.get(task, [task.experts]),)
            for i, experts in enumerate(parts)
        ]
        return sorted(tasks, key=self._work, reverse=True)

    def _work(self, task: GroupTask) -> tuple[bool, int]:
        """Sorts groups by the time they take. Dense ones are only copied."""
        entries = len(task.experts) * self.source.sites[task.layer].shape.entries
        return task.layer in self.settings.layers, entries

    @property
    def _aligns_rows(self) -> bool:
        return any(self.compressor.method(layer).aligns_rows for layer in self.settings.layers)

    def _with_shared_keeps(self, schedule: Schedule, tasks: list[GroupTask]) -> Plans:
        """Plans of the groups whose kept entries come from one budget of the whole model."""
        planned = [task for task in tasks if self.compressor.method(task.layer).shares_budget]
        if not planned:
            return {}
        plans = self._plans(schedule, planned)
        return dict(zip(plans, with_shared_keep(list(plans.values())), strict=True))

    def _with_bits(self, plans: Plans) -> tuple[Plans, float]:
        """The plans with the bits that fit the target, and the error that is expected of them."""
        sizes = [
            self.compressor.size(i, site.num_experts) for i, site in enumerate(self.source.sites)
        ]
        energies = self._weighted_energies(plans)
        bits = bits_for_target(self.settings, sizes, energies)
        error = sum(error_of(e, b) for e, b in zip(energies, bits, strict=True))
        chosen = zip(plans.items(), bits, strict=True)
        return {task: replace(plan, bits=each) for (task, plan), each in chosen}, error

    def _weighted_energies(self, plans: Plans) -> list[GroupEnergies]:
        """The plans' energies, with weights that turn errors into a loss of the model."""
        found = [(task.layer, plan.energies) for task, plan in plans.items() if plan.energies]
        if self.sensitivity is None:
            return [energies for _, energies in found]
        whole: dict[int, float] = defaultdict(float)
        for layer, energies in found:
            whole[layer] += energies.whole
        factors = {layer: self.sensitivity[layer] / (whole[layer] or 1) for layer in whole}
        return [energies.weighted(factors[layer]) for layer, energies in found]

    def _plans(self, schedule: Schedule, tasks: list[GroupTask]) -> Plans:
        def plan(task: GroupTask) -> GroupPlan:
            found = self.files.plan(task)
            if found is None:
                found = self.compressor.plan(task.layer, task.experts)
                self.files.write_plan(task, found)
            # The rank that compresses the group reads the permutations from the file.
            return found.without_permutations()

        return schedule.run_phase(
            "planning", tasks, plan, lambda task: self.files.plan(task) is not None
        )


def with_shared_keep(plans: Sequence[GroupPlan]) -> list[GroupPlan]:
    """Plans with the shares to keep at which the whole model's kept entries save most."""
    curves, budgets = [], []
    for plan in plans:
        assert plan.curve is not None and plan.keep is not None
        curves.append(plan.curve)
        budgets.append(plan.keep * plan.curve.values)
    keeps = allocate_over_model(curves, budgets)
    return [replace(plan, keep=keep) for plan, keep in zip(plans, keeps, strict=True)]
