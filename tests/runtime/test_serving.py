"""The embedded Mixtral on grids: perplexity, greedy text, bytes per rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from resmoe_dist.checkpoints.compressed import CompressedCheckpoint
from resmoe_dist.checkpoints.restore import restore_checkpoint
from resmoe_dist.design_matrix import row_range
from resmoe_dist.errors import UserError
from resmoe_dist.evaluation.perplexity import evaluate, load_tokenizer
from resmoe_dist.parallel.topology import SINGLE_PROCESS, build_topology, owned_experts
from resmoe_dist.runtime.generation import GenerationOptions, check_chat, generate_on_lane
from resmoe_dist.runtime.loading import load_model
from resmoe_dist.runtime.rank_memory import rank_memory
from tests.models import compress
from tests.ranks import run_on_ranks

KEEP = 0.25
PROMPTS = ["def __init__(self", "import os\n", "class Error"]
OPTIONS = GenerationOptions(max_new_tokens=24)
# World, ep, tp, lanes (None: as many as possible), form of dispatch.
GRIDS = [
    (2, 2, 1, None, "auto"),
    (2, 1, 2, None, "auto"),
    (4, 2, 2, None, "exchange"),
    (4, 4, 1, 1, "auto"),
    (4, 4, 1, 2, "exchange"),
    (8, 4, 2, None, "auto"),
    (8, 4, 2, 1, "auto"),
    (8, 8, 1, 4, "decode"),
    (8, 2, 2, 2, "auto"),
]


@pytest.fixture(scope="module")
def compressed(embedded_source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("embedded") / "c"
    compress(embedded_source, folder, groups=4, keep=KEEP)
    return folder


@pytest.fixture(scope="module")
def sequences(compressed) -> list[list[int]]:
    """Some of this file, of unequal lengths, and not a multiple of the lanes."""
    ids = load_tokenizer(compressed)(Path(__file__).read_text())["input_ids"]
    return [ids[i * 100 : i * 100 + 90 + i % 3] for i in range(11)]


@pytest.fixture(scope="module")
def dense(compressed, tmp_path_factory):
    """The restored model in plain transformers."""
    folder = tmp_path_factory.mktemp("embedded") / "d"
    restore_checkpoint(compressed, folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def _serve(
    folder: Path, sequences: list[list[int]], ep: int, tp: int, lanes: int | None, dispatch: str
) -> tuple:
    topology = build_topology(ep, tp, lanes)
    model = load_model(folder, topology=topology, dispatch=dispatch)
    perplexity = evaluate(model, sequences, topology).perplexity
    tokenizer = load_tokenizer(folder)
    texts = generate_on_lane(model, tokenizer, PROMPTS, topology, OPTIONS).completions
    # Stop at the first space: lanes then finish at different steps.
    model.generation_config.eos_token_id = tokenizer(" ")["input_ids"][-1]
    short = generate_on_lane(model, tokenizer, PROMPTS, topology, OPTIONS).completions
    return perplexity, texts, short, rank_memory(model)


def _greedy(model, tokenizer, prompt: str, **options) -> str:
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=OPTIONS.max_new_tokens,
        do_sample=False,
        **options,
    )[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(output, skip_special_tokens=True)


@pytest.mark.slow
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_grid_serves_as_the_restored_model_does(compressed, sequences, dense, grid):
    world, ep, tp, *_ = grid
    expected = evaluate(dense, sequences).perplexity
    tokenizer = load_tokenizer(compressed)
    space = tokenizer(" ")["input_ids"][-1]
    texts = [_greedy(dense, tokenizer, prompt) for prompt in PROMPTS]
    short = [
        _greedy(dense, tokenizer, prompt, eos_token_id=space, pad_token_id=tokenizer.pad_token_id)
        for prompt in PROMPTS
    ]

    reports = run_on_ranks(world, _serve, compressed, sequences, *grid[1:])

    for perplexity, *_ in reports:
        assert perplexity == pytest.approx(expected, rel=1e-4)
    found, found_short = {}, {}
    for _, mine, mine_short, _ in reports:
        found |= mine
        found_short |= mine_short
    assert [found[i] for i in range(len(PROMPTS))] == texts
    assert [found_short[i] for i in range(len(PROMPTS))] == short
    for rank, (*_, memory) in enumerate(reports):
        formula = _formula_bytes(compressed, rank, ep, tp)
        assert memory.expert_bytes == pytest.approx(formula, rel=0.03)


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


def test_single_process_serves_as_the_restored_model_does(compressed, sequences, dense):
    model = load_model(compressed)

    found = evaluate(model, sequences).perplexity
    tokenizer = load_tokenizer(compressed)
    texts = generate_on_lane(model, tokenizer, PROMPTS, SINGLE_PROCESS, OPTIONS).completions

    assert found == pytest.approx(evaluate(dense, sequences).perplexity, rel=1e-4)
    assert list(texts.values()) == [_greedy(dense, tokenizer, prompt) for prompt in PROMPTS]


def test_logits_do_not_depend_on_other_rows_of_the_batch(compressed):
    model = load_model(compressed)
    rows = torch.randint(0, 256, (4, 40))

    with torch.no_grad():
        together, alone = model(rows).logits[1], model(rows[1:2]).logits[0]

    assert float((together - alone).abs().max() / alone.abs().max()) <= 1e-5


def _sampled(folder: Path, ep: int, tp: int, batch: int = 8) -> dict[int, str]:
    topology = build_topology(ep, tp)
    options = GenerationOptions(max_new_tokens=24, temperature=1.0, top_p=0.9, seed=3, batch=batch)
    model, tokenizer = load_model(folder, topology=topology), load_tokenizer(folder)
    return generate_on_lane(model, tokenizer, PROMPTS, topology, options).completions


@pytest.mark.slow
def test_a_seed_gives_the_same_text_on_every_grid(compressed):
    expected = run_on_ranks(1, _sampled, compressed, 1, 1)[0]
    assert expected != run_on_ranks(1, _sampled_greedily, compressed)[0]

    first, second = run_on_ranks(2, _sampled, compressed, 1, 2)
    assert first == second == expected
    lanes = run_on_ranks(2, _sampled, compressed, 2, 1, 1)
    assert lanes[0] | lanes[1] == expected


@pytest.mark.slow
def test_batches_of_any_size_give_the_same_text(compressed):
    texts = [_completed(compressed, batch) for batch in (1, 2, 8)]

    assert texts[0] == texts[1] == texts[2]
    assert list(texts[0]) == list(range(len(PROMPTS)))


def _completed(folder: Path, batch: int) -> dict[int, str]:
    options = GenerationOptions(max_new_tokens=24, batch=batch)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    return generate_on_lane(model, tokenizer, PROMPTS, SINGLE_PROCESS, options).completions


def test_chat_puts_prompts_into_the_template(compressed):
    model, tokenizer = load_model(compressed), load_tokenizer(compressed)
    with pytest.raises(UserError, match="--chat: the tokenizer has no chat template"):
        check_chat(tokenizer)
    tokenizer.chat_template = (
        "{% for message in messages %}def {{ message.content }}(self{% endfor %}"
    )
    check_chat(tokenizer)

    options = GenerationOptions(8, chat=True)
    found = generate_on_lane(model, tokenizer, ["read"], SINGLE_PROCESS, options).completions

    # Special tokens are the template's business.
    inputs = tokenizer("def read(self", return_tensors="pt", add_special_tokens=False)
    output_S = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
    expected = tokenizer.decode(output_S[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found == {0: expected}


def _sampled_greedily(folder: Path) -> dict[int, str]:
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    return generate_on_lane(model, tokenizer, PROMPTS, SINGLE_PROCESS, OPTIONS).completions
