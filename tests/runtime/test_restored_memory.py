"""Memory of restored experts: the workspace, and the cache with its byte budget."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from resmoe_dist.kernels import Backend
from resmoe_dist.kernels.reference import ReferenceBackend
from resmoe_dist.runtime.execution import Product, Restore, RestoredExperts
from resmoe_dist.runtime.planning import execution_for
from tests.models import relative_difference
from tests.runtime.random_layers import (
    CODECS,
    EXPERTS,
    LONG,
    MIXED,
    SHORT,
    make_experts,
    make_layer,
    naive,
    random_tokens,
    restored_bytes,
)
from tests.runtime.test_execution import EXECUTIONS, TOLERANCE, every_execution


class CountingBackend(ReferenceBackend):
    """Counts the experts it restores."""

    def __init__(self, layer) -> None:
        super().__init__(layer)
        self.restored: list[int] = []

    def restore(self, expert: int, out_RC: Tensor, *first: int) -> None:
        self.restored.append(expert)
        super().restore(expert, out_RC, *first)


def test_all_layers_restore_into_one_workspace():
    execution = Restore()
    layers = [make_experts(shape, execution=execution) for shape in (SHORT, LONG, SHORT)]

    found = []
    for layer in layers:
        layer(random_tokens(9))
        found.append(execution.workspace.nbytes)

    assert found == [restored_bytes(SHORT), restored_bytes(LONG), restored_bytes(LONG)]


def test_a_large_expert_is_restored_in_blocks():
    execution = Restore(cpu_block_bytes=7 * LONG.columns * 4 + 3)
    experts = make_experts(LONG, execution=execution)

    experts(random_tokens(9))

    assert execution.workspace.nbytes == 7 * LONG.columns * 4


@pytest.mark.parametrize("share_center", [True, False])
@pytest.mark.parametrize("codec", ["pruned", "low_rank"])
def test_products_change_and_keep_no_weights(codec, share_center):
    experts = make_experts(SHORT, MIXED, CODECS[codec], Product(share_center=share_center))
    before = [buffer.clone() for buffer in experts.buffers()]
    held = experts.residual_bytes + experts.center_bytes

    experts(random_tokens(23))

    assert all(map(torch.equal, experts.buffers(), before))
    assert experts.residual_bytes + experts.center_bytes == held


@every_execution
def test_dense_experts_run_from_where_they_are_stored(execution):
    experts = make_experts(codec="dense", execution=EXECUTIONS[execution]())

    experts(random_tokens(23))

    assert isinstance(experts.execution, Restore)
    assert experts.execution.workspace.nbytes == 0
    assert experts.execution.cache is None


def test_decoded_row_biases_are_counted():
    experts = make_experts(LONG, execution=Product(share_center=True))
    before = experts.residual_bytes

    experts(random_tokens(3))

    # Two input projections of six experts in float32.
    assert experts.residual_bytes == before + EXPERTS * 2 * LONG.rows * 4


def test_a_cached_expert_is_not_restored_again():
    execution = execution_for("cached", EXPERTS * restored_bytes(LONG))
    backend = CountingBackend(make_layer(LONG))
    routed = random_tokens(40)
    first = execution.run(routed, backend)
    assert backend.restored == list(range(EXPERTS))

    again = execution.run(routed, backend)

    assert backend.restored == list(range(EXPERTS))
    assert torch.equal(again, first)


@pytest.mark.parametrize("budget", [1, 2, 3.9, 6, 100])
def test_cached_experts_stay_within_their_budget(budget):
    one = restored_bytes(SHORT)
    execution = execution_for("cached", int(budget * one))
    experts = make_experts(execution=execution)
    for _ in range(4):
        routed = random_tokens(5)

        found = experts(routed)

        assert relative_difference(found.double(), naive(experts, routed)) <= TOLERANCE
        assert execution.cache.nbytes <= budget * one
        assert execution.cache.nbytes % one == 0
    # The budget is used.
    assert execution.cache.nbytes == min(int(budget), EXPERTS) * one
    assert execution.workspace.nbytes == 0


def test_a_budget_below_one_expert_caches_none():
    one = restored_bytes(SHORT)
    execution = execution_for("cached", one - 1)
    experts = make_experts(execution=execution)
    routed = random_tokens(23)

    found = experts(routed)

    assert relative_difference(found.double(), naive(experts, routed)) <= TOLERANCE
    assert execution.cache.nbytes == 0
    assert execution.workspace.nbytes == one


def test_the_least_recently_used_expert_goes_first():
    cache = RestoredExperts(3 * 40)
    made = []

    def use(name: str) -> None:
        def restore() -> Tensor:
            made.append(name)
            return torch.zeros(10)

        assert cache.get(name, 40, restore).shape == (10,)

    for name in "abcadbe":
        use(name)

    # d replaces b, because a was used after it; then b replaces c, and e replaces a.
    assert made == list("abcdbe")
    for name in "dbe":
        use(name)
    assert made == list("abcdbe")
    assert cache.nbytes == 120


def test_a_large_expert_replaces_several():
    cache = RestoredExperts(100)
    for name in "abc":
        cache.get(name, 32, lambda: torch.zeros(8))

    large = cache.get("d", 60, lambda: torch.zeros(15))

    assert large.shape == (15,)
    assert cache.nbytes == 92
    assert cache.get("c", 32, lambda: pytest.fail("c should have stayed")).shape == (8,)


def test_layers_with_one_cache_keep_their_experts_apart():
    execution = execution_for("cached", 1 << 30)
    routed = random_tokens(5)

    for layer in [make_experts(execution=execution) for _ in range(2)]:
        assert relative_difference(layer(routed).double(), naive(layer, routed)) <= TOLERANCE


def test_cache_is_not_reused_after_id_reuse():
    execution = execution_for("cached", 1 << 30)
    routed = random_tokens(5)
    # Some of these layers get the address of an earlier one.
    for _ in range(100):
        layer = make_experts(execution=execution)
        assert relative_difference(layer(routed).double(), naive(layer, routed)) <= TOLERANCE
        del layer


def test_a_copy_of_a_layer_has_its_own_backend():
    experts = make_experts(execution=Product(share_center=True))
    routed = random_tokens(5)
    expected = experts(routed)

    copied = copy.deepcopy(experts)

    assert torch.equal(copied(routed), expected)
    first: Backend = experts.backend
    assert copied.backend is not first
    experts.layer.centers[0].weight.zero_()
    assert torch.equal(copied(routed), expected)
