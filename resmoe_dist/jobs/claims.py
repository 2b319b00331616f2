"""Which rank runs which task, agreed on through files that only one process can create."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from resmoe_dist.jobs.disk_errors import disk_error

_FINISHED_SUFFIX = ".finished"
_FOLDER_IS_GONE = (errno.ENOENT, errno.ESTALE)


class ClaimsClosedError(Exception):
    """The run of these claims is over: a rank failed, or another run took over the folder."""


class Claims:
    """The claims of one run. A rank claims a task by creating its file with O_EXCL.

    This works alike for the ranks of MPI and of DeepSpeed, and across nodes that share a file
    system. It needs no answer from a busy rank, as a message would. The folder exists as long as
    the run goes on; without it no rank can take another task.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def take(self, name: str) -> bool:
        """Claim a task. Returns False if a rank has claimed it already.

        Raises ClaimsClosedError if the run is over, and UserError if the disk is full.
        """
        try:
            os.close(os.open(self.folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno in _FOLDER_IS_GONE:
                raise ClaimsClosedError from None
            raise disk_error(self.folder, error) from error
        return True

    def finish(self, name: str) -> None:
        """Mark a task of this rank as finished."""
        # Only progress bars read the mark, so a full disk is no reason to fail.
        with suppress(OSError):
            (self.folder / f"{name}{_FINISHED_SUFFIX}").touch()

    def finished(self, prefix: str) -> set[str]:
        """Return the finished tasks whose names begin with `prefix`; empty if the run is over."""
        with suppress(OSError):
            found = (name for name in os.listdir(self.folder) if name.startswith(prefix))
            return {
                name.removesuffix(_FINISHED_SUFFIX)
                for name in found
                if name.endswith(_FINISHED_SUFFIX)
            }
        return set()

    def close(self) -> bool:
        """End the run for all ranks. Returns False if it was over already.

        Renames the folder, which works on a full disk too.
        """
        try:
            self.folder.rename(self.folder.with_name(f"{self.folder.name}-closed"))
        except OSError:
            return False
        return True
