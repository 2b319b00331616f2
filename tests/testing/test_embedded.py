"""On trained experts, each step of the method lowers the error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.codecs import CodecSpec
from resmoe_dist.compression.alignment import align
from resmoe_dist.compression.blocks import AlignedExperts
from resmoe_dist.compression.encoding import GroupCodecs, encode_group
from resmoe_dist.jobs.pipeline import Compression
from resmoe_dist.testing import cache, embedded

KEEP = 0.25


@pytest.fixture(scope="module")
def groups(embedded_source) -> list[Tensor]:
    """All experts [E, I, D] of each layer of the embedded Mixtral: one group per layer."""
    source = SourceCheckpoint(embedded_source)
    return [
        torch.stack([source.read_expert(layer, k)[0] for k in range(site.num_experts)])
        for layer, site in enumerate(source.sites)
    ]


@pytest.fixture(scope="module")
def aligned_groups(groups) -> list[AlignedExperts]:
    return [AlignedExperts(group, align(group, "loo").permutations_EI) for group in groups]


def _error(aligned: AlignedExperts, center: str, allocate: str) -> float:
    """Squared error of the restored experts."""
    encoded = encode_group(
        aligned,
        GroupCodecs(CodecSpec(name="pruned", options={"keep": KEEP}), torch.float32),
        center=center,
        allocate=allocate,
    )
    restored = torch.stack([encoded.center.decode() + r.decode() for r in encoded.residuals])
    exact = aligned.block(slice(0, restored.shape[1]))
    return float((exact - restored).double().square().sum())


def _plain_pruning_error(experts_EID: Tensor) -> float:
    """Squared error of magnitude pruning without a centre, each expert at the same keep."""
    error = 0.0
    for expert_ID in experts_EID:
        magnitudes = expert_ID.abs().flatten().float().sort().values
        dropped = magnitudes[: magnitudes.numel() - int(KEEP * magnitudes.numel())]
        error += float(dropped.double().square().sum())
    return error


@pytest.mark.parametrize("allocate", ["expert", "group"])
def test_pruning_around_a_barycentre_beats_plain_pruning(aligned_groups, allocate):
    for aligned in aligned_groups:
        plain = _plain_pruning_error(aligned.experts_EID)
        assert _error(aligned, "barycenter", allocate) < plain


@pytest.mark.parametrize("allocate", ["expert", "group"])
def test_the_joint_centre_has_a_fifth_less_error_than_the_barycentre(aligned_groups, allocate):
    for aligned in aligned_groups:
        plain = _error(aligned, "barycenter", allocate)
        assert _error(aligned, "joint", allocate) <= 0.8 * plain


@pytest.mark.parametrize("shuffled", [False, True])
def test_leave_one_out_is_never_above_pot(groups, shuffled):
    for experts_EID in groups:
        if shuffled:
            experts_EID = torch.stack([e[torch.randperm(len(e))] for e in experts_EID])
        found, pots = align(experts_EID, "loo").objective, align(experts_EID, "pot").objective
        # Objectives are sums of float32 squares, so equal alignments differ by rounding.
        assert found <= pots * (1 + 1e-6)


def test_shuffled_experts_are_aligned_as_well_as_unshuffled_ones(groups):
    for experts_EID in groups:
        shuffled_EID = torch.stack([e[torch.randperm(len(e))] for e in experts_EID])
        expected = align(experts_EID, "loo").objective
        assert align(shuffled_EID, "loo").objective == pytest.approx(expected, rel=1e-5)
        assert align(shuffled_EID, "none").objective > 2 * expected


def test_an_interrupted_first_use_leaves_nothing(family_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("RESMOE_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "cached_tiny_model", lambda: family_folder("mixtral"))
    finished = []

    def interrupt(compression, task, keeps=None):
        if finished:
            raise KeyboardInterrupt
        finished.append(compress_group(compression, task, keeps))
        return finished[-1]

    compress_group = Compression.compress_group
    monkeypatch.setattr(Compression, "compress_group", interrupt)

    with pytest.raises(KeyboardInterrupt) as caught:
        embedded.embedded_checkpoint(2)

    assert str(caught.value) == ""  # no advice to resume what has no --resume
    assert finished
    assert list((tmp_path / "compressed").iterdir()) == []


def test_training_is_announced_also_without_a_terminal(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("RESMOE_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "train_tiny_model", lambda *_: None)

    folder = cache.cached_tiny_model()

    (record,) = caplog.records
    assert record.levelname == "WARNING"  # shown without any configuration of logging
    assert "training the embedded mixtral model" in record.getMessage()
    assert str(folder) in record.getMessage()
