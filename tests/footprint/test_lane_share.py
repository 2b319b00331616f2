"""What `plan` predicts for the ranks of a lane, besides experts, equals what they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

from resmoe_dist import load_model
from resmoe_dist.footprint.lane_share import LaneShare, lane_share
from resmoe_dist.footprint.structure import read_structure
from resmoe_dist.runtime.rank_memory import rank_memory
from resmoe_dist.runtime.sharding_rules import STYLES, Division
from tests.footprint.live_cache import live_cache_bytes
from tests.models import FAMILIES, VOCABULARY, compress, save_family
from tests.ranks import run_on_ranks

BATCH, TOKENS = 3, 9
# Eight heads, four key/value heads. Latent attention has as many key/value heads as heads.
SIZES = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", SIZES),
    "tied mixtral": ("mixtral", SIZES | {"tie_word_embeddings": True}),
    "odd mixtral": ("mixtral", SIZES | {"vocab_size": VOCABULARY + 3}),
    "deepseek_v3": ("deepseek_v3", SIZES | {"num_key_value_heads": 8}),
    "qwen3_moe": ("qwen3_moe", SIZES),
    "gpt_oss": ("gpt_oss", SIZES),
    "sliding gpt_oss": ("gpt_oss", SIZES | {"sliding_window": 5}),
    "olmoe": ("olmoe", SIZES),
    "switch": ("switch", {}),
}
# A grid, and the ranks of its lanes.
GRIDS = [
    ({"ep": 1, "tp": 2}, 2),
    ({"ep": 4, "tp": 1, "lanes": 1}, 4),
    ({"ep": 4, "tp": 2, "lanes": 1}, 8),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = {}
    for name, (family, values) in MODELS.items():
        source = tmp_path_factory.mktemp("model") / "s"
        save_family(FAMILIES[family], source, **values)
        made[name] = source.parent / "c"
        compress(source, made[name], groups=4)
    return made


def _live(folders: dict[str, Path], grid: dict[str, Any]) -> dict[str, LaneShare]:
    found = {}
    for name, folder in folders.items():
        model = load_model(folder, **grid)
        cache = live_cache_bytes(model, BATCH, TOKENS)
        found[name] = LaneShare(rank_memory(model).other_bytes, cache // BATCH)
        torch.distributed.barrier()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("grid", "lane_ranks"), GRIDS, ids=str)
def test_the_rank_that_holds_most_holds_what_is_predicted(folders, grid, lane_ranks):
    ranks = run_on_ranks(grid["ep"] * grid["tp"], _live, folders, grid)

    for name, folder in folders.items():
        predicted = lane_share(read_structure(folder, context=TOKENS), lane_ranks)
        live = [rank[name] for rank in ranks]
        assert max(share.other for share in live) == predicted.other, name
        assert {share.cache for share in live} == {predicted.cache}, name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Four key/value heads: at most four parts.
        ("mixtral", [1, 2, 4, 4]),
        ("gpt_oss", [1, 2, 4, 4]),
        # The cached latent has no heads, OLMoE gathers keys, Switch has no plan.
        ("deepseek_v3", [1, 1, 1, 1]),
        ("olmoe", [1, 1, 1, 1]),
        ("switch", [1, 1, 1, 1]),
    ],
)
def test_parts_of_the_cache(folders, name, expected):
    structure = read_structure(folders[name], context=TOKENS)

    found = [lane_share(structure, ranks).cache for ranks in (1, 2, 4, 8)]

    assert found == [structure.cache_bytes // parts for parts in expected]


def test_one_rank_and_a_family_without_a_plan_hold_everything(folders):
    mixtral, switch = (read_structure(folders[name], context=0) for name in ("mixtral", "switch"))

    assert lane_share(mixtral, 1) == LaneShare(mixtral.other_bytes, 0)
    assert lane_share(switch, 4) == LaneShare(switch.other_bytes, 0)


@pytest.fixture(params=[2, 3])
def mesh(request):
    """The first rank of a world that does not exist."""
    torch.distributed.init_process_group(
        "fake", rank=0, world_size=request.param, store=FakeStore()
    )
    yield init_device_mesh("cpu", (request.param,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("style", STYLES)
def test_a_slice_has_the_shape_that_transformers_gives_it(mesh, style):
    with torch.device("meta"):
        linear = torch.nn.Linear(7, 10)
    whole = {name: tuple(parameter.shape) for name, parameter in linear.named_parameters()}
    for name in whole:
        ALL_PARALLEL_STYLES[style].shard_param(linear, name, mesh)

    local = {
        name: tuple(getattr(parameter.data, "_local_tensor", parameter).shape)
        for name, parameter in linear.named_parameters()
    }

    names = ["weight"] if style == "embedding_rowwise" else [*whole]
    division = Division(style, mesh.size())
    assert {name: division.largest_slice(whole[name]) for name in names} == {
        name: local[name] for name in names
    }
