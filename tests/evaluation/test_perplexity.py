"""Perplexity equals a loop over tokens in float64; what cannot be scored is refused in a line."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from resmoe_dist import load_model
from resmoe_dist.checkpoints.restore import restore_checkpoint
from resmoe_dist.evaluation.perplexity import (
    Evaluation,
    check_vocabulary,
    divergence,
    evaluate,
    load_tokenizer,
    sequences_from_json,
    sequences_from_text,
)
from tests.checkpoints.damage import copy_of, mistake
from tests.models import VOCABULARY, compress, dense_model

CHARACTERS = "abcdefghijklmnopqrstuvwxyz .,\n"
TEXT = "the quick brown fox jumps over the lazy dog. pack my box,\nand five dozen jugs."


def _naive_nll(model, sequences):
    """Mean NLL by one forward pass per predicted token, in float64."""
    model = model.double()
    losses = []
    for sequence in sequences:
        for position in range(1, len(sequence)):
            with torch.no_grad():
                logits = model(torch.tensor([sequence[:position]])).logits[0, -1]
            losses.append(float(logits.logsumexp(0) - logits[sequence[position]]))
    return sum(losses) / len(losses), len(losses)


def _naive_seq2seq_nll(model, sequences):
    """The same for the second half of each sequence, the encoder reading the first."""
    model = model.double()
    losses = []
    for sequence in sequences:
        half = len(sequence) // 2
        decoded = [model.config.decoder_start_token_id]
        for token in sequence[half:]:
            with torch.no_grad():
                logits = model(
                    input_ids=torch.tensor([sequence[:half]]),
                    decoder_input_ids=torch.tensor([decoded]),
                ).logits[0, -1]
            losses.append(float(logits.logsumexp(0) - logits[token]))
            decoded.append(token)
    return sum(losses) / len(losses), len(losses)


def _sequences(*lengths):
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module")
def tokenizer():
    """One token per character, ids from 3."""
    ids = {character: i + 3 for i, character in enumerate(CHARACTERS)} | {"?": 2}
    backend = Tokenizer(models.WordLevel(ids, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_nll_of_token_ids_is_the_naive_one(family_folder, name):
    sequences = _sequences(9, 9, 2, 17, 17, 17, 5)
    source = family_folder(name)

    found = evaluate(dense_model(source), sequences)

    nll, tokens = _naive_nll(dense_model(source), sequences)
    assert found.tokens == tokens == sum(map(len, sequences)) - len(sequences)
    assert found.nll == pytest.approx(nll, rel=1e-4)
    assert found.perplexity == pytest.approx(math.exp(nll), rel=1e-3)


def test_nll_of_a_compressed_model_is_the_naive_one_of_its_dense_form(family_folder, tmp_path):
    sequences = _sequences(12, 7)
    compress(family_folder("mixtral"), tmp_path / "c", groups=2)
    restore_checkpoint(tmp_path / "c", tmp_path / "d")

    found = evaluate(load_model(tmp_path / "c"), sequences)

    nll, _ = _naive_nll(dense_model(tmp_path / "d"), sequences)
    assert found.nll == pytest.approx(nll, rel=1e-4)
    # The comparison means something only where compression changed the model.
    assert found.nll != pytest.approx(
        _naive_nll(dense_model(family_folder("mixtral")), sequences)[0]
    )


def test_encoder_decoder_is_scored_on_the_second_half(family_folder):
    sequences = _sequences(10, 7)
    source = family_folder("switch")

    found = evaluate(dense_model(source), sequences)

    nll, tokens = _naive_seq2seq_nll(dense_model(source), sequences)
    assert found.tokens == tokens == 5 + 4
    assert found.nll == pytest.approx(nll, rel=1e-4)


def test_text_is_scored_in_windows(family_folder, tokenizer, tmp_path):
    (tmp_path / "text").write_text(TEXT)
    ids = [CHARACTERS.index(character) + 3 for character in TEXT]

    windows = sequences_from_text(tmp_path / "text", tokenizer, 16)
    found = evaluate(dense_model(family_folder("mixtral")), windows)

    assert windows == [ids[i : i + 16] for i in range(0, len(ids), 16)]
    nll, _ = _naive_nll(dense_model(family_folder("mixtral")), windows)
    assert found.nll == pytest.approx(nll, rel=1e-4)


def test_tokenizer_of_a_compressed_folder_is_the_sources(family_folder, tokenizer, tmp_path):
    source = copy_of(family_folder("mixtral"), tmp_path / "source")
    tokenizer.save_pretrained(source)
    compress(source, tmp_path / "c")
    assert load_tokenizer(tmp_path / "c")(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]


def test_last_window_of_one_token_is_left_out(tokenizer, tmp_path):
    (tmp_path / "text").write_text("abcdefg")
    windows = sequences_from_text(tmp_path / "text", tokenizer, 3)
    assert windows == [[3, 4, 5], [6, 7, 8]]


def test_perplexity_past_the_largest_float_is_infinite():
    assert Evaluation(nll=800.0, tokens=1).perplexity == math.inf


@pytest.mark.parametrize("content", [None, b"{cut", b"", b"\xff\xfe"])
def test_token_ids_that_are_no_json(tmp_path, content):
    if content is not None:
        (tmp_path / "ids.json").write_bytes(content)
    with mistake(f"{tmp_path}/ids.json: not a readable JSON file"):
        sequences_from_json(tmp_path / "ids.json")


@pytest.mark.parametrize("value", [[], {}, {"a": [1, 2]}, 3, "12", None])
def test_token_ids_that_are_no_list_of_sequences(tmp_path, value):
    (tmp_path / "ids.json").write_text(json.dumps(value))
    with mistake(f"{tmp_path}/ids.json: must be a JSON list of sequences of token ids"):
        sequences_from_json(tmp_path / "ids.json")


@pytest.mark.parametrize(
    "sequence", [[], [5], [-1, 5], [5, 6.0], ["5", "6"], [True, False], 5, None, [[5, 6]]]
)
def test_sequence_that_cannot_be_scored_is_named(tmp_path, sequence):
    (tmp_path / "ids.json").write_text(json.dumps([[1, 2], sequence]))
    with mistake(f"{tmp_path}/ids.json: sequence 1 must be a list of two or more token ids"):
        sequences_from_json(tmp_path / "ids.json")


def test_token_id_past_the_vocabulary_is_named(tmp_path):
    check_vocabulary(tmp_path / "ids.json", [[0, 63]], 64)
    with mistake("ids.json: sequence 1 has token id 64, the model's end at 63"):
        check_vocabulary(tmp_path / "ids.json", [[0, 63], [64, 1]], 64)


def test_token_ids_are_read_as_written(tmp_path):
    (tmp_path / "ids.json").write_text("[[1, 2, 3], [0, 7]]")
    assert sequences_from_json(tmp_path / "ids.json") == [[1, 2, 3], [0, 7]]


@pytest.mark.parametrize("content", [None, b"\xff\xfe\xfa"])
def test_text_that_cannot_be_read(tokenizer, tmp_path, content):
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    with mistake(f"{tmp_path}/text: not a readable UTF-8 text file"):
        sequences_from_text(tmp_path / "text", tokenizer, 16)


@pytest.mark.parametrize("content", ["", "a"])
def test_text_that_is_too_short(tokenizer, tmp_path, content):
    (tmp_path / "text").write_text(content)
    with mistake(f"{tmp_path}/text: too short; two tokens or more are needed"):
        sequences_from_text(tmp_path / "text", tokenizer, 16)


def test_folder_without_a_tokenizer(family_folder):
    with mistake(f"{family_folder('mixtral')}: no tokenizer could be loaded"):
        load_tokenizer(family_folder("mixtral"))


@pytest.mark.parametrize("content", ["{cut", "{}", "[]", '{"model": {}}'])
def test_tokenizer_that_is_damaged(family_folder, tmp_path, content):
    folder = copy_of(family_folder("mixtral"), tmp_path / "m")
    (folder / "tokenizer.json").write_text(content)
    with mistake(f"{folder}: no tokenizer could be loaded"):
        load_tokenizer(folder)


@pytest.mark.parametrize("family", ["mixtral", "switch"])
def test_divergence_is_the_mean_of_what_its_definition_gives(family_folder, family):
    reference = load_model(family_folder(family))
    model = copy.deepcopy(reference)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.1)
    sequences = [[3, 4, 5, 6], [7, 8, 9, 10], [11, 12]]

    found = divergence(model, reference, sequences)

    terms = []
    for sequence in sequences:
        ids = torch.tensor([sequence])
        p, q = (_distributions(m, ids) for m in (reference, model))
        terms += [float((a * (a / b).log()).sum()) for a, b in zip(p, q, strict=True)]
    assert found == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    assert found > 0
    assert divergence(reference, reference, sequences) == 0


@torch.no_grad()
def _distributions(model, ids):
    """Of each predicted token, as `evaluate` predicts them."""
    if model.config.is_encoder_decoder:
        half = ids.shape[1] // 2
        logits = model(input_ids=ids[:, :half], labels=ids[:, half:]).logits[0]
    else:
        logits = model(input_ids=ids).logits[0, :-1]
    return logits.double().softmax(-1)


def test_switch_is_evaluated_in_batches_of_several(family_folder):
    model = load_model(family_folder("switch"))
    sequences = [[3, 4, 5, 6, 7], [8, 9, 10, 11, 12], [13, 14, 15, 16, 17]]

    together = evaluate(model, sequences)

    apart = [evaluate(model, [sequence]) for sequence in sequences]
    assert together.nll == pytest.approx(sum(part.nll for part in apart) / 3, rel=1e-5)
