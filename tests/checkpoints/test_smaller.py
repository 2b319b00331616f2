"""`restore` of checkpoints without some experts or rows: a smaller model for plain transformers."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from resmoe_dist.checkpoints.restore import restore_checkpoint
from tests.checkpoints.damage import edit_json, mistake, names_in
from tests.checkpoints.pruned_by_hand import (
    OVERRIDES,
    edit_config,
    without_experts,
    without_rows,
)
from tests.checkpoints.regrouping import regroup
from tests.models import (
    FAMILIES,
    compress,
    dense_model,
    logits_of,
    relative_difference,
    save_family,
)

TOLERANCE = 1e-4  # relative, float32
KEPT = [0, 2, 3, 5]
EXPERT_MAP = [0, -1, 1, 2, -1, 3]
KEPT_ROWS = [0, 1, 2, 4, 5, 7, 8]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(family): folders of a model with six experts, `source`, and its exact `compressed`."""
    folders = {}

    def make(name):
        if name not in folders:
            folder = tmp_path_factory.mktemp(name)
            save_family(FAMILIES[name], folder / "source", **OVERRIDES[name])
            compress(folder / "source", folder / "compressed", align="none", keep=1.0)
            folders[name] = folder
        return folders[name]

    return make


def _tensors(folder):
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def _config(folder):
    return json.loads((folder / "config.json").read_text())


def _assert_same_logits(found, expected):
    expected = logits_of(dense_model(expected))
    assert relative_difference(logits_of(dense_model(found)), expected) <= TOLERANCE


@pytest.mark.parametrize("name", OVERRIDES)
def test_dropped_experts_leave_the_model_that_slicing_by_hand_gives(made, tmp_path, name):
    regroup(made(name) / "compressed", tmp_path / "r", [[0, 1], [2, 3]], expert_map=EXPERT_MAP)
    expected = without_experts(made(name) / "source", tmp_path / "expected", KEPT)

    remarks = restore_checkpoint(tmp_path / "r", tmp_path / "d")

    assert len(remarks) == 1
    assert "is 4 instead of 6" in remarks[0]
    assert _config(tmp_path / "d") == _config(expected)
    found, wanted = _tensors(tmp_path / "d"), _tensors(expected)
    assert found.keys() == wanted.keys()
    for tensor, value in wanted.items():
        torch.testing.assert_close(found[tensor], value, rtol=1e-5, atol=1e-5)
    _assert_same_logits(tmp_path / "d", expected)
    # Otherwise the choice of experts would not matter.
    source = logits_of(dense_model(made(name) / "source"))
    assert relative_difference(logits_of(dense_model(expected)), source) > 0.01


def test_merged_and_dropped_experts_are_written_in_full(made, tmp_path):
    expert_map = [0, -1, 0, 1, -1, 2]
    folder = made("mixtral")
    regroup(folder / "compressed", tmp_path / "r", [[0, 1, 2]], expert_map=expert_map)

    restore_checkpoint(tmp_path / "r", tmp_path / "d")

    before, after = _tensors(folder / "source"), _tensors(tmp_path / "d")
    block = "model.layers.1.block_sparse_moe.experts"
    mean = (before[f"{block}.0.w1.weight"] + before[f"{block}.2.w1.weight"]) / 2
    for expert in (0, 1):
        torch.testing.assert_close(after[f"{block}.{expert}.w1.weight"], mean)
    torch.testing.assert_close(after[f"{block}.3.w1.weight"], before[f"{block}.5.w1.weight"])
    assert f"{block}.4.w1.weight" not in after


def test_layers_that_keep_different_numbers_are_refused(made, tmp_path):
    compressed = made("mixtral") / "compressed"
    regroup(compressed, tmp_path / "r", [[0, 1, 2, 3]], expert_map=EXPERT_MAP, only_layers=[1])
    with mistake(
        "layers keep 4 of 6 and 6 of 6 experts, and config.json has one number for all; serve the "
        "compressed folder instead"
    ):
        restore_checkpoint(tmp_path / "r", tmp_path / "d")
    assert names_in(tmp_path) == {"r"}


def test_too_few_experts_for_a_token_are_refused(made, tmp_path):
    compressed = made("qwen3_moe") / "compressed"
    regroup(compressed, tmp_path / "r", [[0]], expert_map=[-1, -1, -1, 0, -1, -1])
    with mistake("1 of 6 experts are kept, and each token needs 2; keep more experts"):
        restore_checkpoint(tmp_path / "r", tmp_path / "d")
    assert names_in(tmp_path) == {"r"}


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    """A DeepSeek-V3 whose router chooses one of two groups of three experts."""
    folder = tmp_path_factory.mktemp("grouped")
    overrides = OVERRIDES["deepseek_v3"] | {"n_group": 2, "topk_group": 1}
    save_family(FAMILIES["deepseek_v3"], folder / "source", **overrides)
    compress(folder / "source", folder / "compressed", align="none", keep=1.0)
    return folder


def test_groups_that_lose_the_same_number_of_experts_stay_groups(grouped, tmp_path):
    expert_map = [0, -1, 1, 2, 3, -1]
    regroup(grouped / "compressed", tmp_path / "r", [[0, 1, 2, 3]], expert_map=expert_map)
    expected = without_experts(grouped / "source", tmp_path / "expected", [0, 2, 3, 4])

    restore_checkpoint(tmp_path / "r", tmp_path / "d")

    _assert_same_logits(tmp_path / "d", expected)


