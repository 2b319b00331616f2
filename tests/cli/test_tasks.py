"""Tasks of lm-eval: on a model, on a grid, in `evaluate` and in `compare`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from resmoe_dist import load_model
from resmoe_dist.comparison.run import run_compare
from resmoe_dist.config.commands import CompareConfig
from resmoe_dist.config.sources import build_config
from resmoe_dist.evaluation.perplexity import load_tokenizer
from resmoe_dist.evaluation.tasks import Tasks
from resmoe_dist.parallel.topology import build_topology
from resmoe_dist.testing.corpus import VOCABULARY_SIZE, byte_tokenizer
from tests.cli.commands import assert_mistake
from tests.models import FAMILIES, compress, dense_model, random_sequences, save_family
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.usefixtures("offline")
EXAMPLES = [
    {"context": f"{a} + {b} = ", "choices": [str(a + b), str(a * b + 1), "none"], "label": 0}
    for a in range(1, 5)
    for b in range(2, 6)
]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A compressed model that reads bytes."""
    folder = tmp_path_factory.mktemp("tasks")
    save_family(FAMILIES["mixtral"], folder / "source", vocab_size=VOCABULARY_SIZE)
    byte_tokenizer("left").save_pretrained(folder / "source")
    compress(folder / "source", folder / "c", groups=2, keep=1.0)
    return folder / "c"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A folder with the task `sums`."""
    folder = tmp_path_factory.mktemp("yaml")
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, EXAMPLES)))
    (folder / "sums.yaml").write_text(
        f"""
task: sums
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder / "sums.jsonl"}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: ""
metric_list:
  - metric: acc
"""
    )
    return folder


def _accuracy(source: Path) -> float:
    """Share of the examples whose right answer is the likeliest one, in plain transformers."""
    dense, tokenizer = dense_model(source), load_tokenizer(source)
    right = 0
    for example in EXAMPLES:
        likelihoods = []
        for choice in example["choices"]:
            before = tokenizer(example["context"])["input_ids"]
            ids = tokenizer(example["context"] + choice)["input_ids"]
            with torch.no_grad():
                logs = dense(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            places = range(len(before), len(ids))
            likelihoods.append(sum(float(logs[i - 1, ids[i]]) for i in places))
        right += likelihoods.index(max(likelihoods)) == example["label"]
    return right / len(EXAMPLES)


def test_accuracy_is_that_of_plain_transformers(run, model, tasks, tmp_path):
    options = ("--tasks", "sums", "--task-folder", tasks, "--json", tmp_path / "r.json")

    code, out, err = run("evaluate", model, *options)

    accuracy = _accuracy(model.parent / "source")
    assert (code, err) == (0, "")
    assert out == f"sums acc  {accuracy:.4f}\n"
    assert json.loads((tmp_path / "r.json").read_text()) == {"tasks": {"sums acc": accuracy}}
    assert 0 < accuracy < 1


def test_a_limit_takes_the_first_examples(model, tasks):
    found = Tasks(("sums",), tasks, limit=1).score(load_model(model), load_tokenizer(model))
    assert found["sums acc"] in (0.0, 1.0)


def _score_on_grid(folder: Path, tasks: Path) -> dict[str, float]:
    model = load_model(folder, topology=build_topology(2, 2, lanes=1))
    return Tasks(("sums",), tasks).score(model, load_tokenizer(folder))


@pytest.mark.slow
def test_ranks_of_a_grid_score_the_same(model, tasks):
    found = run_on_ranks(4, _score_on_grid, model, tasks)
    assert found[0] == {"sums acc": _accuracy(model.parent / "source")}


@pytest.mark.slow
def test_compare_has_a_column_for_each_metric(model, tasks, tmp_path):
    source, ids = model.parent / "source", tmp_path / "ids.json"
    ids.write_text(json.dumps(random_sequences(12, 12)))
    values: dict[str, Any] = {"source": source, "token_ids": ids, "report": tmp_path / "r"}
    values |= {"methods": "up", "keep": "1.0", "tasks": "sums", "task_folder": tasks}

    assert run_compare(build_config(CompareConfig, values)) == 0

    report = json.loads((tmp_path / "r" / "report.json").read_text())
    accuracy = {"sums acc": _accuracy(source)}
    assert report["source"]["tasks"] == report["rows"][0]["tasks"] == accuracy
    lines = (tmp_path / "r" / "report.md").read_text().splitlines()
    (header,) = (line for line in lines if line.startswith("| method"))
    (row,) = (line for line in lines if line.startswith("| up |"))
    assert header.endswith("| sums acc |")
    assert row.endswith(f"| {accuracy['sums acc']:.4f} |")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--tasks", "sums"), "--tasks sums: lm-eval has no such task"),
        (("--tasks", "sums", "--task-folder", "nowhere"), "--task-folder nowhere: no such folder"),
        (("--tasks", "piqa"), "--tasks piqa: cannot be scored ("),
        (("--text", "a.txt", "--task-limit", 3), "--task-limit: needs --tasks"),
        (("--text", "a.txt", "--tasks", "piqa"), "--text and --tasks exclude each other"),
        (("--tasks", "piqa", "--task-limit", 0), "--task-limit"),
    ],
)
def test_mistakes_are_one_line(run, model, options, text):
    assert_mistake(run("evaluate", model, *options), text)


def test_a_missing_library_is_named(run, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert_mistake(run("evaluate", model, "--tasks", "piqa"), "pip install 'resmoe-dist[eval]'")
