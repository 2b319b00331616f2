"""What models are scored on: text, token ids, or tasks of lm-eval."""

from __future__ import annotations

from pathlib import Path

from pydantic import model_validator
from typing_extensions import Self

from resmoe_dist.config.options import CommandConfig, option
from resmoe_dist.config.values import Names


class ScoredTextConfig(CommandConfig):
    """Text or token ids."""

    text: Path | None = option(
        None, "UTF-8 text file to score", metavar="F", exclusive="data", required_set=True
    )
    token_ids: Path | None = option(
        None,
        "JSON list of sequences of token ids to score",
        metavar="F.json",
        exclusive="data",
        required_set=True,
    )
    context: int = option(512, "tokens per window of --text", ge=2)

    @property
    def data(self) -> Path:
        """The file to score: of --text or --token-ids."""
        data = self.text or self.token_ids
        assert data is not None
        return data


class TasksConfig(CommandConfig):
    """Tasks of lm-eval."""

    tasks: Names | None = option(
        None, "lm-eval tasks to score, with commas: piqa,winogrande", metavar="NAMES"
    )
    task_folder: Path | None = option(
        None, "folder with YAML files of further tasks", metavar="DIR"
    )
    task_limit: int | None = option(None, "examples of each task (default: all)", metavar="N", ge=1)

    @model_validator(mode="after")
    def _check_tasks(self) -> Self:
        if self.tasks is None:
            for name in ("task_folder", "task_limit"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{self.shown_name(name)}: needs --tasks")
        return self
