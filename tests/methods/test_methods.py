"""Methods by name, their options, and what each of them plans and encodes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tests.codecs.rounded_codec  # noqa: F401  (registers codec `rounded`)
from resmoe_dist.codecs import DENSE, CodecSpec
from resmoe_dist.compression.activations import LayerActivations
from resmoe_dist.compression.encoding import GroupCodecs
from resmoe_dist.design_matrix import ExpertShape
from resmoe_dist.errors import UserError
from resmoe_dist.methods import (
    METHODS,
    Dense,
    EncodedGroup,
    GroupPlan,
    Method,
    MethodConfig,
    MethodSpec,
    SourceGroup,
    method_named,
    method_of,
    register_method,
)

SHAPE = ExpertShape(rows=12, hidden=6)


def _resmoe(**options: Any) -> Method:
    return method_of(MethodSpec(name="resmoe", options=options))


def _codecs(center: str = "dense", residual: str = "pruned:keep=0.25") -> GroupCodecs:
    return GroupCodecs(CodecSpec.parse(residual), torch.float32, CodecSpec.parse(center))


def _group(noise: float, count: int = 4, activations: LayerActivations | None = None):
    """Noisy copies of one matrix, with their rows permuted."""
    base = torch.randn(SHAPE.rows, SHAPE.columns)
    experts = base + noise * torch.randn(count, SHAPE.rows, SHAPE.columns)
    permuted = torch.stack([expert[torch.randperm(SHAPE.rows)] for expert in experts])
    return SourceGroup(permuted, SHAPE, activations)


def _restored(encoded: EncodedGroup) -> Tensor:
    center = 0.0 if encoded.center is None else encoded.center.decode()
    return torch.stack([center + residual.decode() for residual in encoded.residuals])


@pytest.mark.parametrize("name", sorted(METHODS))
def test_method_is_found_by_its_name_and_spec(name):
    method = method_of(MethodSpec(name=name))

    assert type(method) is method_named(name)
    assert method.spec.name == name
    assert method_of(method.spec).spec == method.spec


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("zip", {}, "unknown method 'zip'; choose one of resmoe|unknown method 'zip'"),
        (
            "resmoe",
            {"align": "best"},
            "method resmoe: align best: choose one of loo, pot, ot_fusion",
        ),
        ("resmoe", {"surprise": 1}, "method resmoe: no option surprise; its options: align, "),
        ("dense", {"align": "loo"}, "method dense: no option align; its options: none"),
    ],
)
def test_unknown_method_or_option_is_refused(name, options, reason):
    with pytest.raises(ValueError, match=reason):
        method_of(MethodSpec(name=name, options=options))


def test_spec_of_a_method_has_all_options():
    assert _resmoe(align="pot").spec.options == {
        "align": "pot",
        "solver": "scipy",
        "center": "auto",
        "allocate": "group",
    }


def test_method_is_one_class():
    class FirstConfig(MethodConfig):
        scale: float = 1.0

    @register_method
    class First(Method):
        """Stores the first expert for all."""

        name = "first"
        config = FirstConfig

        def codecs(self, wanted: GroupCodecs) -> GroupCodecs:
            return wanted

        def plan(self, group: SourceGroup, codecs: GroupCodecs) -> GroupPlan:
            raise AssertionError("not planned")

        def encode(
            self, group: SourceGroup, codecs: GroupCodecs, plan: GroupPlan | None = None
        ) -> EncodedGroup:
            center = DENSE.codec.encode(group.experts_EID[0], DENSE.config, codecs.dtype)
            return EncodedGroup(center, [], [], self.options.scale)

    method = method_of(MethodSpec(name="first", options={"scale": 2}))

    assert method.encode(_group(0.1), _codecs()).objective == 2.0


# resmoe


def test_layer_without_centres_has_no_codec_for_them():
    assert _resmoe(center="none").codecs(_codecs()).center is None
    assert _resmoe(center="auto").codecs(_codecs()).center == DENSE


@pytest.mark.parametrize(
    ("center", "align", "aligns"),
    [("auto", "loo", True), ("none", "loo", False), ("joint", "none", False)],
)
def test_rows_are_aligned_only_for_a_centre(center, align, aligns):
    assert _resmoe(center=center, align=align).aligns_rows is aligns


@pytest.mark.parametrize("allocate", ["block", "model"])
def test_budgets_of_entries_need_a_codec_that_selects_them(allocate):
    with pytest.raises(UserError, match=f"--allocate {allocate}: needs a codec that selects"):
        _resmoe(allocate=allocate).codecs(_codecs(residual="low_rank"))


@pytest.mark.parametrize(("noise", "center"), [(0.1, "joint"), (10.0, "none")])
def test_centre_is_chosen_by_whether_it_pays(noise, center):
    method, codecs = _resmoe(), _codecs()

    plan = method.plan(_group(noise), codecs)

    assert plan.center == center
    # Without a centre the group keeps more entries for its bytes.
    assert plan.keep == (0.25 if center == "joint" else 0.5)


def test_cheaper_centre_pays_for_experts_that_a_dense_one_does_not_pay_for():
    group = _group(10.0)

    centers = [_resmoe().plan(group, _codecs(center=name)).center for name in ("dense", "rounded")]

    assert centers == ["none", "joint"]


def test_codec_that_does_not_select_entries_always_gets_a_centre():
    assert _resmoe().plan(_group(10.0), _codecs(residual="low_rank")).center == "joint"


@pytest.mark.parametrize("residual", ["pruned:keep=0.25", "low_rank", "rounded"])
@pytest.mark.parametrize("center", ["dense", "rounded"])
def test_encoding_by_a_plan_equals_encoding_without_one(residual, center):
    group, codecs = _group(0.3), _codecs(center, residual)
    method = _resmoe(center="joint")

    planned = method.encode(group, codecs, method.plan(group, codecs))

    assert torch.equal(_restored(planned), _restored(method.encode(group, codecs)))


def test_plan_decides_the_budget():
    group, codecs, method = _group(0.3), _codecs(), _resmoe(center="joint")
    plan = method.plan(group, codecs)

    found = method.encode(group, codecs, GroupPlan(plan.permutations_EI, 0.0, "joint", 0.5))

    assert sum(loss.kept for loss in found.losses) == int(0.5 * group.experts_EID.numel())


@pytest.mark.parametrize("allocate", ["group", "model"])
def test_prices_are_planned_only_for_a_budget_that_the_model_shares(allocate):
    method = _resmoe(allocate=allocate)

    plan = method.plan(_group(0.3), _codecs())

    assert method.shares_budget is (allocate == "model")
    assert (plan.curve is not None) is (allocate == "model")


@pytest.mark.parametrize("allocate", ["group", "model"])
def test_plan_is_the_same_after_saving_and_loading(tmp_path, allocate):
    plan = _resmoe(allocate=allocate).plan(_group(0.3), _codecs())

    plan.save(tmp_path / "plan.safetensors")
    found = GroupPlan.load(tmp_path / "plan.safetensors")

    assert torch.equal(found.permutations_EI, plan.permutations_EI)
    assert (found.objective, found.center) == (plan.objective, plan.center)
    assert (found.keep, found.curve) == (plan.keep, plan.curve)
    assert not found.without_permutations().permutations_EI.numel()


@pytest.mark.parametrize("content", [None, b"", b"not a plan"])
def test_file_that_is_not_a_plan_is_none(tmp_path, content):
    if content is not None:
        (tmp_path / "plan.safetensors").write_bytes(content)

    assert GroupPlan.load(tmp_path / "plan.safetensors") is None


def test_activations_weigh_the_errors():
    activations = LayerActivations(
        input_rms_H=torch.tensor([10.0, 10.0, 10.0, 0.1, 0.1, 0.1]),
        neuron_rms_EI=torch.ones(4, SHAPE.rows),
        tokens_E=torch.ones(4, dtype=torch.int64),
    )
    group = _group(0.3)
    weighted = SourceGroup(group.experts_EID, SHAPE, activations)
    method, codecs = _resmoe(align="none", center="none"), _codecs()

    lost = method.encode(weighted, codecs)

    # Columns of gate and up with large inputs are kept, those with small inputs are not.
    kept_D = (_restored(lost) != 0).float().mean((0, 1))
    assert kept_D[:3].min() > 2 * kept_D[3:6].max()
    assert all(loss.weighted_squared_error != loss.squared_error for loss in lost.losses)


# dense


@pytest.mark.parametrize("residual", ["pruned:keep=0.25", "low_rank", "rounded"])
def test_dense_method_stores_experts_unchanged_whatever_the_codecs(residual):
    method, group = Dense(), _group(0.3)
    codecs = method.codecs(_codecs("rounded", residual))

    found = method.encode(group, codecs)

    assert (codecs.center, found.center) == (None, None)
    assert {matrix.name for matrix in found.residuals} == {"dense"}
    assert torch.equal(_restored(found), group.experts_EID)
    assert [loss.squared_error for loss in found.losses] == [0.0] * 4
    assert found.objective == 0.0
