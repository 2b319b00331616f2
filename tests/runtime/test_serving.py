"""The embedded Mixtral: what its text and logits depend on. `test_grids` has it on every grid."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resmoe_dist.errors import UserError
from resmoe_dist.evaluation.perplexity import load_tokenizer
from resmoe_dist.parallel.topology import SINGLE_PROCESS, build_topology
from resmoe_dist.runtime.generation import GenerationOptions, check_chat, generate_on_lane
from resmoe_dist.runtime.loading import load_model
from tests.models import compress
from tests.ranks import run_on_ranks

PROMPTS = ["def __init__(self", "import os\n", "class Error"]
OPTIONS = GenerationOptions(max_new_tokens=24)


@pytest.fixture(scope="module")
def compressed(embedded_source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("embedded") / "c"
    compress(embedded_source, folder, groups=4)
    return folder


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
