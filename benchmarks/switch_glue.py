"""A Switch Transformer fine-tuned on GLUE tasks, then compressed by each method (001, table 2).

    python -m benchmarks.switch_glue MODEL --tasks sst2 --learning-rate 1e-4 --work DIR
    python -m benchmarks.switch_glue MODEL --tasks cola --data DIR --methods UP "ResMoE (UP)" resmoe

Experts and routers are frozen while everything else is fine-tuned, with the optimiser of paper 000
(table 1). Each method then compresses the last four MoE layers of encoder and decoder, without
further training. The papers choose among learning rates of 1e-5 2e-5 3e-5 5e-5 1e-4 2e-4 3e-4 5e-4
1e-3, batch sizes of 16 32 64 and 3 5 10 15 20 epochs (000, appendix A.1), separately for each task,
and report three seeds (`--repeats`).

The papers add a classification head "according to the setting of T5". transformers has one for T5
and none for Switch, so this benchmark does what T5 itself does: the label is a word, and the word
that the decoder finds most probable is the answer (`label_words.py`). Published figures come from
another head, hyper-parameters chosen by search, and perhaps other splits: compare differences to
the uncompressed model.
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks import harness
from benchmarks.glue import (
    TASKS,
    Example,
    Task,
    accuracy,
    check_libraries,
    matthews,
    read_examples,
)
from benchmarks.harness import logger, positive, share
from benchmarks.label_words import LabelWords, Training, fine_tune
from benchmarks.paper_methods import KEEP, METHODS, papers_layers, papers_model
from benchmarks.published import published
from benchmarks.tables import Row
from benchmarks.timing import Clock
from resmoe_dist.checkpoints.compressed import CompressedCheckpoint
from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.checkpoints.tensor_files import read_json_object, write_json
from resmoe_dist.config.commands import CompressConfig
from resmoe_dist.errors import UserError
from resmoe_dist.evaluation.perplexity import load_tokenizer
from resmoe_dist.evaluation.report import describe
from resmoe_dist.jobs.settings import parse_layers
from resmoe_dist.launch.compress import compress
from resmoe_dist.runtime.loading import load_model

FULL = "Full"
TABLES = (
    (
        *("rows", "task", "method", "published=published:.2f", "accuracy=accuracy:.2f"),
        *("±=accuracy_sd:.2f", "to full=to_full:+.2f", "Matthews=matthews:.2f"),
        *("agreement=agreement:.1%", "error=relative_error:.4f", "of dense bytes=dense_share:.1%"),
        "reason",
    ),
)
_FINE_TUNING_FILE = "fine-tuning.json"
# As many as paper 002 takes (appendix A2).
_CALIBRATION_EXAMPLES = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See `harness`."""
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="folder of a Switch Transformer")
    add("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    add("--data", type=Path, metavar="DIR", help="JSONL files instead of the library datasets")
    add("--learning-rate", type=_rate, default=1e-4)
    add("--batch-size", type=positive, default=32)
    add("--epochs", type=positive, default=3)
    add("--max-length", type=positive, default=128, help="tokens of an input")
    add("--limit", type=positive, metavar="N", help="examples of each split, for a trial")
    names = list(METHODS)
    add("--methods", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    add("--keep", type=share, default=KEEP, help="share kept (default %(default)s)")
    add("--layers", help="as of compress (default: the last four MoE layers of each half)")
    add("--work", type=Path, metavar="DIR", help="keep fine-tuned models here, or reuse them")


def _rate(text: str) -> float:
    """A learning rate, for argparse."""
    rate = float(text)
    if not (rate > 0 and math.isfinite(rate)):
        raise argparse.ArgumentTypeError(f"{text}: must be above 0")
    return rate


def measure(args: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """rows: per task, the uncompressed model and each method; means over seeds, in percent."""
    tasks = [TASKS[name] for name in dict.fromkeys(args.tasks)]
    check_libraries(tasks, args.data)
    source = SourceCheckpoint(args.model)
    if source.config.model_type != "switch_transformers":
        raise UserError(f"{args.model}: a {source.config.model_type}; give a Switch Transformer")
    layers = args.layers or papers_layers(source)
    parse_layers(layers, len(source.sites))
    rows = []
    for task in tasks:
        train = read_examples(task, "train", args.data, args.limit)
        scored = read_examples(task, "validation", args.data, args.limit)
        runs = []
        for repeat in range(args.repeats):
            training = Training(
                args.learning_rate,
                args.batch_size,
                args.epochs,
                args.max_length,
                args.seed + repeat,
            )
            runs.append(_Run(args, task, training, layers, clock.device).measure(train, scored))
        named = papers_model(source.config)
        rows += [
            {"task": task.title, "method": method, "published": _published(named, task, method)}
            | _joined([run[method] for run in runs])
            for method in (FULL, *args.methods)
        ]
        full = rows[-1 - len(args.methods)]["accuracy"]
        for row in rows[-1 - len(args.methods) :]:
            row["to_full"] = row["accuracy"] - full if "accuracy" in row else None
    return {"rows": rows, "layers": layers}


def _published(model: str | None, task: Task, method: str) -> float | None:
    if model is None:
        return None
    found = [published(f"001 table {table}", model, method, task.title) for table in (2, 4)]
    return next((each for each in found if each is not None), None)


def _joined(runs: list[Row]) -> Row:
    """Means over seeds, and `_sd` of several."""
    if "reason" in runs[0]:
        return runs[0]
    row: Row = {name: statistics.fmean(run[name] for run in runs) for name in runs[0]}
    if len(runs) > 1:
        row |= {f"{name}_sd": statistics.stdev(run[name] for run in runs) for name in runs[0]}
    return row


class _Run:
    """One task with one seed."""

    def __init__(
        self,
        args: argparse.Namespace,
        task: Task,
        training: Training,
        layers: str,
        device: torch.device,
    ) -> None:
        self._args, self._task, self._training = args, task, training
        self._layers, self._device = layers, device
        tokenizer = load_tokenizer(args.model)
        self._tokenizer = tokenizer
        self._words = LabelWords(tokenizer, task.words, training.max_length)

    def measure(self, train: list[Example], scored: list[Example]) -> dict[str, Row]:
        """The figures of each method."""
        texts, labels = [each.text for each in scored], [each.label for each in scored]
        with self._folder() as work:
            tuned = work / f"{self._task.name}-seed{self._training.seed}"
            self._ensure_tuned(tuned, train)
            full = self._predict(self._load(tuned), texts)
            rows = {FULL: self._figures(full, full, labels)}
            calibration = work / "calibration.txt"
            calibration.write_text(
                "\n".join(each.text for each in train[:_CALIBRATION_EXAMPLES]), encoding="utf-8"
            )
            for method in self._args.methods:
                with TemporaryDirectory(dir=work) as scratch:
                    output = Path(scratch) / "compressed"
                    try:
                        cost = self._compress(tuned, output, method, calibration)
                    except UserError as error:
                        rows[method] = {"reason": str(error)}
                        continue
                    found = self._predict(self._load(output), texts)
                rows[method] = self._figures(found, full, labels) | cost
                logger.info("%s, seed %d, %s", self._task.name, self._training.seed, method)
        return rows

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        if self._args.work is None:
            with TemporaryDirectory() as folder:
                yield Path(folder)
            return
        self._args.work.mkdir(parents=True, exist_ok=True)
        yield self._args.work

    def _ensure_tuned(self, folder: Path, train: list[Example]) -> None:
        """Fine-tune into `folder`, or check that it holds the same."""
        facts = {
            "model": SourceCheckpoint(self._args.model).fingerprint(),
            "task": self._task.name,
            "examples": len(train),
            **self._training.as_dict(),
        }
        if folder.exists():
            if read_json_object(folder / _FINE_TUNING_FILE) != facts:
                raise UserError(f"{folder}: fine-tuned otherwise; choose another --work")
            return
        model = self._load(self._args.model)
        fine_tune(model, self._words, train, self._training)
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        self._tokenizer.save_pretrained(partial)
        write_json(partial / _FINE_TUNING_FILE, facts)
        partial.rename(folder)

    def _load(self, folder: Path) -> PreTrainedModel:
        return load_model(folder, dtype=torch.float32).to(self._device)

    def _predict(self, model: PreTrainedModel, texts: list[str]) -> list[int]:
        return self._words.predict(model, texts, self._training.batch_size)

    def _figures(self, found: list[int], full: list[int], labels: list[int]) -> Row:
        row: Row = {
            "accuracy": 100 * accuracy(found, labels),
            "agreement": accuracy(found, full),
        }
        if self._task.matthews:
            row["matthews"] = 100 * matthews(found, labels)
        return row

    def _compress(self, source: Path, output: Path, method: str, calibration: Path) -> Row:
        contender = METHODS[method]
        options = contender.compress_options(self._training.seed, ep=1)
        if contender.calibrated:
            options["calibration"] = calibration
        compress(
            CompressConfig(
                source=source,
                output=output,
                layers=self._layers,
                keep=self._args.keep,
                device=self._device.type,
                **options,
            )
        )
        described = describe(CompressedCheckpoint(output))
        chosen = [layer for layer in described["layers"] if layer["compressed"]]
        stored = sum(layer["stored_bytes"] for layer in chosen)
        return {
            "relative_error": described["experts"]["relative_error"],
            "dense_share": stored / sum(layer["dense_bytes"] for layer in chosen),
        }


if __name__ == "__main__":
    harness.main(sys.modules[__name__])
