"""Settings of a compress run: what users write, and whether it fits the model."""

from __future__ import annotations

import re
from collections.abc import Sequence

from resmoe_dist.checkpoints.format import CompressionSettings
from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.codecs import DENSE, CodecSpec
from resmoe_dist.compression.stored_size import StoredSize, keep_for
from resmoe_dist.errors import UserError
from resmoe_dist.families.storage import ExpertSite
from resmoe_dist.jobs.group import GroupCompressor
from resmoe_dist.methods import method_of

# Bits of a centre, unless the user or a target chooses them.
_CENTER_BITS = 4


def parse_layers(text: str, count: int) -> list[int]:
    """Positions among `count` MoE layers named by `all`, `last:N`, `A-B` (inclusive) or `A,B,…`.

    Raises UserError for anything else, or a position that does not exist.
    """
    if text == "all":
        return list(range(count))
    chosen: Sequence[int]
    if match := re.fullmatch(r"last:(\d+)", text):
        chosen = range(count - int(match[1]), count)
    elif match := re.fullmatch(r"(\d+)-(\d+)", text):
        chosen = range(int(match[1]), int(match[2]) + 1)
    elif re.fullmatch(r"\d+(,\d+)*", text):
        chosen = sorted({int(part) for part in text.split(",")})
    else:
        raise UserError(f"--layers {text}: not understood; write all, last:24, 8-31 or 0,2")
    if not chosen or chosen[0] < 0 or chosen[-1] >= count:
        raise UserError(f"--layers {text}: this model has {count} MoE layers, 0 to {count - 1}")
    return list(chosen)


def parse_codec(option: str, text: str) -> CodecSpec:
    """The codec that `--codec` or `--center-codec` names.

    Raises UserError if it is unknown, or if only a method can make it.
    """
    try:
        spec = CodecSpec.parse(text)
    except ValueError as error:
        raise UserError(f"{option} {text}: {_reason(error)}") from error
    if not spec.codec.standalone:
        raise UserError(f"{option} {text}: only a method that chooses this codec stores it")
    return spec


def parse_codecs(residual: str, center: str | None) -> tuple[CodecSpec, CodecSpec]:
    """The residuals' and the centres' codec. Raises UserError if one is unknown.

    center: None for a dense centre, or for one with few bits if the residuals have few bits too.
    """
    spec = parse_codec("--codec", residual)
    if center is not None:
        return spec, parse_codec("--center-codec", center)
    return spec, spec.with_bits(_CENTER_BITS) if spec.codec.spends_bits else DENSE


def _reason(error: ValueError) -> str:
    """The message of a validation error, without pydantic's frame."""
    lines = str(error).splitlines()
    message = lines[1] if len(lines) > 1 else lines[0]
    return message.strip().removeprefix("Value error, ").partition(" [type=")[0]


def with_budget(codec: CodecSpec, keep: float) -> CodecSpec:
    """`codec` with the budget that `--keep` asks for.

    Raises UserError for a share outside (0, 1], or a codec without a budget.
    """
    _check_has_budget(codec, f"--keep {keep}")
    if not 0 < keep <= 1:
        raise UserError(f"--keep {keep}: must lie in (0, 1]")
    return codec.with_keep(keep)


def check_settings(
    source: SourceCheckpoint, settings: CompressionSettings, compressor: GroupCompressor
) -> None:
    """Raise UserError for settings that do not fit the model or each other."""
    check_choices(source.sites, settings)
    method = method_of(settings.method)
    if method.needs_samples and settings.calibration is None:
        raise UserError(f"--method {method.name}: needs --calibration TEXT")
    if settings.recalibrate_router:
        if settings.calibration is None:
            raise UserError("--recalibrate-router: needs --calibration TEXT")
        if method.reduces == "experts":
            raise UserError(
                f"--recalibrate-router: --method {method.name} stores other experts than the "
                "source's router chooses among; leave one of them out"
            )
    if method.reduces != "entries" and settings.residual_codec.keep is None:
        raise UserError(
            f"--method {method.name}: stores fewer {method.reduces}, so it needs a budget, which "
            f"codec {settings.residual_codec.name} does not have; leave --codec out"
        )
    if method.reduces == "experts" and settings.groups * settings.groups_per_rank > 1:
        raise UserError(
            f"--method {method.name}: chooses among all experts of a layer; give --ep 1 and no "
            "--groups-per-rank"
        )
    for layer in settings.layers:
        compressor.codecs(layer)


