"""Process many blocks in parallel, one thread per block."""

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
    """Yield `work(item)` for each item, in order.

    On a CPU, as many items run at a time as PyTorch has threads, each on one thread. On other
    devices, and with one thread, items run one after the other. At most one item more than
    threads is in progress.

    PyTorch's own parallelism splits every single operation. The operations here are short, so the
    threads would spend most of the time waiting for each other. Results do not depend on the number
    of threads.
    """
    threads = torch.get_num_threads()
    if threads == 1 or device.type != "cpu":
        yield from map(work, items)
        return
    pending: deque[Future[Result]] = deque()
    # Threads created from now on inherit this setting.
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) > threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
    finally:
        torch.set_num_threads(threads)
