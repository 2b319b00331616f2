"""A lock file that lets one run at a time work in a folder."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from contextlib import suppress
from pathlib import Path

from resmoe_dist.errors import UserError
from resmoe_dist.jobs.disk_errors import disk_error

LOCK_FILE = "resmoe-lock"
# Errors of file systems that cannot lock, such as Lustre without its flock mount option.
_CANNOT_LOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

logger = logging.getLogger(__name__)


class FolderLock:
    """An exclusive lock on a folder. The kernel releases it if the process is killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / LOCK_FILE
        self._descriptor: int | None = None

    @property
    def is_held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    def acquire(self) -> bool:
        """Take the lock. Returns False if the folder or the lock file vanished meanwhile.

        On a file system that cannot lock, logs a warning and goes on.

        Raises UserError if another run holds the lock, or if the file cannot be written.
        """
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise disk_error(self.folder, error) from error
        self._descriptor = descriptor
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace") or "just starting"
            self.release()
            raise UserError(
                f"{self.folder}: another run is at work here ({holder}); let it finish or choose "
                "another output folder"
            ) from None
        except OSError as error:
            if error.errno not in _CANNOT_LOCK:
                self.release()
                raise disk_error(self.folder, error) from error
            logger.warning("%s: cannot be locked; start no second run on it", self.folder)
        # The previous holder may have removed the file between our `open` and `flock`.
        with suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), self.path.stat()):
                return True
        self.release()
        return False

    def name_holder(self) -> None:
        """Write this process into the lock file, for the message that a second run shows.

        Raises OSError if the file cannot be written.
        """
        assert self._descriptor is not None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0)

    def release(self) -> None:
        """Release the lock, if it is held. The file stays."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
