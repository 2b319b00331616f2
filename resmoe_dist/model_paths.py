"""Which files of a model folder may be read: those in the folder, and nothing that it points to."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from resmoe_dist.errors import UserError


def is_plain_name(name: object) -> bool:
    """Whether a name that a file gives is the name of a file beside it: no folders, no tricks."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and not name.startswith(".")
        and bool(name)
        and not {"/", "\\"} & set(name)
    )


def is_relative_name(name: object) -> bool:
    """Whether a name is that of a file in a folder or its subfolders: plain names and slashes."""
    return isinstance(name, str) and all(map(is_plain_name, name.split("/")))


def check_model_folder(folder: Path) -> None:
    """Raise UserError if a model folder holds a link out of it, a pipe or a device.

    Files of the Hugging Face cache are links to its blobs, so a snapshot may link to the blobs of
    its own model. A path that is not a folder passes: whoever reads it says so.
    """
    if not folder.is_dir():
        return
    top = folder.resolve()
    allowed = [top]
    if top.parent.name == "snapshots" and top.parent.parent.name.startswith("models--"):
        allowed.append(top.parent.parent / "blobs")
    for path in _entries(folder):
        try:
            target = path.resolve(strict=True) if path.is_symlink() else path
            mode = target.stat().st_mode
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path}: a link that leads nowhere; remove it") from error
        if target is not path and not any(target.is_relative_to(place) for place in allowed):
            raise UserError(
                f"{path}: a link out of the model folder; put the file itself there, or give the "
                "folder's snapshot in the Hugging Face cache"
            )
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise UserError(f"{path}: neither a file nor a folder; remove it")


def files_in(folder: Path) -> list[str]:
    """Names of all files in a folder and its subfolders, with slashes, sorted; no dot-files."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in _entries(folder)
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    )


def _entries(folder: Path) -> Iterator[Path]:
    """Everything in a folder and its subfolders, links not followed.

    Nothing in a hidden subfolder (`.git`, `.cache`) belongs to the model.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error

    for place, folders, files in os.walk(folder, onerror=refuse):
        for name in (*folders, *files):
            yield Path(place, name)
        folders[:] = [name for name in folders if not name.startswith(".")]
