"""One layer of a large model through the compressor: where the seconds and the memory go.

Stages are timed around the functions that do them, in a run that is otherwise the pipeline's own:
read, align, choose the centre, encode, write, digest.
"""

from __future__ import annotations

import argparse
import cProfile
import logging
import os
import pstats
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.machine import timed
from benchmarks.memory import MemoryWatch, forget_high_water, memory_of
from benchmarks.process import ROOT
from benchmarks.synthetic import add_model_arguments, model_of
from resmoe_dist.checkpoints.format import CompressionSettings, MethodSpec
from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.checkpoints.tensor_files import write_tensors
from resmoe_dist.codecs import CodecSpec
from resmoe_dist.compression import encoding
from resmoe_dist.evaluation.tables import human_bytes, text_table
from resmoe_dist.jobs.group import GroupCompressor
from resmoe_dist.jobs.memory_budget import ExpertStore
from resmoe_dist.jobs.model_files import file_entry
from resmoe_dist.methods import resmoe
from resmoe_dist.sizes import parse_size

STAGES = ("read", "align", "centre", "encode", "write", "digest", "rest")
# What does the work of a stage: where it is looked up, its name, the stage.
_WORK = [
    (SourceCheckpoint, "read_expert_into", "read"),
    (resmoe, "align", "align"),
    (resmoe, "center_pays", "centre"),
    (encoding, "joint_center", "centre"),
    (encoding, "mean_center", "centre"),
    (resmoe, "encode_group", "encode"),
]
_PROFILED = 30

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `layer`."""
    add_model_arguments(parser, layers=1)
    add = parser.add_argument
    add("--groups", type=int, default=1, help="G, as in `compress --ep G`")
    add("--keep", type=float, default=0.25)
    add("--codec", choices=("pruned", "low_rank"), default="pruned")
    add("--align", choices=("loo", "pot", "none"), default="loo")
    add("--solver", choices=("scipy", "lapx"), default="scipy")
    add("--center", choices=("auto", "joint", "barycenter", "mean", "none"), default="auto")
    add("--allocate", choices=("expert", "group"), default="group")
    add("--max-memory", metavar="SIZE", help="as in `compress`")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--cold", action="store_true", help="read the source from the disk, not the page cache")
    add("--source", type=Path, metavar="DIR", help="keep the synthetic checkpoint, or reuse it")


class StageClock:
    """Seconds of each stage; of one within another, the outer one has the rest alone."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What happens within belongs to stage `name`."""
        self._switch()
        self._open.append(name)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def timing(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its calls a stage."""

        @wraps(function)
        def staged(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return function(*args, **kwargs)

        return staged

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds per stage, peaks of memory, and the functions with most time of their own."""
    if args.source:
        args.source.parent.mkdir(parents=True, exist_ok=True)
    # On the disk that was chosen: the usual place may be memory.
    with tempfile.TemporaryDirectory(dir=args.source.parent if args.source else None) as scratch:
        folder = args.source or Path(scratch) / "source"
        if not model_of(args).is_in(folder):
            _, taken = timed(lambda: _write_source(args, folder))
            logger.info("wrote the synthetic checkpoint in %.1f s", taken)
        source = SourceCheckpoint(folder)
        if args.cold:
            _drop_from_cache(folder)
        return _compress(args, source, Path(scratch))


def _write_source(args: argparse.Namespace, folder: Path) -> None:
    """In a process of its own, whose memory is not counted here."""
    names = ("family", "layers", "hidden", "rows", "experts", "noise", "seed")
    options = [text for name in names for text in (f"--{name}", str(getattr(args, name)))]
    command = [sys.executable, "-m", "benchmarks.synthetic", str(folder.resolve()), *options]
    subprocess.run(command, cwd=ROOT, check=True)


def _drop_from_cache(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _compress(args: argparse.Namespace, source: SourceCheckpoint, scratch: Path) -> dict[str, Any]:
    settings = CompressionSettings(
        groups=args.groups,
        method=MethodSpec(
            name="resmoe",
            options={
                "align": args.align,
                "solver": args.solver,
                "center": args.center,
                "allocate": args.allocate,
            },
        ),
        residual_codec=CodecSpec(name=args.codec, options={"keep": args.keep}),
        layers=list(range(len(source.sites))),
    )
    store = ExpertStore(scratch, parse_size(args.max_memory) if args.max_memory else None)
    compressor = GroupCompressor(source, settings, store, device=torch.device(args.device))
    clock, profile = StageClock(), cProfile.Profile()
    forget_high_water()
    before = memory_of(os.getpid())
    records = []
    with ExitStack() as stack:
        for owner, name, stage in _WORK:
            staged = clock.timing(stage, getattr(owner, name))
            stack.enter_context(patch.object(owner, name, staged))
        watch = stack.enter_context(MemoryWatch())
        begun = time.perf_counter()
        with profile, clock.stage("rest"):
            for layer, site in enumerate(source.sites):
                size = site.num_experts // args.groups
                for number in range(args.groups):
                    experts = range(number * size, (number + 1) * size)
                    made = compressor.compress(layer, experts)
                    path = scratch / f"{layer}-{number}.safetensors"
                    with clock.stage("write"):
                        write_tensors(path, made.tensors, {})
                    with clock.stage("digest"):
                        file = file_entry(path)
                    path.unlink()
                    records.append(made.record | {"file_bytes": file.bytes})
                    del made
                    logger.info("layer %d, group %d: done", layer, number)
        total = time.perf_counter() - begun
    source_bytes = sum(record["source_bytes"] for record in records)
    return {
        "seconds": clock.seconds,
        "total_seconds": total,
        "source_bytes": source_bytes,
        "stored_bytes": sum(record["file_bytes"] for record in records),
        "source_bytes_per_second": source_bytes / total,
        "memory_before": before,
        "memory": watch.as_dict(),
        "records": records,
        "profile": _own_times(profile),
    }


def _own_times(profile: cProfile.Profile) -> list[dict[str, Any]]:
    """The functions with most time of their own."""
    found = [
        {"function": _where(place), "calls": calls, "own_seconds": own, "seconds": all_}
        for place, (_, calls, own, all_, _) in pstats.Stats(profile).stats.items()
    ]
    return sorted(found, key=lambda entry: entry["own_seconds"], reverse=True)[:_PROFILED]


def _where(place: tuple[str, int, str]) -> str:
    """`aligned.py:95(expert_rows)`; compiled functions have their name alone."""
    file, line, name = place
    return name if file == "~" else f"{Path(file).name}:{line}({name})"


def table(results: dict[str, Any]) -> str:
    """The results of `measure` as text."""
    seconds, peaks = results["seconds"], results["memory"]["one"]
    total = results["total_seconds"]
    rows = [
        [stage, f"{seconds[stage]:.2f}", f"{seconds[stage] / total:.1%}"]
        for stage in STAGES
        if seconds[stage]
    ]
    rows.append(["total", f"{total:.2f}", ""])
    lines = [text_table(["stage", "seconds", "share"], rows)]
    lines.append(
        f"experts of {human_bytes(results['source_bytes'])} to "
        f"{human_bytes(results['stored_bytes'])}, "
        f"{human_bytes(results['source_bytes_per_second'])} a second"
    )
    lines.append(
        f"peak of anonymous memory {human_bytes(peaks['anonymous'])}, "
        f"resident {human_bytes(peaks['high_water'])}; before "
        f"{human_bytes(results['memory_before']['anonymous'])} and "
        f"{human_bytes(results['memory_before']['resident'])}"
    )
    profiled = [
        [entry["function"], str(entry["calls"]), f"{entry['own_seconds']:.2f}"]
        for entry in results["profile"][:10]
    ]
    lines.append(text_table(["function", "calls", "own seconds"], profiled))
    return "\n\n".join(lines)
