"""The `resmoe-dist` command. See `resmoe-dist --help`."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from resmoe_dist import __version__
from resmoe_dist.checkpoints.compressed import (
    STORED_DTYPES,
    CompressedCheckpoint,
    CompressionSettings,
)
from resmoe_dist.checkpoints.restore import restore_checkpoint
from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.checkpoints.tensor_files import write_json
from resmoe_dist.compression.activations import LayerActivations
from resmoe_dist.errors import UserError
from resmoe_dist.evaluation.perplexity import (
    DEFAULT_CONTEXT,
    Evaluation,
    check_vocabulary,
    evaluate,
    load_tokenizer,
    sequences_from_json,
    sequences_from_text,
)
from resmoe_dist.evaluation.report import describe, layer_table
from resmoe_dist.parallel.launcher import quiet_libraries, run_entry_point
from resmoe_dist.parallel.topology import SINGLE_PROCESS, Topology
from resmoe_dist.runtime.execution import MODES, Execution
from resmoe_dist.runtime.loading import load_model
from resmoe_dist.runtime.planning import execution_for
from resmoe_dist.sizes import parse_size

if TYPE_CHECKING:
    from resmoe_dist.jobs.workers import Workers


def _share(text: str) -> float:
    """0.35 or 35%."""
    return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)


def add_compress_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `compress`, shared with launch/compress.py."""
    add = parser.add_argument
    add("source", type=Path, help="Hugging Face model folder (safetensors)")
    add("output", type=Path, help="folder to write; must not exist")
    add(
        "--ep",
        type=int,
        required=True,
        metavar="G",
        help="groups per layer, each with a centre of its own: the EP size to serve at",
    )
    add(
        "--groups-per-rank",
        type=int,
        default=1,
        metavar="M",
        help="centres of each EP rank; its experts are clustered by likeness (default 1)",
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--keep", type=float, default=0.25, help="share of residual entries kept (default 0.25)"
    )
    budget.add_argument(
        "--target-bytes",
        type=_share,
        metavar="SHARE",
        help="keep as much as fits this share of the dense expert bytes, centres, indices and all",
    )
    add("--codec", choices=("pruned", "low_rank"), default="pruned")
    add(
        "--preset",
        choices=sorted(PRESETS),
        default="default",
        help="`paper`: --align pot --center barycenter --allocate expert, unless given otherwise",
    )
    add(
        "--align",
        choices=("loo", "pot", "none"),
        help="row alignment: leave-one-out descent (default), POT's barycentre, or none",
    )
    add(
        "--solver",
        choices=("scipy", "lapx"),
        default="scipy",
        help="of assignments in --align loo (default scipy)",
    )
    add(
        "--center",
        choices=("auto", "joint", "barycenter", "mean", "none"),
        help="chosen with the residuals, but none where it would not pay for its bytes (default); "
        "the same without that exception; mean of the aligned experts; mean of the experts as "
        "stored; or none",
    )
    add(
        "--allocate",
        choices=("block", "expert", "group", "model"),
        help="what shares one budget of kept entries: 64 entries of a row, an expert, a group "
        "(default), or all layers",
    )
    add(
        "--calibration",
        type=Path,
        metavar="TEXT",
        help="weigh errors by the activations that this UTF-8 text file causes",
    )
    add("--layers", default="all", help="MoE layers to compress: all, last:24, 8-31 or 0,2")
    add("--dtype", choices=sorted(STORED_DTYPES), help="of stored values (default: the source's)")
    add(
        "--max-memory",
        metavar="SIZE",
        help="bound on each process's memory, page cache aside: 8GB, 7500MiB (default: none)",
    )
    add(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where to compute; with several ranks on a host each takes the next GPU",
    )
    add("--resume", action="store_true", help="continue an interrupted run; keep finished files")


# What --align, --center and --allocate are where they are not given.
PRESETS = {
    "default": {"align": "loo", "center": "auto", "allocate": "group"},
    "paper": {"align": "pot", "center": "barycenter", "allocate": "expert"},
}


