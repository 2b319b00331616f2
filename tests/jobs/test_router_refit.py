"""Refitted routers: the answer of least squares on the restored model, and part of the checkpoint.

Legend: T tokens, K experts per token, E experts, H hidden.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from resmoe_dist import load_model
from resmoe_dist.checkpoints.compressed import CompressedCheckpoint
from resmoe_dist.checkpoints.format import CheckpointIndex, MethodSpec
from resmoe_dist.checkpoints.restore import restore_checkpoint, restored_expert
from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.compression.router_fit import RIDGE
from resmoe_dist.jobs import pipeline, router_refit
from resmoe_dist.jobs.calibration import measure_activations
from resmoe_dist.jobs.group import GroupCompressor
from resmoe_dist.jobs.pipeline import Compression
from resmoe_dist.jobs.router_refit import RouterRefit
from resmoe_dist.jobs.workers import DeepSpeedWorkers, Workers
from tests.all_families import tiny_model
from tests.checkpoints.damage import edit_tensors, mistake, names_in
from tests.compress_settings import compression_settings
from tests.jobs.runs import before_each_task, contents, staging_of
from tests.models import FAMILIES, dense_model, logits_of, random_sequences, save_family
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.usefixtures("one_thread")

SEQUENCES = random_sequences(*[20] * 48)
HELD_OUT = torch.tensor(random_sequences(*[31] * 64)[32:])
# Three MoE layers: the last routers read what two compressed layers made of the tokens.
SIZES: dict[str, dict[str, int]] = {
    "mixtral": {"num_hidden_layers": 3},
    "qwen3_moe": {"num_hidden_layers": 3},
    "deepseek_v3": {"num_hidden_layers": 4},
    "gpt_oss": {"num_hidden_layers": 3},
    "switch": {"num_layers": 4, "num_decoder_layers": 4, "num_sparse_encoder_layers": 2},
}
# The weight of a router, in the block around the experts.
WEIGHTS = {
    "mixtral": "gate.weight",
    "qwen3_moe": "gate.weight",
    "deepseek_v3": "gate.weight",
    "gpt_oss": "router.weight",
    "switch": "router.classifier.weight",
}
CASES = [
    ("mixtral", {"keep": 0.1}),
    ("mixtral", {"codec": "quantized:bits=1", "center_codec": "quantized:bits=2"}),
    ("qwen3_moe", {"codec": "low_rank", "keep": 0.2, "groups": 2}),
    ("deepseek_v3", {"keep": 0.1}),
    ("gpt_oss", {"keep": 0.1}),
    ("switch", {"keep": 0.1}),
]
NAMES = ["mixtral", "mixtral-quantized", "qwen3_moe-low_rank", "deepseek_v3", "gpt_oss", "switch"]


def compress(
    source: Path,
    output: Path,
    workers: Workers | None = None,
    *,
    refit: bool = True,
    resume: bool = False,
    measured: list[list[int]] = SEQUENCES,
    **options: Any,
) -> CheckpointIndex:
    """Compress with a calibration, and refit the routers. measured: tokens of the calibration."""
    checkpoint = SourceCheckpoint(source)
    values = {"groups": 1, "layers": list(range(len(checkpoint.sites)))} | options
    settings = compression_settings(calibration="0" * 64, recalibrate_router=refit, **values)
    run = Compression(
        checkpoint,
        output,
        settings,
        workers,
        measure=lambda samples: measure_activations(checkpoint, measured, samples=samples),
        routers=RouterRefit(checkpoint, SEQUENCES) if refit else None,
    )
    return run.run(resume=resume)


def _bias_choices(tensors: dict[str, Tensor]) -> None:
    """Give a bias to the choices of routers that have one (DeepSeek-V3)."""
    for name in tensors:
        if name.endswith("e_score_correction_bias"):
            tensors[name] = torch.linspace(-0.1, 0.1, len(tensors[name]))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """sources(family): a model of three MoE layers."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            save_family(FAMILIES[family], made[family], **SIZES[family])
            edit_tensors(made[family] / "model.safetensors", _bias_choices)
        return made[family]

    return make


