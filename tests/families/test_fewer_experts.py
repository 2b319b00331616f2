"""Every family can drop experts, or is refused in one line: `restore` and serving agree."""

from __future__ import annotations

import pytest

from resmoe_dist.checkpoints.restore import restore_checkpoint
from resmoe_dist.runtime.loading import load_model
from tests.all_families import tiny_model
from tests.checkpoints.damage import mistake
from tests.checkpoints.regrouping import regroup
from tests.families.test_all_families import SUPPORTED, outputs_of
from tests.models import compress, relative_difference

REFUSED = {
    "deepseek_v4": "tid2eid: may hold numbers of experts, so experts cannot be dropped",
    "dots3_note": "vision_tower.blocks.1.mlp.experts: 3 of 4 experts are stored, and a Dots3Note",
}


def _without_an_expert(family, folder):
    tiny_model(family).save_pretrained(folder / "source")
    compress(folder / "source", folder / "compressed", keep=1.0, dtype="float32")
    return regroup(folder / "compressed", folder / "r", [[0, 1, 2]], expert_map=[0, -1, 1, 2])


@pytest.mark.parametrize("family", [name for name in SUPPORTED if name not in REFUSED])
def test_the_restored_smaller_model_is_what_is_served(family, tmp_path):
    folder = _without_an_expert(family, tmp_path)

    restore_checkpoint(folder, tmp_path / "dense")

    expected = outputs_of(load_model(tmp_path / "dense"))
    assert relative_difference(outputs_of(load_model(folder)), expected) < 1e-4


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_drop_experts_is_refused(family, tmp_path):
    folder = _without_an_expert(family, tmp_path)
    with mistake(REFUSED[family]):
        load_model(folder)
    with mistake("."):
        restore_checkpoint(folder, tmp_path / "dense")
