"""`resmoe-dist compress`: its options, its report, and mistakes in a single line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.checkpoints.damage import copy_of, edit_tensors, names_in
from tests.cli.commands import assert_mistake, start
from tests.models import FAMILIES, save_family

EXPERT = "model.layers.0.block_sparse_moe.experts.3.w2.weight"


@pytest.mark.slow
def test_compress_verify_and_restore_as_a_user_starts_them(family_folder, tmp_path):
    source = family_folder("mixtral")

    code, out, err = start("compress", source, tmp_path / "c", "--ep", 2)
    assert (code, err) == (0, "")
    assert "model.layers.1.mlp.experts" in out
    assert start("verify", tmp_path / "c") == (0, f"{tmp_path}/c: all 8 files are whole\n", "")
    code, out, err = start("restore", tmp_path / "c", tmp_path / "d")
    assert (code, out, err) == (0, f"{tmp_path}/d: dense model written\n", "")
    assert names_in(tmp_path) == {"c", "d"}


@pytest.mark.slow
def test_a_mistake_in_the_installed_command_is_one_line(family_folder, tmp_path):
    source = copy_of(family_folder("mixtral"), tmp_path / "source")
    edit_tensors(source / "model.safetensors", lambda t: t[EXPERT][0, 0].fill_(math.nan))

    outcome = start("compress", source, tmp_path / "c", "--ep", 2)

    assert_mistake(outcome, f"{source}/model.safetensors: tensor '{EXPERT}' holds NaN")
    assert names_in(tmp_path) == {"source"}


def test_a_target_says_that_it_does_not_choose_the_groups(family_folder, run, tmp_path):
    source = family_folder("mixtral")

    target = ("--target-bytes", "80%", "--codec", "pruned")
    code, out, _ = run("compress", source, tmp_path / "c", "--ep", 2, *target)

    assert code == 0
    assert out.splitlines()[-1].startswith(
        "--target-bytes chose how much to keep with 2 groups per layer, not how many groups"
    )


def test_compress_reports_what_inspect_reports(family_folder, run, tmp_path):
    code, out, err = run("compress", family_folder("mixtral"), tmp_path / "c", "--ep", 2)
    assert (code, err) == (0, "")
    assert run("inspect", tmp_path / "c")[1].endswith(out)


PRUNED = {"name": "pruned", "options": {"keep": 0.25}}
OPTIONS = [
    ((), {"groups": 1, "residual_codec": PRUNED, "align": "loo", "center": "auto"}),
    ((), {"allocate": "group", "groups_per_rank": 1, "target_bytes": None, "solver": "scipy"}),
    ((), {"center_codec": {"name": "dense", "options": {}}}),
    (("--preset", "paper"), {"align": "pot", "center": "barycenter", "allocate": "expert"}),
    (("--preset", "paper", "--align", "loo"), {"align": "loo", "center": "barycenter"}),
    (("--allocate", "model", "--groups-per-rank", 2), {"allocate": "model"}),
    (("--groups-per-rank", 2), {"groups_per_rank": 2}),
    (("--target-bytes", "60%"), {"target_bytes": 0.6}),
    (("--max-memory", "30GB"), {"residual_codec": PRUNED}),
    (
        ("--keep", "0.5", "--codec", "low_rank"),
        {"residual_codec": {"name": "low_rank", "options": {"keep": 0.5}}},
    ),
    (
        ("--codec", "low_rank:rank=3", "--center-codec", "low_rank:keep=1"),
        {
            "residual_codec": {"name": "low_rank", "options": {"keep": 0.25, "rank": 3}},
            "center_codec": {"name": "low_rank", "options": {"keep": 1.0}},
        },
    ),
    (("--center", "mean"), {"center": "mean", "align": "none"}),
    (("--center", "barycenter", "--align", "pot"), {"center": "barycenter", "align": "pot"}),
    (("--layers", "last:1", "--dtype", "bfloat16"), {"layers": [1], "dtype": "bfloat16"}),
]


@pytest.mark.parametrize(("arguments", "expected"), OPTIONS)
def test_options_become_settings(family_folder, run, tmp_path, arguments, expected):
    source = family_folder("mixtral")
    assert run("compress", source, tmp_path / "c", "--ep", 1, *arguments)[0] == 0

    settings = json.loads((tmp_path / "c" / "resmoe.json").read_text())["settings"]
    settings |= settings["method"]["options"]
    assert settings | expected == settings


@pytest.mark.parametrize(
    ("arguments", "codec"),
    [
        ((), "pruned"),
        (("--keep", 0.5), "pruned"),
        (("--bits", 2), "quantized"),
        (("--target-bits", 3), "quantized"),
        (("--target-bytes", "60%"), "quantized"),
        (("--target-bytes", "60%", "--codec", "low_rank"), "low_rank"),
        # Methods and budgets that keep entries.
        (("--target-bytes", "60%", "--method", "up"), "pruned"),
        (("--target-bytes", "60%", "--allocate", "model"), "pruned"),
    ],
)
def test_the_codec_follows_from_the_budget(family_folder, run, tmp_path, arguments, codec):
    source = family_folder("mixtral")
    assert run("compress", source, tmp_path / "c", "--ep", 1, *arguments)[0] == 0

    settings = json.loads((tmp_path / "c" / "resmoe.json").read_text())["settings"]
    assert settings["residual_codec"]["name"] == codec


@pytest.mark.slow
def test_calibration_weights_errors_by_activations(embedded_source, run, tmp_path):
    text = tmp_path / "text.py"
    text.write_text("def compress(source, output):\n    return source.read()\n" * 20)

    code, out, err = run(
        "compress", embedded_source, tmp_path / "c", "--ep", 4, "--calibration", text
    )

    assert (code, err) == (0, "")
    assert "weighted" in out
    index = json.loads((tmp_path / "c" / "resmoe.json").read_text())
    assert len(index["settings"]["calibration"]) == 64
    for layer in index["layers"]:
        for group in layer["groups"]:
            errors, norms = group["weighted_squared_errors"], group["weighted_squared_norms"]
            assert all(0 < e < 0.1 * n for e, n in zip(errors, norms, strict=True))


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    """readers(family): a random model with a tokenizer."""
    from resmoe_dist.testing.corpus import VOCABULARY_SIZE, byte_tokenizer

    def make(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        save_family(FAMILIES[family], folder, vocab_size=VOCABULARY_SIZE, num_hidden_layers=3)
        byte_tokenizer("left").save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_refitted_routers_are_shown_with_their_agreement(readers, run, tmp_path, family):
    source, text = readers(family), tmp_path / "text.py"
    text.write_text("def compress(source, output):\n    return source.read()\n" * 20)
    options = ("--ep", 2, "--calibration", text, "--recalibrate-router")

    code, out, err = run("compress", source, tmp_path / "c", *options)

    assert (code, err) == (0, "")
    index = json.loads((tmp_path / "c" / "resmoe.json").read_text())
    header, _, first, *others, total = out.splitlines()[:6]
    assert "  routing  " in header and "→" not in first
    routers = [layer["router"] for layer in index["layers"][1:]]
    for line, router in zip(others, routers, strict=True):
        before, after = router["agreement_before"], router["agreement_after"]
        assert f"{before:.1%} → {after:.1%}" in line
    means = [
        sum(router[f"agreement_{when}"] for router in routers) / 2 for when in ("before", "after")
    ]
    assert f"{means[0]:.1%} → {means[1]:.1%}" in total
    assert run("inspect", tmp_path / "c", "--json", tmp_path / "i.json")[1].endswith(out)
    described = json.loads((tmp_path / "i.json").read_text())
    assert [layer["router"] for layer in described["layers"]] == [None, *routers]
    assert run("verify", tmp_path / "c")[0] == 0
    assert run("compress", source, tmp_path / "c", *options, "--resume") == (0, out, "")


def test_routers_are_refitted_with_a_calibration_alone(family_folder, run, tmp_path):
    outcome = run(
        "compress", family_folder("mixtral"), tmp_path / "c", "--ep", 2, "--recalibrate-router"
    )
    assert_mistake(outcome, "--recalibrate-router: needs --calibration TEXT")
    assert names_in(tmp_path) == set()


def test_routers_of_fewer_experts_are_not_refitted(readers, run, tmp_path):
    text = tmp_path / "text.py"
    text.write_text("import os\n" * 20)
    outcome = run(
        *("compress", readers("mixtral"), tmp_path / "c", "--ep", 1, "--method", "reap"),
        *("--keep", 0.5, "--calibration", text, "--recalibrate-router"),
    )
    assert_mistake(outcome, "--recalibrate-router: --method reap stores other experts")
    assert names_in(tmp_path) == {"text.py"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--ep", 0), "--ep 0: must be 1 or more"),
        (("--ep", 3), "--ep 3: model.layers.0.mlp.experts has 4 experts"),
        (("--ep", 2, "--keep", 0), "--keep 0.0: must lie in (0, 1]"),
        (("--ep", 2, "--groups-per-rank", 3), "--groups-per-rank 3: a rank has 2 experts"),
        (
            ("--ep", 2, "--target-bytes", "0.3", "--codec", "pruned"),
            "--target-bytes 0.3: centres, indices",
        ),
        (("--ep", 2, "--target-bytes", "0.01"), "--target-bytes 0.01: one bit per entry"),
        (("--ep", 2, "--max-memory", "much"), "--max-memory much: not a size"),
        (("--ep", 2, "--max-memory", "1MB"), "--max-memory: a group of 2 experts takes"),
        (("--ep", 2, "--codec", "low_rank", "--allocate", "model"), "--allocate model: needs"),
        (("--ep", 2, "--codec", "low_rank", "--allocate", "block"), "--allocate block: needs"),
        (("--ep", 2, "--keep", 0.01, "--allocate", "block"), "--allocate block: --keep 0.01"),
        (("--ep", 2, "--calibration", "nowhere"), "no tokenizer could be loaded"),
        (("--ep", 2, "--keep", "nan"), "--keep nan: must lie in (0, 1]"),
        (("--ep", 2, "--layers", "many"), "--layers many: not understood"),
        (("--ep", 2, "--layers", "2"), "--layers 2: this model has 2 MoE layers, 0 to 1"),
        (("--ep", 2, "--center", "mean", "--align", "loo"), "drop --align loo"),
    ],
)
def test_invalid_options_are_refused(family_folder, run, tmp_path, arguments, text):
    outcome = run("compress", family_folder("mixtral"), tmp_path / "c", *arguments)
    assert_mistake(outcome, text)
    assert names_in(tmp_path) == set()


def test_a_missing_source_is_refused(run, tmp_path):
    outcome = run("compress", tmp_path / "none", tmp_path / "c", "--ep", 2)
    assert_mistake(outcome, f"{tmp_path}/none: no such folder")
    assert names_in(tmp_path) == set()


def test_an_existing_output_folder_is_refused(family_folder, run, pristine):
    outcome = run("compress", family_folder("mixtral"), pristine, "--ep", 2)
    assert_mistake(outcome, f"{pristine}: exists already")


def test_a_compressed_source_is_refused(run, pristine, tmp_path):
    outcome = run("compress", pristine, tmp_path / "c", "--ep", 2)
    assert_mistake(outcome, f"{pristine}: compressed already")


def test_resume_needs_the_same_options(family_folder, run, tmp_path):
    source = family_folder("mixtral")
    (tmp_path / "c.partial").mkdir()
    assert_mistake(
        run("compress", source, tmp_path / "c", "--ep", 2), "continue it with --resume or remove it"
    )
    (tmp_path / "c.partial").rmdir()
    # On a finished folder --resume only reports; with other options it refuses.
    first = run("compress", source, tmp_path / "c", "--ep", 2, "--resume")
    assert first[0] == 0
    assert run("compress", source, tmp_path / "c", "--ep", 2, "--resume") == first
    assert_mistake(
        run("compress", source, tmp_path / "c", "--ep", 2, "--keep", 0.5, "--resume"),
        "was made with other options",
    )
