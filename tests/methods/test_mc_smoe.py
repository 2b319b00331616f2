"""`mc_smoe`: experts merged as `m_smoe` merges them, then stored in parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from resmoe_dist import load_model
from resmoe_dist.checkpoints.compressed import CompressedCheckpoint
from resmoe_dist.checkpoints.restore import restore_checkpoint
from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.codecs import CodecSpec, LowRankColumnsMatrix
from resmoe_dist.compression.encoding import GroupCodecs
from resmoe_dist.design_matrix import ExpertShape
from resmoe_dist.methods import Method, MethodSpec, method_of
from tests.methods.folders import TOLERANCE, compress, settings
from tests.models import dense_model, logits_of, relative_difference

SHAPE = ExpertShape(rows=40, hidden=30)


def _method(**options: Any) -> Method:
    return method_of(MethodSpec(name="mc_smoe", options=options))


def _codecs(method: Method) -> GroupCodecs:
    return method.codecs(GroupCodecs(CodecSpec.parse("pruned:keep=0.25"), torch.bfloat16))


@pytest.mark.parametrize(("keep", "experts"), [(0.25, 4), (0.4, 6), (0.5, 8), (1.0, 8)])
def test_a_budget_of_values_allows_more_experts_of_which_less_is_stored(keep, experts):
    method = _method(share=0.5, sparse=0.1)
    codecs = _codecs(method)

    size = method.size(SHAPE, 8, codecs)

    config = codecs.residual.config
    one = LowRankColumnsMatrix.stored_bytes(40, 90, config, 2)
    assert size.bytes_at(keep) == experts * one
    # 3 of 30 columns of gate and up, 4 of 40 rows of down: 360 values. Rank 6 of three factors of
    # 40 + 30 values is the largest that fits into the other 1440. 6 numbers and 41 offsets.
    assert one == 2 * (360 + 6 * 3 * 70) + 4 * (6 + 41)
    assert size.dense_bytes == 8 * 40 * 90 * 2


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "switch"])
def test_folder_stores_the_experts_of_m_smoe_in_parts(family_folder, tmp_path, family):
    source = family_folder(family)
    # The same number of experts: a quarter of the values is half of the experts, in half the bytes.
    compress(source, tmp_path / "whole", settings(source, "m_smoe", 0.5))

    compress(source, tmp_path / "parts", settings(source, "mc_smoe", 0.25, share=0.5))

    parts, whole = (CompressedCheckpoint(tmp_path / name) for name in ("parts", "whole"))
    assert parts.faults() == []
    for layer, same in zip(parts.index.layers, whole.index.layers, strict=True):
        assert layer.expert_map == same.expert_map
        assert layer.residual_codec == "low_rank_columns"
        (group,), (dense_group,) = layer.groups, same.groups
        file, dense_file = parts.open_group(layer, group), whole.open_group(same, dense_group)
        for k in group.experts:
            stored = file.read_residual(k, 0, layer.rows)
            merged_ID = dense_file.read_residual(k, 0, layer.rows).decode()
            lost_ID = stored.decode() - merged_ID
            assert isinstance(stored, LowRankColumnsMatrix)
            # Some of it is lost, but none of what the kept columns and rows hold.
            assert 0.01 < float(lost_ID.norm() / merged_ID.norm()) < 0.9
            H = layer.hidden
            out = slice(len(layer.shape.inputs) * H, (len(layer.shape.inputs) + 1) * H)
            kept_rows = stored.row_offsets.diff().bool()
            assert int(kept_rows.sum()) == int(0.1 * layer.rows)
            assert float(lost_ID[kept_rows, out].abs().max()) < 1e-5


def test_folder_serves_what_it_restores_to(family_folder, tmp_path):
    source = family_folder("mixtral")
    compress(source, tmp_path / "c", settings(source, "mc_smoe", 0.25, share=0.5))

    found = logits_of(load_model(tmp_path / "c"))

    restore_checkpoint(tmp_path / "c", tmp_path / "d")
    expected = logits_of(dense_model(tmp_path / "d"))
    assert relative_difference(found, expected) <= TOLERANCE
    original = logits_of(dense_model(source))
    assert relative_difference(found, original) > 100 * TOLERANCE


def test_recorded_bytes_are_those_of_the_parts(family_folder, tmp_path):
    source = family_folder("mixtral")
    chosen = settings(source, "mc_smoe", 0.25, share=0.5, sparse=0.2)

    index = compress(source, tmp_path / "c", chosen)

    shape = SourceCheckpoint(source).sites[0].shape
    codecs = GroupCodecs(chosen.residual_codec, torch.float32)
    config = method_of(chosen.method).codecs(codecs).residual.config
    one = LowRankColumnsMatrix.stored_bytes(shape.rows, shape.columns, config, 4)
    groups = [layer.groups[0] for layer in index.layers]
    assert sum(len(group.experts) for group in groups) == 4
    assert [group.stored_bytes for group in groups] == [
        len(group.experts) * one for group in groups
    ]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"share": 0.1, "sparse": 0.1}, "method mc_smoe: sparse 0.1 must be below share 0.1"),
        ({"blocks": 3}, "method mc_smoe: no option blocks; its options: share, sparse"),
    ],
)
def test_wrong_options_are_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        _method(**options)
