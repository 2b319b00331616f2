"""Groups that are no ranges of experts, groups without a centre: the same model all the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resmoe_dist import Topology, load_model
from resmoe_dist.checkpoints.restore import restore_checkpoint
from resmoe_dist.runtime.rank_memory import rank_memory
from tests.checkpoints.damage import mistake
from tests.checkpoints.regrouping import regroup
from tests.models import FAMILIES, compress, dense_model, logits_of, relative_difference
from tests.ranks import run_on_ranks

TOLERANCE = 1e-4  # relative, float32
# (groups, which of them have no centre)
GROUPINGS = [
    ([[1, 2], [0, 3]], ()),
    ([[3], [0, 2], [1]], (1,)),
    ([[0, 1, 2, 3]], (0,)),
]


@pytest.mark.parametrize("codec", ["pruned", "low_rank", "dense"])
@pytest.mark.parametrize(("partition", "centerless"), GROUPINGS)
def test_experts_are_the_same_in_whatever_groups(
    family_folder, tmp_path, partition, centerless, codec
):
    compress(family_folder("mixtral"), tmp_path / "c", groups=2)
    restore_checkpoint(tmp_path / "c", tmp_path / "d")
    regroup(tmp_path / "c", tmp_path / "r", partition, centerless=centerless, codec=codec)

    found = logits_of(load_model(tmp_path / "r"))

    assert relative_difference(found, logits_of(dense_model(tmp_path / "d"))) <= TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_served_from_interleaved_groups(family_folder, tmp_path, name):
    compress(family_folder(name), tmp_path / "c", groups=2)
    restore_checkpoint(tmp_path / "c", tmp_path / "d")
    regroup(tmp_path / "c", tmp_path / "r", [[1, 2], [0, 3]], centerless=[0])

    found = logits_of(load_model(tmp_path / "r"))

    assert relative_difference(found, logits_of(dense_model(tmp_path / "d"))) <= TOLERANCE


def _logits_on_grid(folders: list[Path], ep: int, tp: int) -> list[torch.Tensor]:
    return [logits_of(load_model(folder, ep=ep, tp=tp)) for folder in folders]


@pytest.mark.slow
@pytest.mark.parametrize(("ep", "tp"), [(2, 1), (1, 2), (2, 2), (4, 1), (4, 2)])
def test_every_grid_gives_the_logits_of_the_restored_model(family_folder, tmp_path, ep, tp):
    # Biases (gpt_oss) and the adapter (switch) go by expert number too. At four ranks there are
    # more ranks than groups, at one and two a rank may hold parts of all of them.
    folders, expected = [], []
    for name in ("mixtral", "gpt_oss", "switch"):
        compress(family_folder(name), tmp_path / name, groups=2)
        for i, (partition, centerless) in enumerate(GROUPINGS):
            for codec in ("pruned", "low_rank"):
                folders.append(tmp_path / f"{name}-{i}-{codec}")
                regroup(
                    tmp_path / name,
                    folders[-1],
                    partition,
                    centerless=centerless,
                    codec=codec,
                    keep=0.5,
                )
                dense = tmp_path / f"{folders[-1].name}-dense"
                restore_checkpoint(folders[-1], dense)
                expected.append(logits_of(dense_model(dense)))

    for rank, found in enumerate(run_on_ranks(ep * tp, _logits_on_grid, folders, ep, tp)):
        for folder, mine, want in zip(folders, found, expected, strict=True):
            assert relative_difference(mine, want) <= TOLERANCE, f"rank {rank}, {folder.name}"


def test_a_rank_opens_only_files_that_hold_its_experts(family_folder, tmp_path):
    compress(family_folder("mixtral"), tmp_path / "c")
    regroup(tmp_path / "c", tmp_path / "r", [[0, 3], [1], [2]])
    for path in (tmp_path / "r").glob("resmoe-*-group-001.safetensors"):
        path.unlink()

    model = load_model(tmp_path / "r", topology=Topology(ep=2, ep_rank=1))  # experts 2 and 3

    held = model.model.layers[0].mlp.experts.experts
    assert (held.num_groups, len(held.residuals)) == (2, 2)
    with mistake("group-001.safetensors: this file is missing"):
        load_model(tmp_path / "r", topology=Topology(ep=2, ep_rank=0))


def test_a_missing_centre_takes_no_memory(family_folder, tmp_path):
    compress(family_folder("mixtral"), tmp_path / "c")
    regroup(tmp_path / "c", tmp_path / "r", [[0, 2], [1, 3]], centerless=[1])

    memory = rank_memory(load_model(tmp_path / "r", topology=Topology(tp=3, tp_rank=1)))

    # Two layers, one centre each, this rank's rows of it; D = 60 float32 columns.
    assert memory.center_bytes == 2 * (2 * 27 // 3 - 27 // 3) * 60 * 4
    assert memory.groups == 4
    # Every entry is kept: its bit and its value, and an offset per row and one more.
    bitmap, values, offsets = 9 * 8, 9 * 60 * 4, 10 * 4
    assert memory.residual_bytes == 2 * 4 * (bitmap + values + offsets)


def test_experts_stored_whole_are_not_copied_to_run(family_folder, tmp_path):
    compress(family_folder("mixtral"), tmp_path / "c", layers=[])

    model = load_model(tmp_path / "c")
    logits_of(model)

    assert model.model.layers[0].mlp.experts.experts.execution.workspace.nbytes == 0
