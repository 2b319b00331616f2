"""Runs with codec `quantized`: targets, calibration, interruption, ranks."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from resmoe_dist import load_model
from resmoe_dist.checkpoints.compressed import CompressedCheckpoint
from resmoe_dist.checkpoints.format import CheckpointIndex, CompressionSettings, MethodSpec
from resmoe_dist.checkpoints.restore import restore_checkpoint
from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.checkpoints.tensor_files import tensor_bytes
from resmoe_dist.codecs import DENSE, CodecSpec
from resmoe_dist.compression.samples import SampleFiles
from resmoe_dist.errors import UserError
from resmoe_dist.evaluation.report import describe, layer_table
from resmoe_dist.jobs.calibration import measure_activations
from resmoe_dist.jobs.pipeline import Compression, MeasureSensitivity
from resmoe_dist.jobs.workers import Workers, find_workers
from resmoe_dist.parallel.topology import build_topology
from tests.checkpoints.damage import copy_of, edit_tensors
from tests.jobs.runs import before_each_task, contents
from tests.models import (
    FAMILIES,
    dense_model,
    logits_of,
    random_sequences,
    relative_difference,
    save_family,
)
from tests.ranks import run_on_ranks

EXPERTS = 24


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Two layers of many experts, with a hidden size that is rotated."""
    folder = tmp_path_factory.mktemp("bits") / "source"
    save_family(
        FAMILIES["mixtral"],
        folder,
        num_local_experts=EXPERTS,
        hidden_size=48,
        intermediate_size=40,
        num_attention_heads=4,
        head_dim=12,
        num_key_value_heads=2,
    )
    return folder


def _run(
    source: Path,
    output: Path,
    codec: str = "quantized",
    *,
    center: CodecSpec | None = None,
    target: float | None = None,
    calibrated: bool = False,
    resume: bool = False,
    groups: int = 2,
    may_join: bool = False,
    measure_sensitivity: MeasureSensitivity | None = None,
    workers: Workers | None = None,
) -> Any:
    residual = CodecSpec.parse(codec)
    settings = CompressionSettings(
        method=MethodSpec(name="resmoe"),
        residual_codec=residual,
        center_codec=center or residual.with_bits(4),
        target_bytes=target,
        groups=groups,
        layers=[0, 1],
        calibration="0" * 64 if calibrated else None,
    )
    checkpoint = SourceCheckpoint(source)

    def measure(samples: SampleFiles | None) -> Any:
        return measure_activations(checkpoint, random_sequences(50, 70), samples=samples)

    run = Compression(
        checkpoint,
        output,
        settings,
        workers,
        measure=measure if calibrated else None,
        measure_sensitivity=measure_sensitivity,
        may_join=may_join,
    )
    return run.run(resume=resume)


def _share(folder: Path) -> float:
    """Bytes of the group files' tensors over the dense experts'."""
    layers = CompressedCheckpoint(folder).index.layers
    files = [folder / group.file.file for layer in layers for group in layer.groups]
    stored = sum(sum(tensor_bytes(file).values()) for file in files)
    return stored / (2 * EXPERTS * 40 * 3 * 48 * 4)


@pytest.mark.parametrize("bits", [1.9, 2.6, 3.3, 5.0])
@pytest.mark.parametrize("coder", ["scalar", "trellis"])
def test_a_target_is_met_from_below_within_one_percent(source, tmp_path, bits, coder):
    """Here one expert more with a bit more is 1/48 of a bit: that much is allowed beside it."""
    _run(source, tmp_path / "c", f"quantized:coder={coder}", target=bits / 32)

    found = _share(tmp_path / "c")

    assert 0.99 * bits / 32 - 1.5 / 48 / 32 <= found <= bits / 32


def test_a_target_below_one_bit_is_refused(source, tmp_path):
    with pytest.raises(UserError, match=r"--target-bytes 0\.02: one bit per entry takes more"):
        _run(source, tmp_path / "c", target=0.02)
    assert not (tmp_path / "c").exists()


def test_a_target_with_a_dense_centre_is_refused(source, tmp_path):
    with pytest.raises(UserError, match=r"--center-codec dense: .* choose the bits of centres too"):
        _run(source, tmp_path / "c", center=DENSE, target=0.1)


@pytest.mark.parametrize("calibrated", [False, True])
def test_more_bits_lose_less(source, tmp_path, calibrated):
    errors = []
    for bits in (1, 2, 3, 4):
        _run(source, tmp_path / str(bits), f"quantized:bits={bits}", calibrated=calibrated)
        described = describe(CompressedCheckpoint(tmp_path / str(bits)))["experts"]
        errors.append(described["relative_error"])
    assert all(after < 0.6 * before for before, after in pairwise(errors))


def test_the_restored_model_computes_the_same(source, tmp_path):
    _run(source, tmp_path / "c", target=2.5 / 32, calibrated=True)
    restore_checkpoint(tmp_path / "c", tmp_path / "d")

    found = logits_of(load_model(tmp_path / "c"))

    expected = logits_of(dense_model(tmp_path / "d"))
    assert relative_difference(found, expected) <= 1e-4
    assert relative_difference(expected, logits_of(dense_model(source))) > 1e-2


def _layer_bits(index: CheckpointIndex) -> list[float]:
    """Mean bits of the residuals of each layer."""
    bits = [[b for group in layer.groups for b in group.residual_bits] for layer in index.layers]
    return [statistics.fmean(each) for each in bits]


