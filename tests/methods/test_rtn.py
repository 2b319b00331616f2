"""`rtn`, the yardstick: each expert rounded by itself, to a size that no budget changes."""

from __future__ import annotations

import pytest
import torch

from resmoe_dist.codecs import CodecSpec
from resmoe_dist.compression.encoding import GroupCodecs
from resmoe_dist.config.commands import CompressConfig
from resmoe_dist.design_matrix import ExpertShape
from resmoe_dist.errors import UserError
from resmoe_dist.launch.compress import compress, settings_of
from resmoe_dist.methods import MethodSpec, SourceGroup, method_of

# H = 4, two-layer, one row: a group of 8 columns in steps of 1, from −1 to 2.
ROW = [-1.0, 2.0, 0.4, 1.6, 0.0, 1.0, -0.6, 1.4]
ROUNDED = [-1.0, 2.0, 0.0, 2.0, 0.0, 1.0, -1.0, 1.0]
SHAPE = ExpertShape(rows=1, hidden=4, gated=False)


def _codecs(keep: float) -> GroupCodecs:
    method = method_of(MethodSpec(name="rtn", options={"bits": 2, "group_size": 8}))
    return method.codecs(GroupCodecs(CodecSpec.parse(f"pruned:keep={keep}"), torch.float32))


def test_experts_are_rounded_by_themselves():
    experts = torch.tensor([[ROW], [[10 * value for value in ROW]]])

    codecs = _codecs(0.25)
    found = method_of(MethodSpec(name="rtn")).encode(SourceGroup(experts, SHAPE), codecs)

    assert found.center is None
    decoded = [residual.decode().tolist() for residual in found.residuals]
    assert decoded == [[ROUNDED], [[10 * value for value in ROUNDED]]]
    lost = sum((a - b) ** 2 for a, b in zip(ROW, ROUNDED, strict=True))
    errors = [loss.squared_error for loss in found.losses]
    assert errors == pytest.approx([lost, 100 * lost], rel=1e-5)
    # 8 integers of 2 bits, a scale, a zero point in a byte for each of its bits.
    assert [residual.nbytes for residual in found.residuals] == [2 + 4 + 2] * 2


def test_no_budget_changes_the_size():
    method = method_of(MethodSpec(name="rtn"))
    size = method.size(SHAPE, 3, _codecs(0.25))

    assert size.bytes_at(0.0) == size.bytes_at(1.0) == size.bytes_at(None) == 3 * (2 + 4 + 2)


@pytest.mark.parametrize(
    ("method", "option", "bits"),
    [("rtn", None, 4), ("rtn", 3, 3), ("rtn:bits=8", None, 8), ("rtn:bits=8", 3, 8)],
)
def test_bits_are_those_of_the_method_or_the_command(tmp_path, method, option, bits):
    config = CompressConfig(
        source=tmp_path, output=tmp_path / "c", ep=1, method=method, bits=option
    )

    assert settings_of(config, [0]).method.options == {"bits": bits, "group_size": 64}


def test_target_bytes_are_refused_before_the_work(family_folder, tmp_path):
    config = CompressConfig(
        source=family_folder("mixtral"),
        output=tmp_path / "c",
        ep=1,
        method="rtn",
        target_bytes=0.3,
    )

    with pytest.raises(UserError, match="--method rtn stores does not depend on a budget"):
        compress(config)
    assert not list(tmp_path.iterdir())
