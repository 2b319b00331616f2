"""Settings of compress runs for tests, from a flat set of options."""

from __future__ import annotations

from typing import Any

from resmoe_dist.checkpoints.format import CompressionSettings, MethodSpec
from resmoe_dist.codecs import CodecSpec
from resmoe_dist.jobs.settings import with_budget
from resmoe_dist.methods import ResMoEConfig


def compression_settings(
    *,
    keep: float = 0.25,
    codec: str = "pruned",
    center_codec: str = "dense",
    **options: Any,
) -> CompressionSettings:
    """Settings of method `resmoe` with a joint centre, and `options`.

    codec, center_codec: as `CodecSpec.parse` reads them. keep: of a residual codec that has a
    budget. options: fields of the method's config or of the settings; `groups` and `layers` must be
    among them.
    """
    residual_codec = CodecSpec.parse(codec)
    if residual_codec.keep is not None:
        residual_codec = with_budget(residual_codec, keep)
    method = {name: options.pop(name) for name in ResMoEConfig.model_fields if name in options}
    return CompressionSettings(
        method=MethodSpec(name="resmoe", options={"center": "joint"} | method),
        center_codec=CodecSpec.parse(center_codec),
        residual_codec=residual_codec,
        **options,
    )
