"""What a rank reads: the files of its own groups, and of those its own rows."""

from __future__ import annotations

import pytest
import torch

from resmoe_dist import Topology, load_model
from resmoe_dist.checkpoints.compressed import CompressedCheckpoint
from resmoe_dist.runtime.served_folder import ServedFolder
from tests.checkpoints.damage import flip_byte_of, mistake
from tests.models import compress, logits_of


def group_files(folder, group: int) -> list:
    """The files of one group of every layer."""
    return sorted(folder.glob(f"resmoe-*-group-{group:03d}.safetensors"))


def test_a_rank_opens_only_the_files_of_its_own_groups(family_folder, tmp_path):
    compress(family_folder("mixtral"), tmp_path / "c", groups=2)
    for path in group_files(tmp_path / "c", 0):
        path.unlink()

    model = load_model(tmp_path / "c", topology=Topology(ep=2, ep_rank=1))

    assert [m.mlp.experts.experts.num_groups for m in model.model.layers] == [1, 1]
    with mistake("group-000.safetensors: this file is missing"):
        load_model(tmp_path / "c", topology=Topology(ep=2, ep_rank=0))


def test_a_rank_reads_only_its_own_rows(family_folder, tmp_path):
    compress(family_folder("mixtral"), tmp_path / "c")
    (first, *_) = group_files(tmp_path / "c", 0)
    flip_byte_of(first, "experts.0.bitmap")  # in row 0, which TP rank 0 holds

    load_model(tmp_path / "c", topology=Topology(tp=2, tp_rank=1))

    with mistake("damaged"):
        load_model(tmp_path / "c", topology=Topology(tp=2, tp_rank=0))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("ep", [1, 2, 4])
def test_ep_at_run_time_may_differ_from_the_groups(family_folder, tmp_path, groups, ep):
    compress(family_folder("mixtral"), tmp_path / "c", groups=groups)

    for rank in range(ep):
        model = load_model(tmp_path / "c", topology=Topology(ep=ep, ep_rank=rank))
        held = model.model.layers[0].mlp.experts.experts
        # Fewer ranks than groups hold several; more ranks each hold the centre they share.
        assert held.num_groups == max(1, groups // ep)
        assert len(held.residuals) == 4 // ep


def test_config_and_index_are_read_once(family_folder, tmp_path):
    compress(family_folder("mixtral"), tmp_path / "c")
    expected = logits_of(load_model(tmp_path / "c"))
    served = ServedFolder.read(tmp_path / "c")
    for name in ("config.json", "resmoe.json"):
        (tmp_path / "c" / name).unlink()

    assert torch.equal(logits_of(load_model(served)), expected)


def test_tensors_of_a_loaded_shard_are_no_larger_than_their_rows(family_folder, tmp_path):
    compress(family_folder("mixtral"), tmp_path / "c")
    layer = CompressedCheckpoint(tmp_path / "c").index.layers[0]

    model = load_model(tmp_path / "c", topology=Topology(tp=3, tp_rank=1))

    for tensor in model.model.layers[0].mlp.experts.experts.buffers():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    center = model.model.layers[0].mlp.experts.experts.centers[0].weight
    assert center.shape == (2 * layer.rows // 3 - layer.rows // 3, layer.shape.columns)


def test_a_plain_folder_cannot_be_sharded(family_folder):
    with mistake("not compressed, so it cannot be sharded"):
        load_model(family_folder("mixtral"), ep=2)


def test_a_grid_the_experts_do_not_divide_over_is_refused(family_folder, tmp_path):
    compress(family_folder("mixtral"), tmp_path / "c")

    with mistake("--ep 3: 4 experts do not divide among 3 ranks; choose one of 1, 2, 4"):
        load_model(tmp_path / "c", ep=3)


def test_more_tp_ranks_than_rows_are_refused(family_folder, tmp_path):
    compress(family_folder("mixtral"), tmp_path / "c")

    with mistake("fewer than ranks to share them"):
        load_model(tmp_path / "c", tp=28)
