"""Everything that is no expert, sharded over the ranks of a lane."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from resmoe_dist import load_model
from resmoe_dist.runtime.layer import ResMoE
from resmoe_dist.runtime.rank_memory import rank_memory
from tests.models import FAMILIES, compress, logits_of, relative_difference, save_family
from tests.parallel.collective_calls import recorded_collectives
from tests.ranks import run_on_ranks

# Large enough that norms and routers are small beside the rest.
SIZES = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
# Latent attention has as many key/value heads as heads. Shared experts of 13 rows would leave some
# ranks with one row.
OTHER_SIZES = {"deepseek_v3": {"num_key_value_heads": 8, "moe_intermediate_size": 16}}
# Families whose attention, embedding and head are all divided.
SHARDED = ("mixtral", "deepseek_v3", "qwen3_moe", "gpt_oss", "olmoe")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = {}
    for name in SHARDED:
        source = tmp_path_factory.mktemp(name) / "s"
        save_family(FAMILIES[name], source, **(SIZES | OTHER_SIZES.get(name, {})))
        made[name] = source.parent / "c"
        compress(source, made[name], groups=2)
    return made


def _whole_bytes(model: PreTrainedModel) -> int:
    """Bytes that every rank keeps: norms, routers, positions, and MLA's way into the latent."""
    whole = ("norm", "gate.", "router", "rotary", "q_a_proj", "kv_a_proj")
    experts = {
        id(tensor)
        for module in model.modules()
        if isinstance(module, ResMoE)
        for tensor in module.buffers()
    }
    named = [*model.named_parameters(), *model.named_buffers()]
    return sum(
        tensor.nbytes
        for name, tensor in named
        if id(tensor) not in experts and any(part in name for part in whole)
    )


def _load(folders: dict[str, Path], grid: dict[str, Any]) -> dict[str, tuple]:
    found = {}
    for name, folder in folders.items():
        model = load_model(folder, **grid)
        found[name] = logits_of(model), rank_memory(model).other_bytes
    torch.distributed.barrier()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("grid", "ranks_of_a_lane"),
    [({"ep": 1, "tp": 2}, 2), ({"ep": 4, "tp": 1, "lanes": 1}, 4), ({"ep": 2, "tp": 2}, 2)],
    ids=str,
)
def test_ranks_of_a_lane_share_everything_but_experts(folders, grid, ranks_of_a_lane):
    world = grid["ep"] * grid["tp"]
    results = run_on_ranks(world, _load, folders, grid)

    for name, folder in folders.items():
        model = load_model(folder)
        expected, all_bytes = logits_of(model), rank_memory(model).other_bytes
        whole = _whole_bytes(model)
        for result in results:
            logits, found_bytes = result[name]
            assert relative_difference(logits, expected) <= 1e-4
            divided = (all_bytes - whole) / ranks_of_a_lane
            assert found_bytes == pytest.approx(whole + divided, rel=0.03), name


def _attention_bytes(folder: Path, grid: dict[str, Any]) -> tuple[torch.Tensor, list[int]]:
    model = load_model(folder, **grid)
    torch.distributed.barrier()
    weights = model.model.layers[0].self_attn
    return logits_of(model), [weights.k_proj.weight.shape[0], weights.q_proj.weight.shape[0]]


@pytest.mark.slow
def test_attention_is_divided_as_far_as_its_heads_divide(folders, tmp_path):
    # Eight ranks, eight heads, but four key/value heads: two copies of four parts.
    expected = logits_of(load_model(folders["mixtral"]))

    for logits, shapes in run_on_ranks(
        8, _attention_bytes, folders["mixtral"], {"ep": 4, "tp": 2, "lanes": 1}
    ):
        assert relative_difference(logits, expected) <= 1e-4
        assert shapes == [8, 16]  # one key/value head of 8, two heads


def _decode_calls(folder: Path, grid: dict[str, Any]) -> list[tuple[str, int]]:
    model = load_model(folder, **grid)
    ids = torch.tensor([[5]])
    with torch.no_grad(), recorded_collectives() as calls:
        model(input_ids=ids)
    torch.distributed.barrier()
    return [(call.name, call.ranks) for call in calls]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("grid", "per_layer", "agreements"),
    [
        # One lane: the sums of attention and of the experts.
        ({"ep": 2, "tp": 2, "lanes": 1}, 2, 0),
        # Lanes of one rank: attention is whole.
        ({"ep": 4, "tp": 1, "dispatch": "decode"}, 2, 1),
        ({"ep": 4, "tp": 1, "dispatch": "exchange"}, 3, 0),
        # Lanes of two: two for the experts, one for attention.
        ({"ep": 2, "tp": 2, "dispatch": "decode"}, 3, 1),
    ],
    ids=str,
)
def test_collectives_of_a_decoding_step(folders, grid, per_layer, agreements):
    layers = 2
    embedding_and_head = 0 if grid["tp"] == 1 and "lanes" not in grid else 2
    for calls in run_on_ranks(4, _decode_calls, folders["mixtral"], grid):
        assert len(calls) == layers * per_layer + agreements + embedding_and_head


def _lines_said(folder: Path, grid: dict[str, Any]) -> list[str]:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("resmoe_dist").addHandler(handler)
    # As `infer` loads a model for a number of lanes that it may not use.
    load_model(folder, **grid, quiet=True)
    load_model(folder, **grid)
    torch.distributed.barrier()
    return [record.getMessage() for record in records]


@pytest.mark.slow
def test_what_is_not_divided_is_said_once(folders, family_folder, tmp_path):
    compress(family_folder("switch"), tmp_path / "c")

    switch = run_on_ranks(2, _lines_said, tmp_path / "c", {"ep": 1, "tp": 2})
    assert switch == [
        ["SwitchTransformersForConditionalGeneration: only experts are divided (no plan)"],
        [],
    ]
    eight = run_on_ranks(8, _lines_said, folders["mixtral"], {"ep": 4, "tp": 2, "lanes": 1})
    assert [line for lines in eight for line in lines] == [
        "attention is divided among 4 of 8 ranks: it has 8 and 4 (key/value) heads"
    ]
