"""Folders of every compression method of plain experts: they hold what was computed in memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from resmoe_dist.checkpoints.compressed import CompressedCheckpoint
from resmoe_dist.checkpoints.source import SourceCheckpoint
from tests.methods.folders import (
    TOLERANCE,
    compress,
    encode_in_memory,
    read_matrices,
    served_and_expected,
    settings,
    source_matrices,
)
from tests.models import relative_difference

METHODS = [
    ("up", {"form": "concat"}),
    ("up", {"form": "sep"}),
    ("sp", {"form": "concat"}),
    ("sp", {"form": "sep"}),
    ("svd", {"form": "concat"}),
    ("svd", {"form": "sep"}),
    ("mlp_fusion", {"seed": 3}),
    ("d2_moe", {}),
    ("rtn", {"bits": 3, "group_size": 16}),
    ("mobe", {"steps": 20}),
]
# Those that store every row, so that the error is a plain difference.
ALL_ROWS = [
    case
    for case in METHODS
    if case not in (("sp", {"form": "concat"}), ("mlp_fusion", {"seed": 3}))
]


def _decoded(encoded):
    center = 0.0 if encoded.center is None else encoded.center.decode().float()
    return torch.stack([center + residual.decode().float() for residual in encoded.residuals])


@pytest.mark.parametrize(("name", "options"), METHODS)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_folder_holds_what_the_method_computed(family_folder, tmp_path, family, name, options):
    source = family_folder(family)
    chosen = settings(source, name, 0.5, **options)

    compress(source, tmp_path / "c", chosen)
    in_memory = encode_in_memory(source, tmp_path, chosen)

    torch.testing.assert_close(read_matrices(tmp_path / "c"), _decoded(in_memory))
    assert CompressedCheckpoint(tmp_path / "c").faults() == []


@pytest.mark.parametrize(("name", "options"), METHODS)
def test_folder_is_served_as_its_matrices_compute(family_folder, tmp_path, name, options):
    source = family_folder("mixtral")
    compress(source, tmp_path / "c", settings(source, name, 0.5, **options))
    matrices_EID = read_matrices(tmp_path / "c")
    shape = replace(SourceCheckpoint(source).sites[0].shape, rows=matrices_EID.shape[1])

    found, expected = served_and_expected(tmp_path / "c", matrices_EID, shape)

    assert relative_difference(found, expected) <= TOLERANCE


@pytest.mark.parametrize(("name", "options"), ALL_ROWS)
def test_errors_in_the_index_are_those_of_the_stored_matrices(
    family_folder, tmp_path, name, options
):
    source = family_folder("gpt_oss")
    index = compress(source, tmp_path / "c", settings(source, name, 0.5, **options))

    lost_EID = source_matrices(source) - read_matrices(tmp_path / "c")

    (group,) = index.layers[0].groups
    expected = lost_EID.double().square().sum((1, 2))
    torch.testing.assert_close(torch.tensor(group.squared_errors, dtype=torch.float64), expected)