@pytest.fixture(scope="module", params=CASES, ids=NAMES)
def case(request, sources, tmp_path_factory):
    """The family, its source, and a folder with compressed `plain` and `refitted`, and `restored`
    from `plain`."""
    family, options = request.param
    folder = tmp_path_factory.mktemp("case")
    compress(sources(family), folder / "plain", refit=False, **options)
    compress(sources(family), folder / "refitted", **options)
    restore_checkpoint(folder / "plain", folder / "restored")
    return family, sources(family), folder


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


def _tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder outside its group files."""
    files = folder.glob("model*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _router_names(folder: Path, family: str) -> list[str]:
    """The routers' names in the files, in the order of the layers."""
    ending = f".{WEIGHTS[family]}"
    names = [name for name in _tensors(folder) if name.endswith(ending)]
    return sorted(names, key=lambda name: ("decoder" in name, name))


@torch.no_grad()
def test_routers_are_the_least_squares_answer_layer_by_layer(case):
    family, source, folder = case
    modules, ids_BS = _modules(folder / "plain"), torch.tensor(SEQUENCES)
    full, compressed = (_Watched(each, family, modules) for each in (source, folder / "restored"))
    expected = full.run(ids_BS)
    found = [_tensors(folder / "refitted")[name] for name in _router_names(source, family)]
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

    mine, theirs = _tensors(folder / "refitted"), _tensors(folder / "plain")
    assert mine.keys() == theirs.keys()
    changed = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert sorted(changed) == sorted(_router_names(folder / "plain", family)[1:])
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


# One run


def test_routers_before_the_first_compressed_layer_stay(sources, tmp_path):
    index = compress(sources("mixtral"), tmp_path / "c", layers=[1], keep=0.1)

    assert [layer.router is None for layer in index.layers] == [True, True, False]
    mine, theirs = _tensors(tmp_path / "c"), _tensors(sources("mixtral"))
    names = _router_names(sources("mixtral"), "mixtral")
    assert [torch.equal(mine[name], theirs[name]) for name in names] == [True, True, False]


def test_routers_keep_their_stored_dtype(sources, tmp_path):
    dense_model(sources("qwen3_moe")).bfloat16().save_pretrained(tmp_path / "source")

    compress(tmp_path / "source", tmp_path / "c", keep=0.1, dtype="float32")

    routers = [_tensors(tmp_path / "c")[n] for n in _router_names(tmp_path / "c", "qwen3_moe")]
    assert [router.dtype for router in routers] == [torch.bfloat16] * 3
    assert json.loads((tmp_path / "c" / "config.json").read_text())["dtype"] == "float32"


def test_a_folder_without_the_option_has_no_new_field(sources, tmp_path):
    compress(sources("mixtral"), tmp_path / "c", refit=False)

    index = json.loads((tmp_path / "c" / "resmoe.json").read_text())
    assert "recalibrate_router" not in index["settings"]
    assert all("router" not in layer for layer in index["layers"])


class _StoppedError(Exception):
    pass


def _stop(*_: Any) -> None:
    raise _StoppedError


@pytest.mark.parametrize("where", ["compress", "refit", "finish"])
def test_resumed_run_gives_the_bytes_of_an_uninterrupted_one(sources, tmp_path, monkeypatch, where):
    source = sources("mixtral")
    compress(source, tmp_path / "whole", keep=0.1)
    with monkeypatch.context() as patch:
        if where == "compress":
            before_each_task(patch, _stop)
        elif where == "refit":
            patch.setattr(RouterRefit, "run", _stop)
        else:
            patch.setattr(pipeline, "write_model_files", _stop)
        with pytest.raises(_StoppedError):
            compress(source, tmp_path / "c", keep=0.1)
    assert names_in(tmp_path) == {"whole", "c.partial"}
    if where == "finish":
        monkeypatch.setattr(RouterRefit, "run", _stop)  # is done already

    compress(source, tmp_path / "c", keep=0.1, resume=True)

    assert contents(tmp_path / "c") == contents(tmp_path / "whole")
    assert names_in(tmp_path) == {"whole", "c"}


