"""Runs that refit the routers: which routers, resuming, ranks, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from resmoe_dist.checkpoints.format import MethodSpec
from resmoe_dist.checkpoints.restore import restored_expert
from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.jobs import pipeline, router_refit
from resmoe_dist.jobs.group import GroupCompressor
from resmoe_dist.jobs.pipeline import Compression
from resmoe_dist.jobs.router_refit import RouterRefit
from resmoe_dist.jobs.workers import DeepSpeedWorkers
from tests.all_families import tiny_model
from tests.checkpoints.damage import mistake, names_in
from tests.compress_settings import compression_settings
from tests.jobs.refits import SEQUENCES, compress, router_names, tensors_of
from tests.jobs.runs import before_each_task, contents, staging_of
from tests.models import dense_model, random_sequences
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.usefixtures("one_thread")


def test_routers_before_the_first_compressed_layer_stay(three_layers, tmp_path):
    index = compress(three_layers("mixtral"), tmp_path / "c", layers=[1], keep=0.1)

    assert [layer.router is None for layer in index.layers] == [True, True, False]
    mine, theirs = tensors_of(tmp_path / "c"), tensors_of(three_layers("mixtral"))
    names = router_names(three_layers("mixtral"), "mixtral")
    assert [torch.equal(mine[name], theirs[name]) for name in names] == [True, True, False]


def test_routers_keep_their_stored_dtype(three_layers, tmp_path):
    dense_model(three_layers("qwen3_moe")).bfloat16().save_pretrained(tmp_path / "source")

    compress(tmp_path / "source", tmp_path / "c", keep=0.1, dtype="float32")

    routers = [tensors_of(tmp_path / "c")[n] for n in router_names(tmp_path / "c", "qwen3_moe")]
    assert [router.dtype for router in routers] == [torch.bfloat16] * 3
    assert json.loads((tmp_path / "c" / "config.json").read_text())["dtype"] == "float32"


def test_a_folder_without_the_option_has_no_new_field(three_layers, tmp_path):
    compress(three_layers("mixtral"), tmp_path / "c", refit=False)

    index = json.loads((tmp_path / "c" / "resmoe.json").read_text())
    assert "recalibrate_router" not in index["settings"]
    assert all("router" not in layer for layer in index["layers"])


class _StoppedError(Exception):
    pass


def _stop(*_: Any) -> None:
    raise _StoppedError


@pytest.mark.parametrize("where", ["compress", "refit", "finish"])
def test_resumed_run_gives_the_bytes_of_a_whole_one(three_layers, tmp_path, monkeypatch, where):
    source = three_layers("mixtral")
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
    three_layers, tmp_path, monkeypatch, lost
):
    source = three_layers("mixtral")
    compress(source, tmp_path / "whole", keep=0.1)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_model_files", _stop)
        with pytest.raises(_StoppedError):
            compress(source, tmp_path / "c", keep=0.1)
    (path,) = staging_of(tmp_path / "c").rglob(lost)
    path.write_bytes(path.read_bytes()[:20])

    compress(source, tmp_path / "c", keep=0.1, resume=True)

    assert contents(tmp_path / "c") == contents(tmp_path / "whole")


def test_resume_with_or_without_the_option_is_another_run(three_layers, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(RouterRefit, "run", _stop)
        with pytest.raises(_StoppedError):
            compress(three_layers("mixtral"), tmp_path / "c")

    with mistake("the unfinished run had other options"):
        compress(three_layers("mixtral"), tmp_path / "c", refit=False, resume=True)


def _on_a_rank(source: Path, output: Path) -> None:
    compress(source, output, DeepSpeedWorkers(), keep=0.1, groups=2)


@pytest.mark.parametrize("ranks", [2, 3])
def test_number_of_ranks_does_not_change_the_routers(three_layers, tmp_path, ranks):
    compress(three_layers("deepseek_v3"), tmp_path / "one", keep=0.1, groups=2)

    run_on_ranks(ranks, _on_a_rank, three_layers("deepseek_v3"), tmp_path / "many")

    assert contents(tmp_path / "many") == contents(tmp_path / "one")


# Refused


def test_without_calibration_it_is_refused(three_layers, tmp_path):
    checkpoint = SourceCheckpoint(three_layers("mixtral"))
    settings = compression_settings(groups=1, layers=[0, 1, 2], recalibrate_router=True)

    with mistake("--recalibrate-router: needs --calibration TEXT"):
        Compression(checkpoint, tmp_path / "c", settings)


def test_methods_that_store_other_experts_are_refused(three_layers, tmp_path):
    checkpoint = SourceCheckpoint(three_layers("mixtral"))
    settings = compression_settings(
        groups=1, layers=[0, 1, 2], recalibrate_router=True, calibration="0" * 64
    )
    reap = settings.model_copy(update={"method": MethodSpec(name="reap")})

    with mistake("--recalibrate-router: --method reap stores other experts than the source's"):
        Compression(checkpoint, tmp_path / "c", reap)


def test_a_family_whose_logits_are_not_recorded_is_refused(three_layers, monkeypatch):
    parts = dense_model(three_layers("mixtral")).modules()
    for kind in {type(part) for part in parts if isinstance(part, PreTrainedModel)}:
        monkeypatch.setattr(kind, "_can_record_outputs", {}, raising=False)

    with mistake("--recalibrate-router: transformers does not record all router logits of a Mixt"):
        RouterRefit(SourceCheckpoint(three_layers("mixtral")), SEQUENCES)


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


def test_a_router_that_runs_twice_is_refused_before_the_work(three_layers, tmp_path, monkeypatch):
    monkeypatch.setattr(GroupCompressor, "compress", _stop)

    # Two lengths: two batches.
    with mistake("--recalibrate-router: model.layers.0.mlp.gate runs several times"):
        compress(three_layers("mixtral"), tmp_path / "c", measured=random_sequences(8, 9))
    assert names_in(tmp_path) == set()


def test_activations_that_are_not_finite_are_refused(three_layers, tmp_path, monkeypatch):
    def overflow(*args: Any) -> tuple[Tensor, None]:
        matrix_ID, bias_H = restored_expert(*args)
        return matrix_ID * 3e38, bias_H

    monkeypatch.setattr(router_refit, "restored_expert", overflow)

    with mistake("model.layers.1.mlp.gate: activations of the compressed model are NaN or inf"):
        compress(three_layers("mixtral"), tmp_path / "c")
    assert names_in(tmp_path) == set()
