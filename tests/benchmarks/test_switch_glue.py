"""Fine-tuning a tiny Switch Transformer on generated tasks, and comparing methods on them."""

from __future__ import annotations

import json
import math
import random
import sys
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import glue, harness, switch_glue
from benchmarks.glue import TASKS, Example, accuracy, check_libraries, matthews, read_examples
from benchmarks.label_words import LabelWords, Training, fine_tune, rate_factor
from resmoe_dist.evaluation.perplexity import load_tokenizer
from resmoe_dist.runtime.loading import load_model
from resmoe_dist.testing.corpus import EOS_ID, byte_tokenizer
from resmoe_dist.testing.recipes import RECIPES, build_model
from tests.benchmarks.runs import results_of
from tests.checkpoints.damage import mistake
from tests.models import FAMILIES, save_family

SST2 = TASKS["sst2"]
SMALL = {"d_model": 32, "d_kv": 16, "num_heads": 2, "d_ff": 48, "num_layers": 2}
SMALL |= {"num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}


@pytest.fixture(scope="module")
def switch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("switch")
    torch.manual_seed(0)
    build_model("switch", RECIPES["switch"].config | SMALL).save_pretrained(folder)
    byte_tokenizer("right").save_pretrained(folder)
    return folder


def _write(folder, task, count):
    """Sentences of mostly one letter or another, which decides the label."""
    chosen = random.Random(0)
    (folder / task).mkdir(parents=True)
    for split in ("train", "validation"):
        lines = []
        for number in range(count):
            letters = "abz" if number % 2 else "xyz"
            sentence = "".join(chosen.choices(letters, k=chosen.randint(4, 12)))
            lines.append(json.dumps({"sentence": sentence, "label": number % 2}))
        (folder / task / f"{split}.jsonl").write_text("\n".join(lines))


def test_a_generated_task_is_learnt_and_compared(switch, tmp_path):
    _write(tmp_path / "data", "sst2", 64)
    options = ("--data", tmp_path / "data", "--work", tmp_path / "work", "--repeats", 2)
    training = ("--tasks", "sst2", "--learning-rate", 0.02, "--batch-size", 16, "--epochs", 12)
    methods = ("--methods", "UP", "M-SMoE", "ResMoE (UP)")
    results = results_of(switch_glue, tmp_path, switch, *options, *training, *methods)

    full, *rows = results["rows"]
    assert results["layers"] == "0,1"
    assert full["method"] == "Full" and full["accuracy"] >= 90
    assert full["to_full"] == 0 and full["agreement"] == 1
    assert "reason" not in json.dumps(rows)
    for row in rows:
        assert row["task"] == "SST-2" and row["published"] is None
        assert row["to_full"] == pytest.approx(row["accuracy"] - full["accuracy"])
        assert 0 < row["relative_error"] < 1
    # Of 4 experts: a quarter of the entries and their bits; one expert; a centre and the first.
    assert rows[0]["dense_share"] == pytest.approx(0.25 + 1 / 32, abs=0.03)
    assert rows[1]["dense_share"] == 0.25
    assert rows[2]["dense_share"] == pytest.approx(0.5 + 1 / 32, abs=0.03)

    before, after = (
        load_file(folder / "model.safetensors")
        for folder in (switch, tmp_path / "work" / "sst2-seed1")
    )
    frozen = [name for name in before if ".experts." in name or ".router." in name]
    assert len(frozen) == 2 * (4 * 2 + 1)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not changed.intersection(frozen)
    with mistake("fine-tuned otherwise"):
        harness.run(switch_glue, list(map(str, (switch, *options, *training, "--epochs", 1))))


def test_keeping_everything_changes_no_answer(switch, tmp_path):
    _write(tmp_path / "data", "sst2", 24)
    options = ("--data", tmp_path / "data", "--tasks", "sst2", "--repeats", 1, "--epochs", 1)
    methods = ("--methods", "UP", "--keep", 1)
    _, row = results_of(switch_glue, tmp_path, switch, *options, *methods)["rows"]
    assert row["relative_error"] == 0 and row["agreement"] == 1 and row["to_full"] == 0


def test_scores_are_log_probabilities_of_the_words(switch):
    model, tokenizer = load_model(switch, dtype=torch.float32), load_tokenizer(switch)
    words = LabelWords(tokenizer, SST2.words, max_length=20)
    texts = ["ab", "a longer text that is cut after twenty tokens"]
    with torch.no_grad():
        scores_BC = words.scores(model, words.inputs(texts, model.device))
        for b, text in enumerate(texts):
            # One text at a time, without padding; one token of the word after the other.
            ids = torch.tensor([tokenizer(text).input_ids[:20]])
            for c, word in enumerate(SST2.words):
                written, total = [model.config.decoder_start_token_id], 0.0
                for token in [*word.encode(), EOS_ID]:
                    logits = model(input_ids=ids, decoder_input_ids=torch.tensor([written])).logits
                    total += float(logits[0, -1].double().log_softmax(0)[token])
                    written.append(token)
                assert float(scores_BC[b, c]) == pytest.approx(total, abs=1e-3)
    assert words.predict(model, texts, batch_size=1) == scores_BC.argmax(1).tolist()


def test_words_that_read_alike_are_refused(switch):
    with mistake("alike"):
        LabelWords(load_tokenizer(switch), ("yes", "yes"), 20)


def test_learning_rate_warms_up_in_eight_steps_and_falls_to_zero():
    factors = [rate_factor(step, 24) for step in range(25)]
    assert factors[:8] == [k / 8 for k in range(1, 9)]
    assert factors[8] == 1 and factors[16] == 0.5 and factors[24] == 0


def test_training_depends_on_its_seed_only(switch):
    examples = [Example(f"sst2 sentence: {text}", k % 2) for k, text in enumerate("abcdef")]
    words = LabelWords(load_tokenizer(switch), SST2.words, 20)
    tuned = []
    for seed in (1, 1, 2):
        model = load_model(switch, dtype=torch.float32)
        torch.rand(1)
        state = torch.get_rng_state()
        fine_tune(model, words, examples, Training(1e-2, 2, 1, 20, seed))
        assert torch.equal(torch.get_rng_state(), state) and not model.training
        tuned.append(model.shared.weight.detach())
    assert torch.equal(tuned[0], tuned[1]) and not torch.equal(tuned[0], tuned[2])


def test_texts_are_those_of_t5():
    found = {"premise": "It rains. ", "hypothesis": "It is wet.", "label": 0, "idx": 3}
    example = TASKS["mnli"].example(found, "here")
    assert example == Example("mnli hypothesis: It is wet. premise: It rains.", 0)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: not a JSON object"),
        ('{"text": "a", "label": 0}', "line 2: no text 'sentence'"),
        ('{"sentence": "a", "label": 2}', "line 2: label is 2"),
        ('{"sentence": "a", "label": "1"}', "line 2: label is '1'"),
        ('{"sentence": "a"}', "line 2: label is None"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, match):
    (tmp_path / "sst2").mkdir()
    path = tmp_path / "sst2" / "train.jsonl"
    path.write_text('{"sentence": "fine", "label": 1}\n' + line)
    with mistake(match):
        read_examples(SST2, "train", tmp_path)
    assert read_examples(SST2, "train", tmp_path, limit=1) == [Example("sst2 sentence: fine", 1)]


def test_missing_and_empty_files_are_named(tmp_path):
    with mistake("train.jsonl: cannot be read"):
        read_examples(SST2, "train", tmp_path)
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2" / "train.jsonl").write_text("\n")
    with mistake("no examples in train"):
        read_examples(SST2, "train", tmp_path)


def test_missing_libraries_are_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with mistake("datasets; run pip install"):
        check_libraries([SST2], None)
    with mistake("scoring cola needs scikit-learn"):
        check_libraries([SST2, TASKS["cola"]], tmp_path)
    check_libraries([SST2], tmp_path)


def test_examples_of_the_library_datasets(monkeypatch):
    asked = []

    def load_dataset(path, name, split):
        asked.append((path, name, split))
        return [{"premise": "a", "hypothesis": "b", "label": 2, "idx": 0}]

    module = ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    (example,) = read_examples(TASKS["mnli"], "validation", None)
    assert example == Example("mnli hypothesis: b premise: a", 2)
    read_examples(TASKS["mnli"], "train", None)
    assert asked == [
        ("nyu-mll/glue", "mnli", "validation_matched"),
        ("nyu-mll/glue", "mnli", "train"),
    ]


def test_accuracy_and_matthews_correlation():
    pytest.importorskip("sklearn")
    labels, predicted = [1, 1, 1, 0, 0, 1], [1, 0, 1, 0, 1, 1]
    assert accuracy(predicted, labels) == 4 / 6
    # 3 true positives, 1 true negative, 1 false positive, 1 false negative.
    assert matthews(predicted, labels) == pytest.approx((3 * 1 - 1 * 1) / math.sqrt(4 * 4 * 2 * 2))
    assert matthews([1] * 6, labels) == 0


def test_cola_has_a_matthews_correlation(switch, tmp_path):
    pytest.importorskip("sklearn")
    _write(tmp_path / "data", "cola", 32)
    options = ("--data", tmp_path / "data", "--tasks", "cola", "--repeats", 1)
    training = ("--learning-rate", 0.02, "--batch-size", 8, "--epochs", 10, "--methods", "UP")
    full, row = results_of(switch_glue, tmp_path, switch, *options, *training)["rows"]
    assert full["task"] == "CoLA" and full["matthews"] > 50
    assert -100 <= row["matthews"] <= 100


def test_other_models_are_refused(tmp_path):
    save_family(FAMILIES["mixtral"], tmp_path)
    with mistake("give a Switch Transformer"):
        harness.run(switch_glue, [str(tmp_path), "--tasks", "sst2", "--data", str(tmp_path)])


def test_tasks_have_as_many_words_as_glue_has_classes():
    # Paper 000, table 3.
    assert {name: len(task.words) for name, task in glue.TASKS.items()} == {
        "sst2": 2,
        "mrpc": 2,
        "cola": 2,
        "mnli": 3,
    }