@pytest.mark.parametrize("lost", ["routers.json", "model-00002-of-00002.safetensors"])
def test_routers_are_made_again_if_half_of_what_they_leave_is_lost(
    sources, tmp_path, monkeypatch, lost
):
    source = sources("mixtral")
    compress(source, tmp_path / "whole", keep=0.1)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_model_files", _stop)
        with pytest.raises(_StoppedError):
            compress(source, tmp_path / "c", keep=0.1)
    (path,) = staging_of(tmp_path / "c").rglob(lost)
    path.write_bytes(path.read_bytes()[:20])

    compress(source, tmp_path / "c", keep=0.1, resume=True)

    assert contents(tmp_path / "c") == contents(tmp_path / "whole")


def test_resume_with_or_without_the_option_is_another_run(sources, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(RouterRefit, "run", _stop)
        with pytest.raises(_StoppedError):
            compress(sources("mixtral"), tmp_path / "c")

    with mistake("the unfinished run had other options"):
        compress(sources("mixtral"), tmp_path / "c", refit=False, resume=True)


def _on_a_rank(source: Path, output: Path) -> None:
    compress(source, output, DeepSpeedWorkers(), keep=0.1, groups=2)


@pytest.mark.parametrize("ranks", [2, 3])
def test_number_of_ranks_does_not_change_the_routers(sources, tmp_path, ranks):
    compress(sources("deepseek_v3"), tmp_path / "one", keep=0.1, groups=2)

    run_on_ranks(ranks, _on_a_rank, sources("deepseek_v3"), tmp_path / "many")

    assert contents(tmp_path / "many") == contents(tmp_path / "one")


# Refused


def test_without_calibration_it_is_refused(sources, tmp_path):
    checkpoint = SourceCheckpoint(sources("mixtral"))
    settings = compression_settings(groups=1, layers=[0, 1, 2], recalibrate_router=True)

    with mistake("--recalibrate-router: needs --calibration TEXT"):
        Compression(checkpoint, tmp_path / "c", settings)


def test_methods_that_store_other_experts_are_refused(sources, tmp_path):
    checkpoint = SourceCheckpoint(sources("mixtral"))
    settings = compression_settings(
        groups=1, layers=[0, 1, 2], recalibrate_router=True, calibration="0" * 64
    )
    reap = settings.model_copy(update={"method": MethodSpec(name="reap")})

    with mistake("--recalibrate-router: --method reap stores other experts than the source's"):
        Compression(checkpoint, tmp_path / "c", reap)


def test_a_family_whose_logits_are_not_recorded_is_refused(sources, monkeypatch):
    parts = dense_model(sources("mixtral")).modules()
    for kind in {type(part) for part in parts if isinstance(part, PreTrainedModel)}:
        monkeypatch.setattr(kind, "_can_record_outputs", {}, raising=False)

    with mistake("--recalibrate-router: transformers does not record all router logits of a Mixt"):
        RouterRefit(SourceCheckpoint(sources("mixtral")), SEQUENCES)


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("gemma4", "router computes more than a product with one weight per expert"),
        ("longcat_flash", "router computes more than a product with one weight per expert"),
        ("deepseek_v4", "transformers does not record all router logits of a DeepseekV4"),
        ("diffusion_gemma", "experts shares its experts with model"),
    ],
)
def test_routers_that_no_product_describes_are_refused(tmp_path, family, why):
    tiny_model(family).save_pretrained(tmp_path)

    with mistake(f"--recalibrate-router: .*{why}.*; leave the option out"):
        RouterRefit(SourceCheckpoint(tmp_path), SEQUENCES)


def test_a_router_that_runs_twice_is_refused_before_the_work(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(GroupCompressor, "compress", _stop)

    # Two lengths: two batches.
    with mistake("--recalibrate-router: model.layers.0.mlp.gate runs several times"):
        compress(sources("mixtral"), tmp_path / "c", measured=random_sequences(8, 9))
    assert names_in(tmp_path) == set()


def test_activations_that_are_not_finite_are_refused(sources, tmp_path, monkeypatch):
    def overflow(*args: Any) -> tuple[Tensor, None]:
        matrix_ID, bias_H = restored_expert(*args)
        return matrix_ID * 3e38, bias_H

    monkeypatch.setattr(router_refit, "restored_expert", overflow)

    with mistake("model.layers.1.mlp.gate: activations of the compressed model are NaN or inf"):
        compress(sources("mixtral"), tmp_path / "c")
    assert names_in(tmp_path) == set()
