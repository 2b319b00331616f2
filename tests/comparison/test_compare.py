"""`resmoe-dist compare`: the figures of a row, rows that fail, and what is kept."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file

from resmoe_dist.checkpoints.compressed import CompressedCheckpoint
from resmoe_dist.checkpoints.restore import restore_checkpoint
from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.comparison.contenders import CONTENDERS
from resmoe_dist.comparison.finished_rows import FinishedRows
from resmoe_dist.comparison.run import run_compare
from resmoe_dist.config.commands import CompareConfig, CompressConfig
from resmoe_dist.config.sources import build_config
from resmoe_dist.errors import UserError
from resmoe_dist.evaluation.report import describe
from resmoe_dist.jobs.locks import LOCK_FILE
from resmoe_dist.launch.compress import compress, settings_of
from resmoe_dist.methods import method_of
from tests.models import dense_model, random_sequences


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "ids.json"
    path.write_text(json.dumps(random_sequences(12, 12, 7)))
    return path


def _run(source: Path, tmp_path: Path, data: Path, **changes: Any) -> dict[str, Any]:
    values = {"source": source, "report": tmp_path / "r", "token_ids": data, "keep": "0.5"}
    assert run_compare(build_config(CompareConfig, values | changes)) == 0
    return json.loads((tmp_path / "r" / "report.json").read_text())


def _log_probabilities(folder: Path, sequence: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return dense_model(folder)(torch.tensor([sequence])).logits[0, :-1].log_softmax(-1)


def test_figures_equal_those_of_the_restored_model(family_folder, tmp_path, data):
    source = family_folder("mixtral")

    row = _run(source, tmp_path, data, methods="resmoe", keep_models="true")["rows"][0]

    (folder,) = (tmp_path / "r" / "work").iterdir()
    assert row["checkpoint_bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    restore_checkpoint(folder, tmp_path / "d")
    nll, diverged, tokens = 0.0, 0.0, 0
    for sequence in json.loads(data.read_text()):
        found, exact = (_log_probabilities(each, sequence) for each in (tmp_path / "d", source))
        nll -= float(found[range(len(sequence) - 1), sequence[1:]].sum())
        diverged += float((exact.exp() * (exact - found)).sum())
        tokens += len(sequence) - 1
    assert row["nll"] == pytest.approx(nll / tokens, rel=1e-4)
    assert row["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-4)
    assert row["divergence"] == pytest.approx(diverged / tokens, rel=1e-3)
    before, after = (SourceCheckpoint(each) for each in (source, tmp_path / "d"))
    errors, norms = [], []
    for layer in range(2):
        for k in range(4):
            exact_ID, restored_ID = (each.read_expert(layer, k)[0] for each in (before, after))
            # Rows are restored in another order: each goes with its nearest.
            errors.append(float(torch.cdist(exact_ID, restored_ID).square().min(1).values.sum()))
            norms.append(float(exact_ID.square().sum()))
    assert row["relative_error"] == pytest.approx(sum(errors) / sum(norms), rel=0.02)


def test_source_row_counts_dense_bytes(family_folder, tmp_path, data):
    source = family_folder("mixtral")

    row = _run(source, tmp_path, data, methods="sp")["source"]

    weights = dense_model(source).state_dict()
    experts = [each for name, each in weights.items() if "experts" in name]
    assert row["expert_bytes"] == sum(each.nbytes for each in experts)
    assert row["checkpoint_bytes"] == (source / "model.safetensors").stat().st_size
    assert row["resident_bytes"] >= sum(each.nbytes for each in weights.values())


def test_contender_that_cannot_run_gives_a_reason_and_the_others_go_on(
    family_folder, tmp_path, data
):
    found = _run(family_folder("mixtral"), tmp_path, data, methods="reap,sp")

    reap, sp = found["rows"]
    assert reap == {"contender": "reap", "budget": "keep 0.5", "reason": "needs --calibration TEXT"}
    # 13 of 27 neurons stay, of four experts in two layers.
    assert sp["expert_share"] == pytest.approx(13 / 27)
    report = (tmp_path / "r" / "report.md").read_text()
    assert "- reap, keep 0.5: needs --calibration TEXT" in report
    # 2 layers of 4 experts, 13 rows of 60 float32 values: 24,960 bytes.
    assert "| sp | keep 0.5 | 24.4 KiB | 48.1% |" in report
    assert not (tmp_path / "r" / "work").exists()


def test_resumed_comparison_keeps_finished_rows(family_folder, tmp_path, data):
    source = family_folder("mixtral")
    first = _run(source, tmp_path, data, methods="sp")["rows"]

    with pytest.raises(UserError, match="holds a comparison; give --resume"):
        _run(source, tmp_path, data, methods="sp")
    # As a run leaves it that is killed.
    (tmp_path / "r" / "work" / "resmoe-no-center-keep-0.5.partial" / "index").mkdir(parents=True)
    again = _run(source, tmp_path, data, methods="sp,resmoe-no-center", resume="true")["rows"]

    # Seconds would differ if the row had been measured again.
    assert again[0] == first[0]
    assert again[1]["contender"] == "resmoe-no-center"
    assert not (tmp_path / "r" / "work").exists()


def test_ep_does_not_matter_to_methods_that_take_whole_layers(family_folder, tmp_path, data):
    found = _run(family_folder("mixtral"), tmp_path, data, methods="reap", ep="3")

    assert [row["reason"] for row in found["rows"]] == ["needs --calibration TEXT"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[1, 2]",
        lambda text: text.replace('"perplexity"', '"perplex"'),
        lambda text: re.sub(r'"divergence": [^,}]*', '"divergence": null', text),
    ],
)
def test_damaged_row_is_measured_again_and_the_others_are_kept(
    family_folder, tmp_path, data, caplog, damage
):
    source = family_folder("mixtral")
    first = _run(source, tmp_path, data, methods="sp,up")["rows"]
    (path,) = (
        path
        for path in (tmp_path / "r" / "rows").iterdir()
        if json.loads(path.read_text()).get("compress_seconds") == first[0]["compress_seconds"]
    )
    path.write_text(damage(path.read_text()))

    again = _run(source, tmp_path, data, methods="sp,up", resume="true")["rows"]

    assert again[1] == first[1]
    assert again[0]["compress_seconds"] != first[0]["compress_seconds"]
    assert again[0]["divergence"] == pytest.approx(first[0]["divergence"], rel=1e-3)
    assert f"{path}: " in caplog.text and "measuring this row again" in caplog.text


def test_second_run_in_a_folder_is_refused_while_the_first_is_at_work(
    family_folder, tmp_path, data
):
    source = family_folder("mixtral")
    _run(source, tmp_path, data, methods="sp")
    at_work = FinishedRows(tmp_path / "r", _common(tmp_path), resume=True)
    with at_work, pytest.raises(UserError, match=r"another run is at work here \(pid \d+"):
        _run(source, tmp_path, data, methods="sp", resume="true")

    _run(source, tmp_path, data, methods="sp", resume="true")
    # No lock file stays.
    names = {path.name for path in (tmp_path / "r").iterdir()}
    assert names - {"report.svg"} == {"comparison.json", "report.json", "report.md", "rows"}


def test_folder_of_a_run_that_was_killed_at_its_start_can_be_used(family_folder, tmp_path, data):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / LOCK_FILE).write_text("pid 1 on elsewhere")

    assert _run(family_folder("mixtral"), tmp_path, data, methods="sp")["rows"]


def _common(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "r" / "comparison.json").read_text())


def test_rounding_has_its_own_size_whatever_the_budgets(family_folder, tmp_path, data):
    found = _run(
        family_folder("mixtral"), tmp_path, data, methods="rtn-4bit,sp,rtn-8bit", keep="0.5,0.25"
    )

    named = [(row["contender"], row["budget"]) for row in found["rows"]]
    assert named == [
        ("sp", "keep 0.5"),
        ("sp", "keep 0.25"),
        ("rtn-4bit", "fixed size"),
        ("rtn-8bit", "fixed size"),
    ]
    # 60 columns are a group of 64: integers, a scale of 4 bytes, a zero point of a byte per bit.
    shares = [row["expert_share"] for row in found["rows"][2:]]
    assert shares == pytest.approx([(8 * bits + 4 + bits) / 240 for bits in (4, 8)])
    rough, fine = found["rows"][2:]
    assert fine["relative_error"] < rough["relative_error"] / 100


def test_folder_of_another_comparison_is_refused(family_folder, tmp_path, data):
    source = family_folder("mixtral")
    _run(source, tmp_path, data, methods="sp")

    with pytest.raises(UserError, match="holds a comparison of other options"):
        _run(source, tmp_path, data, methods="sp", ep="2", resume="true")
    data.write_text("[[1, 2, 3]]")
    with pytest.raises(UserError, match="holds a comparison of other options"):
        _run(source, tmp_path, data, methods="sp", resume="true")
    with pytest.raises(UserError, match="holds other files"):
        _run(source, tmp_path, data, report=str(tmp_path))


def test_method_with_a_seed_runs_once_per_seed(family_folder, tmp_path, data):
    source = family_folder("mixtral")

    row, once = _run(source, tmp_path, data, methods="mlp_fusion,sp", seeds="3")["rows"]

    errors = []
    for seed in range(3):
        method = f"mlp_fusion:seed={seed}"
        options = {"source": source, "output": tmp_path / str(seed), "ep": 1, "keep": 0.5}
        compress(CompressConfig(**options, method=method))
        described = describe(CompressedCheckpoint(tmp_path / str(seed)))
        errors.append(described["experts"]["relative_error"])
    assert row["relative_error"] == pytest.approx(numpy.mean(errors))
    assert row["relative_error_sd"] == pytest.approx(numpy.std(errors, ddof=1))
    assert len(set(errors)) > 1
    assert "relative_error_sd" not in once
    written = (tmp_path / "r" / "report.md").read_text()
    assert f"{once['relative_error']:.4f} ± – |" in written
    assert f"{row['relative_error']:.4f} ± {row['relative_error_sd']:.4f} |" in written


def test_fewer_neurons_take_fewer_operations(family_folder, tmp_path, data):
    found = _run(family_folder("mixtral"), tmp_path, data, methods="sp,resmoe-no-center")

    sp, pruned = found["rows"]
    # Two experts of each token lose 14 of 27 neurons: 3 products of 20 values in two layers.
    saved = 2 * 2 * 14 * 3 * 20 * 2
    assert pruned["flops_per_token"] - sp["flops_per_token"] == pytest.approx(saved, rel=1e-6)
    assert pruned["flops_per_token"] == pytest.approx(found["source"]["flops_per_token"], rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"methods": "resmoe,zip"}, "--methods 'zip': choose all, or of resmoe, "),
        ({"keep": "0.5,2"}, "each share must lie in"),
        ({"layers": "7"}, "--layers 7: this model has 2 MoE layers"),
        ({"ep": "3"}, "--ep 3: .* has 4 experts, which do not divide into 3 groups"),
        ({"calibration": "missing.txt"}, "no tokenizer could be loaded"),
        ({"context": "1"}, "context"),
    ],
)
def test_invalid_input_is_refused_before_the_work(family_folder, tmp_path, data, changes, reason):
    with pytest.raises(UserError, match=reason):
        _run(family_folder("mixtral"), tmp_path, data, **changes)

    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("name", CONTENDERS)
def test_contender_names_a_method_with_its_needs(name, tmp_path):
    contender = CONTENDERS[name]
    options = contender.compress_options(seed=1, ep=1)

    config = CompressConfig(source=tmp_path, output=tmp_path / "c", keep=0.5, **options)
    method = method_of(settings_of(config, [0]).method)

    assert contender.whole_layer == (method.reduces == "experts")
    assert contender.seeded == ("seed" in type(method.options).model_fields)
    if method.needs_samples:
        assert contender.calibrated


def test_resident_bytes_are_those_of_the_dtype_that_is_served(family_folder, tmp_path, data):
    source = family_folder("mixtral")
    options = {"methods": "sp", "dtype": "bfloat16"}

    row = _run(source, tmp_path, data, keep_models="true", **options)["rows"][0]

    (folder,) = (tmp_path / "r" / "work").iterdir()
    weights = load_file(folder / "model-00001-of-00001.safetensors")
    experts = sum(
        each.nbytes
        for path in folder.glob("resmoe-*.safetensors")
        for each in load_file(path).values()
    )
    # Two bytes for every value; positions are computed, not stored.
    stored = experts + 2 * sum(each.numel() for each in weights.values())
    assert stored <= row["resident_bytes"] < stored + 1024
