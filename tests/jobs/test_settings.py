"""Settings that do not fit the model or each other are refused before anything is written."""

from __future__ import annotations

import math
import re

import pytest

import tests.codecs.rounded_codec  # noqa: F401  (registers codec `rounded`)
from resmoe_dist.codecs import CodecSpec
from resmoe_dist.jobs.settings import parse_layers, with_budget
from tests.checkpoints.damage import mistake, names_in
from tests.jobs.runs import run


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("all", [0, 1, 2, 3, 4]),
        ("last:2", [3, 4]),
        ("last:5", [0, 1, 2, 3, 4]),
        ("1-3", [1, 2, 3]),
        ("2-2", [2]),
        ("4", [4]),
        ("3,0,3", [0, 3]),
    ],
)
def test_layers_are_parsed(text, chosen):
    assert parse_layers(text, 5) == chosen


@pytest.mark.parametrize("text", ["", "some", "1,", "-1", "1-", "last", "last:", "0 1", "1.5"])
def test_malformed_layers_are_refused(text):
    with mistake(f"--layers {re.escape(text)}: not understood; write all, last:24, 8-31 or 0,2"):
        parse_layers(text, 5)


@pytest.mark.parametrize(
    "text",
    ["5", "0,9", "3-5", "3-1", "last:0", "last:6", "0-99999999999999", "last:99999999999999"],
)
def test_layers_that_the_model_does_not_have_are_refused(text):
    with mistake(f"--layers {text}: this model has 5 MoE layers, 0 to 4"):
        parse_layers(text, 5)


def test_groups_must_divide_the_experts(sharded_source, tmp_path):
    with mistake("--ep 3: model.layers.0.mlp.experts has 4 experts, which do not divide into 3"):
        run(sharded_source, tmp_path / "c", groups=3)
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize("groups", [0, -2])
def test_number_of_groups_must_be_positive(sharded_source, tmp_path, groups):
    with mistake(f"--ep {groups}: must be 1 or more"):
        run(sharded_source, tmp_path / "c", groups=groups)
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.01, math.nan, math.inf])
def test_keep_out_of_range(sharded_source, tmp_path, keep):
    with mistake(rf"--keep {keep}: must lie in \(0, 1\]"):
        run(sharded_source, tmp_path / "c", keep=keep)
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize("allocate", ["block", "model"])
def test_shared_budgets_need_a_codec_that_selects_entries(sharded_source, tmp_path, allocate):
    with mistake(f"--allocate {allocate}: needs a codec that selects entries, .*, not low_rank"):
        run(sharded_source, tmp_path / "c", codec="low_rank", allocate=allocate)
    assert names_in(tmp_path) == set()


def test_blocks_need_a_budget_of_at_least_one_entry(sharded_source, tmp_path):
    with mistake("--allocate block: --keep 0.01 keeps none of 64 entries; give 0.015625 or more"):
        run(sharded_source, tmp_path / "c", keep=0.01, allocate="block")
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.01, math.nan, math.inf])
def test_budget_must_be_a_share(keep):
    with mistake(rf"--keep {keep}: must lie in \(0, 1\]"):
        with_budget(CodecSpec(name="pruned"), keep)


@pytest.mark.parametrize("codec", ["rounded", "empty", "dense"])
def test_budget_needs_a_codec_that_has_one(codec):
    with mistake(f"--keep 0.5: codec {codec} has no budget of kept entries"):
        with_budget(CodecSpec(name=codec), 0.5)


def test_target_needs_a_codec_with_a_budget(sharded_source, tmp_path):
    with mistake("--target-bytes: codec rounded has no budget of kept entries"):
        run(sharded_source, tmp_path / "c", codec="rounded", target_bytes=0.9)
    assert names_in(tmp_path) == set()


def test_target_needs_a_size_that_depends_on_the_budget(sharded_source, tmp_path):
    with mistake("the size of what --method resmoe stores does not depend on a budget"):
        run(sharded_source, tmp_path / "c", codec="low_rank:rank=2", target_bytes=0.9)
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize("groups_per_rank", [0, 3])
def test_groups_per_rank_must_fit_its_experts(sharded_source, tmp_path, groups_per_rank):
    with mistake(f"--groups-per-rank {groups_per_rank}: a rank has 2 experts of .*; choose 1 to 2"):
        run(sharded_source, tmp_path / "c", groups=2, groups_per_rank=groups_per_rank)
    assert names_in(tmp_path) == set()
