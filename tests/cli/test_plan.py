"""`resmoe-dist plan`: what it prints and writes, the examples in `configs/`, and mistakes."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from deepspeed.launcher.runner import fetch_hostfile

from tests.checkpoints.damage import edit_text
from tests.cli.commands import assert_mistake
from tests.models import FAMILIES

ROOT = Path(__file__).parents[2]
PLANNED = sorted(
    path
    for path in ROOT.glob("configs/*.yaml")
    if (ROOT / f"configs/models/{path.stem}.json").exists()
)


@pytest.fixture
def mixtral(family_folder):
    return family_folder("mixtral") / "config.json"


@pytest.mark.parametrize("path", PLANNED, ids=lambda path: path.stem)
def test_an_example_says_what_plan_says(run, monkeypatch, path):
    monkeypatch.chdir(ROOT)
    comment = re.sub(r"^# ? ? ?", "", path.read_text(), flags=re.MULTILINE)
    command = re.search(r"^resmoe-dist (plan .*)$", comment, re.MULTILINE)
    assert command is not None

    code, out, err = run(*shlex.split(command[1]))

    assert (code, err) == (0, "")
    asked, _, _ = out.partition("\n\n")
    assert f"\n{asked}\n" in comment
    assert re.search(r"^fits .* yes ", asked, re.MULTILINE)


def test_the_documentation_says_what_plan_says(run, monkeypatch):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "planning.md").read_text()
    command = re.search(r"^    resmoe-dist (plan .*)$", page, re.MULTILINE)
    assert command is not None

    asked, _, _ = run(*shlex.split(command[1])).out.partition("\n\n")

    assert f"```\n{asked}\n```" in page


def test_every_model_of_the_examples_has_an_example():
    models = {path.stem for path in ROOT.glob("configs/models/*.json")}
    assert models == {path.stem for path in PLANNED}
    assert len(models) == 4


@pytest.mark.parametrize(
    ("model", "billions"),
    [
        ("mixtral-8x7b", 46.7),
        ("deepseek-v2-lite", 15.7),
        ("qwen3-30b-a3b", 30.5),
        ("gpt-oss-20b", 20.9),
    ],
)
def test_the_examples_have_the_published_number_of_parameters(run, tmp_path, model, billions):
    config = ROOT / "configs" / "models" / f"{model}.json"
    run("plan", config, "--ranks", 1, "--context", 0, "--json", tmp_path / "p.json")

    parameters = json.loads((tmp_path / "p.json").read_text())["parameters"]
    assert parameters == pytest.approx(billions * 1e9, rel=0.003)


def test_the_example_hostfile_is_one_that_deepspeed_reads():
    found = fetch_hostfile(str(ROOT / "configs" / "hostfile-2-nodes.txt"))
    assert dict(found) == {"node-1": 4, "node-2": 4}


def test_json_has_the_figures_of_the_tables(run, mixtral, tmp_path):
    options = ("--ep", 2, "--tp", 2, "--lanes", 1, "--batch-size", 3, "--gpu-memory", "50KB")
    code, out, err = run("plan", mixtral, *options, "--json", tmp_path / "p.json")

    assert (code, err) == (0, "")
    found = json.loads((tmp_path / "p.json").read_text())
    grid = found["grid"]
    assert (grid["ep"], grid["tp"], grid["lanes"]) == (2, 2, 1)
    # Four ranks, two key/value heads.
    assert grid["cache_bytes"] == 3 * found["cache_bytes_per_sequence"] // 2 > 0
    parts = ("center_bytes", "residual_bytes", "other_bytes", "cache_bytes")
    assert grid["total_bytes"] == sum(grid[part] for part in parts)
    assert grid["fits"] is (grid["total_bytes"] <= 50_000)
    assert {(g["ep"], g["tp"]) for g in found["grids"]} >= {(1, 1), (4, 4), (2, 8)}
    assert len(out.split("\n\n")[1].splitlines()) == 2 + len(found["grids"])


def test_a_compressed_folder_is_planned_by_its_index(run, pristine, tmp_path):
    code, out, _ = run("plan", pristine, "--ep", 2, "--json", tmp_path / "p.json")

    index = json.loads((pristine / "resmoe.json").read_text())
    groups = [layer["groups"] for layer in index["layers"]]
    held = [
        sum(
            layer[rank]["center_bytes"] + sum(layer[rank]["residual_bytes"].values())
            for layer in groups
        )
        for rank in (0, 1)
    ]
    grid = json.loads((tmp_path / "p.json").read_text())["grid"]
    assert code == 0
    assert "dense + pruned (keep 0.25), groups per layer 2" in out
    assert grid["center_bytes"] + grid["residual_bytes"] == max(held)


def test_grids_that_miss_the_target_are_named(run, mixtral):
    code, out, _ = run("plan", mixtral, "--target-bytes", "0.5", "--codec", "pruned", "--ranks", 4)

    assert code == 0
    assert "ep 4: --target-bytes 0.5: centres, indices" in out


def test_a_size_is_shown_without_bits_that_only_compress_can_choose(run, mixtral):
    code, out, _ = run("plan", mixtral, "--target-bits", 8, "--ranks", 1)

    assert code == 0
    assert "experts as quantized, 25.00% of the dense bytes with centres, groups per layer 1" in out
    assert re.search("^experts  ", out, re.MULTILINE)
    assert "residuals" not in out
    assert "bits 3" not in out


def test_a_quantised_source_is_named(run, mixtral, tmp_path):
    config = json.loads(mixtral.read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    edit_text(tmp_path / "config.json", json.dumps(config))

    out = run("plan", tmp_path, "--ranks", 1)[1]

    assert "the source is quantised (mxfp4); its figures here are for float32" in out


MISTAKES = [
    (("--ep", 3), "--ep 3: 4 experts do not divide among 3 ranks; choose one of 1, 2, 4"),
    (("--ep", 0), "--ep 0 --tp 1: both must be 1 or more"),
    (("--tp", 28), "has 27 rows, fewer than ranks"),
    (("--ep", 4, "--lanes", 3), "--lanes 3: a grid with ep 4 and dp 1 has 1 or 2 or 4"),
    (("--groups", 3), "--groups 3: model.layers.0.mlp.experts has 4 experts"),
    (("--keep", 2), "--keep 2.0: must lie in (0, 1]"),
    (("--keep", 0.5, "--target-bytes", 0.5), "exclude each other"),
    (("--codec", "zip"), "--codec zip: unknown codec 'zip'"),
    (("--codec", "dense", "--keep", 0.5), "codec dense has no budget"),
    (("--layers", "7"), "--layers 7: this model has 2 MoE layers, 0 to 1"),
    (("--gpu-memory", "much"), "--gpu-memory much: not a size; write 8GB"),
    (("--context", -1), "--context -1: must be 0 or more"),
    (("--groups-per-rank", 5), "--groups-per-rank 5: a rank has 4 experts"),
]


@pytest.mark.parametrize(("arguments", "text"), MISTAKES)
def test_invalid_options_are_refused(run, mixtral, arguments, text):
    assert_mistake(run("plan", mixtral, *arguments), text)


CONFIGS = {
    "damaged": ('{"model_type": "mixtral",', "not a valid JSON file"),
    "unknown family": ('{"model_type": "zip"}', "does not recognize this architecture"),
    "custom code": (
        '{"model_type": "zip", "auto_map": {"AutoConfig": "zip.ZipConfig"}}',
        "contains custom code",
    ),
    "no architecture": ('{"model_type": "mixtral"}', "'architectures' is None"),
    "no experts": (
        '{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}',
        "a 'llama' model has no experts to compress",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_an_unusable_config_is_refused(run, tmp_path, name):
    text, message = CONFIGS[name]
    edit_text(tmp_path / "config.json", text)
    assert_mistake(run("plan", tmp_path / "config.json"), message)
    assert_mistake(run("plan", tmp_path), message)


def test_a_missing_model_is_refused(run, tmp_path):
    assert_mistake(run("plan", tmp_path / "none"), f"{tmp_path}/none: no such file or folder")


def test_a_compressed_folder_keeps_its_options(run, pristine):
    outcome = run("plan", pristine, "--keep", 0.5)
    assert_mistake(outcome, f"{pristine}: compressed already; leave --keep out")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_planned(run, family_folder, name):
    code, out, err = run("plan", family_folder(name), "--gpu-memory", "1MB", "--context", 8)

    assert (code, err) == (0, "")
    assert FAMILIES[name].model in out
