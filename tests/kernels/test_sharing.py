"""Shared centres are multiplied once per token, and only with the tokens that need them."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from resmoe_dist.kernels.reference import ReferenceBackend
from resmoe_dist.kernels.sharing import CenterCopies
from tests.runtime.random_layers import (
    EXPERTS,
    GROUPINGS,
    HIDDEN,
    LONG,
    MIXED,
    NONE,
    TOP_K,
    make_layer,
    random_tokens,
    to_experts,
)


class Call(NamedTuple):
    """One product: which weights, and how many copies have a job."""

    product: str
    part: str
    copies: int


class RecordingBackend(ReferenceBackend):
    """Records its products."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.calls: list[Call] = []

    def project_in(self, part, x_TH, copies, rows) -> Tensor:
        self.calls.append(Call("in", part, int(copies.offsets_J[-1])))
        return super().project_in(part, x_TH, copies, rows)

    def project_out(self, part, h_NS, copies, rows, num_tokens) -> Tensor:
        self.calls.append(Call("out", part, int(copies.offsets_J[-1])))
        return super().project_out(part, h_NS, copies, rows, num_tokens)


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_a_centre_is_multiplied_once_per_token(grouping):
    partition, centerless = GROUPINGS[grouping]
    backend = RecordingBackend(make_layer(grouping=GROUPINGS[grouping]))
    index_TK = torch.randint(EXPERTS, (40, TOP_K))

    backend.mlp(to_experts(index_TK, torch.randn(40, HIDDEN)), share_center=True)

    group_of = {k: g for g, members in enumerate(partition) for k in members}
    needed = {(t, group_of[k]) for t, row in enumerate(index_TK.tolist()) for k in row}
    with_center = [pair for pair in needed if pair[1] not in centerless]
    expected = Counter()
    for product in ("in", "out"):
        expected[Call(product, "residual" if with_center else "whole", 40 * TOP_K)] += 1
        if with_center:
            expected[Call(product, "center", len(with_center))] += 1
    assert Counter(backend.calls) == expected
    if grouping == "one group":
        assert len(with_center) == 40


def test_tiled_multiplies_centre_plus_residual_per_copy():
    backend = RecordingBackend(make_layer(grouping=MIXED))
    routed = random_tokens(40)

    backend.mlp(routed, share_center=False)

    kept = int(routed.offsets_L[-1])
    assert backend.calls == [Call("in", "whole", kept), Call("out", "whole", kept)]


def test_many_copies_are_multiplied_in_blocks_of_rows():
    backend = RecordingBackend(make_layer(LONG), product_bytes=1)

    backend.mlp(random_tokens(70), share_center=False)

    assert len(backend.calls) == 2 * 3  # 64, 64 and 22 rows


@pytest.mark.parametrize("grouping", [name for name in GROUPINGS if name != "no centres"])
def test_center_copies_are_sorted_by_centre_and_complete(grouping):
    layer, routed = make_layer(grouping=GROUPINGS[grouping]), random_tokens(30)

    found = CenterCopies.of(routed, layer)

    token_C, offsets_G = found.copies.token_N, found.copies.offsets_J
    offsets = offsets_G.tolist()
    assert offsets[0] == 0 and offsets[-1] == len(token_C)
    center_C = torch.searchsorted(offsets_G[1:], torch.arange(len(token_C)), right=True).tolist()
    pairs = list(zip(center_C, token_C.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    for n, expert in enumerate(routed.expert_N.tolist()):
        center = layer.center_of[expert] if expert < EXPERTS else -1
        index = int(found.index_N[n])
        if center >= 0:
            assert pairs[index] == (center, int(routed.token_N[n]))
        elif not layer.shares_one_center:
            assert index == -1


def test_a_layer_without_centres_has_no_center_copies():
    assert CenterCopies.of(random_tokens(3), make_layer(grouping=NONE)) is None
