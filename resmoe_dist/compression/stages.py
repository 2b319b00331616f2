"""Seconds that compression spends in each stage.

    read        experts of a group from the source
    align       row alignment (`barycenter`, inside it: POT's free-support barycentre)
    center      choosing and encoding the centre
    threshold   finding the magnitude above which residual entries are kept
    encode      everything else that makes residuals and measures their losses
    write       the group's file, synced
    digest      SHA-256 of finished files

A stage costs about a microsecond while no recorder is active. It does not wait for a GPU.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

# Seconds by stage of the active recorder, or None. Shared by threads: tasks run in several.
_recorded: dict[str, float] | None = None
_lock = threading.Lock()
_thread = threading.local()


@contextmanager
def record_stages() -> Iterator[dict[str, float]]:
    """Record the block: yields seconds by stage, filled as stages end, in all threads.

    Recorders do not nest.
    """
    global _recorded
    assert _recorded is None, "stages are being recorded already"
    _recorded = {}
    try:
        yield _recorded
    finally:
        _recorded = None


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Count the block's seconds for a stage, without those of stages inside it.

    Also a decorator: `@stage("align")` counts the calls of a function.
    """
    recorded = _recorded
    if recorded is None:
        yield
        return
    # Seconds of the stages that ended inside the enclosing one, on this thread.
    before = getattr(_thread, "inner", 0.0)
    _thread.inner = 0.0
    began = time.perf_counter()
    try:
        yield
    finally:
        taken = time.perf_counter() - began
        with _lock:
            recorded[name] = recorded.get(name, 0.0) + taken - _thread.inner
        _thread.inner = before + taken
