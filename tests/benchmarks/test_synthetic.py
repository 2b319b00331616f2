"""The synthetic checkpoint: a whole Mixtral to its readers, with the statistics it promises."""

from __future__ import annotations

import pytest
import torch
from transformers import MixtralForCausalLM

from benchmarks import synthetic
from benchmarks.synthetic import SyntheticModel
from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.design_matrix import from_rows
from tests.checkpoints.damage import mistake, names_in

MODEL = SyntheticModel(layers=2, hidden=48, rows=70, experts=3)


@pytest.fixture
def small_blocks(monkeypatch):
    """Many blocks to each tensor, the last of them shorter."""
    monkeypatch.setattr(synthetic, "_BLOCK_VALUES", 48 * 16)


@pytest.fixture
def folder(tmp_path, small_blocks):
    MODEL.write(tmp_path / "model")
    return tmp_path / "model"


def test_transformers_and_the_compressor_read_the_same_experts(folder):
    model, found = MixtralForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values())  # nothing missing, unexpected or of another shape
    source = SourceCheckpoint(folder)
    shape = source.sites[0].shape
    assert (len(source.sites), shape.rows, shape.hidden) == (2, 70, 48)
    for layer in range(2):
        fused = model.model.layers[layer].mlp.experts
        for expert in range(3):
            projections = from_rows(shape, source.read_expert(layer, expert)[0])
            gate_up = torch.cat([projections["gate"], projections["up"]])
            assert torch.equal(gate_up, fused.gate_up_proj[expert])
            assert torch.equal(projections["down"], fused.down_proj[expert])


def test_rows_in_base_order_correlate_as_documented_and_others_do_not(folder):
    source = SourceCheckpoint(folder)
    rows = []
    for expert in range(3):
        matrix_ID = source.read_expert(1, expert)[0].float()
        in_base_order = torch.empty_like(matrix_ID)
        in_base_order[MODEL.row_order(1, expert)] = matrix_ID
        rows.append(in_base_order)
    values_NID = torch.stack(rows)
    assert float(values_NID.std()) == pytest.approx(0.02, rel=0.02)
    together = torch.corrcoef(values_NID.flatten(1))
    assert together[0, 1:].tolist() == pytest.approx([0.8, 0.8], abs=0.02)
    shifted = torch.corrcoef(torch.stack([rows[0].flatten(), rows[1].roll(1, 0).flatten()]))
    assert abs(float(shifted[0, 1])) < 0.04
    # What is each one's own is independent of the others'.
    own_NC = (values_NID - values_NID.mean(0)).flatten(1)
    assert torch.corrcoef(own_NC)[0, 1:].tolist() == pytest.approx([-0.5, -0.5], abs=0.04)


def test_bytes_follow_from_the_seed_alone(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    MODEL.write(tmp_path / "again")
    SyntheticModel(layers=2, hidden=48, rows=70, experts=3, seed=1).write(tmp_path / "other")

    first, again, other = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")}
        for name in ("model", "again", "other")
    )
    assert first == again
    assert all(first[name] != other[name] for name in first)


def test_only_the_very_same_model_is_reused(folder):
    assert MODEL.is_in(folder)
    assert not MODEL.is_in(folder / "elsewhere")
    with mistake("holds another model"):
        SyntheticModel(layers=2, hidden=48, rows=70, experts=3, noise=1.0).is_in(folder)
    with mistake("exists already"):
        MODEL.write(folder)


def test_model_that_the_disk_cannot_hold_is_not_begun(tmp_path):
    with mistake("GB free"):
        SyntheticModel(layers=10**9).write(tmp_path / "model")
    assert names_in(tmp_path) == set()
