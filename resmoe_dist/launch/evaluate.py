"""Perplexity of a model or its accuracy on tasks, in one process or on an EP x TP grid.

deepspeed launch/evaluate.py MODEL --ep 4 --tp 2 (--text F | --token-ids F.json | --tasks NAMES)
"""

from __future__ import annotations

import math

from transformers import PreTrainedModel

from resmoe_dist.checkpoints.entries import STORED_DTYPES
from resmoe_dist.checkpoints.tensor_files import check_writable, write_json
from resmoe_dist.config.arguments import parse
from resmoe_dist.config.commands import EvaluateConfig, GridEvaluateConfig
from resmoe_dist.config.scoring import TasksConfig
from resmoe_dist.errors import UserError
from resmoe_dist.evaluation.perplexity import (
    Evaluation,
    check_vocabulary,
    evaluate,
    load_tokenizer,
    sequences_from_json,
    sequences_from_text,
)
from resmoe_dist.evaluation.tasks import Tasks, TaskScores
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
    tasks = read_tasks(config)
    if tasks is not None and config.lanes not in (None, 1):
        raise UserError(
            f"--tasks: all ranks work on the same examples; leave --lanes {config.lanes} out"
        )
    sequences = [] if tasks else read_sequences(config, served)
    topology = start_grid(
        config.ep,
        config.tp,
        lanes=1 if tasks else config.lanes,
        rank_timeout=config.rank_timeout,
        facts=facts_of(config, served, sequences),
    )
    result: Evaluation | TaskScores
    if tasks:
        result = run_tasks(config, served, tasks, topology, config.dispatch)
    else:
        result = run_evaluate(config, served, sequences, topology, config.dispatch)
    if topology.rank == 0:
        report(result, config)


def read_tasks(config: TasksConfig) -> Tasks | None:
    """The tasks that are asked for, if any. Raises UserError for those that cannot be scored."""
    if config.tasks is None:
        return None
    tasks = Tasks(tuple(dict.fromkeys(config.tasks)), config.task_folder, config.task_limit)
    tasks.check()
    return tasks


def run_alone(config: EvaluateConfig) -> int:
    """`resmoe-dist evaluate`, in one process; exit code 0."""
    quiet_libraries()
    served, tasks = read_model(config), read_tasks(config)
    if tasks:
        report(run_tasks(config, served, tasks), config)
    else:
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
    model = _load(config, served, topology, dispatch)
    check_vocabulary(config.data, sequences, vocabulary_of(model))
    result = evaluate(model, sequences, topology)
    if not math.isfinite(result.nll):
        raise UserError(
            f"{config.model}: the loss is {result.nll}; its values overflow or its files are "
            "damaged: choose another --dtype, or run resmoe-dist verify"
        )
    return result


def run_tasks(
    config: EvaluateConfig,
    served: ServedFolder,
    tasks: Tasks,
    topology: Topology = SINGLE_PROCESS,
    dispatch: str = "auto",
) -> TaskScores:
    """Score tasks on a grid of one lane; the result is on rank 0."""
    tokenizer = load_tokenizer(config.model)
    return tasks.score(_load(config, served, topology, dispatch), tokenizer)


def _load(
    config: EvaluateConfig, served: ServedFolder, topology: Topology, dispatch: str
) -> PreTrainedModel:
    """The model on this rank, after a trial."""
    model = load_model(
        served,
        dtype=STORED_DTYPES[config.dtype] if config.dtype else None,
        topology=topology,
        execution=execution_of(config),
        dispatch=dispatch,
        verify=config.verify,
    )
    check_runs(config.model, model)
    if config.check:
        check_steps(model, topology)
    return model


def report(result: Evaluation | TaskScores, config: EvaluateConfig) -> None:
    """Print a result, and write it as JSON if asked to."""
    if isinstance(result, Evaluation):
        print(f"perplexity {result.perplexity:.6g}  nll {result.nll:.6g}  tokens {result.tokens}")
    else:
        print("\n".join(f"{name}  {score:.4f}" for name, score in result.items()))
    if config.json_file:
        as_dict = result.as_dict() if isinstance(result, Evaluation) else {"tasks": result}
        write_json(config.json_file, as_dict)


if __name__ == "__main__":
    main()
