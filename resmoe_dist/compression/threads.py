"""Work on many blocks at once, one thread each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_parallel(
    work: Callable[[Item], Result], items: Iterable[Item], *, device: torch.device
) -> Iterator[Result]:
    """`work` of each item, in order; on a CPU on as many threads as PyTorch has.

    PyTorch would share out every single operation, each too short for that: threads that meet after
    it wait more than they work, and by far the most on a machine that is busy otherwise. Results do
    not depend on the number of threads. Few more items than threads are underway at a time.
    """
    threads = torch.get_num_threads()
    if threads == 1 or device.type != "cpu":
        yield from map(work, items)
        return
    underway: deque[Future[Result]] = deque()
    # Threads that are made from here on have one thread to themselves.
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            for item in items:
                underway.append(pool.submit(work, item))
                if len(underway) > threads:
                    yield underway.popleft().result()
            while underway:
                yield underway.popleft().result()
    finally:
        torch.set_num_threads(threads)