def test_groups_that_lose_different_numbers_are_refused(grouped, tmp_path):
    expert_map = [0, 1, 2, -1, 3, -1]
    regroup(grouped / "compressed", tmp_path / "r", [[0, 1, 2, 3]], expert_map=expert_map)
    with mistake(r"the router chooses among 2 groups of experts, which keep \[3, 1\]; keep the"):
        restore_checkpoint(tmp_path / "r", tmp_path / "d")


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_fewer_rows_make_a_smaller_model(made, tmp_path, name):
    regroup(made(name) / "compressed", tmp_path / "r", [list(range(6))], kept_rows=KEPT_ROWS)
    expected = without_rows(made(name) / "source", tmp_path / "expected", KEPT_ROWS, zero=False)
    field = "moe_intermediate_size" if name == "qwen3_moe" else "intermediate_size"
    edit_config(expected, len(KEPT_ROWS), field)

    remarks = restore_checkpoint(tmp_path / "r", tmp_path / "d")

    assert [remark.split(" instead")[0] for remark in remarks] == [f"config.json: {field} is 7"]
    assert _config(tmp_path / "d") == _config(expected)
    _assert_same_logits(tmp_path / "d", expected)


# Their field for rows also sizes shared experts or dense MLPs.
@pytest.mark.parametrize("name", ["deepseek_v3", "switch"])
def test_rows_of_zeros_stand_in_where_the_config_cannot_say_it(made, tmp_path, name):
    regroup(made(name) / "compressed", tmp_path / "r", [list(range(6))], kept_rows=KEPT_ROWS)
    expected = without_rows(made(name) / "source", tmp_path / "expected", KEPT_ROWS, zero=True)

    (remark,) = restore_checkpoint(tmp_path / "r", tmp_path / "d")

    assert "zero rows are added to experts, from 7 to" in remark
    assert "config.json cannot say how many each layer has" in remark
    assert _config(tmp_path / "d") == _config(expected)
    _assert_same_logits(tmp_path / "d", expected)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_the_full_number_of_rows_can_be_asked_for(made, tmp_path, name):
    regroup(made(name) / "compressed", tmp_path / "r", [list(range(6))], kept_rows=KEPT_ROWS)
    expected = without_rows(made(name) / "source", tmp_path / "expected", KEPT_ROWS, zero=True)

    (remark,) = restore_checkpoint(tmp_path / "r", tmp_path / "d", full_rows=True)

    assert remark.endswith("(as asked for)")
    assert _config(tmp_path / "d") == _config(made(name) / "source")
    _assert_same_logits(tmp_path / "d", expected)


def test_layers_with_different_rows_get_as_many_as_the_largest(made, tmp_path):
    """Layer 0 stores 7 of 27 rows, layer 1 stores 5: the model gets 7."""
    folder, every = made("mixtral"), [list(range(6))]
    rows = {0: KEPT_ROWS, 1: KEPT_ROWS[:5]}
    regroup(folder / "compressed", tmp_path / "a", every, kept_rows=rows[0], only_layers=[0])
    regroup(tmp_path / "a", tmp_path / "r", every, kept_rows=rows[1], only_layers=[1])

    remarks = restore_checkpoint(tmp_path / "r", tmp_path / "d")

    assert remarks[0] == "config.json: intermediate_size is 7 instead of 27"
    assert remarks[1].startswith("1 of 2 layers: zero rows are added to experts, from 5 to 7 in")
    before, after = _tensors(folder / "source"), _tensors(tmp_path / "d")
    for layer, kept in rows.items():
        name = f"model.layers.{layer}.block_sparse_moe.experts.4.w2.weight"
        padding = torch.zeros(20, 7 - len(kept))
        torch.testing.assert_close(after[name], torch.cat([before[name][:, kept], padding], 1))


def test_fewer_experts_with_fewer_rows_make_a_model_smaller_in_both(made, tmp_path):
    folder = made("mixtral")
    regroup(
        folder / "compressed",
        tmp_path / "r",
        [[0, 1, 2, 3]],
        expert_map=EXPERT_MAP,
        kept_rows=KEPT_ROWS,
    )
    few = without_experts(folder / "source", tmp_path / "few", KEPT)
    expected = without_rows(few, tmp_path / "expected", KEPT_ROWS, zero=False)
    edit_config(expected, 7, "intermediate_size")

    restore_checkpoint(tmp_path / "r", tmp_path / "d")

    assert _config(tmp_path / "d") == _config(expected)
    _assert_same_logits(tmp_path / "d", expected)


def test_more_stored_rows_than_the_model_has_are_refused(pristine, tmp_path):
    folder = regroup(pristine, tmp_path / "r", [[0, 1, 2, 3]], kept_rows=KEPT_ROWS)
    edit_json(folder / "resmoe.json", lambda index: index["layers"][1].update(source_rows=6))
    with mistake("model.layers.1.mlp.experts: 7 rows are stored of experts of 6"):
        restore_checkpoint(folder, tmp_path / "d")
