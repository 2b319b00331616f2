"""`resmoe-dist compress`, alone or spread over ranks.

mpirun -n 4 python launch/compress.py SOURCE OUTPUT --ep 4
deepspeed --num_gpus 4 launch/compress.py SOURCE OUTPUT --ep 4
"""

from __future__ import annotations

import hashlib
import json
import logging
import socket
from functools import partial
from pathlib import Path

import torch

from resmoe_dist.checkpoints.compressed import CompressedCheckpoint
from resmoe_dist.checkpoints.entries import STORED_DTYPES
from resmoe_dist.checkpoints.format import CheckpointIndex, CompressionSettings, MethodSpec
from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.compression.activations import LayerActivations
from resmoe_dist.compression.assignment import check_solver
from resmoe_dist.compression.samples import SampleFiles
from resmoe_dist.config.arguments import parse
from resmoe_dist.config.commands import CompressConfig
from resmoe_dist.config.storage import StorageConfig
from resmoe_dist.errors import UserError
from resmoe_dist.evaluation.perplexity import check_vocabulary, load_tokenizer
from resmoe_dist.evaluation.report import describe, layer_table
from resmoe_dist.jobs.calibration import calibration_sequences, measure_activations
from resmoe_dist.jobs.pipeline import Compression
from resmoe_dist.jobs.router_refit import RouterRefit
from resmoe_dist.jobs.sensitivity import measure_sensitivity
from resmoe_dist.jobs.settings import parse_codecs, parse_layers, with_budget
from resmoe_dist.jobs.workers import SingleWorker, Workers, find_workers
from resmoe_dist.methods import method_named, method_of
from resmoe_dist.parallel.entry_point import quiet_libraries, run_entry_point
from resmoe_dist.registry import parse_name_and_options

logger = logging.getLogger(__name__)

_TARGET_REMARK = (
    "--target-bytes chose how much to keep with {groups} groups per layer, not how many groups; "
    "fewer leave room to keep more, often with a smaller error (--ep, --groups-per-rank)"
)


def main() -> None:
    """One rank, from the command line."""
    run_entry_point(run)


def run() -> int:
    """Check the options and compress."""
    return run_compress(parse(CompressConfig, CompressConfig.__doc__ or ""))


def run_compress(config: CompressConfig) -> int:
    """Compress on every rank that was started; rank 0 prints the table. Exit code 0."""
    quiet_libraries()
    workers = find_workers()
    settings = compress(config, workers).settings
    if workers.rank == 0:
        description = describe(CompressedCheckpoint(config.output))
        print(layer_table(description))
        if settings.target_bytes is not None and settings.residual_codec.keep is not None:
            print(_TARGET_REMARK.format(groups=settings.groups * settings.groups_per_rank))
    return 0


def compress(config: CompressConfig, workers: Workers | None = None) -> CheckpointIndex:
    """Compress a model and return the index of the result.

    workers: the ranks that share the work, this process alone by default. Raises UserError for
    whatever the user can correct.
    """
    workers = workers or SingleWorker()
    check_solver(config.solver)
    device = _device(config.device, workers)
    source = SourceCheckpoint(config.source, drop_unused=config.drop_unused)
    if workers.rank == 0 and (line := source.unused_line()):
        logger.warning(line)
    digest, measure, sensitivity, routers = None, None, None, None
    if config.calibration is not None:
        digest, sequences = calibration_of(source, config.calibration)
        measure = partial(_activations, source, sequences)
        sensitivity = partial(measure_sensitivity, source, sequences)
        if config.recalibrate_router:
            routers = RouterRefit(source, sequences)
    run = Compression(
        source,
        config.output,
        settings_of(
            config,
            parse_layers(config.layers, len(source.sites)),
            digest,
            itemsize=source.dtype(0).itemsize,
        ),
        workers,
        device=device,
        max_memory=config.max_memory,
        measure=measure,
        measure_sensitivity=sensitivity,
        # One group for all ranks takes more memory.
        may_join=config.groups_per_rank is None and config.max_memory is None,
        routers=routers,
    )
    return run.run(resume=config.resume)


def settings_of(
    config: CompressConfig,
    layers: list[int],
    calibration: str | None = None,
    *,
    itemsize: int = 2,
) -> CompressionSettings:
    """The checkpoint's settings from a command's configuration.

    layers: positions of the compressed layers. calibration: digest of the calibration tokens.
    itemsize: bytes of the source's values, unless `config.dtype` says what is stored.
    Raises UserError for an unknown codec or method, or an option that one of them does not have.
    """
    residual, center = parse_codecs(config.residual_text, config.center_text)
    if config.keep is not None:
        residual = with_budget(residual, config.keep)
    try:
        name, given = parse_name_and_options(config.method)
        known = method_named(name).config.model_fields
        options = {key: getattr(config, key) for key in known if key in CompressConfig.model_fields}
        # None: the method's own default.
        chosen = {key: value for key, value in options.items() if value is not None}
        method = method_of(MethodSpec(name=name, options=chosen | given)).spec
    except ValueError as error:
        raise UserError(f"--method {config.method}: {error}") from error
    return CompressionSettings(
        groups=config.ep,
        groups_per_rank=config.clusters,
        method=method,
        center_codec=center,
        residual_codec=residual,
        target_bytes=target_share(config, itemsize),
        calibration=calibration,
        recalibrate_router=config.recalibrate_router,
        layers=layers,
        dtype=config.dtype,
    )


def target_share(config: StorageConfig, itemsize: int) -> float | None:
    """The share of the dense bytes that `--target-bytes` or `--target-bits` asks for."""
    if config.target_bits is None:
        return config.target_bytes
    stored = STORED_DTYPES[config.dtype].itemsize if config.dtype else itemsize
    return config.target_bits / (8 * stored)


def _device(name: str, workers: Workers) -> torch.device:
    """Where to compute: the ranks on one host take its GPUs in turn."""
    if name == "cpu":
        return torch.device(name)
    hosts = workers.gather(socket.gethostname())
    if not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here; leave --device out")
    number = hosts[: workers.rank].count(hosts[workers.rank])
    return torch.device(name, number % torch.cuda.device_count())


def calibration_of(source: SourceCheckpoint, text: Path) -> tuple[str, list[list[int]]]:
    """SHA-256 of a text's token ids, and the ids, in sequences of the same length.

    Raises UserError for a text that cannot be used, or a source without a tokenizer.
    """
    sequences = calibration_sequences(text, load_tokenizer(source.folder))
    check_vocabulary(text, sequences, source.config.get_text_config().vocab_size)
    return hashlib.sha256(json.dumps(sequences).encode()).hexdigest(), sequences


def _activations(
    source: SourceCheckpoint, sequences: list[list[int]], samples: SampleFiles | None
) -> list[LayerActivations]:
    return measure_activations(source, sequences, samples=samples)


if __name__ == "__main__":
    main()
