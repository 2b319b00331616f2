"""A progress bar for work that several processes do together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def progress_bar(
    description: str,
    total: int,
    count_finished: Callable[[], int],
    *,
    poll_seconds: float = 1.0,
) -> Iterator[None]:
    """Show a bar of `total` tasks on standard error while the block runs.

    count_finished: how many tasks of all processes are finished. It is called from a thread every
    `poll_seconds`.
    """
    bar = tqdm(total=total, initial=count_finished(), desc=description, unit="task")
    stopped = threading.Event()

    def show() -> None:
        # `bar.n` instead of `bar.update`: tqdm then estimates the time left from the average over
        # all tasks. Its usual estimate follows the latest few, which vary too much here.
        bar.n = count_finished()
        bar.refresh()

    def poll() -> None:
        while not stopped.wait(poll_seconds):
            show()

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
        show()
    finally:
        stopped.set()
        thread.join()
        bar.close()
