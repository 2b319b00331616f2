"""`up` and `sp`, with the design matrix as one matrix and projection by projection."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from resmoe_dist.codecs import CodecSpec
from resmoe_dist.compression.encoding import GroupCodecs
from resmoe_dist.design_matrix import ExpertShape
from resmoe_dist.errors import UserError
from resmoe_dist.methods import EncodedGroup, Method, MethodSpec, SourceGroup, method_of

# Four neurons, H = 1: gate, up, down.
BY_HAND = torch.tensor(
    [
        [1.0, -9.0, 2.0],
        [3.0, 8.0, -1.0],
        [-4.0, 0.5, 7.0],
        [2.0, 6.0, 0.1],
    ]
)
SHAPE = ExpertShape(rows=4, hidden=1)
# Two layers' worth of one-column projections, with biases: in, out, in_bias.
TWO_LAYER = ExpertShape(rows=4, hidden=1, gated=False, row_bias=True)


def _method(name: str, **options: Any) -> Method:
    return method_of(MethodSpec(name=name, options=options))


def _encode(
    name: str,
    form: str,
    keep: float,
    experts: Tensor = BY_HAND,
    shape: ExpertShape = SHAPE,
) -> EncodedGroup:
    residual = CodecSpec.parse(f"pruned:keep={keep}")
    method = _method(name, form=form)
    wanted = GroupCodecs(residual, torch.float32, budget=keep)
    group = SourceGroup(experts.view(-1, shape.rows, shape.columns), shape)
    return method.encode(group, method.codecs(wanted))


def _squares(*lost: float) -> float:
    return sum(value**2 for value in lost)


def test_up_concat_keeps_the_largest_entries_of_the_whole_matrix():
    found = _encode("up", "concat", 0.5)

    kept = [[0, -9, 0], [3, 8, 0], [-4, 0, 7], [0, 6, 0]]
    assert found.residuals[0].decode().tolist() == kept
    assert found.losses[0].squared_error == pytest.approx(_squares(1, 2, 1, 0.5, 2, 0.1))
    assert found.losses[0].kept == 6
    assert found.center is None


def test_up_concat_gives_every_expert_its_own_budget():
    found = _encode("up", "concat", 0.5, torch.stack([BY_HAND, 100 * BY_HAND]))

    assert [loss.kept for loss in found.losses] == [6, 6]


def test_up_sep_keeps_the_same_share_of_each_projection():
    found = _encode("up", "sep", 0.5)

    kept = [[0, -9, 2], [3, 8, 0], [-4, 0, 7], [0, 0, 0]]
    assert found.residuals[0].decode().tolist() == kept
    assert found.losses[0].squared_error == pytest.approx(_squares(1, 2, 0.5, 6, 1, 0.1))


def test_up_sep_counts_a_bias_with_its_projection():
    # in and its bias are one matrix of 8 entries, out another of 4.
    expert = torch.tensor([[1.0, 5.0, 9.0], [2.0, 6.0, 8.0], [3.0, 7.0, 7.0], [4.0, 8.0, 6.0]])

    found = _encode("up", "sep", 0.5, expert, TWO_LAYER)

    assert found.residuals[0].decode().tolist() == [[0, 0, 9], [0, 0, 8], [0, 7, 7], [0, 8, 6]]


def test_sp_concat_keeps_the_largest_rows():
    found = _encode("sp", "concat", 0.5)

    # Squared norms of the rows: 86, 74, 65.25, 40.01.
    assert found.residuals[0].name == "dense"
    assert found.residuals[0].decode().tolist() == [[1, -9, 2], [3, 8, -1]]
    assert found.losses[0].squared_error == pytest.approx(65.25 + 40.01)


def test_sp_sep_keeps_the_largest_rows_of_each_projection():
    two_wide = torch.tensor([[1.0, 1.0, 0.0, 9.0], [0.0, 3.0, 1.0, 1.0]])  # in [2], outᵀ [2]
    shape = ExpertShape(rows=2, hidden=2, gated=False)

    found = _encode("sp", "sep", 0.5, two_wide, shape)

    # in: norms √2 and 3; out: 9 and √2. Row 1 of in and row 0 of out stay.
    assert found.residuals[0].name == "pruned"
    assert found.residuals[0].decode().tolist() == [[0, 0, 0, 9], [0, 3, 0, 0]]
    assert found.losses[0].squared_error == pytest.approx(4.0)
    # Zeros of a kept row are stored too.
    assert (found.losses[0].kept, found.residuals[0].values.tolist()) == (4, [0, 9, 0, 3])


def test_sp_removes_rows_or_entries_by_its_form():
    assert _method("sp").reduces == "rows"
    assert _method("sp", form="sep").reduces == "entries"
    assert _method("sp").stored_rows(SHAPE, 0.5) == 2
    assert _method("sp", form="sep").stored_rows(SHAPE, 0.5) == 4


@pytest.mark.parametrize(("name", "form"), [("up", "concat"), ("up", "sep"), ("sp", "sep")])
def test_pruning_needs_a_codec_that_selects_entries(name, form):
    wanted = GroupCodecs(CodecSpec.parse("low_rank"), torch.float32)

    with pytest.raises(UserError, match=f"--method {name}: needs a codec that selects entries"):
        _method(name, form=form).codecs(wanted)


@pytest.mark.parametrize("name", ["up", "sp"])
def test_unknown_form_is_refused(name):
    with pytest.raises(ValueError, match=f"method {name}: form both: choose one of concat or sep"):
        _method(name, form="both")
