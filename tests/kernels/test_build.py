"""Building the kernels: once, in the cache alone, and doing without them where that fails."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from resmoe_dist.kernels.dispatch import kernels_for

from resmoe_dist.codecs import PrunedResidual
from resmoe_dist.kernels.cpu import build
from tests.ranks import run_on_ranks

# What the compiler makes of the kernels is tested elsewhere; this takes it less time.
FLAGS = "-O0"


class Report(NamedTuple):
    """What one process saw: whether there are kernels, what stands in for them, what it was told,
    and whether a residual is restored right."""

    loaded: bool
    operations: str
    messages: list[str]
    warned: list[str]
    right: bool


class _Records(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def _report(environment: dict[str, str], folder: Path) -> Report:
    os.environ |= environment
    os.chdir(folder)
    handler = _Records()
    logger = logging.getLogger("resmoe_dist")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = build.load_kernels()
        residual = PrunedResidual.encode(torch.randn(6, 20), keep=0.5, dtype=torch.float32)
        out = torch.empty(3, 20)
        residual.restore(None, out, 2)
    warned = [record.getMessage() for record in handler.records if record.levelno > logging.INFO]
    return Report(
        loaded=loaded,
        operations=kernels_for(out.device, out.dtype).__name__.rpartition(".")[2],
        messages=[record.getMessage() for record in handler.records],
        warned=warned + [str(warning.message) for warning in caught],
        right=torch.equal(out, residual.decode()[2:5]),
    )


class Places(NamedTuple):
    """Folders that a process may write to: the cache, and those it should leave as they were."""

    cache: Path
    home: Path
    temporary: Path
    current: Path

    @classmethod
    def under(cls, folder: Path) -> Places:
        places = cls(*(folder / name for name in cls._fields))
        for place in places:
            place.mkdir()
        return places

    def run(self, processes: int = 1, **environment: str) -> list[Report]:
        """Reports of processes that start at once."""
        ours = {
            "RESMOE_CACHE": str(self.cache),
            "RESMOE_KERNELS": "",
            "RESMOE_KERNELS_FLAGS": FLAGS,
            "HOME": str(self.home),
            "XDG_CACHE_HOME": str(self.home),
            "TMPDIR": str(self.temporary),
        }
        return run_on_ranks(processes, _report, ours | environment, self.current)

    def library(self) -> Path:
        """The one that is in the cache."""
        (path,) = self.cache.glob("kernels-*/*.so")
        return path


class Race(NamedTuple):
    places: Places
    unfinished: Path
    reports: list[Report]
    sources_before: dict[Path, int]


def _package_files() -> dict[Path, int]:
    """When each file of the package was last written."""
    package = Path(build.__file__).parents[1]
    files = [path for path in package.rglob("*") if "__pycache__" not in path.parts]
    return {path: path.stat().st_mtime_ns for path in files}


@pytest.fixture(scope="module")
def race(tmp_path_factory: pytest.TempPathFactory) -> Race:
    """Two processes that need kernels at once, after one that was killed while it built them."""
    places = Places.under(tmp_path_factory.mktemp("race"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESMOE_KERNELS_FLAGS", FLAGS)
        name = f"kernels-{build.fingerprint()}"
    unfinished = places.cache / f"{name}.building"
    unfinished.mkdir()
    (places.cache / f"{name}.lock").touch()
    # Whoever meets the lock of PyTorch's own build waits until it is gone.
    (unfinished / "lock").touch()
    (unfinished / "resmoe_kernels.so").write_bytes(b"\x7fELF, and no more")
    before = _package_files()
    return Race(places, unfinished, places.run(2), before)


@pytest.mark.slow
def test_of_two_processes_at_once_one_builds_and_both_have_kernels(race):
    builds = [m for report in race.reports for m in report.messages if "building" in m]

    assert len(builds) == 1
    for report in race.reports:
        assert report.loaded
        assert report.operations == "cpu_kernels"
        assert report.right
        assert report.warned == []


@pytest.mark.slow
def test_what_was_left_unfinished_is_replaced(race):
    assert not race.unfinished.exists()
    assert race.places.library().parent.name == race.unfinished.stem


@pytest.mark.slow
def test_a_later_process_takes_the_library_that_is_there(race):
    before = race.places.library().stat()

    (report,) = race.places.run()

    assert report.loaded
    assert report.right
    assert report.messages == []
    after = race.places.library().stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.slow
def test_nothing_is_written_outside_the_cache(race):
    for place in (race.places.home, race.places.temporary, race.places.current):
        assert list(place.iterdir()) == []
    assert _package_files() == race.sources_before


@pytest.mark.slow
def test_without_a_compiler_there_is_one_warning_and_the_reference_does_the_work(tmp_path):
    (report,) = Places.under(tmp_path).run(CXX="/bin/false")

    assert not report.loaded
    assert report.operations == "reference"
    assert report.right
    (warning,) = report.warned
    assert "C++20 compiler" in warning
    assert len(warning.splitlines()) == 1


@pytest.mark.slow
def test_the_reference_can_be_asked_for_and_builds_nothing(tmp_path):
    places = Places.under(tmp_path)

    (report,) = places.run(RESMOE_KERNELS="reference")

    assert not report.loaded
    assert report.operations == "reference"
    assert report.right
    assert report.messages == report.warned == list(places.cache.iterdir()) == []


def test_more_flags_make_another_library(monkeypatch):
    names = set()
    for flags in ("", "-O1", "-O1 -DNAME='a b'", "-O1 -DNAME='a  b'"):
        monkeypatch.setenv("RESMOE_KERNELS_FLAGS", flags)
        names.add(build.fingerprint())
    monkeypatch.delenv("RESMOE_KERNELS_FLAGS")

    assert len(names) == 4
    assert build.fingerprint() in names
