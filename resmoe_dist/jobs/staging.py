"""`OUTPUT.partial`: the folder in which a run works, and from which a later run can resume.

    model/                   the files of the checkpoint; renamed to OUTPUT when all are there
    scratch/                 other files that tasks keep for a resumed run
    claims-*/                which rank runs which task, in this run only
    resmoe-settings.json     what the run was started with; a resumed run must agree
    resmoe-lock              locked by rank 0 while its process lives

One rename creates OUTPUT, so it is complete or absent.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from resmoe_dist.checkpoints.tensor_files import write_json
from resmoe_dist.errors import UserError
from resmoe_dist.jobs.claims import Claims
from resmoe_dist.jobs.disk_errors import disk_error
from resmoe_dist.jobs.locks import LOCK_FILE, FolderLock

_SETTINGS_FILE = "resmoe-settings.json"
_CLAIMS_PREFIX = "claims-"
# Enough time for a starting run to lock the folder that it has just made.
_LOCK_APPEARS_SECONDS = 0.5


class StagingFolder:
    """The folder `OUTPUT.partial` beside `output`.

    Only rank 0 calls the methods; the other ranks use the paths.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output.parent / f"{output.name}.partial"
        self.model, self.scratch = self.folder / "model", self.folder / "scratch"
        self.lock = FolderLock(self.folder)
        self._settings: dict[str, Any] = {}

    def acquire(self, settings: dict[str, Any], *, resume: bool) -> Claims | None:
        """Make the folder, or with `resume` continue in an existing one; lock it.

        settings: what identifies a run, as JSON. A resumed run needs the same settings. The keys
        `source` and `producer` have their own error messages.

        Returns the claims of this run, or None if OUTPUT exists already.

        Raises UserError if another run holds the lock, if there is unfinished work and `resume` is
        False, or if the unfinished work has other settings.
        """
        self._settings = settings
        while not os.path.lexists(self.output):
            if not self._enter(resume):
                continue
            # A run that held the lock until now may have made OUTPUT meanwhile.
            if os.path.lexists(self.output):
                self.give_up(keep=True)
                break
            try:
                return self._begin()
            except OSError as error:
                self.give_up(keep=True)
                raise disk_error(self.folder, error) from error
        if resume:
            self._remove_leftovers()
        return None

    def has_finished_work(self) -> bool:
        """Whether the folder holds any file that a resumed run would not have to make again."""
        folders = (self.model, self.scratch)
        return any(not path.name.startswith(".") for f in folders for path in f.glob("*"))

    def finish(self) -> None:
        """Rename the model to OUTPUT. Raises UserError if OUTPUT exists by now."""
        try:
            self.model.rename(self.output)
        except OSError as error:
            raise disk_error(self.output, error, "made") from error
        self._remove()

    def give_up(self, *, keep: bool) -> bool:
        """Unlock the folder, and remove it unless `keep` is set and there is finished work.

        Returns whether the folder was kept.
        """
        kept = keep and self.has_finished_work()
        if not kept:
            self._remove()
        self.release()
        return kept

    def release(self) -> None:
        """Unlock the folder. The kernel does the same when the process dies."""
        self.lock.release()

    def _enter(self, resume: bool) -> bool:
        """Find or make the folder and lock it. False: another run was faster, so try again."""
        try:
            self.folder.mkdir(parents=True)
        except FileExistsError:
            return self._enter_existing(resume)
        except OSError as error:
            raise disk_error(self.folder, error, "made") from error
        try:
            if not self.lock.acquire():
                return False
        except UserError:
            with suppress(OSError):  # fails if another run works in the folder by now
                self.folder.rmdir()
            raise
        self._write_settings()
        return True

    def _enter_existing(self, resume: bool) -> bool:
        # A folder without a lock file may belong to a run that is just starting: wait for it.
        deadline = time.monotonic() + _LOCK_APPEARS_SECONDS
        while not self.lock.path.exists() and not resume and time.monotonic() < deadline:
            time.sleep(_LOCK_APPEARS_SECONDS / 10)
        names = self._names()
        if not os.path.lexists(self.folder):
            return False
        is_staging_folder = bool(names & {LOCK_FILE, _SETTINGS_FILE})
        # A run that was killed at its very start leaves an empty folder.
        is_empty = not names and self.folder.is_dir()
        if (is_staging_folder or (resume and is_empty)) and not self.lock.acquire():
            return False
        try:
            self._check_unfinished(resume)
        except UserError:
            self.release()
            raise
        return True

    def _check_unfinished(self, resume: bool) -> None:
        """Raise UserError unless this run may continue the unfinished one."""
        if not resume:
            raise UserError(
                f"{self.folder}: an unfinished run is here; continue it with --resume or remove it"
            )
        visible = {name for name in self._names() if not name.startswith(".")}
        if self.lock.is_held and visible <= {LOCK_FILE}:
            self._write_settings()
            return
        wanted, found = self._settings, self._found_settings()
        differing = {key for key in wanted | found if wanted.get(key) != found.get(key)}
        if not differing:
            return
        reason = "had other options"
        if differing == {"source"}:
            reason = "read another source, or this one before it changed"
        elif differing <= {"source", "producer"}:
            reason = "was another version's"
        raise UserError(f"{self.folder}: the unfinished run {reason}; remove it to start anew")

    def _names(self) -> set[str]:
        """Return the names in the folder; empty if it cannot be listed."""
        try:
            return set(os.listdir(self.folder))
        except OSError:
            return set()

    def _found_settings(self) -> dict[str, Any]:
        """Return the settings of the unfinished run; empty if they cannot be read."""
        try:
            found = json.loads((self.folder / _SETTINGS_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _write_settings(self) -> None:
        try:
            write_json(self.folder / _SETTINGS_FILE, self._settings)
        except UserError:
            self._remove()
            raise

    def _begin(self) -> Claims:
        """Remove what a killed run left half-done, and make what this run needs to start."""
        for claims_folder in self.folder.glob(f"{_CLAIMS_PREFIX}*"):
            _delete(claims_folder)
        for folder in (self.folder, self.model, self.scratch):
            folder.mkdir(exist_ok=True)
            # Temporary files of interrupted writes, ours and those of safetensors.
            for temporary in folder.glob(".*"):
                _delete(temporary)
        self.lock.name_holder()
        # A random name: a rank of the killed run that still lives must not claim tasks of this run.
        claims_folder = self.folder / f"{_CLAIMS_PREFIX}{uuid.uuid4().hex[:8]}"
        claims_folder.mkdir()
        return Claims(claims_folder)

    def _remove(self) -> None:
        """Remove the folder and unlock it.

        Settings and lock file go last: until then another run can resume.
        """
        with suppress(OSError):
            for path in self.folder.iterdir():
                if path.name not in (_SETTINGS_FILE, LOCK_FILE):
                    _delete(path)
            (self.folder / _SETTINGS_FILE).unlink(missing_ok=True)
            self.lock.path.unlink(missing_ok=True)
            self.folder.rmdir()
        self.release()

    def _remove_leftovers(self) -> None:
        """Remove the folder of a run that was killed right after it had made OUTPUT."""
        if self._names() & {LOCK_FILE, _SETTINGS_FILE} and not self.model.exists():
            with suppress(UserError):
                if self.lock.acquire():
                    self._remove()


def _delete(path: Path) -> None:
    """Delete a file, or as much of a folder as possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink()