def run_compress(args: argparse.Namespace) -> int:
    """`compress`, on every rank that was started."""
    # Imported here: the other commands need neither POT nor SciPy's optimisers.
    from resmoe_dist.compression.assignment import check_solver
    from resmoe_dist.jobs.pipeline import Compression, parse_layers
    from resmoe_dist.jobs.workers import find_workers

    workers = find_workers()
    chosen = {key: getattr(args, key) or value for key, value in PRESETS[args.preset].items()}
    if chosen["center"] == "mean":
        if args.align in ("loo", "pot"):
            raise UserError(f"--center mean averages experts as stored; drop --align {args.align}")
        chosen["align"] = "none"
    check_solver(args.solver)
    max_memory = None if args.max_memory is None else parse_size(args.max_memory)
    device = _device(args.device, workers)
    source = SourceCheckpoint(args.source)
    digest, measure = None, None
    if args.calibration is not None:
        digest, measure = _calibration(source, args.calibration)
    settings = CompressionSettings(
        groups=args.ep,
        groups_per_rank=args.groups_per_rank,
        keep=args.keep,
        target_bytes=args.target_bytes,
        codec=args.codec,
        solver=args.solver,
        layers=parse_layers(args.layers, len(source.sites)),
        dtype=args.dtype,
        calibration=digest,
        **chosen,
    )
    run = Compression(
        source,
        args.output,
        settings,
        workers,
        device=device,
        max_memory=max_memory,
        measure=measure,
    )
    run.run(resume=args.resume)
    if workers.rank == 0:
        print(layer_table(describe(CompressedCheckpoint(args.output))))
    return 0


def _device(name: str, workers: Workers) -> torch.device:
    """Where to compute: ranks on one host take its GPUs in turn."""
    if name == "cpu":
        return torch.device(name)
    hosts = workers.gather(socket.gethostname())
    if not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here; leave --device out")
    number = hosts[: workers.rank].count(hosts[workers.rank])
    return torch.device(name, number % torch.cuda.device_count())


