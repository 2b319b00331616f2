"""The text of a calibration is cut into windows of the same length."""

from __future__ import annotations

import pytest

from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.evaluation.perplexity import load_tokenizer
from resmoe_dist.jobs.calibration import calibration_sequences, measure_activations


@pytest.fixture
def text(embedded_source, tmp_path):
    """A text file, the tokenizer of the embedded model, and the token ids of the text."""
    path, tokenizer = tmp_path / "text", load_tokenizer(embedded_source)
    path.write_text("def value(self):\n    return self.value\n" * 50, encoding="utf-8")
    return path, tokenizer, tokenizer(path.read_text(encoding="utf-8"))["input_ids"]


@pytest.mark.parametrize(
    ("tokens", "context", "expected"),
    [(64, 16, [16] * 4), (70, 16, [16] * 4), (10, 16, [10])],
)
def test_text_is_cut_into_whole_windows(text, tokens, context, expected):
    path, tokenizer, ids = text

    windows = calibration_sequences(path, tokenizer, tokens=tokens, context=context)

    assert [len(window) for window in windows] == expected
    assert [token for window in windows for token in window] == ids[: sum(expected)]


def test_shorter_last_window_is_left_out(text):
    path, tokenizer, ids = text
    context = len(ids) // 2 - 1

    assert calibration_sequences(path, tokenizer, context=context) == [
        ids[:context],
        ids[context : 2 * context],
    ]


def test_text_shorter_than_a_window_is_one_window(text):
    path, tokenizer, ids = text

    assert calibration_sequences(path, tokenizer, context=len(ids) + 1) == [ids]


def test_all_tokens_of_the_embedded_model_are_routed(embedded_source, text):
    source = SourceCheckpoint(embedded_source)
    path, tokenizer, _ = text

    found = measure_activations(source, calibration_sequences(path, tokenizer, 256, 64))

    assert len(found) == len(source.sites)
    routed = 4 * 64 * source.config.num_experts_per_tok
    assert all(int(layer.tokens_E.sum()) == routed for layer in found)
