"""Every way to run a layer's experts, against a float64 sum written out copy by copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from resmoe_dist.design_matrix import row_range
from resmoe_dist.kernels import Backend, LayerWeights
from resmoe_dist.routing import NO_EXPERT
from resmoe_dist.runtime.execution import (
    MODES,
    Auto,
    Execution,
    Product,
    Restore,
    RestoredExperts,
)
from resmoe_dist.runtime.experts import CompressedExperts
from resmoe_dist.runtime.planning import execution_for
from tests.models import relative_difference
from tests.runtime.random_layers import (
    CODECS,
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
    random_tokens,
    to_experts,
)

# Relative to the largest output: float32 rounds each sum of at most 150 terms by about 2⁻²⁴ of its
# largest partial sum. A wrong term is orders of magnitude larger.
TOLERANCE = 1e-5
SHAPES = {
    "gated": SHORT,
    "two-layer": replace(SHORT, gated=False),
    "gated with biases": replace(SHORT, row_bias=True, output_bias=True),
    "two-layer with biases": replace(SHORT, gated=False, row_bias=True, output_bias=True),
}


@dataclass(frozen=True)
class Always:
    """A planner that always gives the same answer."""

    way: str

    def prepare(self, backend: Backend) -> None:
        pass

    def choose(self, backend: Backend, tokens: int, copies: int) -> str:
        return self.way


EXECUTIONS: dict[str, Callable[[], Execution]] = {
    "restore": Restore,
    "restore in blocks": lambda: Restore(cpu_block_bytes=7 * LONG.columns * 4),
    "shared": lambda: Product(share_center=True),
    "tiled": lambda: Product(share_center=False),
    "cached": lambda: execution_for("cached", 1 << 30),
    "cached, no room": lambda: execution_for("cached", 1),
    "cached, room for some": lambda: execution_for("cached", 2 * 37 * 63 * 4),
    "auto": lambda: Auto(Always("shared")),
}
every_execution = pytest.mark.parametrize("execution", EXECUTIONS)
every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)


@every_execution
@every_codec
@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_execution_gives_the_naive_sum(shape, grouping, codec, execution):
    experts = make_experts(SHAPES[shape], GROUPINGS[grouping], codec, EXECUTIONS[execution]())
    routed = random_tokens(23)

    found = experts(routed)

    assert found.dtype == torch.float32
    assert relative_difference(found.double(), naive(experts, routed)) <= TOLERANCE


@every_execution
@pytest.mark.parametrize("center_codec", ["low_rank:keep=0.6", "pruned:keep=0.5"])
@pytest.mark.parametrize("codec", ["pruned:keep=0.3", "empty"])
def test_centres_of_every_codec_give_the_naive_sum(codec, center_codec, execution):
    experts = make_experts(LONG, SEVERAL, codec, EXECUTIONS[execution](), center_codec=center_codec)
    routed = random_tokens(23)

    found = experts(routed)

    assert relative_difference(found.double(), naive(experts, routed)) <= TOLERANCE


@every_execution
@every_codec
@pytest.mark.parametrize("grouping", ["one group", "one group without a centre"])
def test_bfloat16_is_within_the_rounding_of_its_steps(grouping, codec, execution):
    # C + R, its products, the activations and the output are each rounded once at most, by up to
    # 2⁻⁸. Sums have many such terms, whose rounding errors cancel in part: at most 2⁻⁶ of the
    # largest output remains.
    shape = SHAPES["gated with biases"]
    experts = make_experts(
        shape, GROUPINGS[grouping], codec, EXECUTIONS[execution](), torch.bfloat16
    )
    routed = random_tokens(64, torch.bfloat16)

    found = experts(routed)

    assert found.dtype == torch.bfloat16
    assert relative_difference(found.double(), naive(experts, routed)) <= 2**-6


@every_execution
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_one_token_gives_the_naive_sum(grouping, execution):
    experts = make_experts(LONG, GROUPINGS[grouping], execution=EXECUTIONS[execution]())
    for _ in range(5):
        routed = random_tokens(1, top_k=4)
        expected = naive(experts, routed)
        if expected.any():
            assert relative_difference(experts(routed).double(), expected) <= TOLERANCE


@every_execution
@pytest.mark.parametrize("grouping", ["one group", "one group without a centre"])
def test_an_expert_chosen_several_times_counts_several_times(grouping, execution):
    experts = make_experts(grouping=GROUPINGS[grouping], execution=EXECUTIONS[execution]())
    index_TK = torch.tensor([[4, 4, 4], [0, 0, 1], [1, 4, 1]])
    x_TH, weights_TK = torch.randn(3, HIDDEN), torch.rand(3, 3)
    routed = to_experts(index_TK, x_TH, weights_TK)

    found = experts(routed)

    assert relative_difference(found.double(), naive(experts, routed)) <= TOLERANCE
    # The same as once with the sum of the weights.
    sum_11 = weights_TK[:1].sum(1, keepdim=True)
    once = experts(to_experts(index_TK[:1, :1], x_TH[:1], sum_11))
    assert relative_difference(found[:1], once) <= TOLERANCE


@every_execution
@every_codec
def test_no_tokens_and_dropped_tokens_give_zeros(codec, execution):
    experts = make_experts(
        replace(LONG, output_bias=False), SEVERAL, codec, EXECUTIONS[execution]()
    )
    experts.to(torch.bfloat16)
    for count in (0, 5):
        index_TK = torch.full((count, TOP_K), NO_EXPERT)
        routed = to_experts(index_TK, torch.randn(count, HIDDEN).bfloat16())

        found = experts(routed)

        assert torch.equal(found, torch.zeros(count, HIDDEN, dtype=torch.bfloat16))


@every_execution
def test_dropped_copies_get_no_output_bias(execution):
    experts = make_experts(LONG, SEVERAL, execution=EXECUTIONS[execution]())
    index_TK = torch.tensor([[NO_EXPERT, NO_EXPERT], [NO_EXPERT, 3]])
    routed = to_experts(index_TK, torch.randn(2, HIDDEN))

    found = experts(routed)

    assert not found[0].any()
    assert relative_difference(found.double(), naive(experts, routed)) <= TOLERANCE


@every_execution
@every_codec
def test_many_tokens_give_the_naive_sum(codec, execution):
    experts = make_experts(LONG, MIXED, codec, EXECUTIONS[execution]())
    routed = random_tokens(70)

    found = experts(routed)

    assert relative_difference(found.double(), naive(experts, routed)) <= TOLERANCE


@every_execution
@every_codec
def test_a_layer_moved_to_another_dtype_runs_in_it(codec, execution):
    experts = make_experts(LONG, MIXED, codec, EXECUTIONS[execution]())
    experts(random_tokens(9))
    experts.to(torch.bfloat16)
    routed = random_tokens(23, torch.bfloat16)

    found = experts(routed)

    assert found.dtype == torch.bfloat16
    assert relative_difference(found.double(), naive(experts, routed)) <= 2**-6


@every_execution
def test_a_tokens_result_does_not_depend_on_other_tokens(execution):
    experts = make_experts(LONG, SEVERAL, execution=EXECUTIONS[execution]())
    x_TH, index_TK = torch.randn(9, HIDDEN), torch.randint(EXPERTS, (9, TOP_K))
    weights_TK = torch.rand(9, TOP_K)
    batch = experts(to_experts(index_TK, x_TH, weights_TK))

    for t in range(9):
        one = slice(t, t + 1)
        alone = experts(to_experts(index_TK[one], x_TH[one], weights_TK[one]))
        assert relative_difference(batch[one], alone) <= 1e-6


@every_execution
@every_codec
def test_row_ranges_add_up_to_the_whole(codec, execution):
    whole = make_experts(LONG, MIXED, codec)
    routed = random_tokens(23)
    total = torch.zeros(23, HIDDEN, dtype=torch.float64)
    for rank in range(4):
        rows = row_range(LONG.rows, rank, 4)
        layer = LayerWeights(
            LONG,
            tuple(residual.slice_rows(*rows) for residual in whole.layer.residuals),
            tuple(center.slice_rows(*rows) for center in whole.layer.centers),
            whole.layer.center_of,
            whole.layer.activation,
        )
        # Exactly one rank adds the output bias.
        bias_LH = whole.output_bias_LH if rank == 0 else None
        total += CompressedExperts(layer, EXECUTIONS[execution](), bias_LH)(routed).double()

    assert relative_difference(total, naive(whole, routed)) <= TOLERANCE


def test_an_unknown_execution_is_an_error_that_names_the_others():
    with pytest.raises(ValueError, match="'nonsense': choose one of " + ", ".join(MODES)):
        execution_for("nonsense")


def test_every_mode_has_an_execution():
    kinds = {mode: execution_for(mode, cache_bytes=123) for mode in MODES}

    assert isinstance(kinds["auto"], Auto)
    assert kinds["shared"].share_center and not kinds["tiled"].share_center
    assert kinds["restore"].cache is None
    assert isinstance(kinds["cached"].cache, RestoredExperts)
    assert kinds["cached"].cache.budget == 123
