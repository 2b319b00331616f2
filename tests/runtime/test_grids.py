"""Every grid, number of lanes and form of dispatch serves as the restored model does.

Expected values are those of plain transformers, which runs the dense model that `restore` writes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from resmoe_dist.checkpoints.compressed import CompressedCheckpoint
from resmoe_dist.checkpoints.restore import restore_checkpoint
from resmoe_dist.design_matrix import row_range
from resmoe_dist.evaluation.perplexity import evaluate, load_tokenizer
from resmoe_dist.parallel.topology import owned_experts
from tests.models import FAMILIES, compress, relative_difference
from tests.ranks import run_on_ranks
from tests.runtime.grid_results import (
    EMBEDDED_PROMPTS,
    EMBEDDED_TOKENS,
    GENERATING,
    PROMPTS,
    RankResults,
    forms_of,
    greedy_texts,
    make_models,
    run_grid,
)

TOLERANCE = 1e-4  # relative, float32
KEEP = 0.25
# World, ep, tp, and the numbers of lanes.
GRIDS = [
    (1, 1, 1, [1]),
    (2, 2, 1, [1, 2]),
    (4, 4, 1, [1, 2, 4]),
    (8, 8, 1, [1, 2, 8]),
    (2, 1, 2, [1]),
    (4, 2, 2, [1, 2]),
    (8, 4, 2, [1, 2, 4]),
    (8, 2, 4, [1, 2]),
    (8, 2, 2, [1, 2, 4]),
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def expected(folder):
    """What the restored models compute, by folder."""
    return make_models(folder)


@pytest.fixture(scope="module")
def embedded(embedded_source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("embedded") / "c"
    compress(embedded_source, folder, groups=4, keep=KEEP)
    return folder


@pytest.fixture(scope="module")
def sequences(embedded) -> list[list[int]]:
    """Some of this file, of unequal lengths, and not a multiple of the lanes."""
    ids = load_tokenizer(embedded)(Path(__file__).read_text())["input_ids"]
    return [ids[i * 100 : i * 100 + 90 + i % 3] for i in range(11)]


@pytest.fixture(scope="module")
def embedded_expected(embedded, sequences, tmp_path_factory) -> tuple[float, list[str], list[str]]:
    """Perplexity, completions, and those that end at a space, of the restored embedded model."""
    folder = tmp_path_factory.mktemp("embedded") / "d"
    restore_checkpoint(embedded, folder)
    dense = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    ends = {"eos_token_id": tokenizer(" ")["input_ids"][-1], "pad_token_id": tokenizer.pad_token_id}
    whole = greedy_texts(dense, EMBEDDED_PROMPTS, EMBEDDED_TOKENS)
    short = greedy_texts(dense, EMBEDDED_PROMPTS, EMBEDDED_TOKENS, **ends)
    return evaluate(dense, sequences).perplexity, whole, short


@pytest.fixture(scope="module", params=GRIDS, ids=str)
def grid(request) -> tuple[int, int, int, list[int]]:
    return request.param


@pytest.fixture(scope="module")
def ranks(grid, folder, expected, embedded, sequences) -> list[RankResults]:
    """What every rank of a grid found."""
    turn = GRIDS.index(grid)
    return run_on_ranks(grid[0], run_grid, *grid[1:], turn, folder, embedded, sequences)


def _merged(completions: list[dict[int, str]], prompts: list[str]) -> list[str]:
    """The completions of all lanes. The ranks of a lane must have the same."""
    merged: dict[int, str] = {}
    for mine in completions:
        assert all(merged.get(number, text) == text for number, text in mine.items())
        merged |= mine
    return [merged[number] for number in range(len(prompts))]


def test_logits_are_those_of_the_restored_model(grid, ranks, expected):
    assert {name.split("-")[0] for *_, name in ranks[0].logits} == set(FAMILIES)
    for rank, mine in enumerate(ranks):
        for key, found in mine.logits.items():
            difference = relative_difference(found, expected[key[-1]].logits)
            assert difference <= TOLERANCE, f"rank {rank}, {key}"


def test_greedy_tokens_are_those_of_the_restored_model(grid, ranks, expected):
    world, ep, tp, lanes = grid
    replicas = world // (ep * tp)
    forms = {(count, form) for count in lanes for form in forms_of(max(1, count // replicas))}
    for family in GENERATING:
        keys = [key for key in ranks[0].texts if key[-1].startswith(family)]
        assert {key[:2] for key in keys} == forms
        for key in keys:
            found = _merged([mine.texts[key] for mine in ranks], PROMPTS)
            assert found == expected[key[-1]].texts, key


def test_the_expected_tokens_differ(expected):
    for family in GENERATING:
        texts = [each.texts for key, each in expected.items() if key.startswith(family)]
        # They follow from the prompt.
        assert all(len(set(mine)) > 2 for mine in texts), texts


def test_the_embedded_model_has_the_perplexity_and_text_of_the_restored_one(
    ranks, embedded_expected
):
    perplexity, whole, short = embedded_expected
    found = [mine.embedded for mine in ranks]

    assert [mine.perplexity for mine in found] == pytest.approx([perplexity] * len(ranks), rel=1e-4)
    assert _merged([mine.whole for mine in found], EMBEDDED_PROMPTS) == whole
    assert _merged([mine.short for mine in found], EMBEDDED_PROMPTS) == short


def test_a_rank_holds_the_bytes_of_its_experts(grid, ranks, embedded):
    for rank, mine in enumerate(ranks):
        formula = _formula_bytes(embedded, rank, *grid[1:3])
        assert mine.embedded.memory.expert_bytes == pytest.approx(formula, rel=0.03)


def _formula_bytes(folder: Path, rank: int, ep: int, tp: int) -> float:
    """One rank's expert bytes by arithmetic alone, in float32: 1 bit + 32·keep bits an entry."""
    total = 0.0
    for layer in CompressedCheckpoint(folder).index.layers:
        start, stop = row_range(layer.rows, rank % tp, tp)
        entries = (stop - start) * layer.shape.columns
        owned = owned_experts(layer.num_experts, rank // tp % ep, ep)
        centers = sum(any(k in owned for k in group.experts) for group in layer.groups)
        offsets = 4 * (stop - start + 1)
        total += 4 * centers * entries + len(owned) * (entries * (1 / 8 + 4 * KEEP) + offsets)
    return total
