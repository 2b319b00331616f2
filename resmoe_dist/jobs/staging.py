"""`OUTPUT.partial`: what a run has finished so far, and whose run it is.

    model/                   the files of the checkpoint; becomes OUTPUT when all are there
    scratch/                 whatever else a task keeps for a resumed run
    claims-*/                which task is whose, in this run alone
    resmoe-settings.json     what the run was started with; a resumed one must agree
    resmoe-lock              held by rank 0 for as long as it lives

OUTPUT is whole or absent: it comes into being by one rename, and nothing else of the folder does.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from resmoe_dist.checkpoints.tensor_files import FULL_DISK, write_json
from resmoe_dist.errors import UserError

_SETTINGS_FILE = "resmoe-settings.json"
_LOCK_FILE = "resmoe-lock"
_CLAIMS = "claims-"
_FINISHED = ".finished"
# Between making the folder and locking it a run needs no longer than this.
_LOCK_APPEARS_SECONDS = 0.5
# What file systems say that cannot lock, such as Lustre without its option for it.
_CANNOT_LOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_GONE = (errno.ENOENT, errno.ESTALE)

logger = logging.getLogger(__name__)


class ClaimsClosedError(Exception):
    """The run that the claims belong to is over: a rank failed, or another run took its place."""


class Claims:
    """Which rank does which task, agreed on through files that only one process can create.

    O_EXCL is the same for ranks of MPI and of DeepSpeed, holds between nodes that share a file
    system, and asks nothing of a rank that is busy, where a message would wait to be answered. The
    folder is the run: without it nobody takes another task.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def take(self, name: str) -> bool:
        """Whether the task is the caller's; False if a rank has it already.

        Raises ClaimsClosedError when the run is over, UserError when the disk is full.
        """
        try:
            os.close(os.open(self.folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno in _GONE:
                raise ClaimsClosedError from None
            raise _refused(self.folder, error) from error
        return True

    def finish(self, name: str) -> None:
        """Let everyone see that the caller's task is done."""
        # Only progress bars ask, which is nothing to fail for on a full disk.
        with suppress(OSError):
            (self.folder / f"{name}{_FINISHED}").touch()

    def finished(self, prefix: str) -> set[str]:
        """Names that begin with `prefix` and are done; empty when the run is over."""
        with suppress(OSError):
            found = (name for name in os.listdir(self.folder) if name.startswith(prefix))
            return {name.removesuffix(_FINISHED) for name in found if name.endswith(_FINISHED)}
        return set()

    def close(self) -> bool:
        """End the run for everyone; False if it was over already. Works on a full disk too."""
        try:
            self.folder.rename(self.folder.with_name(f"{self.folder.name}-closed"))
        except OSError:
            return False
        return True


class StagingFolder:
    """The folder of unfinished work beside `output`.

    The methods are rank 0's; the other ranks need the paths alone.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output.parent / f"{output.name}.partial"
        self.model, self.scratch = self.folder / "model", self.folder / "scratch"
        self._settings: dict[str, Any] = {}
        self._lock: int | None = None

    def acquire(self, settings: dict[str, Any], *, resume: bool) -> Claims | None:
        """Make the folder, or find it where `resume` is set; lock it, and return claims on it.

        settings: what makes two runs the same one, as JSON, with `source` and `producer` among it.
        Returns None where OUTPUT exists already.

        Raises UserError when another run holds the lock, when there is unfinished work and `resume`
        is not set, or when that work is not of these settings.
        """
        self._settings = settings
        while not os.path.lexists(self.output):
            if not self._enter(resume):
                continue
            # The run that held the lock before may have finished since we looked.
            if os.path.lexists(self.output):
                self.give_up(keep=True)
                break
            try:
                return self._begin()
            except OSError as error:
                self.give_up(keep=True)
                raise _refused(self.folder, error) from error
        if resume:
            self._remove_remains()
        return None

    def has_finished_work(self) -> bool:
        """Whether there is any file that a resumed run would not have to make again."""
        folders = (self.model, self.scratch)
        return any(not path.name.startswith(".") for f in folders for path in f.glob("*"))

    def finish(self) -> None:
        """Give the model its name. Raises UserError where that has been taken meanwhile."""
        try:
            self.model.rename(self.output)
        except OSError as error:
            raise _refused(self.output, error, "made") from error
        self._remove()

    def give_up(self, *, keep: bool) -> bool:
        """Remove the folder unless there is finished work to `keep`; whether it was kept."""
        kept = keep and self.has_finished_work()
        if not kept:
            self._remove()
        self.release()
        return kept

    def release(self) -> None:
        """Let go of the lock; the kernel does it for a process that is killed."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _enter(self, resume: bool) -> bool:
        """Find or make the folder and lock it; False if another run was faster: look again."""
        try:
            self.folder.mkdir(parents=True)
        except FileExistsError:
            return self._enter_existing(resume)
        except OSError as error:
            raise _refused(self.folder, error, "made") from error
        try:
            if not self._acquire_lock():
                return False
        except UserError:
            with suppress(OSError):  # unless another run has moved in
                self.folder.rmdir()
            raise
        self._write_settings()
        return True

    def _enter_existing(self, resume: bool) -> bool:
        lock = self.folder / _LOCK_FILE
        # Without a lock it is no run's, or that of one which begins at this very moment.
        deadline = time.monotonic() + _LOCK_APPEARS_SECONDS
        while not lock.exists() and not resume and time.monotonic() < deadline:
            time.sleep(_LOCK_APPEARS_SECONDS / 10)
        names = self._names()
        if not os.path.lexists(self.folder):
            return False
        known = bool(names & {_LOCK_FILE, _SETTINGS_FILE})
        # A run that was killed before it had made anything leaves an empty folder.
        begun = known or (resume and not names and self.folder.is_dir())
        if begun and not self._acquire_lock():
            return False
        try:
            self._check_unfinished(resume)
        except UserError:
            self.release()
            raise
        return True

    def _check_unfinished(self, resume: bool) -> None:
        if not resume:
            raise UserError(
                f"{self.folder}: an unfinished run is here; continue it with --resume or remove it"
            )
        finished = {name for name in self._names() if not name.startswith(".")} - {_LOCK_FILE}
        if self._lock is not None and not finished:
            self._write_settings()
            return
        wanted, found = self._settings, self._found_settings()
        differing = {key for key in wanted | found if wanted.get(key) != found.get(key)}
        if not differing:
            return
        what = "had other options"
        if differing == {"source"}:
            what = "read another source, or this one before it changed"
        elif differing <= {"source", "producer"}:
            what = "was another version's"
        raise UserError(f"{self.folder}: the unfinished run {what}; remove it to start anew")

    def _names(self) -> set[str]:
        """What lies in the folder at one moment; nothing if it is none."""
        try:
            return set(os.listdir(self.folder))
        except OSError:
            return set()

    def _found_settings(self) -> dict[str, Any]:
        """What the unfinished run was started with; empty if that cannot be told."""
        try:
            found = json.loads((self.folder / _SETTINGS_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _acquire_lock(self) -> bool:
        """Lock the folder; False if it vanished meanwhile. Raises UserError if it is locked."""
        path = self.folder / _LOCK_FILE
        try:
            self._lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise _refused(self.folder, error) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._lock, 1000, 0).decode(errors="replace") or "just starting"
            self.release()
            raise UserError(
                f"{self.folder}: another run is at work here ({holder}); let it finish or choose "
                "another output folder"
            ) from None
        except OSError as error:
            if error.errno not in _CANNOT_LOCK:
                self.release()
                raise _refused(self.folder, error) from error
            logger.warning("%s: cannot be locked; start no second run on it", self.folder)
        # Who held the lock before us may have removed the file that we have locked now.
        with suppress(OSError):
            if os.path.samestat(os.fstat(self._lock), path.stat()):
                return True
        self.release()
        return False

    def _write_settings(self) -> None:
        try:
            write_json(self.folder / _SETTINGS_FILE, self._settings)
        except UserError:
            self._remove()
            raise

    def _begin(self) -> Claims:
        """What a run needs to start, without what one that was killed has left."""
        for remains in self.folder.glob(f"{_CLAIMS}*"):
            _delete(remains)
        for folder in (self.folder, self.model, self.scratch):
            folder.mkdir(exist_ok=True)
            # What was being written just then: ours, and safetensors' own.
            for stray in folder.glob(".*"):
                _delete(stray)
        assert self._lock is not None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0)
        # A rank of the killed run that is still alive must not take tasks of this one.
        claims = self.folder / f"{_CLAIMS}{uuid.uuid4().hex[:8]}"
        claims.mkdir()
        return Claims(claims)

    def _remove(self) -> None:
        """Remove the folder; settings and lock last, so that it can be resumed until then."""
        with suppress(OSError):
            for path in self.folder.iterdir():
                if path.name not in (_SETTINGS_FILE, _LOCK_FILE):
                    _delete(path)
            (self.folder / _SETTINGS_FILE).unlink(missing_ok=True)
            (self.folder / _LOCK_FILE).unlink(missing_ok=True)
            self.folder.rmdir()
        self.release()

    def _remove_remains(self) -> None:
        """Remove what a run that was killed right after its last rename left behind."""
        if self._names() & {_LOCK_FILE, _SETTINGS_FILE} and not self.model.exists():
            with suppress(UserError):
                if self._acquire_lock():
                    self._remove()


def _delete(path: Path) -> None:
    """A file, or a folder as far as that can be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink()


def _refused(path: Path, error: OSError, verb: str = "written") -> UserError:
    if error.errno in FULL_DISK:
        return UserError(f"{path}: the disk is full; free some space and run again")
    return UserError(f"{path}: cannot be {verb} ({error.strerror})")
