"""Training the models that methods are compared on, and measuring how related their experts are."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from benchmarks import harness, long_training, trained_models
from benchmarks.long_training import Stage, train_stage
from benchmarks.relatedness import energy_left
from benchmarks.trained_kinds import KINDS
from resmoe_dist.evaluation.perplexity import evaluate
from resmoe_dist.runtime.loading import load_model
from resmoe_dist.testing.corpus import read_corpus
from resmoe_dist.testing.recipes import RECIPES, build_model
from resmoe_dist.testing.training import learning_rates
from tests.benchmarks.runs import results_of
from tests.checkpoints.damage import mistake


def test_energy_left_by_hand():
    # The second expert's rows are swapped. Aligned: (4, 0) (0, 4) and (6, 0) (0, 2), mean (5, 0)
    # (0, 3), so four deviations of 1, of an energy of 16 + 16 + 36 + 4.
    experts = torch.tensor([[[4.0, 0.0], [0.0, 4.0]], [[0.0, 2.0], [6.0, 0.0]]])
    assert energy_left(experts, 2) == pytest.approx(4 / 72)
    assert energy_left(experts, 1) == 0
    # Two groups: the one above, and one of opposite experts, whose mean is zero.
    opposite = torch.tensor([[[3.0, 0.0], [3.0, 0.0]], [[-3.0, 0.0], [-3.0, 0.0]]])
    four = torch.cat([experts, opposite])
    assert energy_left(four, 2) == pytest.approx((4 + 36) / (72 + 36))


def test_equal_experts_leave_nothing_and_independent_ones_nearly_all():
    torch.manual_seed(0)
    one = torch.randn(1, 24, 512)
    orders = torch.stack([torch.randperm(24) for _ in range(4)])
    assert energy_left(one[0][orders], 4) == pytest.approx(0, abs=1e-6)
    assert 0.7 < energy_left(torch.randn(4, 24, 512), 4) < 0.75


def _parameters_per_token(model, experts, used):
    """Parameters that one token uses, routers left out."""
    total = 0
    for name, value in model.named_parameters():
        if name.endswith(("gate.weight", "classifier.weight")):
            continue
        share = used / experts if ".experts." in name else 1
        total += value.numel() * share
    return total


@pytest.mark.parametrize("name", list(KINDS))
def test_the_dense_counterpart_uses_as_many_parameters_per_token(name):
    kind = KINDS[name]
    moe = build_model(kind.family, kind.recipe.config)
    dense = build_model(kind.family, kind.recipe.config | kind.counterpart)
    experts = next(
        kind.recipe.config[key]
        for key in ("num_local_experts", "n_routed_experts", "num_experts")
        if key in kind.recipe.config
    )
    expected = _parameters_per_token(moe, experts, kind.recipe.top_k)
    of_two = "n_routed_experts" in kind.counterpart
    assert _parameters_per_token(dense, 2 if of_two else 1, 1) == expected


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    options = ("--work", folder, "--kinds", "mixtral", "fine", "--steps", 4)
    return folder, results_of(trained_models, folder, *options)


@pytest.mark.parametrize(("kind", "experts", "layers"), [("mixtral", 8, 4), ("fine", 16, 3)])
def test_report_describes_the_saved_model(work, kind, experts, layers):
    folder, results = work
    row = next(row for row in results["rows"] if row["kind"] == kind)
    model = load_model(folder / f"{kind}-seed0")
    sequences = json.loads((folder / f"{kind}-seed0" / "held-out.json").read_text())
    assert row["nll"] == pytest.approx(evaluate(model, sequences).nll, abs=1e-4)
    assert row["parameters"] == model.num_parameters() > row["dense_parameters"]
    assert row["gain"] == row["dense_nll"] - row["nll"]
    assert row["experts"] == experts
    assert len([layer for layer in results["layers"] if layer["kind"] == kind]) == layers
    assert sorted(path.name for path in folder.iterdir() if kind in path.name) == [f"{kind}-seed0"]


def test_only_experts_that_were_never_one_are_unrelated(work):
    related, fine = work[1]["rows"]
    assert related["kind"] == "mixtral" and related["left_of_all"] < 0.1
    assert fine["left_of_all"] > 0.85


def test_calibration_text_is_of_training_files(work):
    text = (work[0] / "fine-seed0" / "calibration.txt").read_text()
    train, held_out = (bytes(part[part < 256].tolist()).decode() for part in read_corpus())
    lines = [line for line in text.splitlines() if len(line) > 60]
    assert 60_000 < len(text.encode()) < 70_000
    assert all(line in train for line in lines)
    assert sum(line in held_out for line in lines) < 0.1 * len(lines)


def test_finished_models_are_kept_and_other_options_refused(work):
    folder, results = work
    before = (folder / "fine-seed0" / "model.safetensors").stat().st_mtime_ns
    options = ["--work", str(folder), "--kinds", "fine", "--steps"]
    again = harness.run(trained_models, [*options, "4"])["results"]
    assert again["rows"] == results["rows"][1:]
    assert (folder / "fine-seed0" / "model.safetensors").stat().st_mtime_ns == before
    with mistake("model of other options"):
        harness.run(trained_models, [*options, "5"])


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "fine-seed0").mkdir()
    with mistake("not a trained model"):
        harness.run(trained_models, ["--work", str(tmp_path), "--kinds", "fine"])


def _weights(stage, model, seed, every=1):
    torch.manual_seed(seed)
    with torch.enable_grad():
        train_stage(stage, model, torch.arange(256).repeat(40), every=every)
    return model.state_dict()


def test_an_interrupted_stage_ends_with_the_same_weights(tmp_path, monkeypatch):
    recipe = RECIPES["mixtral"]
    small = recipe.config | {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1}
    torch.manual_seed(0)
    started = build_model("mixtral", small | {"head_dim": 8})
    start = {name: value.clone() for name, value in started.state_dict().items()}
    rates = learning_rates(5, decay=True)
    whole = Stage("whole", tmp_path / "whole.pt", "a", recipe, rates)
    expected = {name: value.clone() for name, value in _weights(whole, started, seed=1).items()}

    step, taken = long_training.train_step, []

    def stops_after_three(*arguments):
        if len(taken) == 3:
            raise KeyboardInterrupt
        taken.append(arguments)
        return step(*arguments)

    cut = Stage("cut", tmp_path / "cut.pt", "a", recipe, rates)
    started.load_state_dict(start)
    monkeypatch.setattr(long_training, "train_step", stops_after_three)
    with pytest.raises(KeyboardInterrupt):
        _weights(cut, started, seed=1, every=2)
    monkeypatch.setattr(long_training, "train_step", step)
    started.load_state_dict(start)  # the checkpoint decides, not what is left of the first run
    found = _weights(cut, started, seed=2)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert not torch.equal(expected["lm_head.weight"], start["lm_head.weight"])

    other = tmp_path / "other.pt"
    shutil.copy(cut.path, other)
    with mistake("checkpoint of other options"):
        train_stage(Stage("other", other, "b", recipe, rates), started, torch.arange(9))
