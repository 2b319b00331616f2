"""What `--target-bytes` and `--target-bits` leave for codecs that spend bits."""

from __future__ import annotations

from collections.abc import Sequence

from resmoe_dist.checkpoints.format import CompressionSettings
from resmoe_dist.compression.bits import GroupBits, GroupEnergies, allocate_bits, sizes_at
from resmoe_dist.compression.stored_size import StoredSize
from resmoe_dist.errors import UserError


def bits_for_target(
    settings: CompressionSettings, sizes: Sequence[StoredSize], groups: Sequence[GroupEnergies]
) -> list[GroupBits]:
    """The bits of each group of a compressed layer.

    sizes: of all experts of each MoE layer. Raises UserError if one bit per entry takes more.
    """
    found = allocate_bits(groups, _coded_bytes(settings, sizes))
    if found is None:
        raise _too_small(settings)
    return found


def sizes_for_target(settings: CompressionSettings, sizes: Sequence[StoredSize]) -> list[float]:
    """Mean bytes of an expert of each MoE layer, centres included, without output biases.

    How `compress` divides the target depends on the weights; here all layers get the same share.
    Raises UserError if one bit per entry takes more.
    """
    least, most = [], []
    centers = settings.groups * settings.groups_per_rank
    for size in sizes:
        at_bits = sizes_at(size.residual_codec, size.rows, size.columns, size.itemsize)
        least.append(at_bits[0])
        most.append(at_bits[-1] * (1 + centers / size.count))

    def total(of_layer: Sequence[float]) -> float:
        return sum(sizes[i].count * of_layer[i] for i in settings.layers)

    left = _coded_bytes(settings, sizes)
    if total(least) > left:
        raise _too_small(settings)
    share = min(1.0, left / total(most))
    return [share * each for each in most]


def _coded_bytes(settings: CompressionSettings, sizes: Sequence[StoredSize]) -> float:
    """The target without what is stored as it is: dense layers and output biases."""
    assert settings.target_bytes is not None
    left = settings.target_bytes * sum(size.dense_bytes for size in sizes)
    for layer, size in enumerate(sizes):
        biases = size.count * size.bias_bytes
        left -= biases if layer in settings.layers else size.dense_bytes
    return left


def _too_small(settings: CompressionSettings) -> UserError:
    return UserError(
        f"--target-bytes {settings.target_bytes}: one bit per entry takes more; allow more"
    )
