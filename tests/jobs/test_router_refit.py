"""Refitted routers: the answer of least squares on the restored model, and part of the checkpoint.

Legend: T tokens, K experts per token, E experts, H hidden.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from resmoe_dist import load_model
from resmoe_dist.checkpoints.compressed import CompressedCheckpoint
from resmoe_dist.checkpoints.restore import restore_checkpoint
from resmoe_dist.compression.router_fit import RIDGE
from tests.jobs.refits import SEQUENCES, WEIGHTS, compress, router_names, tensors_of
from tests.jobs.runs import contents
from tests.models import dense_model, logits_of, random_sequences

pytestmark = pytest.mark.usefixtures("one_thread")

HELD_OUT = torch.tensor(random_sequences(*[31] * 64)[32:])

CASES = [
    ("mixtral", {"keep": 0.1}),
    ("mixtral", {"codec": "quantized:bits=1", "center_codec": "quantized:bits=2"}),
    ("qwen3_moe", {"codec": "low_rank", "keep": 0.2, "groups": 2}),
    ("deepseek_v3", {"keep": 0.1}),
    ("gpt_oss", {"keep": 0.1}),
    ("switch", {"keep": 0.1}),
]
NAMES = ["mixtral", "mixtral-quantized", "qwen3_moe-low_rank", "deepseek_v3", "gpt_oss", "switch"]


@pytest.fixture(scope="module", params=CASES, ids=NAMES)
def case(request, three_layers, tmp_path_factory):
    """The family, its source, and a folder with compressed `plain` and `refitted`, and `restored`
    from `plain`."""
    family, options = request.param
    folder = tmp_path_factory.mktemp("case")
    compress(three_layers(family), folder / "plain", refit=False, **options)
    compress(three_layers(family), folder / "refitted", **options)
    restore_checkpoint(folder / "plain", folder / "restored")
    return family, three_layers(family), folder


class _Watched:
    """A plain model whose routers' inputs and choices are recorded by hooks, layer by layer."""

    def __init__(self, folder: Path, family: str, modules: list[str]) -> None:
        self.model = dense_model(folder)
        self.inputs: list[list[Tensor]] = [[] for _ in modules]
        self.choices: list[list[Tensor]] = [[] for _ in modules]
        self.weights = []
        for layer, name in enumerate(modules):
            block, weight = name.rpartition(".")[0], WEIGHTS[family]
            self.weights.append(self.model.get_parameter(f"{block}.{weight}"))
            # Every family here gives the experts the hidden states that the router reads.
            self.model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, layer=layer: self._see(layer, args[0], args[1])
            )

    def _see(self, layer: int, x_TH: Tensor, chosen: Tensor) -> None:
        self.inputs[layer].append(x_TH.reshape(-1, x_TH.shape[-1]).clone())
        if chosen.dim() == 3:  # Switch: a mask [T, 1, E]
            chosen = chosen[:, 0].argmax(-1, keepdim=True)
        self.choices[layer].append(chosen.clone())

    @torch.no_grad()
    def run(self, ids_BS: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Inputs [T, H] and choices [T, K] of each layer."""
        for seen in (*self.inputs, *self.choices):
            seen.clear()
        for ids in ids_BS.unsqueeze(1):
            if self.model.config.is_encoder_decoder:
                half = ids.shape[1] // 2
                self.model(input_ids=ids[:, :half], labels=ids[:, half:])
            else:
                self.model(input_ids=ids)
        pairs = zip(self.inputs, self.choices, strict=True)
        return [(torch.cat(inputs), torch.cat(choices)) for inputs, choices in pairs]


def _agreement(expected_TK: Tensor, found_TK: Tensor) -> float:
    """The share of choices that are also made in `found_TK`."""
    pairs = zip(expected_TK.tolist(), found_TK.tolist(), strict=True)
    shared = [len(set(mine) & set(theirs)) / len(mine) for mine, theirs in pairs]
    return sum(shared) / len(shared)


def _fitted(x_TH: Tensor, wanted_TE: Tensor, old_EH: Tensor) -> Tensor:
    """[X; √λ I] Wᵀ = [wanted; √λ W_oldᵀ] in the least-squares sense."""
    x_TH, old_EH = x_TH.double(), old_EH.double()
    penalty = (RIDGE * x_TH.square().sum() / x_TH.shape[1]).sqrt()
    ones = penalty * torch.eye(x_TH.shape[1], dtype=torch.float64)
    rows, answers = torch.cat([x_TH, ones]), torch.cat([wanted_TE.double(), penalty * old_EH.T])
    return torch.linalg.lstsq(rows, answers).solution.T


def _modules(folder: Path) -> list[str]:
    return [layer.module for layer in CompressedCheckpoint(folder).index.layers]


@torch.no_grad()
def test_routers_are_the_least_squares_answer_layer_by_layer(case):
    family, source, folder = case
    modules, ids_BS = _modules(folder / "plain"), torch.tensor(SEQUENCES)
    full, compressed = (_Watched(each, family, modules) for each in (source, folder / "restored"))
    expected = full.run(ids_BS)
    found = [tensors_of(folder / "refitted")[name] for name in router_names(source, family)]
    assert len(found) == len(modules) == 3

    for layer, weight_EH in enumerate(found):
        if layer == 0:
            assert torch.equal(weight_EH, full.weights[0])
            continue
        inputs_TH = compressed.run(ids_BS)[layer][0]
        # A bias stays on both sides.
        wanted_TE = expected[layer][0] @ full.weights[layer].T
        fitted_EH = _fitted(inputs_TH, wanted_TE, full.weights[layer])
        change = float((fitted_EH - full.weights[layer]).abs().max())
        assert change > 1e-3
        torch.testing.assert_close(weight_EH.double(), fitted_EH, rtol=0, atol=1e-3 * change)
        compressed.weights[layer].copy_(weight_EH)


def test_nothing_else_differs_from_a_run_without_the_option(case):
    family, _, folder = case
    plain, refitted = contents(folder / "plain"), contents(folder / "refitted")
    for name in plain:
        if not name.startswith("model") and name != "resmoe.json":
            assert refitted[name] == plain[name], name

    mine, theirs = tensors_of(folder / "refitted"), tensors_of(folder / "plain")
    assert mine.keys() == theirs.keys()
    changed = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert sorted(changed) == sorted(router_names(folder / "plain", family)[1:])
    assert all(mine[name].dtype == theirs[name].dtype for name in mine)
    index = json.loads(refitted["resmoe.json"])
    assert index["settings"].pop("recalibrate_router") is True
    assert "recalibrate_router" not in json.loads(plain["resmoe.json"])["settings"]
    for layer in index["layers"]:
        layer.pop("router", None)
    without = json.loads(plain["resmoe.json"])
    for key in ("layers", "settings"):
        assert index[key] == without[key]


def test_index_tells_the_agreement_of_choices(case, tmp_path):
    family, source, folder = case
    restore_checkpoint(folder / "refitted", tmp_path / "restored")
    modules, ids_BS = _modules(folder / "plain"), torch.tensor(SEQUENCES)
    expected, before, after = (
        [chosen for _, chosen in _Watched(each, family, modules).run(ids_BS)]
        for each in (source, folder / "restored", tmp_path / "restored")
    )

    first, *others = CompressedCheckpoint(folder / "refitted").index.layers

    assert first.router is None
    for layer, entry in enumerate(others, start=1):
        assert entry.router is not None
        told = entry.router.agreement_before, entry.router.agreement_after
        for mine, chosen in zip(told, (before[layer], after[layer]), strict=True):
            assert mine == pytest.approx(_agreement(expected[layer], chosen), abs=2e-3)
        assert told[0] < 0.95


def test_agreement_on_other_tokens_does_not_fall(case, tmp_path):
    family, source, folder = case
    restore_checkpoint(folder / "refitted", tmp_path / "restored")
    modules = _modules(folder / "plain")
    expected, before, after = (
        [chosen for _, chosen in _Watched(each, family, modules).run(HELD_OUT)]
        for each in (source, folder / "restored", tmp_path / "restored")
    )

    def mean(found: list[Tensor]) -> float:
        agreements = [_agreement(*pair) for pair in zip(expected, found, strict=True)]
        return sum(agreements) / len(agreements)

    assert mean(after) >= mean(before)


def test_restored_model_is_the_served_one_and_the_folder_is_whole(case, tmp_path):
    _, _, folder = case
    assert CompressedCheckpoint(folder / "refitted", verify=True).faults() == []
    restore_checkpoint(folder / "refitted", tmp_path / "restored")

    served = logits_of(load_model(folder / "refitted", verify=True))

    restored = logits_of(dense_model(tmp_path / "restored"))
    torch.testing.assert_close(served, restored, rtol=1e-4, atol=1e-4 * float(served.abs().max()))
    plain = logits_of(load_model(folder / "plain"))
    assert (served - plain).abs().max() > 1e-3 * plain.abs().max()
