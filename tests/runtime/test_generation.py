"""What a tokenizer and a generation config can do to a completion."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from resmoe_dist import load_model
from resmoe_dist.errors import UserError
from resmoe_dist.evaluation.perplexity import load_tokenizer
from resmoe_dist.families.models import load_config
from resmoe_dist.parallel.topology import SINGLE_PROCESS
from resmoe_dist.runtime.generation import (
    GenerationOptions,
    check_prompts,
    generate_on_lane,
    try_generation,
)
from tests.checkpoints.damage import copy_of, mistake
from tests.models import VOCABULARY

# Ids 0 to 2 are special in the models of the tests; the others are characters.
CHARACTERS = "".join(chr(ord("A") + i) for i in range(VOCABULARY - 3))
PROMPTS = ["ABC", "HELLO", "Q"]
NEW_TOKENS = 12


def save_tokenizer(folder: Path, **special: str) -> None:
    """A tokenizer of single characters."""
    vocabulary = {"<p>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {character: i + 3 for i, character in enumerate(CHARACTERS)}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)


def model_folder(pristine, folder: Path, generation: dict | None, **special: str) -> Path:
    """A copy of a compressed model with a tokenizer and a generation config."""
    copy_of(pristine, folder)
    save_tokenizer(folder, **special)
    path = folder / "generation_config.json"
    path.unlink()
    if generation is not None:
        path.write_text(json.dumps(generation))
    return folder


def expected_ids(model, prompt: str, end: int | None) -> list[int]:
    """Greedy decoding by whole forward passes, one prompt at a time, with the token `end`."""
    ids = [CHARACTERS.index(character) + 3 for character in prompt]
    new: list[int] = []
    while len(new) < NEW_TOKENS:
        with torch.no_grad():
            token = int(model(torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax())
        new.append(token)
        if token == end:
            break
    return new


def text_of(ids: list[int], *special: str) -> str:
    """The text of token ids without special tokens."""
    texts = ["<p>", "<s>", "</s>", *CHARACTERS]
    return "".join(texts[i] for i in ids if texts[i] not in special)


def complete(folder: Path, prompts: list[str] = PROMPTS, **options) -> tuple[list[str], int]:
    """Completions in the order of the prompts, and the number of new tokens."""
    tokenizer = load_tokenizer(folder)
    chosen = GenerationOptions(NEW_TOKENS, **options)
    output = generate_on_lane(load_model(folder), tokenizer, prompts, SINGLE_PROCESS, chosen)
    return [output.completions[i] for i in range(len(prompts))], output.new_tokens


GENERATION_CONFIGS = {
    "none": None,
    "empty": {},
    "dict and scores": {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "output_attentions": True,
        "output_hidden_states": True,
    },
    "beams": {"num_beams": 3, "num_return_sequences": 3, "early_stopping": True},
    "sequences": {"num_return_sequences": 4, "do_sample": True, "top_k": 5, "temperature": 3.0},
    "lengths": {"max_length": 1, "max_time": 0.0001},
    "lookup": {"prompt_lookup_num_tokens": 3, "num_assistant_tokens": 2},
    "guidance": {"guidance_scale": 2.0, "penalty_alpha": 0.6, "dola_layers": "low"},
    "cache": {"use_cache": False, "cache_implementation": "static"},
    "mtp": {"use_mtp": True, "token_healing": True},
    "impossible stop": {"stop_strings": ["zz~"]},
}

SPECIAL = {"eos_token": "</s>", "pad_token": "<p>", "bos_token": "<s>"}


@pytest.mark.parametrize(
    ("name", "special"),
    [
        *((name, {}) for name in GENERATION_CONFIGS),
        *(("none", {token: text}) for token, text in SPECIAL.items()),
    ],
)
def test_one_greedy_sequence_for_each_prompt(pristine, tmp_path, name, special):
    folder = model_folder(pristine, tmp_path / "c", GENERATION_CONFIGS[name], **special)
    end = 2 if GENERATION_CONFIGS[name] is None else None  # config.json then says where texts end
    expected = [expected_ids(load_model(folder), prompt, end) for prompt in PROMPTS]

    texts, new_tokens = complete(folder)

    assert texts == [text_of(ids, *special.values()) for ids in expected]
    assert new_tokens == sum(map(len, expected))


def test_sampling_ignores_beams_and_sequences(pristine, tmp_path):
    plain = model_folder(pristine, tmp_path / "a", {})
    beams = model_folder(pristine, tmp_path / "b", {"num_beams": 3, "num_return_sequences": 2})

    assert complete(beams, temperature=2.0) == complete(plain, temperature=2.0)


def test_each_row_ends_at_its_own_ending_token(pristine, tmp_path):
    plain = model_folder(pristine, tmp_path / "a", {})
    free = [expected_ids(load_model(plain), prompt, None) for prompt in PROMPTS]
    end = free[0][4]
    expected = [ids[: ids.index(end) + 1] if end in ids else ids for ids in free]
    # No padding token at all, and an ending token that the tokenizer does not know as special.
    folder = model_folder(pristine, tmp_path / "c", {"eos_token_id": [2, end]})

    assert complete(folder) == ([text_of(ids) for ids in expected], sum(map(len, expected)))


def test_each_row_ends_after_its_own_stop_string(pristine, tmp_path):
    plain = model_folder(pristine, tmp_path / "a", {})
    free, _ = complete(plain)
    stop = free[0][3:5]
    folder = model_folder(pristine, tmp_path / "c", {"stop_strings": [stop]})

    texts, _ = complete(folder)

    assert texts[0] == free[0][: free[0].index(stop) + len(stop)]
    assert texts[1:] == [
        text[: text.index(stop) + len(stop)] if stop in text else text for text in free[1:]
    ]


@pytest.mark.parametrize(
    "generation",
    [
        {"pad_token_id": 10_000},
        {"pad_token_id": None, "eos_token_id": 10_000},
        {"pad_token_id": -1},
        {"bos_token_id": 10_000},
    ],
)
def test_tokens_beyond_the_vocabulary_are_not_used_for_padding(pristine, tmp_path, generation):
    folder = model_folder(pristine, tmp_path / "c", generation)
    model = load_model(folder)
    expected = [text_of(expected_ids(model, prompt, None)) for prompt in PROMPTS]

    assert complete(folder)[0] == expected


def test_padding_of_the_tokenizer_beyond_the_vocabulary_is_not_used(pristine, tmp_path):
    folder = model_folder(pristine, tmp_path / "c", {})
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"pad_token": AddedToken("<new>", special=True)})
    assert tokenizer.pad_token_id == VOCABULARY
    tokenizer.save_pretrained(folder)
    model = load_model(folder)

    assert complete(folder)[0] == [text_of(expected_ids(model, p, None)) for p in PROMPTS]


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("A<new>", "has token id 64, the model's end at 63"),
        ("A" * 40, "has 40 tokens, the model's context is 32"),
        ("é", "the tokenizer finds no tokens"),
    ],
)
def test_prompts_that_the_model_cannot_continue_are_refused(pristine, tmp_path, prompt, text):
    folder = model_folder(pristine, tmp_path / "c", {})
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(["<new>"])
    config = load_config(str(folder))
    config.max_position_embeddings = 32

    check_prompts(tokenizer, ["A" * 32], config)
    with mistake(text):
        check_prompts(tokenizer, ["A", prompt], config)


def test_a_tokenizer_that_fails_when_it_is_used_is_one_line(pristine, tmp_path):
    tokenizer = load_tokenizer(model_folder(pristine, tmp_path / "c", {}))
    tokenizer.model_max_length = "x"

    with mistake("the tokenizer fails .TypeError: "):
        check_prompts(tokenizer, PROMPTS, load_config(str(tmp_path / "c")))


def test_a_chat_template_that_refuses_is_one_line(pristine, tmp_path):
    tokenizer = load_tokenizer(model_folder(pristine, tmp_path / "c", {}))
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"

    with mistake("--chat: the tokenizer's chat template fails .roles must alternate"):
        check_prompts(tokenizer, PROMPTS, load_config(str(tmp_path / "c")), chat=True)


@pytest.mark.parametrize(
    "generation",
    [
        {"repetition_penalty": "x"},
        {"eos_token_id": ["</s>"]},
        {"stop_strings": [3]},
        {"bad_words_ids": 7},
        {"sequence_bias": 1},
    ],
)
def test_values_that_transformers_refuses_fail_before_the_prompts(pristine, tmp_path, generation):
    folder = model_folder(pristine, tmp_path / "c", {})
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    for name, value in generation.items():
        setattr(model.generation_config, name, value)

    with pytest.raises((UserError, ValueError, TypeError)):
        try_generation(model, tokenizer, SINGLE_PROCESS)


def test_logits_that_are_nan_end_the_run(pristine, tmp_path):
    folder = model_folder(pristine, tmp_path / "c", {})
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    model.lm_head.register_forward_hook(lambda *_: torch.full((1, 1, VOCABULARY), float("nan")))

    with mistake("the model's logits are NaN"):
        try_generation(model, tokenizer, SINGLE_PROCESS)


def test_prompt_files_are_split_at_newlines_only(tmp_path):
    from resmoe_dist.launch.infer import read_prompts

    path = tmp_path / "prompts"
    path.write_text("a\u2028b\fc\x0bd\x85e\n\nf\r\ng", encoding="utf-8", newline="")

    found = read_prompts(SimpleNamespace(prompts=path, prompt=None))

    assert found == ["a\u2028b\fc\x0bd\x85e", "f", "g"]