def check_choices(sites: Sequence[ExpertSite], settings: CompressionSettings) -> None:
    """Raise UserError for a budget that the codec does not have, or groups that do not divide a
    layer's experts."""
    if settings.target_bytes is not None:
        if not settings.residual_codec.codec.spends_bits:
            _check_has_budget(settings.residual_codec, "--target-bytes")
        elif not method_of(settings.method).chooses_bits:
            raise UserError(
                f"--target-bytes: method {settings.method.name} does not choose bits; leave it out "
                "or give --method resmoe"
            )
        elif not settings.center_codec.codec.spends_bits:
            raise UserError(
                f"--center-codec {settings.center_codec.name}: --target-bytes and --target-bits "
                "choose the bits of centres too; leave it out"
            )
    elif settings.residual_codec.keep is not None:
        with_budget(settings.residual_codec, settings.residual_codec.keep)
    check_groups(sites, settings.groups, settings.groups_per_rank)


def check_groups(sites: Sequence[ExpertSite], groups: int, groups_per_rank: int = 1) -> None:
    """Raise UserError for groups that do not divide a layer's experts."""
    if groups < 1:
        raise UserError(f"--ep {groups}: must be 1 or more")
    for site in sites:
        if site.num_experts % groups:
            raise UserError(
                f"--ep {groups}: {site.module} has {site.num_experts} experts, which do not "
                f"divide into {groups} groups; choose a divisor"
            )
        owned = site.num_experts // groups
        if not 1 <= groups_per_rank <= owned:
            raise UserError(
                f"--groups-per-rank {groups_per_rank}: a rank has {owned} experts of "
                f"{site.module}; choose 1 to {owned}"
            )


def keep_for_target(settings: CompressionSettings, sizes: Sequence[StoredSize]) -> float:
    """The keep at which all expert tensors take the share `target_bytes` of the dense experts.

    sizes: of all experts of each MoE layer, as if they were one group. Raises UserError if centres,
    indices and dense layers alone exceed the target, or the size does not depend on the budget.
    """
    assert settings.target_bytes is not None
    groups = settings.groups * settings.groups_per_rank
    dense = fixed = 0
    compressed: list[StoredSize] = []
    for layer, size in enumerate(sizes):
        dense += size.dense_bytes
        if layer in settings.layers:
            compressed.append(size)
        else:
            fixed += size.dense_bytes

    def total(keep: float) -> int:
        # Residuals take the same bytes in groups of any size.
        return fixed + sum(
            size.bytes_at(keep) + (groups - 1) * size.center_bytes_at(keep) for size in compressed
        )

    if total(0.0) == total(1.0):
        raise UserError(
            f"--target-bytes: with these options, the size of what --method {settings.method.name} "
            "stores does not depend on a budget; leave --target-bytes out"
        )
    keep = keep_for(settings.target_bytes * dense, total)
    if not keep:
        raise UserError(
            f"--target-bytes {settings.target_bytes}: centres, indices and layers left dense alone "
            f"take {total(0.0) / dense:.3f} of the dense experts; allow more, or use a smaller --ep"
        )
    return keep


def _check_has_budget(codec: CodecSpec, option: str) -> None:
    if codec.keep is None:
        raise UserError(
            f"{option}: codec {codec.name} has no budget of kept entries; leave it out or choose "
            "another codec"
        )
