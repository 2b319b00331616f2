"""Perplexity of a model, in one process or on an expert x tensor parallel grid.

deepspeed launch/evaluate.py MODEL --ep 4 --tp 2 (--text F | --token-ids F.json) [--json F]
"""

from __future__ import annotations

import math

from resmoe_dist.checkpoints.format import STORED_DTYPES
from resmoe_dist.checkpoints.tensor_files import check_writable, write_json
from resmoe_dist.config.arguments import parse
from resmoe_dist.config.commands import EvaluateConfig, GridEvaluateConfig
from resmoe_dist.errors import UserError
from resmoe_dist.evaluation.perplexity import (
    Evaluation,
    check_vocabulary,
    evaluate,
    load_tokenizer,
    sequences_from_json,
    sequences_from_text,
)
from resmoe_dist.launch.execution import execution_of
from resmoe_dist.launch.facts import facts_of
from resmoe_dist.parallel.entry_point import launched_rank, quiet_libraries, run_entry_point
from resmoe_dist.parallel.launcher import start_grid
from resmoe_dist.parallel.topology import SINGLE_PROCESS, Topology
from resmoe_dist.runtime.checking import check_steps
from resmoe_dist.runtime.decoding import vocabulary_of
from resmoe_dist.runtime.folder_checks import check_runs
from resmoe_dist.runtime.loading import load_model
from resmoe_dist.runtime.served_folder import ServedFolder


def main() -> None:
    """One rank, from the command line."""
    run_entry_point(run)


def run() -> None:
    """Check the options, join the grid, evaluate; rank 0 reports."""
    config = parse(GridEvaluateConfig, GridEvaluateConfig.__doc__ or "")
    quiet_libraries()
    # Mistakes are found here, before ranks are started.
    execution_of(config)
    served = read_model(config, config.ep, config.tp)
    sequences = read_sequences(config, served)
    topology = start_grid(
        config.ep,
        config.tp,
        lanes=config.lanes,
        rank_timeout=config.rank_timeout,
        facts=facts_of(config, served, sequences),
    )
    result = run_evaluate(config, served, sequences, topology, config.dispatch)
    if topology.rank == 0:
        report(result, config)


def run_alone(config: EvaluateConfig) -> int:
    """`resmoe-dist evaluate`, in one process; exit code 0."""
    quiet_libraries()
    served = read_model(config)
    report(run_evaluate(config, served, read_sequences(config, served)), config)
    return 0


def read_model(config: EvaluateConfig, ep: int = 1, tp: int = 1) -> ServedFolder:
    """The model's folder.

    Raises UserError for a model that cannot be scored on the grid, or an unwritable output.
    """
    if config.json_file and not launched_rank():
        check_writable(config.json_file)
    served = ServedFolder.read(config.model)
    served.check_grid(ep, tp)
    served.check_language_model()
    return served


def read_sequences(config: EvaluateConfig, served: ServedFolder) -> list[list[int]]:
    """Token ids of the sequences to score. Raises UserError for a file that cannot be used."""
    if config.text:
        tokenizer = load_tokenizer(config.model)
        sequences = sequences_from_text(config.text, tokenizer, config.context)
    else:
        sequences = sequences_from_json(config.data)
    if served.vocabulary is not None:
        check_vocabulary(config.data, sequences, served.vocabulary)
    return sequences


def run_evaluate(
    config: EvaluateConfig,
    served: ServedFolder,
    sequences: list[list[int]],
    topology: Topology = SINGLE_PROCESS,
    dispatch: str = "auto",
) -> Evaluation:
    """Score sequences on a grid; the result is the same on every rank."""
    execution = execution_of(config)
    dtype = STORED_DTYPES[config.dtype] if config.dtype else None
    model = load_model(
        served,
        dtype=dtype,
        topology=topology,
        execution=execution,
        dispatch=dispatch,
        verify=config.verify,
    )
    check_runs(config.model, model)
    if config.check:
        check_steps(model, topology)
    check_vocabulary(config.data, sequences, vocabulary_of(model))
    result = evaluate(model, sequences, topology)
    if not math.isfinite(result.nll):
        raise UserError(
            f"{config.model}: the loss is {result.nll}; its values overflow or its files are "
            "damaged: choose another --dtype, or run resmoe-dist verify"
        )
    return result


def report(result: Evaluation, config: EvaluateConfig) -> None:
    """Print an evaluation, and write it as JSON if asked to."""
    print(f"perplexity {result.perplexity:.6g}  nll {result.nll:.6g}  tokens {result.tokens}")
    if config.json_file:
        write_json(config.json_file, result.as_dict())


if __name__ == "__main__":
    main()
