"""Building the C++ kernels: once, only in the cache, with a fallback if the build fails."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import resmoe_dist
from resmoe_dist.codecs import PrunedResidual
from resmoe_dist.kernels import reference
from resmoe_dist.kernels.cpu import build
from resmoe_dist.kernels.cpu import operations as cpu_kernels
from resmoe_dist.kernels.dispatch import kernels_for
from tests.ranks import run_on_ranks

# These tests only need a library that works, and this builds it fastest.
FLAGS = "-O0"


class Report(NamedTuple):
    """What one process saw."""

    loaded: bool  # whether it has the C++ kernels
    operations: str  # name of the module that runs the operations
    messages: list[str]  # everything that was logged
    warnings: list[str]  # logged warnings, and those of the `warnings` module
    restored: bool  # whether restoring a residual gave the right result


class RecordingHandler(logging.Handler):
    """Keeps log records in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def load_and_restore(environment: dict[str, str], folder: Path) -> Report:
    """Load the kernels and restore a residual, with this environment and current folder."""
    os.environ |= environment
    os.chdir(folder)
    handler = RecordingHandler()
    logger = logging.getLogger("resmoe_dist")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = build.load_kernels()
        residual = PrunedResidual.encode(torch.randn(6, 20), keep=0.5, dtype=torch.float32)
        out = torch.empty(3, 20)
        residual.restore(None, out, 2)
    logged = [record.getMessage() for record in handler.records if record.levelno > logging.INFO]
    return Report(
        loaded=loaded,
        operations=kernels_for(out.device, out.dtype).__name__,
        messages=[record.getMessage() for record in handler.records],
        warnings=logged + [str(warning.message) for warning in caught],
        restored=torch.equal(out, residual.decode()[2:5]),
    )


class Folders(NamedTuple):
    """Folders that a process could write to. It should write to the cache only."""

    cache: Path
    home: Path
    temporary: Path
    current: Path

    @classmethod
    def under(cls, folder: Path) -> Folders:
        folders = cls(*(folder / name for name in cls._fields))
        for path in folders:
            path.mkdir()
        return folders

    def run(self, processes: int = 1, **environment: str) -> list[Report]:
        """Start processes at the same time and return their reports."""
        defaults = {
            "RESMOE_CACHE": str(self.cache),
            "RESMOE_KERNELS": "",
            "RESMOE_KERNELS_FLAGS": FLAGS,
            "HOME": str(self.home),
            "XDG_CACHE_HOME": str(self.home),
            "TMPDIR": str(self.temporary),
        }
        return run_on_ranks(processes, load_and_restore, defaults | environment, self.current)

    def library(self) -> Path:
        """The only library in the cache."""
        (path,) = self.cache.glob("kernels-*/*.so")
        return path


class Race(NamedTuple):
    folders: Folders
    unfinished: Path  # left behind by the killed process
    reports: list[Report]
    package_before: dict[Path, int]


def package_files() -> dict[Path, int]:
    """When each file of the package was last written."""
    package = Path(resmoe_dist.__file__).parent
    files = [path for path in package.rglob("*") if "__pycache__" not in path.parts]
    return {path: path.stat().st_mtime_ns for path in files}


@pytest.fixture(scope="module")
def race(tmp_path_factory: pytest.TempPathFactory) -> Race:
    """Two processes need the kernels at once, after a third was killed while building them."""
    folders = Folders.under(tmp_path_factory.mktemp("race"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESMOE_KERNELS_FLAGS", FLAGS)
        name = f"kernels-{build.fingerprint()}"
    unfinished = folders.cache / f"{name}.building"
    unfinished.mkdir()
    (folders.cache / f"{name}.lock").touch()
    # PyTorch's own build would wait until this file is gone.
    (unfinished / "lock").touch()
    (unfinished / "resmoe_kernels.so").write_bytes(b"\x7fELF, truncated")
    before = package_files()
    return Race(folders, unfinished, folders.run(2), before)


@pytest.mark.slow
def test_one_of_two_processes_builds_and_both_load(race):
    builds = [m for report in race.reports for m in report.messages if "building" in m]

    assert len(builds) == 1
    for report in race.reports:
        assert report.loaded
        assert report.operations == cpu_kernels.__name__
        assert report.restored
        assert report.warnings == []


@pytest.mark.slow
def test_unfinished_build_is_replaced(race):
    assert not race.unfinished.exists()
    assert race.folders.library().parent.name == race.unfinished.stem


@pytest.mark.slow
def test_later_process_uses_the_cached_library(race):
    before = race.folders.library().stat()

    (report,) = race.folders.run()

    assert report.loaded
    assert report.restored
    assert report.messages == []
    after = race.folders.library().stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.slow
def test_nothing_is_written_outside_the_cache(race):
    for path in (race.folders.home, race.folders.temporary, race.folders.current):
        assert list(path.iterdir()) == []
    assert package_files() == race.package_before


@pytest.mark.slow
def test_without_a_compiler_warns_once_and_uses_the_reference(tmp_path):
    (report,) = Folders.under(tmp_path).run(CXX="/bin/false")

    assert not report.loaded
    assert report.operations == reference.__name__
    assert report.restored
    (warning,) = report.warnings
    assert "C++20 compiler" in warning
    assert len(warning.splitlines()) == 1


@pytest.mark.slow
def test_requesting_the_reference_builds_nothing(tmp_path):
    folders = Folders.under(tmp_path)

    (report,) = folders.run(RESMOE_KERNELS="reference")

    assert not report.loaded
    assert report.operations == reference.__name__
    assert report.restored
    assert report.messages == report.warnings == list(folders.cache.iterdir()) == []


def test_each_set_of_flags_has_a_separate_library(monkeypatch):
    names = set()
    for flags in ("", "-O1", "-O1 -DNAME='a b'", "-O1 -DNAME='a  b'"):
        monkeypatch.setenv("RESMOE_KERNELS_FLAGS", flags)
        names.add(build.fingerprint())
    monkeypatch.delenv("RESMOE_KERNELS_FLAGS")

    assert len(names) == 4
    assert build.fingerprint() in names