def _interrupt(workers: Workers) -> None:
    raise KeyboardInterrupt


def test_sensitive_layers_get_more_bits(source, tmp_path):
    asked = []

    def measure(layers: Sequence[int]) -> list[float]:
        asked.append(list(layers))
        return [0.02, 2.0]

    even = _run(source, tmp_path / "even", target=0.08)
    found = _run(source, tmp_path / "c", target=0.08, measure_sensitivity=measure)

    assert asked == [[0, 1]]
    assert abs(_layer_bits(even)[0] - _layer_bits(even)[1]) < 0.3
    assert _layer_bits(found)[1] > _layer_bits(found)[0] + 1
    assert [layer.sensitivity for layer in found.layers] == [0.02, 2.0]
    assert [layer.sensitivity for layer in even.layers] == [None, None]
    columns = layer_table(describe(CompressedCheckpoint(tmp_path / "c"))).splitlines()
    assert "sensitivity" in columns[0]


def test_unknown_sensitivities_change_nothing(source, tmp_path):
    _run(source, tmp_path / "even", target=0.08)
    _run(source, tmp_path / "unknown", target=0.08, measure_sensitivity=lambda layers: None)

    assert contents(tmp_path / "unknown") == contents(tmp_path / "even")


def test_sensitivity_is_not_measured_if_nothing_depends_on_it(source, tmp_path):
    def measure(layers: Sequence[int]) -> list[float]:
        raise AssertionError

    _run(source, tmp_path / "c", measure_sensitivity=measure)


def test_a_resumed_run_does_not_measure_sensitivity_again(source, tmp_path, monkeypatch):
    count = 0

    def measure(layers: Sequence[int]) -> list[float]:
        nonlocal count
        count += 1
        return [1.0, 30.0]

    options = {"target": 0.08, "measure_sensitivity": measure}
    _run(source, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        before_each_task(patch, _interrupt)
        with pytest.raises(KeyboardInterrupt):
            _run(source, tmp_path / "c", **options)
    _run(source, tmp_path / "c", resume=True, **options)

    assert count == 2
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("one_thread")
def test_an_interrupted_run_resumes_to_the_same_bytes(source, tmp_path, monkeypatch):
    options = {"target": 2.5 / 32, "calibrated": True}
    _run(source, tmp_path / "whole", **options)
    tasks = []

    def interrupt(_: Workers) -> None:
        tasks.append(1)
        if len(tasks) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as context:
        before_each_task(context, interrupt)
        with pytest.raises(KeyboardInterrupt):
            _run(source, tmp_path / "resumed", **options)

    _run(source, tmp_path / "resumed", resume=True, **options)

    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")


def _compress(source: Path, output: Path, workers: Workers | None = None) -> None:
    _run(
        source,
        output,
        target=2.5 / 32,
        calibrated=True,
        may_join=True,
        measure_sensitivity=lambda layers: [1.0, 10.0],
        workers=workers,
    )


def _compress_on_rank(source: Path, output: Path) -> None:
    torch.set_num_threads(1)
    _compress(source, output, find_workers())


@pytest.mark.usefixtures("one_thread")
def test_ranks_write_the_bytes_of_one_process(source, tmp_path):
    _compress(source, tmp_path / "one")

    run_on_ranks(3, _compress_on_rank, source, tmp_path / "three")

    assert contents(tmp_path / "three") == contents(tmp_path / "one")


def _with_bases(source: Path, folder: Path, bases: int) -> Path:
    """The same model with experts that are near one of so many matrices, in consecutive runs."""
    copy_of(source, folder)

    def change(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if match := re.search(r"experts\.(\d+)\.", name):
                first = int(match[1]) * bases // EXPERTS * (EXPERTS // bases)
                base = tensors[name.replace(match[0], f"experts.{first}.")]
                if first != int(match[1]):
                    tensor.mul_(0.2).add_(base)

    edit_tensors(folder / "model.safetensors", change)
    return folder


@pytest.mark.parametrize("bases", [1, 2])
def test_the_groups_are_those_that_lose_less(source, tmp_path, bases):
    """Two ranks: their experts are near one matrix, or near one each."""
    related = _with_bases(source, tmp_path / "source", bases)

    index = _run(related, tmp_path / "c", target=2.1 / 32, groups=2, may_join=True)

    assert [len(layer.groups) for layer in index.layers] == [bases, bases]
    for layer in index.layers:
        assert all(group.has_center for group in layer.groups)


def test_groups_of_ranks_stay_if_they_are_asked_for(source, tmp_path):
    related = _with_bases(source, tmp_path / "source", 1)

    index = _run(related, tmp_path / "c", target=2.1 / 32, groups=2)

    assert [len(layer.groups) for layer in index.layers] == [2, 2]


def test_one_group_for_all_ranks_is_served_on_a_grid(source, tmp_path):
    related = _with_bases(source, tmp_path / "source", 1)
    _run(related, tmp_path / "c", target=2.1 / 32, groups=2, may_join=True)

    found = run_on_ranks(4, _logits_on_grid, tmp_path / "c")

    expected = logits_of(load_model(tmp_path / "c"))
    assert all(relative_difference(each, expected) <= 1e-4 for each in found)


def _logits_on_grid(folder: Path) -> Tensor:
    return logits_of(load_model(folder, topology=build_topology(2, 2)))
