"""Hand out tasks to the ranks of a run as the ranks become free."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from resmoe_dist.errors import UserError
from resmoe_dist.jobs.claims import Claims, ClaimsClosedError
from resmoe_dist.jobs.progress import progress_bar
from resmoe_dist.jobs.workers import Workers, gather_or_raise

T = TypeVar("T")
Task = TypeVar("Task", bound=Hashable)


class Schedule:
    """Runs tasks in phases. A phase ends when every rank has the results of all its tasks.

    poll_seconds: how often the progress bar looks for finished tasks.
    """

    def __init__(self, workers: Workers, claims: Claims, *, poll_seconds: float = 1.0) -> None:
        self.workers, self.claims = workers, claims
        self._poll_seconds = poll_seconds

    def run_phase(
        self,
        name: str,
        tasks: Sequence[Task],
        run_task: Callable[[Task], T],
        is_finished: Callable[[Task], bool] = lambda task: False,
    ) -> dict[Task, T]:
        """Run each task on one rank; return all results, in task order, on every rank.

        name: must differ from the names of the run's other phases. Rank 0 shows it in its progress
        bar.
        tasks: must be the same on every rank. Put long tasks first.
        run_task: its results must be picklable. It runs in a separate thread, so the caller's
        grad mode and current CUDA device do not apply.
        is_finished: whether an earlier run has finished a task already. Only the progress bar uses
        it, as its starting point.

        Raises UserError on every rank if `run_task` raises it on one; the other ranks end their
        current task and take no more. Any other exception is raised on its own rank only, and the
        other ranks stop in the same way.
        """

        def run_claimed_tasks() -> dict[int, T]:
            results: dict[int, T] = {}
            try:
                for number, task in enumerate(tasks):
                    claim = f"{name}-{number}"
                    if self.claims.take(claim):
                        results[number] = run_task(task)
                        self.claims.finish(claim)
            except ClaimsClosedError:
                pass
            except Exception:
                self.claims.close()
                raise
            return results

        with self._progress_bar(name, tasks, is_finished):
            results_by_rank = gather_or_raise(
                self.workers, lambda: run_interruptibly(run_claimed_tasks)
            )
        found = {number: result for part in results_by_rank for number, result in part.items()}
        if len(found) < len(tasks):
            raise UserError(
                f"{self.claims.folder.parent}: was removed or taken over while this run was "
                "working in it"
            )
        return {task: found[number] for number, task in enumerate(tasks)}

    def _progress_bar(
        self, name: str, tasks: Sequence[Task], is_finished: Callable[[Task], bool]
    ) -> AbstractContextManager[None]:
        """Count the finished tasks of all ranks, on rank 0, if standard error is a terminal."""
        if self.workers.rank != 0 or not sys.stderr.isatty():
            return nullcontext()
        earlier = {f"{name}-{number}" for number, task in enumerate(tasks) if is_finished(task)}
        return progress_bar(
            name,
            len(tasks),
            lambda: len(earlier | self.claims.finished(f"{name}-")),
            poll_seconds=self._poll_seconds,
        )


def run_interruptibly(action: Callable[[], T]) -> T:
    """Run `action()` in a thread and return its result, or raise its exception.

    Python runs signal handlers in the main thread, between two bytecode instructions; a solver may
    spend minutes in compiled code. So the main thread only waits.

    If a signal handler raises there, the action keeps running in its daemon thread: the caller must
    end the process, or close the claims so that the thread takes no other task.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    wait([future])
    return future.result()
