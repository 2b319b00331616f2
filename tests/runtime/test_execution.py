"""Every way to run a layer's experts, against a float64 sum written out token by token."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from resmoe_dist.codecs import CODECS, DenseResidual, LowRankResidual, PrunedResidual
from resmoe_dist.design_matrix import ExpertShape, row_range
from resmoe_dist.parallel.dispatcher import NO_EXPERT, DispatchedTokens
from resmoe_dist.runtime import experts as experts_module
from resmoe_dist.runtime.execution import MODES, Execution, RestoredExperts
from resmoe_dist.runtime.experts import CompressedExperts, ExpertGroup
from resmoe_dist.runtime.planning import execution_for
from tests.models import relative_difference
from tests.runtime.random_layers import (
    EXPERTS,
    GROUPINGS,
    HIDDEN,
    LONG,
    MIXED,
    SEVERAL,
    SHORT,
    TOP_K,
    make_experts,
    naive,
    routed,
    to_experts,
)

# Of the largest output: float32 rounds each of the sums of 150 terms, at most, by 2⁻²⁴ or so of
# its largest partial sum. Wrong terms are orders of magnitude above.
TOLERANCE = 1e-5
SHAPES = {
    "gated": SHORT,
    "two-layer": replace(SHORT, gated=False),
    "gated with biases": replace(SHORT, row_bias=True, output_bias=True),
    "two-layer with biases": replace(SHORT, gated=False, row_bias=True, output_bias=True),
}


@dataclass(frozen=True)
class Always:
    """A planner with one answer."""

    mode: str

    def prepare(self, experts: CompressedExperts) -> None:
        pass

    def choose(self, experts: CompressedExperts, tokens: DispatchedTokens) -> str:
        return self.mode


EXECUTIONS: dict[str, Callable[[], Execution]] = {
    "restore": lambda: Execution("restore"),
    "shared": lambda: Execution("shared"),
    "tiled": lambda: Execution("tiled"),
    "cached": lambda: execution_for("cached", 1 << 30),
    "cached, no room": lambda: execution_for("cached", 1),
    "cached, room for some": lambda: execution_for("cached", 2 * 37 * 63 * 4),
    "auto": lambda: Execution("auto", planner=Always("shared")),
}
every_execution = pytest.mark.parametrize("execution", EXECUTIONS)
every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)


# The same result.


@every_execution
@every_codec
@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_execution_gives_the_naive_sum(shape, grouping, codec, execution):
    experts = make_experts(SHAPES[shape], GROUPINGS[grouping], codec, EXECUTIONS[execution]())
    tokens = routed(23)

    found = experts(tokens)

    assert found.dtype == torch.float32
    assert relative_difference(found.double(), naive(experts, tokens)) <= TOLERANCE


@every_execution
@every_codec
@pytest.mark.parametrize("grouping", ["one group", "one of them without a centre"])
def test_bfloat16_is_within_the_rounding_of_its_steps(grouping, codec, execution):
    # Of C + R, the products with it, the activations and the output each is rounded once at most,
    # by up to 2⁻⁸. Sums go over many such terms, whose roundings cancel in part: no more than 2⁻⁶
    # of the largest output is left.
    shape = SHAPES["gated with biases"]
    experts = make_experts(
        shape, GROUPINGS[grouping], codec, EXECUTIONS[execution](), torch.bfloat16
    )
    tokens = routed(64, torch.bfloat16)

    found = experts(tokens)

    assert found.dtype == torch.bfloat16
    assert relative_difference(found.double(), naive(experts, tokens)) <= 2**-6


@every_execution
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_one_token_gives_the_naive_sum(grouping, execution):
    experts = make_experts(LONG, GROUPINGS[grouping], execution=EXECUTIONS[execution]())
    for _ in range(5):
        tokens = routed(1, top_k=4)
        if len(tokens.row_N):
            expected = naive(experts, tokens)
            assert relative_difference(experts(tokens).double(), expected) <= TOLERANCE


@every_execution
@pytest.mark.parametrize("grouping", ["one group", "one of them without a centre"])
def test_a_token_that_wants_an_expert_several_times_gets_it_as_often(grouping, execution):
    experts = make_experts(grouping=GROUPINGS[grouping], execution=EXECUTIONS[execution]())
    index_TK = torch.tensor([[4, 4, 4], [0, 0, 1], [1, 4, 1]])
    x_TH, weights_TK = torch.randn(3, HIDDEN), torch.rand(3, 3)
    tokens = to_experts(index_TK, x_TH, weights_TK)

    found = experts(tokens)

    assert relative_difference(found.double(), naive(experts, tokens)) <= TOLERANCE
    # As much as once with the sum of the weights.
    sum_11 = weights_TK[:1].sum(1, keepdim=True)
    once = experts(to_experts(index_TK[:1, :1], x_TH[:1], sum_11))
    assert relative_difference(found[:1], once) <= TOLERANCE


@every_execution
@every_codec
def test_no_tokens_and_tokens_that_go_nowhere_give_zeros(codec, execution):
    experts = make_experts(LONG, SEVERAL, codec, EXECUTIONS[execution]())
    for count in (0, 5):
        index_TK = torch.full((count, TOP_K), NO_EXPERT)
        tokens = to_experts(index_TK, torch.randn(count, HIDDEN).bfloat16())

        found = experts(tokens)

        assert torch.equal(found, torch.zeros(count, HIDDEN, dtype=torch.bfloat16))


@every_execution
@every_codec
def test_many_tokens_are_run_in_parts_with_the_same_result(monkeypatch, codec, execution):
    # Rows of products at least 64 at a time, of restored experts seven.
    monkeypatch.setattr(experts_module, "_PRODUCT_BYTES", 1)
    monkeypatch.setattr(experts_module, "_BLOCK_BYTES", 7 * LONG.columns * 4)
    experts = make_experts(LONG, MIXED, codec, EXECUTIONS[execution]())
    tokens = routed(70)

    found = experts(tokens)

    assert relative_difference(found.double(), naive(experts, tokens)) <= TOLERANCE


@every_execution
@every_codec
def test_a_layer_that_was_moved_to_another_dtype_runs_in_it(codec, execution):
    experts = make_experts(LONG, MIXED, codec, EXECUTIONS[execution]())
    experts(routed(9))
    experts.to(torch.bfloat16)
    tokens = routed(23, torch.bfloat16)

    found = experts(tokens)

    assert found.dtype == torch.bfloat16
    assert relative_difference(found.double(), naive(experts, tokens)) <= 2**-6


@every_execution
def test_a_tokens_result_does_not_depend_on_other_tokens(execution):
    experts = make_experts(LONG, SEVERAL, execution=EXECUTIONS[execution]())
    x_TH, index_TK = torch.randn(9, HIDDEN), torch.randint(EXPERTS, (9, TOP_K))
    weights_TK = torch.rand(9, TOP_K)
    together = experts(to_experts(index_TK, x_TH, weights_TK))

    for t in range(9):
        one = slice(t, t + 1)
        alone = experts(to_experts(index_TK[one], x_TH[one], weights_TK[one]))
        assert relative_difference(together[one], alone) <= 1e-6


@every_execution
@every_codec
def test_row_ranges_add_up_to_the_whole_with_its_output_bias_once(codec, execution):
    whole = make_experts(LONG, MIXED, codec)
    tokens = routed(23)
    total = torch.zeros(23, HIDDEN, dtype=torch.float64)
    for rank in range(4):
        start, stop = row_range(LONG.rows, rank, 4)
        groups = [
            ExpertGroup(
                group.experts,
                None if group.center is None else group.center[start:stop],
                [residual.slice_rows(start, stop) for residual in group.residuals],
                list(group.output_biases),
            )
            for group in whole.groups
        ]
        part = CompressedExperts(
            replace(LONG, rows=stop - start),
            groups,
            whole.activation,
            EXECUTIONS[execution](),
            adds_output_bias=rank == 0,
        )
        total += part(tokens).double()

    assert relative_difference(total, naive(whole, tokens)) <= TOLERANCE


# What `shared` shares.


class Products(NamedTuple):
    """Copies that were multiplied with centres, with residuals, and with sums of the two."""

    centers: int
    residuals: int
    sums: int


@pytest.fixture
def products(monkeypatch) -> Iterator[list[Products]]:
    """What `project_in` and `project_out` of `pruned` were asked for, where nothing fuses them."""
    asked = []
    monkeypatch.setattr(PrunedResidual, "fuses_mlp", lambda *_: False)

    def count(counts_J, jobs) -> None:
        parts = {"centers": 0, "residuals": 0, "sums": 0}
        for copies, job in zip(counts_J, jobs, strict=True):
            kind = "centers" if job.residual is None else "residuals"
            parts["sums" if kind == "residuals" and job.center is not None else kind] += copies
        asked.append(Products(**parts))

    for name in ("project_in", "project_out"):
        original = getattr(PrunedResidual, name)

        def spy(x, token_N, counts_J, jobs, *rest, original=original) -> Tensor:
            count(counts_J, jobs)
            return original(x, token_N, counts_J, jobs, *rest)

        monkeypatch.setattr(PrunedResidual, name, spy)
    yield asked


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_shared_runs_a_centre_once_per_token_on_the_way_in_and_out(products, grouping):
    partition, centerless = GROUPINGS[grouping]
    experts = make_experts(grouping=GROUPINGS[grouping], execution=Execution("shared"))
    x_TH, index_TK = torch.randn(40, HIDDEN), torch.randint(EXPERTS, (40, TOP_K))
    tokens = to_experts(index_TK, x_TH)

    experts(tokens)

    group_of = {k: g for g, members in enumerate(partition) for k in members}
    wanted = {(t, group_of[k]) for t, row in enumerate(index_TK.tolist()) for k in row}
    with_center = [pair for pair in wanted if pair[1] not in centerless]
    assert products == [Products(len(with_center), 40 * TOP_K, 0)] * 2
    if grouping == "one group":
        assert len(with_center) == 40


def test_tiled_runs_the_sum_of_centre_and_residual_for_each_copy(products):
    experts = make_experts(grouping=MIXED, execution=Execution("tiled"))
    tokens = routed(40)

    experts(tokens)

    without = sum(tokens.counts_L[k] for k in MIXED.partition[1])
    assert products == [Products(0, without, len(tokens.row_N) - without)] * 2


def test_products_of_many_tokens_are_taken_in_parts(monkeypatch, products):
    experts = make_experts(LONG, execution=Execution("shared"))
    tokens = routed(70)
    experts(tokens)
    assert len(products) == 2
    products.clear()

    monkeypatch.setattr(experts_module, "_PRODUCT_BYTES", 1)
    experts(tokens)

    assert len(products) == 2 * 3  # 64, 64 and 22 rows


# What it takes.


def restored_bytes(shape: ExpertShape) -> int:
    return shape.entries * 4


@pytest.fixture
def restored(monkeypatch) -> list[weakref.ref[Tensor]]:
    """Each tensor that an expert of `pruned` was restored into, as long as it lives."""
    tensors = []
    original = PrunedResidual.restore

    def spy(self, center, out, *first) -> None:
        tensors.append(weakref.ref(out))
        original(self, center, out, *first)

    monkeypatch.setattr(PrunedResidual, "restore", spy)
    return tensors


def live_bytes(tensors: list[weakref.ref[Tensor]]) -> int:
    """Of the storages of the tensors that live."""
    alive = [tensor for ref in tensors if (tensor := ref()) is not None]
    return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in alive}.values())


def test_restore_keeps_no_more_than_one_expert_for_all_layers():
    execution = Execution("restore")
    small, large = SHORT, LONG
    layers = [make_experts(shape, execution=execution) for shape in (small, large, small)]

    found = []
    for layer in layers:
        layer(routed(9))
        found.append(execution.workspace.nbytes)

    assert found == [restored_bytes(small), restored_bytes(large), restored_bytes(large)]


def test_restore_keeps_no_more_than_a_block_of_a_large_expert(monkeypatch):
    monkeypatch.setattr(experts_module, "_BLOCK_BYTES", 7 * LONG.columns * 4 + 3)
    experts = make_experts(LONG, execution=Execution("restore"))

    experts(routed(9))

    assert experts.execution.workspace.nbytes == 7 * LONG.columns * 4


@pytest.mark.parametrize("mode", ["shared", "tiled"])
@pytest.mark.parametrize("codec", [PrunedResidual, LowRankResidual])
def test_nothing_is_restored_where_nothing_needs_be(restored, codec, mode):
    experts = make_experts(SHORT, MIXED, codec, Execution(mode))

    experts(routed(23))

    assert experts.execution.workspace.nbytes == 0
    assert restored == []


@every_execution
def test_what_is_stored_whole_is_run_from_where_it_lies(execution):
    experts = make_experts(codec=DenseResidual, execution=EXECUTIONS[execution]())

    experts(routed(23))

    assert experts.execution.workspace.nbytes == 0
    cache = experts.execution.cache
    assert cache is None or cache.nbytes == 0


# `cached`.


def test_a_kept_expert_is_not_restored_again(restored):
    experts = make_experts(execution=execution_for("cached", EXPERTS * restored_bytes(LONG)))
    tokens = routed(40)
    first = experts(tokens)
    assert len(restored) == EXPERTS

    again = experts(tokens)

    assert len(restored) == EXPERTS
    assert torch.equal(again, first)


@pytest.mark.parametrize("room", [1, 2, 3.9, 6, 100])
def test_restored_experts_stay_within_their_budget(restored, room):
    one = restored_bytes(SHORT)
    experts = make_experts(execution=execution_for("cached", int(room * one)))
    for _ in range(4):
        tokens = routed(5)

        found = experts(tokens)

        assert relative_difference(found.double(), naive(experts, tokens)) <= TOLERANCE
        kept = live_bytes(restored)
        assert kept == experts.execution.cache.nbytes <= room * one
        assert kept % one == 0
    # The room that there is, is used.
    assert kept == min(int(room), EXPERTS) * one
    assert experts.execution.workspace.nbytes == 0


def test_a_budget_below_one_expert_keeps_none(restored):
    one = restored_bytes(SHORT)
    experts = make_experts(execution=execution_for("cached", one - 1))
    tokens = routed(23)

    found = experts(tokens)

    assert relative_difference(found.double(), naive(experts, tokens)) <= TOLERANCE
    assert experts.execution.cache.nbytes == 0
    assert experts.execution.workspace.nbytes == one


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

    # d takes the place of b, as a was used after it; then b that of c, and e that of a.
    assert made == list("abcdbe")
    for name in "dbe":
        use(name)
    assert made == list("abcdbe")
    assert cache.nbytes == 120


def test_a_large_expert_takes_the_place_of_several():
    cache = RestoredExperts(100)
    for name in "abc":
        cache.get(name, 32, lambda: torch.zeros(8))

    large = cache.get("d", 60, lambda: torch.zeros(15))

    assert large.shape == (15,)
    assert cache.nbytes == 92
    assert cache.get("c", 32, lambda: pytest.fail("c should have stayed")).shape == (8,)


def test_layers_with_one_cache_keep_their_experts_apart():
    execution = execution_for("cached", 1 << 30)
    tokens = routed(5)
    layers = [make_experts(execution=execution) for _ in range(2)]

    for layer in layers:
        assert relative_difference(layer(tokens).double(), naive(layer, tokens)) <= TOLERANCE


def test_a_layer_where_another_lay_before_does_not_get_its_experts():
    execution = execution_for("cached", 1 << 30)
    tokens = routed(5)
    # Some of these have the address of an earlier one.
    for _ in range(100):
        layer = make_experts(execution=execution)
        assert relative_difference(layer(tokens).double(), naive(layer, tokens)) <= TOLERANCE
        del layer


# What a caller may ask for.


def test_an_unknown_execution_is_an_error_that_names_those_there_are():
    with pytest.raises(ValueError, match="'nonsense': one of " + ", ".join(MODES)):
        Execution("nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        execution_for("nonsense")


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_made_with_what_it_needs(mode):
    execution = execution_for(mode, cache_bytes=123)

    assert execution.mode == mode
    assert (execution.cache is not None) == (mode == "cached")
    assert (execution.planner is not None) == (mode == "auto")
    if mode == "cached":
        assert execution.cache.budget == 123


@pytest.mark.parametrize(
    "arguments",
    [
        {"mode": "cached"},
        {"mode": "auto"},
        {"mode": "shared", "cache": RestoredExperts(1)},
        {"mode": "restore", "planner": Always("shared")},
    ],
    ids=str,
)
def test_what_does_not_belong_together_is_an_error(arguments):
    with pytest.raises(ValueError, match="and no other execution"):
        Execution(**arguments)
