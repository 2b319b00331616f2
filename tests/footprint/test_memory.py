"""What `plan` predicts for a rank equals what a loaded model holds there."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

import tests.codecs.rounded_codec  # noqa: F401  (registers codec `rounded`)
from resmoe_dist.checkpoints.compressed import CompressedCheckpoint
from resmoe_dist.checkpoints.format import CompressionSettings
from resmoe_dist.families.activations import PlainActivation
from resmoe_dist.footprint.experts import ExpertBytes
from resmoe_dist.footprint.grid import Footprint, footprint, grid_for
from resmoe_dist.footprint.layout import CheckpointLayout, SettingsLayout
from resmoe_dist.footprint.structure import read_structure
from resmoe_dist.parallel.topology import Topology, build_topology
from resmoe_dist.runtime.experts import CompressedExperts
from resmoe_dist.runtime.loading import load_model
from resmoe_dist.runtime.rank_memory import RankMemory, rank_memory
from tests.checkpoints.damage import bytes_by_tensor
from tests.compress_settings import compression_settings
from tests.models import FAMILIES, compress, logits_of
from tests.ranks import run_on_ranks

# In these a quarter of an expert's entries is a whole number of values.
WHOLE_VALUES = ("mixtral", "olmoe", "switch")


def settings_for(name: str, **options) -> CompressionSettings:
    layers = [0] if name == "deepseek_v3" else [0, 1]  # The other layer of deepseek_v3 is dense.
    return compression_settings(**({"groups": 2, "layers": layers} | options))


def predicted(
    source: Path, settings: CompressionSettings, ep: int, tp: int, dtype: torch.dtype | None = None
) -> Footprint:
    structure = read_structure(source, context=0, dtype=dtype)
    layout = SettingsLayout(structure, settings, fixed_groups=True)
    return footprint(structure, layout, grid_for(ep, tp, ep))


def from_index(folder: Path, ep: int, tp: int, dtype: torch.dtype | None = None) -> Footprint:
    structure = read_structure(folder, context=0, dtype=dtype)
    return footprint(structure, CheckpointLayout(folder), grid_for(ep, tp, ep))


def live_here(folder: Path, dtype: torch.dtype | None = None) -> RankMemory:
    """Of one process, after a forward: row biases are decoded when they are first used."""
    model = load_model(folder, dtype=dtype)
    logits_of(model)
    return rank_memory(model)


def live_on_rank(folder: Path, ep: int, tp: int) -> RankMemory:
    model = load_model(folder, topology=build_topology(ep, tp))
    logits_of(model)
    return rank_memory(model)


def experts_on_ranks(folder: Path, ep: int, tp: int) -> list[ExpertBytes]:
    """Of every rank of a grid, loaded one after the other without processes."""
    checkpoint = CompressedCheckpoint(folder)
    activation = PlainActivation(torch.nn.SiLU())
    found = []
    for ep_rank, tp_rank in itertools.product(range(ep), range(tp)):
        place = Topology(ep, tp, ep_rank=ep_rank, tp_rank=tp_rank)
        layers = [
            CompressedExperts.load(checkpoint, layer, place, activation)
            for layer in checkpoint.index.layers
        ]
        parts = [ExpertBytes(layer.center_bytes, layer.residual_bytes) for layer in layers]
        found.append(sum(parts, ExpertBytes()))
    return found


def largest(ranks: list[ExpertBytes]) -> ExpertBytes:
    return max(ranks, key=lambda rank: rank.total)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_and_an_index_give_the_bytes_of_one_process(family_folder, tmp_path, name):
    source, settings = family_folder(name), settings_for(name)
    compress(source, tmp_path / "c", groups=2)
    live = live_here(tmp_path / "c")

    indexed, planned = from_index(tmp_path / "c", 1, 1), predicted(source, settings, 1, 1)

    assert indexed.experts == ExpertBytes(live.center_bytes, live.residual_bytes)
    assert indexed.other == planned.other == live.other_bytes
    assert planned.experts.center == live.center_bytes
    # A quarter of the entries is a fraction of a value in some families: rounded up per expert.
    experts = sum(site.num_experts for site in read_structure(source, context=0).sites)
    surplus = planned.experts.residual - live.residual_bytes
    assert 0 <= surplus <= (0 if name in WHOLE_VALUES else experts * 4)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "qwen3_moe", "gpt_oss"])
def test_another_dtype_in_memory(family_folder, tmp_path, name):
    source, dtype = family_folder(name), torch.bfloat16
    compress(source, tmp_path / "c", groups=2)
    live = live_here(tmp_path / "c", dtype)

    found = from_index(tmp_path / "c", 1, 1, dtype)

    assert found.other == live.other_bytes
    assert found.experts.center == live.center_bytes
    assert found.experts.residual == pytest.approx(live.residual_bytes, abs=2 * 8 * 2)


CODECS = [
    {"codec": "low_rank"},
    {"codec": "low_rank:rank=3", "center_codec": "low_rank:keep=0.5"},
    {"codec": "rounded"},
    {"codec": "rtn:bits=3,group_size=16", "center_codec": "rtn:bits=8"},
    {"codec": "dense", "center": "none"},
    {"allocate": "block", "groups_per_rank": 2},
    {"allocate": "block", "layers": [1]},
]


@pytest.mark.parametrize("options", CODECS, ids=str)
@pytest.mark.parametrize("tp", [1, 2, 3])
def test_every_codec_gives_the_bytes_of_a_row_range(family_folder, tmp_path, options, tp):
    """Where all rows and experts take the same bytes, every slice is exact."""
    source = family_folder("mixtral")
    index = compress(source, tmp_path / "c", groups=2, **options)
    ranks = experts_on_ranks(tmp_path / "c", 1, tp)

    settings = settings_for("mixtral", **options)

    assert predicted(source, settings, 1, tp).experts == largest(ranks)
    assert from_index(tmp_path / "c", 1, tp).experts == largest(ranks)
    assert index.settings == settings.model_copy(update={"method": index.settings.method})


@pytest.mark.parametrize(("ep", "tp"), [(2, 1), (4, 1), (2, 2), (1, 3)])
def test_a_group_that_is_split_over_ranks_is_spread_evenly(family_folder, tmp_path, ep, tp):
    """Masks are chosen over a whole group, so rows and experts of it differ in kept values."""
    source, settings = family_folder("mixtral"), settings_for("mixtral")
    compress(source, tmp_path / "c", groups=2)
    ranks = experts_on_ranks(tmp_path / "c", ep, tp)

    found, planned = from_index(tmp_path / "c", ep, tp), predicted(source, settings, ep, tp)

    assert found.experts.center == planned.experts.center == largest(ranks).center
    if (ep, tp) == (2, 1):
        assert found.experts == planned.experts == largest(ranks)
    else:
        assert planned.experts.residual == pytest.approx(largest(ranks).residual, rel=0.1)
        assert found.experts.residual == pytest.approx(largest(ranks).residual, rel=0.1)


@pytest.mark.slow
def test_a_served_grid_holds_what_was_predicted(family_folder, tmp_path):
    source = family_folder("gpt_oss")
    settings = settings_for("gpt_oss", allocate="block")
    compress(source, tmp_path / "c", groups=2, allocate="block")

    ranks = run_on_ranks(4, live_on_rank, tmp_path / "c", 2, 2)
    experts = [ExpertBytes(rank.center_bytes, rank.residual_bytes) for rank in ranks]

    found = from_index(tmp_path / "c", 2, 2)
    assert found.experts.center == largest(experts).center
    # The index rounds `keep`, and codecs round up: at most a value for each expert.
    assert 0 <= found.experts.residual - largest(experts).residual <= 2 * 2 * 4
    assert {found.other} == {rank.other_bytes for rank in ranks}
    # A budget of each row keeps 15 of 62 entries, which is less than a quarter.
    planned = predicted(source, settings, 2, 2)
    assert planned.experts.center == largest(experts).center
    assert planned.experts.residual == pytest.approx(largest(experts).residual, rel=0.03)


@pytest.mark.parametrize("name", FAMILIES)
def test_disk_bytes_are_those_of_the_tensors(family_folder, tmp_path, name):
    source, settings = family_folder(name), settings_for(name)
    compress(source, tmp_path / "c", groups=2)
    files = list((tmp_path / "c").glob("*.safetensors"))
    tensors = sum(sum(bytes_by_tensor(path).values()) for path in files)
    count = sum(len(bytes_by_tensor(path)) for path in files)

    indexed, planned = from_index(tmp_path / "c", 1, 1), predicted(source, settings, 1, 1)

    assert indexed.stored.disk_bytes == sum(path.stat().st_size for path in files)
    # Without file headers; with at most a value for each expert too many.
    assert 0 <= planned.stored.disk_bytes - tensors <= 8 * 4
    assert indexed.stored.disk_bytes - tensors <= 150 * count + 1000 * len(files)


def test_groups_that_do_without_a_centre_take_the_same_bytes(family_folder, tmp_path):
    source = family_folder("mixtral")
    index = compress(source, tmp_path / "c", groups=2, center="auto")
    groups = [group for layer in index.layers for group in layer.groups]
    assert not all(group.has_center for group in groups)

    planned = predicted(source, settings_for("mixtral", center="auto"), 2, 1)

    stored = sum(group.stored_bytes for group in groups)
    assert 0 <= sum(layer.stored_bytes for layer in planned.stored.layers) - stored <= 8 * 4


def test_a_target_gives_the_keep_of_compress(family_folder, tmp_path):
    source = family_folder("mixtral")
    index = compress(source, tmp_path / "c", groups=2, target_bytes=0.9)

    settings = settings_for("mixtral", target_bytes=0.9)
    planned = predicted(source, settings, 2, 1)

    assert planned.stored.settings.residual_codec == index.settings.residual_codec
    dense = 2 * 4 * 27 * 60 * 4
    stored = sum(group.stored_bytes for layer in index.layers for group in layer.groups)
    assert sum(layer.stored_bytes for layer in planned.stored.layers) <= 0.9 * dense
    assert sum(layer.stored_bytes for layer in planned.stored.layers) >= stored


@pytest.mark.parametrize("target", [0.1, 0.19, 0.6])
def test_a_target_for_bits_gives_the_size_of_compress(family_folder, tmp_path, target):
    source = family_folder("mixtral")
    options = {"target_bytes": target, "codec": "quantized", "center_codec": "quantized"}
    index = compress(source, tmp_path / "c", groups=2, **options)

    planned = predicted(source, settings_for("mixtral", **options), 2, 1)

    stored = sum(group.stored_bytes for layer in index.layers for group in layer.groups)
    found = sum(layer.stored_bytes for layer in planned.stored.layers)
    # `compress` stays below by less than an expert's step from 4 to 8 bits.
    assert stored <= found <= target * 2 * 4 * 27 * 60 * 4
    assert found - stored <= 27 * 60 * 4 / 8


def test_a_narrower_dtype_is_stored_where_layers_are_compressed(family_folder, tmp_path):
    source, options = family_folder("mixtral"), {"layers": [1], "dtype": "bfloat16"}
    compress(source, tmp_path / "c", groups=2, **options)
    files = list((tmp_path / "c").glob("*.safetensors"))

    planned = predicted(source, settings_for("mixtral", **options), 1, 1, torch.bfloat16)

    live = live_here(tmp_path / "c")
    assert planned.experts == ExpertBytes(live.center_bytes, live.residual_bytes)
    assert planned.other == live.other_bytes
    tensors = sum(sum(bytes_by_tensor(path).values()) for path in files)
    assert planned.stored.disk_bytes == tensors
