"""The synthetic checkpoint: a complete Mixtral to its readers, with the documented statistics."""

from __future__ import annotations

import pytest
import torch
from transformers import MixtralForCausalLM

from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.design_matrix import from_rows
from resmoe_dist.testing.synthetic_model import SyntheticModel
from tests.checkpoints.damage import mistake, names_in

MODEL = SyntheticModel(layers=2, hidden=48, rows=70, experts=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic") / "model"
    MODEL.write(folder)
    return folder


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
    experts = []
    for expert in range(3):
        matrix_ID = source.read_expert(1, expert)[0].float()
        in_base_order_ID = torch.empty_like(matrix_ID)
        in_base_order_ID[MODEL.row_order(1, expert)] = matrix_ID
        experts.append(in_base_order_ID)
    values_EID = torch.stack(experts)
    assert float(values_EID.std()) == pytest.approx(0.02, rel=0.02)
    correlation = torch.corrcoef(values_EID.flatten(1))
    assert correlation[0, 1:].tolist() == pytest.approx([0.8, 0.8], abs=0.02)
    shifted = torch.corrcoef(torch.stack([experts[0].flatten(), experts[1].roll(1, 0).flatten()]))
    assert abs(float(shifted[0, 1])) < 0.04
    # The experts' own parts are independent.
    own_EC = (values_EID - values_EID.mean(0)).flatten(1)
    assert torch.corrcoef(own_EC)[0, 1:].tolist() == pytest.approx([-0.5, -0.5], abs=0.04)


def test_seed_alone_decides_the_bytes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    MODEL.write(tmp_path / "again")
    SyntheticModel(layers=2, hidden=48, rows=70, experts=3, seed=1).write(tmp_path / "other")

    first, again, other = (
        {path.name: path.read_bytes() for path in place.iterdir()}
        for place in (folder, tmp_path / "again", tmp_path / "other")
    )
    assert first == again
    assert all(first[name] != other[name] for name in first if name.endswith(".safetensors"))


def test_only_the_same_model_is_reused(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    MODEL.ensure_in(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    with mistake("holds another model"):
        SyntheticModel(layers=2, hidden=48, rows=70, experts=3, noise=1.0).ensure_in(folder)
    with mistake("exists already"):
        MODEL.write(folder)


def test_model_that_does_not_fit_the_disk_is_refused(tmp_path):
    with mistake("GB free"):
        SyntheticModel(layers=10**9).write(tmp_path / "model")
    assert names_in(tmp_path) == set()
