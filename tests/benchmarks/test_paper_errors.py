"""Approximation errors per method, as the papers' tables normalise them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from benchmarks import harness, paper_tables
from benchmarks.paper_errors import quality_rows
from benchmarks.paper_methods import METHODS, papers_layers, papers_model
from benchmarks.published import published
from resmoe_dist.checkpoints.source import SourceCheckpoint
from tests.benchmarks.runs import results_of
from tests.checkpoints.damage import mistake
from tests.models import FAMILIES, save_family


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral")
    save_family(FAMILIES["mixtral"], folder, num_hidden_layers=4)
    return folder


def _experts(folder, layer):
    """Design matrices [E, I, D] of one layer, read by hand."""
    tensors = load_file(folder / "model.safetensors")
    name = f"model.layers.{layer}.block_sparse_moe.experts"
    gate, up, down = (
        [tensors[f"{name}.{k}.{part}.weight"] for k in range(4)] for part in ("w1", "w3", "w2")
    )
    experts = zip(gate, up, down, strict=True)
    return torch.stack([torch.cat([g, u, d.T], dim=1) for g, u, d in experts]).double()


def test_errors_are_divided_by_experts_and_rows(mixtral, tmp_path):
    methods = ("UP", "SP", "M-SMoE", "ResMoE (UP)")
    results = results_of(paper_tables, tmp_path, mixtral, "--methods", *methods)

    rows = {row["method"]: row for row in results["errors"]}
    assert list(rows) == list(methods)
    # The last three quarters of the layers.
    assert rows["UP"]["layers"] == "last:3"
    for position, layer in enumerate((1, 2, 3)):
        experts_EID = _experts(mixtral, layer)
        E, rows_count, D = experts_EID.shape
        dropped = rows_count * D - int(0.25 * rows_count * D)
        pruned = sum(
            float(each.flatten().square().sort().values[:dropped].sum()) for each in experts_EID
        )
        assert rows["UP"]["errors"][position] == pytest.approx(pruned / E / rows_count, rel=1e-5)
        norms_EI = experts_EID.square().sum(2).sort(dim=1).values
        # A quarter of 27 rows is kept: 6.
        removed = float(norms_EI[:, :21].sum())
        assert rows["SP"]["errors"][position] == pytest.approx(removed / E / rows_count, rel=1e-5)
    for name in ("UP", "SP", "ResMoE (UP)"):
        row = rows[name]
        assert row["sum"] == pytest.approx(sum(row["errors"]))
        assert row["mean"] == pytest.approx(row["sum"] / 3)
        assert row["published"] is None
    # The centre of four experts counts.
    assert rows["ResMoE (UP)"]["dense_share"] > rows["UP"]["dense_share"] + 0.2
    assert rows["M-SMoE"]["reason"] == "needs --calibration TEXT"
    assert {row["about"] for row in results["remarks"]} == {"error", "MEO"}


def test_layers_of_an_encoder_decoder_are_the_last_four_of_each_half(tmp_path):
    layers = {"num_layers": 12, "num_decoder_layers": 12}
    sparse = {"num_sparse_encoder_layers": 6, "num_sparse_decoder_layers": 6}
    save_family(FAMILIES["switch"], tmp_path, **layers, **sparse)
    assert papers_layers(SourceCheckpoint(tmp_path)) == "2,3,4,5,8,9,10,11"


def test_published_figures_belong_to_the_papers_models():
    mixtral = AutoConfig.for_model("mixtral")
    assert papers_model(mixtral) == "Mixtral"
    mixtral.num_local_experts = 16
    assert papers_model(mixtral) is None
    switch = AutoConfig.for_model("switch_transformers")
    assert papers_model(switch) == "Switch"
    assert published("001 table 1", "Switch", "UP") == 34.27
    assert published("001 table 2", "Switch", "UP", "CoLA") == 81.40
    assert published("001 table 2", "Switch", "UP (sep)", "CoLA") == 79.33


def test_measured_qualities_stand_beside_published_ones(tmp_path):
    report = {
        "source": {"perplexity": 4.0, "tasks": {"piqa acc": 0.8, "sums acc": 0.5}},
        "rows": [
            {"contender": "resmoe-barycenter", "budget": "keep 0.25", "perplexity": 5.5},
            {"contender": "reap", "budget": "keep 0.25", "perplexity": 9.0},
            {"contender": "up", "budget": "keep 0.25", "reason": "not measured"},
        ],
    }
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    rows = quality_rows(path, AutoConfig.for_model("mixtral"))
    keys = ("method", "measure", "measured", "published")
    assert [tuple(row[key] for key in keys) for row in rows] == [
        ("Full", "WikiText perplexity", 4.0, 3.87),
        ("Full", "PIQA", 80.0, 82.37),
        ("ResMoE (UP)", "WikiText perplexity", 5.5, 5.38),
        ("reap", "WikiText perplexity", 9.0, None),
    ]
    path.write_text("{}")
    with mistake("not the report.json"):
        quality_rows(path, AutoConfig.for_model("mixtral"))


def test_invalid_choices_are_refused(mixtral, tmp_path):
    with mistake("either a MODEL or --shapes"):
        harness.run(paper_tables, [])
    with mistake("4 MoE layers"):
        harness.run(paper_tables, [str(mixtral), "--layers", "9"])
    with mistake("no such folder"):
        harness.run(paper_tables, [str(mixtral), "--work", str(tmp_path / "none")])


def test_every_method_of_the_tables_compresses(mixtral, tmp_path):
    results = results_of(paper_tables, tmp_path, mixtral, "--layers", "0")
    failed = [row["method"] for row in results["errors"] if "reason" in row]
    assert failed == [name for name, each in METHODS.items() if each.calibrated]
