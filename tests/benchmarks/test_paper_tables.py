"""Published memory and FLOPs, from shapes."""

from __future__ import annotations

import pytest

from benchmarks import paper_tables
from benchmarks.paper_counting import (
    METHODS,
    SHAPES,
    TOKENS,
    ModelShape,
    our_bytes,
    our_flops,
    paper_bytes,
    paper_flops,
)
from benchmarks.published import FIGURES, published
from tests.benchmarks.runs import results_of

BY_NAME = {method.name: method for method in METHODS}
MIXTRAL, DEEPSEEK = SHAPES[0], SHAPES[1]
# Two published figures that no counting tried here comes within 1 % of.
MISSED = {("DeepSeekMoE", "SVD"), ("DeepSeekMoE", "ResMoE (SVD)")}

# Experts of 3 · 8 · 16 = 384 weights: a matrix [16, 24] each. Rank ⌊96 / 40⌋ = 2.
SMALL = ModelShape("small", 8, 16, 3, 4, 2, 3, compressed=2, other_weights=1000)


@pytest.mark.parametrize(
    ("method", "paper", "ours"),
    [
        ("Full", 4 * 384 * 4, 4 * 384 * 2),
        # 96 values. Ours: a bitmap of 16 rows of 3 bytes, 17 offsets of 4 bytes.
        ("UP", 4 * 96 * 6, 4 * (16 * 3 + 96 * 2 + 17 * 4)),
        ("SP", 4 * 96 * 4, 4 * 96 * 2),
        # Ours: two factors of rank 2.
        ("SVD", 4 * 96 * 4, 4 * 2 * (16 + 24) * 2),
        ("MEO", 384 * 4, 384 * 2),
        ("ResMoE (UP)", 4 * 96 * 6 + 384 * 4, 4 * (16 * 3 + 96 * 2 + 17 * 4) + 384 * 2),
        ("ResMoE (SVD)", 4 * 96 * 4 + 384 * 4, 4 * 2 * (16 + 24) * 2 + 384 * 2),
    ],
)
def test_memory_of_a_small_layer(method, paper, ours):
    assert paper_bytes(SMALL, BY_NAME[method]) == paper
    assert our_bytes(SMALL, BY_NAME[method]) == ours


@pytest.mark.parametrize(
    ("method", "paper", "ours"),
    [
        ("Full", 2 * 384, 2 * 384),
        ("UP", 2 * 96, 2 * 384),
        ("SP", 2 * 96, 2 * 96),
        # Three matrices, each through rank 2: 3 · 2 · (16 + 8) = 144.
        ("SVD", 2 * 144, 2 * 144),
        # One of four experts is left, so a token runs one.
        ("MEO", 2 * 384, 384),
        ("ResMoE (UP)", 2 * 384, 2 * 384 + 384),
        ("ResMoE (SVD)", 2 * 144 + 384, 2 * 144 + 384),
    ],
)
def test_flops_of_a_small_model(method, paper, ours):
    # One layer of two experts stays dense, two are compressed.
    per_token = 1000 + 2 * 384
    assert paper_flops(SMALL, BY_NAME[method]) == 2 * TOKENS * (per_token + 2 * paper)
    assert our_flops(SMALL, BY_NAME[method]) == 2 * TOKENS * (per_token + 2 * ours)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("shape", [MIXTRAL, DEEPSEEK], ids=lambda shape: shape.name)
def test_memory_reproduces_table_5(shape, method):
    figure = published("000 table 5", shape.name, method.name)
    assert paper_bytes(shape, method) / 2**20 == pytest.approx(figure, rel=0.01)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize(("shape", "unit"), [(MIXTRAL, 1e12), (DEEPSEEK, 1e9)])
def test_flops_reproduce_table_7(shape, unit, method):
    figure = published("000 table 7", shape.name, method.name)
    near = paper_flops(shape, method) / unit == pytest.approx(figure, rel=0.01)
    assert near == ((shape.name, method.name) not in MISSED)


def test_the_report_says_which_figures_are_not_reproduced(tmp_path):
    results = results_of(paper_tables, tmp_path, "--shapes")

    rows = results["memory"] + results["flops"]
    assert len(rows) == 2 * len(SHAPES) * len(METHODS)
    missed = {(row["model"], row["method"]) for row in rows if row["verdict"] == "NOT REPRODUCED"}
    assert missed == MISSED
    said = [line for line in results["assumptions"] if "not reproduced" in line["assumption"]]
    assert len(said) == len(MISSED)


def test_every_figure_is_published_once():
    keys = [(each.source, each.model, each.method, each.measure) for each in FIGURES]
    assert len(keys) == len(set(keys))
