"""Four GLUE tasks as T5 reads them (Raffel et al. 2020, appendix D): texts, label words, scores.

Examples come from the library `datasets` (extra `glue`), or from files of the same form:
DIR/TASK/train.jsonl and DIR/TASK/validation.jsonl, one object per line with the task's fields and
`label`, such as {"sentence": "a fine film", "label": 1}.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from resmoe_dist.errors import UserError

Split = Literal["train", "validation"]
_NEEDS = "{what} needs {library}; run pip install 'resmoe-dist[glue]'"
_SOURCE = "nyu-mll/glue"


class Example(NamedTuple):
    """text: what the encoder reads. label: position of its word among the task's."""

    text: str
    label: int


@dataclass(frozen=True)
class Task:
    """name: as in `datasets`. title: in the papers. fields: of an example, in the text's order.

    words: by label. validation: the split of `datasets` to score on. matthews: whether GLUE scores
    it by Matthews correlation; the papers give accuracy for all.
    """

    name: str
    title: str
    fields: tuple[str, ...]
    words: tuple[str, ...]
    validation: str = "validation"
    matthews: bool = False

    def example(self, found: Any, place: str) -> Example:
        """An example of an object with the task's fields. Raises UserError if it has others."""
        if not isinstance(found, dict):
            raise UserError(f"{place}: not a JSON object")
        for field in self.fields:
            if not isinstance(found.get(field), str):
                raise UserError(f"{place}: no text {field!r}; {self.name} needs {self.fields}")
        label = found.get("label")
        if type(label) is not int or not 0 <= label < len(self.words):
            raise UserError(f"{place}: label is {label!r}; give 0 to {len(self.words) - 1}")
        parts = [f"{field}: {found[field].strip()}" for field in self.fields]
        return Example(" ".join([self.name, *parts]), label)


TASKS = {
    task.name: task
    for task in (
        Task("sst2", "SST-2", ("sentence",), ("negative", "positive")),
        Task("mrpc", "MRPC", ("sentence1", "sentence2"), ("not_equivalent", "equivalent")),
        Task("cola", "CoLA", ("sentence",), ("unacceptable", "acceptable"), matthews=True),
        Task(
            "mnli",
            "MNLI",
            ("hypothesis", "premise"),
            ("entailment", "neutral", "contradiction"),
            validation="validation_matched",
        ),
    )
}


def check_libraries(tasks: Iterable[Task], data: Path | None) -> None:
    """Raise UserError, before any work, if the tasks need a library that is not installed."""
    if data is None and importlib.util.find_spec("datasets") is None:
        text = _NEEDS.format(what="reading GLUE", library="datasets")
        raise UserError(f"{text}, or give --data DIR")
    for task in tasks:
        if task.matthews and importlib.util.find_spec("sklearn") is None:
            raise UserError(_NEEDS.format(what=f"scoring {task.name}", library="scikit-learn"))


def read_examples(
    task: Task, split: Split, data: Path | None, limit: int | None = None
) -> list[Example]:
    """The first `limit` examples of a split, None for all. data: a folder, None for `datasets`.

    Raises UserError for a file that cannot be used, or a split without examples.
    """
    found = _from_datasets(task, split) if data is None else _from_file(task, split, data)
    examples = list(islice(found, limit))
    if not examples:
        raise UserError(f"{task.name}: no examples in {split}")
    return examples


def _from_file(task: Task, split: Split, data: Path) -> Iterator[Example]:
    path = data / task.name / f"{split}.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); write one example per line") from error
    for number, line in enumerate(lines, start=1):
        place = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: not JSON ({error})") from error
        yield task.example(found, place)


def _from_datasets(task: Task, split: Split) -> Iterator[Example]:
    import datasets

    name = "train" if split == "train" else task.validation
    for number, found in enumerate(datasets.load_dataset(_SOURCE, task.name, split=name)):
        yield task.example(found, f"{_SOURCE}, {task.name}, {name}, example {number}")


def accuracy(predicted: Sequence[int], labels: Sequence[int]) -> float:
    """Share of equal labels."""
    return sum(p == q for p, q in zip(predicted, labels, strict=True)) / len(labels)


def matthews(predicted: Sequence[int], labels: Sequence[int]) -> float:
    """Matthews correlation, as GLUE scores CoLA; 0 if all predictions are the same."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predicted))
