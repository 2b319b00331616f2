"""Accuracy on the tasks of lm-eval, the optional extra `eval`.

Papers 000 and 001 score WikiText, LAMBADA, PIQA and WinoGrande. lm-eval loads the data of its own
tasks by name; with HF_DATASETS_OFFLINE=1 only from the cache. Further tasks are YAML files.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from resmoe_dist.errors import UserError, first_line

_MISSING = "--tasks: lm-eval is not installed; run pip install 'resmoe-dist[eval]'"
_SEQUENCES_PER_BATCH = 8

# "piqa acc" -> 0.79
TaskScores = dict[str, float]


@dataclass(frozen=True)
class Tasks:
    """names: of lm-eval's tasks, or of those of `folder`. limit: examples of each; None for all."""

    names: tuple[str, ...]
    folder: Path | None = None
    limit: int | None = None

    def check(self) -> None:
        """Raise UserError if lm-eval is not installed, or does not know one of the tasks."""
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError(_MISSING)
        if self.folder is not None and not self.folder.is_dir():
            raise UserError(f"--task-folder {self.folder}: no such folder")
        with _quiet():
            known = self._manager.all_tasks
        for name in self.names:
            if name not in known:
                raise UserError(
                    f"--tasks {name}: lm-eval has no such task; `lm-eval ls tasks` lists its own, "
                    "and --task-folder adds others"
                )

    def score(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> TaskScores:
        """Every metric of every task: `{"piqa acc": 0.79}`; nothing on ranks other than 0.

        On a grid it is collective over the ranks, which all work on the same examples: one lane.
        Raises UserError if a task's data cannot be loaded.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        with _quiet(), _without_environment():
            try:
                found = simple_evaluate(
                    model=HFLM(
                        pretrained=model, tokenizer=tokenizer, batch_size=_SEQUENCES_PER_BATCH
                    ),
                    tasks=list(self.names),
                    task_manager=self._manager,
                    limit=self.limit,
                    bootstrap_iters=0,
                )
            except (OSError, ValueError, KeyError) as error:
                names = ",".join(self.names)
                raise UserError(
                    f"--tasks {names}: cannot be scored ({first_line(error)})"
                ) from error
        return {} if found is None else _scores(found["results"])

    @cached_property
    def _manager(self) -> Any:
        """Knows the tasks of the folder, and lm-eval's own if they are needed: there are thousands
        of files to read."""
        from lm_eval.tasks import TaskManager

        if self.folder is None:
            return TaskManager()
        own = TaskManager(include_path=str(self.folder), include_defaults=False)
        if set(self.names) <= set(own.all_tasks):
            return own
        return TaskManager(include_path=str(self.folder))


def _scores(results: dict[str, dict[str, Any]]) -> TaskScores:
    """lm-eval names a metric `acc,none`: with the filter that the answers went through."""
    scores = {}
    for task, figures in results.items():
        for key, value in figures.items():
            metric, comma, chosen = key.partition(",")
            if comma and isinstance(value, int | float):
                suffix = "" if chosen == "none" else f" ({chosen})"
                scores[f"{task} {metric}{suffix}"] = float(value)
    return scores


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's log and its progress bars."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def _without_environment() -> Iterator[None]:
    """Without what lm-eval notes of the machine: it asks git, which complains outside of a
    repository, and lists all installed packages, which takes seconds."""
    with patch.multiple(
        "lm_eval.evaluator", get_git_commit_hash=lambda: None, add_env_info=lambda results: None
    ):
        yield
