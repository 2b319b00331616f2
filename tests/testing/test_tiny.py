"""The embedded model: a complete Hugging Face folder, a byte tokenizer, related experts."""

import itertools
import json
import re
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from resmoe_dist.errors import UserError
from resmoe_dist.evaluation.perplexity import evaluate
from resmoe_dist.testing import FAMILIES, cache, cached_tiny_model, train_tiny_model, training
from resmoe_dist.testing.corpus import read_corpus
from resmoe_dist.testing.recipes import RECIPES, build_model
from resmoe_dist.testing.upcycling import choose_first_expert, upcycle

DENSE_STEPS, MOE_STEPS = 3, 3


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Each family's model after very few steps, by family."""
    root = tmp_path_factory.mktemp("tiny")
    for family in FAMILIES:
        train_tiny_model(root / family, family, dense_steps=DENSE_STEPS, moe_steps=MOE_STEPS)
    return {family: root / family for family in FAMILIES}


def load(folder):
    encoder_decoder = AutoConfig.from_pretrained(folder).is_encoder_decoder
    auto = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
    return auto.from_pretrained(folder).eval()


def expert_matrices(model):
    """[name, tensor [E, out, in]] of every expert projection, fused or in a ModuleDict."""
    stacks = {}
    for name, value in model.state_dict().items():
        if re.search(r"\.experts\.\w+_proj$", name):
            stacks[name] = list(value)
        elif match := re.search(r"^(.*\.experts)\.expert_\d+(.*)$", name):
            stacks.setdefault(match[1] + match[2], []).append(value)
    return {name: torch.stack(values) for name, values in stacks.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_folder_loads_and_generates_from_padded_prompts_without_warnings(folders, family, capfd):
    tokenizer = AutoTokenizer.from_pretrained(folders[family])
    model = load(folders[family])
    prompts = tokenizer(["def f(", "import os\n\nclass A:"], return_tensors="pt", padding=True)
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens = model.generate(**prompts, max_new_tokens=5, do_sample=False)
    assert capfd.readouterr().err == ""  # transformers logs its warnings there
    assert tokens.shape[0] == 2
    assert tokenizer.padding_side == ("right" if model.config.is_encoder_decoder else "left")


@pytest.mark.parametrize("family", FAMILIES)
def test_report_is_saved_with_the_model(folders, family):
    report = json.loads((folders[family] / "training.json").read_text())
    assert report["family"] == family
    assert report["parameters"] == load(folders[family]).num_parameters()
    assert (report["dense_steps"], report["moe_steps"]) == (DENSE_STEPS, MOE_STEPS)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_padding_changes_no_prediction(folders, family):
    tokenizer, model = AutoTokenizer.from_pretrained(folders[family]), load(folders[family])
    alone = model(**tokenizer("def f(", return_tensors="pt")).logits[0, -1]
    batch = tokenizer(["def f(", "import os\n\nclass A:"], return_tensors="pt", padding=True)
    torch.testing.assert_close(model(**batch).logits[0, -1], alone, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="session")
def saved_tokenizer(folders):
    return AutoTokenizer.from_pretrained(folders["mixtral"])


@settings(deadline=None)
@given(text=st.text())
def test_tokens_are_the_bytes_after_one_bos(saved_tokenizer, text):
    tokens = saved_tokenizer(text)["input_ids"]
    assert tokens == [saved_tokenizer.bos_token_id, *text.encode()]
    assert saved_tokenizer.decode(tokens, skip_special_tokens=True) == text


@pytest.mark.parametrize("text", ["</s> is <pad>", " ' s n't , .", "\t\r\n\n  ", "naïve 中文 🙂\0"])
def test_tokenizer_round_trips_text_that_trips_others(saved_tokenizer, text):
    tokens = saved_tokenizer(text)["input_ids"]
    assert tokens[1:] == list(text.encode())
    assert saved_tokenizer.decode(tokens, skip_special_tokens=True) == text


def test_short_training_beats_byte_frequencies_on_held_out_files(tmp_path):
    report = train_tiny_model(tmp_path / "m", dense_steps=24, moe_steps=6)
    assert report.held_out_nll < report.unigram_nll - 0.1


def test_nll_of_the_report_is_that_of_the_saved_model(folders):
    report = json.loads((folders["mixtral"] / "training.json").read_text())
    model, tokenizer = load(folders["mixtral"]), AutoTokenizer.from_pretrained(folders["mixtral"])
    held_out = read_corpus()[1]
    starts = torch.linspace(0, len(held_out) - 256, 64).long().tolist()
    crops = [held_out[start : start + 256].tolist() for start in starts]
    total = 0.0
    for crop in crops:
        tokens = torch.tensor([[tokenizer.bos_token_id, *crop]])
        with torch.no_grad():
            log_probabilities = model(tokens).logits[0, :-1].log_softmax(-1)
        total -= log_probabilities[torch.arange(256), tokens[0, 1:]].sum().item()
    assert report["held_out_nll"] == pytest.approx(total / (64 * 256), abs=1e-4)


def test_the_held_out_loss_can_be_measured_again_from_the_folder(folders):
    folder = folders["mixtral"]
    report = json.loads((folder / "training.json").read_text())
    sequences = json.loads((folder / "held-out.json").read_text())

    assert evaluate(load(folder), sequences).nll == pytest.approx(report["held_out_nll"], abs=1e-5)


def test_held_out_files_are_not_in_the_training_text():
    train, held_out = (bytes(part[part < 256].tolist()) for part in read_corpus())
    lines = [line for line in held_out.splitlines() if len(line) > 60]
    assert sum(line in train for line in lines[::100]) < 0.2 * len(lines[::100])


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_differ_but_are_related(folders, family):
    stacks = expert_matrices(load(folders[family]))
    assert stacks
    generator = torch.Generator().manual_seed(0)
    for stack in stacks.values():
        for first, second in itertools.combinations(stack, 2):
            shuffled = second[torch.randperm(len(second), generator=generator)]
            distance = (first - second).norm()
            assert 0 < distance < 0.5 * (first - shuffled).norm()


# Not Switch, which scales its expert by the router's probability: 1 before, less after.
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_upcycled_experts_compute_what_the_dense_model_does(family):
    recipe = RECIPES[family]
    torch.manual_seed(0)
    dense = build_model(family, recipe.config | recipe.one_expert).eval()
    choose_first_expert(dense)
    moe = build_model(family, recipe.config).eval()
    upcycle(dense, moe)
    tokens = torch.arange(80).reshape(2, 40)
    torch.testing.assert_close(moe(tokens).logits, dense(tokens).logits, rtol=1e-3, atol=1e-4)


def test_same_seed_same_model_whatever_the_callers_state(tmp_path, folders):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    with torch.no_grad():
        train_tiny_model(tmp_path / "again", dense_steps=DENSE_STEPS, moe_steps=MOE_STEPS)
    assert torch.equal(torch.get_rng_state(), before)
    first, again = load(folders["mixtral"]).state_dict(), load(tmp_path / "again").state_dict()
    for name, value in first.items():
        torch.testing.assert_close(again[name], value, rtol=1e-4, atol=1e-5)


def test_refuses_a_directory_that_is_not_empty(tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(UserError, match="not empty"):
        train_tiny_model(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_refuses_an_unknown_family(tmp_path):
    with pytest.raises(UserError, match=r"llama.*mixtral"):
        train_tiny_model(tmp_path / "m", "llama")


def test_an_interrupted_training_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train_tiny_model(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def quick_recipe(monkeypatch):
    """Let the default recipe of mixtral take two steps, and count the trainings."""
    calls = []
    train = train_tiny_model

    def quick(directory, family, seed):
        calls.append(directory)
        return train(directory, family, seed, dense_steps=1, moe_steps=1)

    monkeypatch.setattr(cache, "train_tiny_model", quick)
    return calls


def test_cache_is_where_the_environment_says_and_is_filled_once(
    tmp_path, monkeypatch, quick_recipe
):
    monkeypatch.setenv("RESMOE_CACHE", str(tmp_path / "cache"))
    folder = cached_tiny_model()
    assert folder.parent == tmp_path / "cache"
    assert cached_tiny_model() == folder
    assert len(quick_recipe) == 1
    assert cached_tiny_model(seed=1) != folder


def test_cache_loser_of_a_race_takes_the_winners_model(tmp_path, monkeypatch, quick_recipe):
    monkeypatch.setenv("RESMOE_CACHE", str(tmp_path))
    quick = cache.train_tiny_model
    sample = training._sample

    def slow_sample(*arguments):
        monkeypatch.setattr(training, "_sample", sample)
        quick(quick_recipe[0], "mixtral", 0)  # another process finishes first
        return "the loser"

    monkeypatch.setattr(training, "_sample", slow_sample)
    folder = cached_tiny_model()
    assert json.loads((folder / "training.json").read_text())["sample"] != "the loser"
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
