"""The report folder of a comparison: one run at a time, and a file for each finished row."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from typing_extensions import Self

from resmoe_dist.checkpoints.tensor_files import check_writable, read_json_object, write_json
from resmoe_dist.comparison.measuring import Row
from resmoe_dist.errors import UserError
from resmoe_dist.jobs.locks import LOCK_FILE, FolderLock

logger = logging.getLogger(__name__)


class FinishedRows:
    """Finished rows of a report folder, which is locked from `with` to its end.

    common: what all rows of the folder have in common. `with` raises UserError if the folder cannot
    be written, another run is at work in it, or it holds a comparison and may not be resumed.
    """

    def __init__(self, folder: Path, common: dict[str, Any], *, resume: bool) -> None:
        self._folder, self._common, self._resume = folder, common, resume
        self._rows, self._made = folder / "rows", folder / "comparison.json"
        self._lock = FolderLock(folder)

    def __enter__(self) -> Self:
        # Before the lock file is there: a folder of something else stays as it is.
        self._check()
        # False if a run that just ended removed its lock file meanwhile.
        while not self._lock.acquire():
            self._make()
        try:
            # Another run may have begun and ended since.
            self._check()
            self._lock.name_holder()
            self._rows.mkdir(exist_ok=True)
            write_json(self._made, self._common)
        except OSError as error:
            self._release()
            raise UserError(f"{self._folder}: cannot be written ({error.strerror})") from error
        except UserError:
            self._release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._release()

    def get(self, key: str, measure: Callable[[], Row], figures: Collection[str]) -> Row:
        """The row of an earlier run, or a new one.

        figures: what a row must have. Rows with a reason instead, and damaged ones, are measured
        again.
        """
        path = self._rows / f"{key}.json"
        row = _read(path, figures)
        if row is None:
            row = measure()
            write_json(path, row)
        return row

    def _make(self) -> None:
        try:
            self._folder.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"{self._folder}: cannot be made ({error.strerror})") from error

    def _check(self) -> None:
        self._make()
        if not self._made.exists():
            if {path.name for path in self._folder.iterdir()} - {LOCK_FILE}:
                raise UserError(f"{self._folder}: holds other files; choose another --report")
            check_writable(self._made)
            return
        check_writable(self._made)
        if not self._resume:
            raise UserError(
                f"{self._folder}: holds a comparison; give --resume or another --report"
            )
        if read_json_object(self._made) != self._common:
            raise UserError(
                f"{self._folder}: holds a comparison of other options; choose another --report"
            )

    def _release(self) -> None:
        """Unlock the folder; no lock file stays in a finished report."""
        with suppress(OSError):
            self._lock.path.unlink(missing_ok=True)
        self._lock.release()


def _read(path: Path, figures: Collection[str]) -> Row | None:
    """A finished row. None if it is missing, failed or damaged, so that it is measured."""
    if not path.exists():
        return None
    try:
        row = read_json_object(path)
    except UserError as error:
        logger.warning("%s; measuring this row again", error)
        return None
    if "reason" in row:
        return None
    if not all(isinstance(row.get(name), int | float) for name in figures):
        logger.warning("%s: figures are missing; measuring this row again", path)
        return None
    return row