def _calibration(
    source: SourceCheckpoint, text: Path
) -> tuple[str, Callable[[], Sequence[LayerActivations]]]:
    """SHA-256 of a text's token ids, and what measures the activations they cause."""
    from resmoe_dist.jobs.calibration import calibration_sequences, measure_activations

    sequences = calibration_sequences(text, load_tokenizer(source.folder))
    check_vocabulary(text, sequences, source.config.get_text_config().vocab_size)
    digest = hashlib.sha256(json.dumps(sequences).encode()).hexdigest()
    return digest, lambda: measure_activations(source, sequences)


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `evaluate`, shared with launch/evaluate.py."""
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", type=Path, metavar="F", help="UTF-8 text file")
    text.add_argument(
        "--token-ids", type=Path, metavar="F.json", help="JSON list of sequences of token ids"
    )
    parser.add_argument(
        "--context", type=int, default=DEFAULT_CONTEXT, help="tokens per window of --text"
    )
    parser.add_argument(
        "--dtype", choices=sorted(STORED_DTYPES), help="to compute in (default: the checkpoint's)"
    )
    add_execution_arguments(parser)
    parser.add_argument("--json", type=Path, metavar="F", help="write the result here too")


def add_execution_arguments(parser: argparse.ArgumentParser) -> None:
    """How compressed experts are run: options of `evaluate` and of the launch scripts."""
    parser.add_argument(
        "--execution",
        choices=MODES,
        default="auto",
        help="how compressed experts are run (default: what is measured to be fastest)",
    )
    parser.add_argument(
        "--cache-size",
        metavar="SIZE",
        help="of the restored experts that `--execution cached` keeps on each rank: 2GB",
    )


def execution_of(args: argparse.Namespace) -> Execution:
    """What `add_execution_arguments` asked for. Raises UserError for options that contradict."""
    if (args.execution == "cached") != (args.cache_size is not None):
        raise UserError("--execution cached and --cache-size SIZE belong together; give both")
    size = parse_size(args.cache_size, "--cache-size") if args.cache_size else 0
    return execution_for(args.execution, size)


def run_evaluate(args: argparse.Namespace, topology: Topology = SINGLE_PROCESS) -> Evaluation:
    """`evaluate` on a grid; the result is the same on every rank."""
    if args.context < 2:
        raise UserError(f"--context {args.context}: must be 2 or more")
    execution = execution_of(args)
    # Before the model is loaded, which may take minutes.
    if args.text:
        sequences = sequences_from_text(args.text, load_tokenizer(args.model), args.context)
    else:
        sequences = sequences_from_json(args.token_ids)
    dtype = STORED_DTYPES[args.dtype] if args.dtype else None
    model = load_model(args.model, dtype=dtype, topology=topology, execution=execution)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    check_vocabulary(args.text or args.token_ids, sequences, vocabulary)
    return evaluate(model, sequences, topology)


def report_evaluation(result: Evaluation, json_file: Path | None) -> None:
    """Print an evaluation, and write it as JSON where asked."""
    print(f"perplexity {result.perplexity:.6g}  nll {result.nll:.6g}  tokens {result.tokens}")
    if json_file:
        write_json(json_file, result.as_dict())


def _tiny_model(args: argparse.Namespace) -> int:
    from resmoe_dist.testing import train_tiny_model

    report = train_tiny_model(args.directory, args.family, args.seed)
    print(
        f"{args.directory}: {report.family}, {report.parameters / 1e6:.1f} M parameters, trained "
        f"in {report.seconds:.0f} s; held-out {report.held_out_nll:.3f} nats per byte "
        f"(unigram {report.unigram_nll:.3f})"
    )
    return 0


def _inspect(args: argparse.Namespace) -> int:
    description = describe(CompressedCheckpoint(args.folder))
    settings = ", ".join(
        f"{k} {v}"
        for k, v in description["settings"].items()
        if k not in ("layers", "calibration") and v is not None
    )
    print(f"{description['folder']}: {settings}; written by {description['producer']}")
    print(layer_table(description))
    if args.json:
        write_json(args.json, description)
    return 0


def _verify(args: argparse.Namespace) -> int:
    checkpoint = CompressedCheckpoint(args.folder)
    faults = checkpoint.faults()
    for fault in faults:
        print(fault)
    if faults:
        return 1
    print(f"{args.folder}: all {len(checkpoint.files())} files are whole")
    return 0


def _restore(args: argparse.Namespace) -> int:
    restore_checkpoint(args.folder, args.output, STORED_DTYPES[args.dtype] if args.dtype else None)
    print(f"{args.output}: dense model written")
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    report_evaluation(run_evaluate(args), args.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="resmoe-dist", description=__doc__.split("\n")[0])
    parser.add_argument("--version", action="version", version=f"resmoe-dist {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Any, summary: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=summary)
        added.set_defaults(run=run)
        return added

    tiny = command("tiny-model", _tiny_model, "train a tiny MoE model on Python's own sources")
    tiny.add_argument("directory", type=Path)
    tiny.add_argument(
        "--family", default="mixtral", choices=("mixtral", "deepseek_v3", "qwen3_moe", "switch")
    )
    tiny.add_argument("--seed", type=int, default=0)

    add_compress_arguments(
        command("compress", run_compress, "compress a model's experts into centres and residuals")
    )

    inspect = command("inspect", _inspect, "show errors and bytes of a compressed checkpoint")
    inspect.add_argument("folder", type=Path)
    inspect.add_argument("--json", type=Path, metavar="F", help="write everything here too")

    verify = command("verify", _verify, "check digests and shapes; exit 1 if a file is bad")
    verify.add_argument("folder", type=Path)

    restore = command("restore", _restore, "write a dense model that plain transformers loads")
    restore.add_argument("folder", type=Path)
    restore.add_argument("output", type=Path, help="folder to write; must not exist")
    restore.add_argument(
        "--dtype", choices=sorted(STORED_DTYPES), help="of the experts (default: as stored)"
    )

    evaluate_ = command("evaluate", _evaluate, "perplexity of a source, dense or compressed model")
    evaluate_.add_argument("model", type=Path)
    add_evaluate_arguments(evaluate_)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: exit code 0, 1 for a failed check, 2 for a user's mistake."""
    args = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    quiet_libraries()
    run_entry_point(lambda: args.run(args))
