"""Compress a tiny model with a method, and compute the same in memory.

Legend: E experts, I rows, D columns, T tokens, K experts per token, H hidden.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resmoe_dist import load_model
from resmoe_dist.checkpoints.compressed import CompressedCheckpoint
from resmoe_dist.checkpoints.format import CheckpointIndex, CompressionSettings, MethodSpec
from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.codecs import DENSE, CodecSpec
from resmoe_dist.compression.encoding import GroupCodecs
from resmoe_dist.compression.samples import SampleFiles
from resmoe_dist.design_matrix import ExpertShape, from_rows
from resmoe_dist.jobs.calibration import measure_activations
from resmoe_dist.jobs.pipeline import Compression
from resmoe_dist.methods import EncodedGroup, SourceGroup, method_of
from tests.models import random_sequences

TOLERANCE = 1e-4  # relative, float32


def settings(source: Path, method: str, keep: float, **options: Any) -> CompressionSettings:
    """Settings that compress all layers, each in one group."""
    return CompressionSettings(
        groups=1,
        method=MethodSpec(name=method, options=options),
        center_codec=DENSE,
        residual_codec=CodecSpec(name="pruned").with_keep(keep),
        layers=list(range(len(SourceCheckpoint(source).sites))),
        calibration="0" * 64 if method_of(MethodSpec(name=method)).needs_samples else None,
    )


def compress(source: Path, output: Path, chosen: CompressionSettings) -> CheckpointIndex:
    """Compress with `chosen`; the calibration text of methods that need one is random."""
    checkpoint = SourceCheckpoint(source)

    def measure(samples: SampleFiles | None):
        return measure_activations(checkpoint, random_sequences(40, 25), samples=samples)

    given = None if chosen.calibration is None else measure
    return Compression(checkpoint, output, chosen, measure=given).run()


def encode_in_memory(
    source: Path, scratch: Path, chosen: CompressionSettings, layer: int = 0
) -> EncodedGroup:
    """What the method returns for the experts of a layer, without any file of the result."""
    checkpoint = SourceCheckpoint(source)
    site = checkpoint.sites[layer]
    samples = activations = None
    if chosen.calibration is not None:
        files = SampleFiles(scratch)
        sequences = random_sequences(40, 25)
        activations = measure_activations(checkpoint, sequences, samples=files)[layer]
        samples = files.read(layer)
    group = SourceGroup(
        source_matrices(source, layer),
        site.shape,
        activations,
        samples=samples,
        activation=checkpoint.activation(layer),
    )
    projections = site.shape.projections
    method, keep = method_of(chosen.method), chosen.residual_codec.keep
    wanted = GroupCodecs(
        chosen.residual_codec, torch.float32, chosen.center_codec, keep, projections
    )
    return method.encode(group, method.codecs(wanted))


def source_matrices(source: Path, layer: int = 0) -> Tensor:
    """Design matrices [E, I, D] of a layer's experts, float32."""
    checkpoint = SourceCheckpoint(source)
    experts = range(checkpoint.sites[layer].num_experts)
    return torch.stack([checkpoint.read_expert(layer, k)[0].float() for k in experts])


def read_matrices(folder: Path, layer: int = 0) -> Tensor:
    """Design matrices [E, stored I, D] that a folder's layer decodes to: centre plus residual."""
    checkpoint = CompressedCheckpoint(folder)
    entry = checkpoint.index.layers[layer]
    (group,) = entry.groups
    file = checkpoint.open_group(entry, group)
    center = file.read_center(0, entry.rows)
    residuals = [file.read_residual(k, 0, entry.rows, center) for k in group.experts]
    matrices = [residual.decode().float() for residual in residuals]
    shared = 0.0 if center is None else center.decode().float()
    return torch.stack([shared + matrix for matrix in matrices])


def served_and_expected(
    folder: Path, matrices_EID: Tensor, shape: ExpertShape
) -> tuple[Tensor, Tensor]:
    """Outputs of the first layer as loaded from a folder, and of gated experts by hand."""
    layer = load_model(folder).model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(7)
    x_TH = torch.randn(5, shape.hidden, generator=generator)
    weights_TK = torch.rand(5, 2, generator=generator)
    index_TK = torch.tensor([[0, 1], [2, 3], [3, 1], [1, 2], [0, 3]])
    expected = torch.zeros_like(x_TH)
    for t, k in [(t, k) for t in range(5) for k in range(2)]:
        weights = from_rows(shape, matrices_EID[index_TK[t, k]])
        gate_I = torch.nn.functional.silu(weights["gate"] @ x_TH[t])
        hidden_I = gate_I * (weights["up"] @ x_TH[t])
        expected[t] += weights_TK[t, k] * (weights["down"] @ hidden_I)
    with torch.no_grad():
        return layer(x_TH, index_TK, weights_TK), expected
