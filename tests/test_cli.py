"""The `resmoe-dist` command: what it prints, its exit codes, and mistakes in a single line.

Most run the command inside this process; a few start it as a user does.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from resmoe_dist import __version__, cli
from resmoe_dist.parallel import launcher
from tests.checkpoints.damage import (
    bytes_by_tensor,
    copy_of,
    edit_tensors,
    edit_text,
    flip_byte_of,
    names_in,
)
from tests.models import compress

COMMAND = Path(sys.executable).parent / "resmoe-dist"
GROUP = "resmoe-00001-of-00002-group-000.safetensors"
EXPERT = "model.layers.0.block_sparse_moe.experts.3.w2.weight"


@pytest.fixture(scope="module")
def compressed(family_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "c"
    compress(family_folder("mixtral"), folder, groups=2)
    return folder


@pytest.fixture
def run(monkeypatch, capfd):
    """run(*arguments): exit code, standard output and standard error of the command, run here."""

    def leave(code):
        raise SystemExit(code)

    # Failing processes leave by os._exit, which pytest would not survive.
    monkeypatch.setattr(launcher, "_leave", leave)

    def run_here(*arguments):
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return left.value.code, out, err

    return run_here


def _start(*arguments):
    """The same from the installed command in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [str(COMMAND), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    return done.returncode, done.stdout, done.stderr


def _assert_mistake(outcome, text):
    code, out, err = outcome
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert text in err


# As a user starts it


@pytest.mark.slow
def test_compress_verify_and_restore_as_a_user_starts_them(family_folder, tmp_path):
    source = family_folder("mixtral")

    code, out, err = _start("compress", source, tmp_path / "c", "--ep", 2)
    assert (code, err) == (0, "")
    assert "model.layers.1.mlp.experts" in out
    assert _start("verify", tmp_path / "c") == (0, f"{tmp_path}/c: all 7 files are whole\n", "")
    code, out, err = _start("restore", tmp_path / "c", tmp_path / "d")
    assert (code, out, err) == (0, f"{tmp_path}/d: dense model written\n", "")
    assert names_in(tmp_path) == {"c", "d"}


@pytest.mark.slow
def test_mistake_as_a_user_meets_it(family_folder, tmp_path):
    source = copy_of(family_folder("mixtral"), tmp_path / "source")
    edit_tensors(source / "model.safetensors", lambda t: t[EXPERT][0, 0].fill_(math.nan))

    outcome = _start("compress", source, tmp_path / "c", "--ep", 2)

    _assert_mistake(outcome, f"{source}/model.safetensors: tensor '{EXPERT}' holds NaN")
    assert names_in(tmp_path) == {"source"}


# compress


def test_compress_reports_what_inspect_reports(family_folder, run, tmp_path):
    code, out, err = run("compress", family_folder("mixtral"), tmp_path / "c", "--ep", 2)
    assert (code, err) == (0, "")
    assert run("inspect", tmp_path / "c")[1].endswith(out)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), {"groups": 1, "keep": 0.25, "codec": "pruned", "align": "loo", "center": "auto"}),
        ((), {"allocate": "group", "groups_per_rank": 1, "target_bytes": None, "solver": "scipy"}),
        (
            ("--preset", "paper"),
            {"align": "pot", "center": "barycenter", "allocate": "expert"},
        ),
        (("--preset", "paper", "--align", "loo"), {"align": "loo", "center": "barycenter"}),
        (("--allocate", "model", "--groups-per-rank", 2), {"allocate": "model"}),
        (("--groups-per-rank", 2), {"groups_per_rank": 2}),
        (("--target-bytes", "60%"), {"target_bytes": 0.6}),
        (("--max-memory", "30GB"), {"keep": 0.25}),
        (("--keep", "0.5", "--codec", "low_rank"), {"keep": 0.5, "codec": "low_rank"}),
        (("--center", "mean"), {"center": "mean", "align": "none"}),
        (("--center", "barycenter", "--align", "pot"), {"center": "barycenter", "align": "pot"}),
        (("--layers", "last:1", "--dtype", "bfloat16"), {"layers": [1], "dtype": "bfloat16"}),
    ],
)
def test_options_become_settings(family_folder, run, tmp_path, arguments, expected):
    source = family_folder("mixtral")
    assert run("compress", source, tmp_path / "c", "--ep", 1, *arguments)[0] == 0

    settings = json.loads((tmp_path / "c" / "resmoe.json").read_text())["settings"]
    assert settings | expected == settings


@pytest.mark.slow
def test_compress_weighs_errors_by_what_a_text_activates(embedded_source, run, tmp_path):
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


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--ep", 0), "--ep 0: must be 1 or more"),
        (("--ep", 3), "--ep 3: model.layers.0.mlp.experts has 4 experts"),
        (("--ep", 2, "--keep", 0), "--keep 0.0: must lie in (0, 1]"),
        (("--ep", 2, "--groups-per-rank", 3), "--groups-per-rank 3: a rank has 2 experts"),
        (("--ep", 2, "--target-bytes", "0.3"), "--target-bytes 0.3: centres, indices"),
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
def test_compress_options_that_cannot_be(family_folder, run, tmp_path, arguments, text):
    outcome = run("compress", family_folder("mixtral"), tmp_path / "c", *arguments)
    _assert_mistake(outcome, text)
    assert names_in(tmp_path) == set()


def test_compress_from_nowhere(run, tmp_path):
    outcome = run("compress", tmp_path / "none", tmp_path / "c", "--ep", 2)
    _assert_mistake(outcome, f"{tmp_path}/none: no such folder")
    assert names_in(tmp_path) == set()


def test_compress_to_a_folder_that_exists(family_folder, run, compressed):
    outcome = run("compress", family_folder("mixtral"), compressed, "--ep", 2)
    _assert_mistake(outcome, f"{compressed}: exists already")


def test_compress_what_is_compressed(run, compressed, tmp_path):
    outcome = run("compress", compressed, tmp_path / "c", "--ep", 2)
    _assert_mistake(outcome, f"{compressed}: compressed already")


def test_compress_resume(family_folder, run, tmp_path):
    source = family_folder("mixtral")
    (tmp_path / "c.partial").mkdir()
    _assert_mistake(
        run("compress", source, tmp_path / "c", "--ep", 2), "continue it with --resume or remove it"
    )
    (tmp_path / "c.partial").rmdir()
    # On a finished folder --resume only reports; with other options it refuses.
    first = run("compress", source, tmp_path / "c", "--ep", 2, "--resume")
    assert first[0] == 0
    assert run("compress", source, tmp_path / "c", "--ep", 2, "--resume") == first
    _assert_mistake(
        run("compress", source, tmp_path / "c", "--ep", 2, "--keep", 0.5, "--resume"),
        "was made with other options",
    )


# inspect


def test_inspect_writes_json_that_adds_up(run, compressed, tmp_path):
    assert run("inspect", compressed, "--json", tmp_path / "i.json")[0] == 0

    found = json.loads((tmp_path / "i.json").read_text())
    files = {p.name: sum(bytes_by_tensor(p).values()) for p in compressed.glob("*.safetensors")}
    experts = sum(size for name, size in files.items() if name.startswith("resmoe-"))
    total = found["experts"]
    assert sum(layer["stored_bytes"] for layer in found["layers"]) == experts
    assert total["center_bytes"] + total["value_bytes"] + total["index_bytes"] == experts
    assert found["other_bytes"] + experts == found["total_bytes"] == sum(files.values())


def test_inspect_of_what_is_not_compressed(run, family_folder):
    _assert_mistake(run("inspect", family_folder("mixtral")), "no resmoe.json here")


def test_inspect_of_a_damaged_folder(run, compressed, tmp_path):
    folder = copy_of(compressed, tmp_path / "c")
    (folder / GROUP).unlink()
    _assert_mistake(run("inspect", folder), f"{folder / GROUP}: this file is missing")


def test_inspect_json_where_nothing_can_be_written(run, compressed, tmp_path):
    code, _, err = run("inspect", compressed, "--json", tmp_path / "none" / "i.json")
    assert code == 2
    assert err == f"error: {tmp_path}/none/i.json: cannot be written (No such file or directory)\n"


# verify


def test_verify_names_every_bad_file_and_exits_1(run, compressed, tmp_path):
    folder = copy_of(compressed, tmp_path / "c")
    second = GROUP.replace("group-000", "group-001")
    flip_byte_of(folder / GROUP, "experts.0.values", 3)
    flip_byte_of(folder / second, "experts.2.bitmap", 3)

    code, out, err = run("verify", folder)

    assert (code, err) == (1, "")
    assert [line.split(":")[0] for line in out.splitlines()] == [GROUP, second]


def test_verify_of_a_newer_format(run, compressed, tmp_path):
    folder = copy_of(compressed, tmp_path / "c")
    edit_text(folder / "resmoe.json", '{"format_version": 99}')
    _assert_mistake(run("verify", folder), "upgrade resmoe-dist")


# restore


def test_restore_to_a_folder_that_exists(run, compressed, tmp_path):
    _assert_mistake(run("restore", compressed, tmp_path), f"{tmp_path}: exists already")
    assert names_in(tmp_path) == set()


def test_restore_of_a_damaged_folder_leaves_nothing(run, compressed, tmp_path):
    folder = copy_of(compressed, tmp_path / "c")
    flip_byte_of(folder / GROUP, "experts.1.bitmap", 3)
    _assert_mistake(run("restore", folder, tmp_path / "d"), f"{folder / GROUP}: damaged")
    assert names_in(tmp_path) == {"c"}


# evaluate


def test_evaluate_prints_and_writes_the_same(run, compressed, tmp_path):
    edit_text(tmp_path / "ids.json", "[[3, 4, 5, 6], [7, 8]]")
    arguments = ("--token-ids", tmp_path / "ids.json", "--json", tmp_path / "e.json")
    code, out, err = run("evaluate", compressed, *arguments)

    assert (code, err) == (0, "")
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["tokens"] == 4
    assert found["perplexity"] == pytest.approx(math.exp(found["nll"]))
    assert out == f"perplexity {found['perplexity']:.6g}  nll {found['nll']:.6g}  tokens 4\n"


@pytest.mark.parametrize(
    ("option", "content", "text"),
    [
        ("--token-ids", "{cut", "not a readable JSON file"),
        ("--token-ids", "[]", "must be a JSON list of sequences"),
        ("--token-ids", "[[3]]", "sequence 0 must be a list of two or more token ids"),
        ("--token-ids", "[[3, 4], [5, 64]]", "sequence 1 has token id 64, the model's end at 63"),
        ("--token-ids", None, "not a readable JSON file"),
        ("--text", "some text", "no tokenizer could be loaded"),
    ],
)
def test_evaluate_of_what_cannot_be_scored(run, compressed, tmp_path, option, content, text):
    if content is not None:
        edit_text(tmp_path / "input", content)
    _assert_mistake(run("evaluate", compressed, option, tmp_path / "input"), text)


def test_evaluate_reads_its_input_before_it_loads_the_model(run, compressed, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "load_model", lambda *args, **kwargs: pytest.fail("loaded"))
    outcome = run("evaluate", compressed, "--token-ids", tmp_path / "none")
    _assert_mistake(outcome, "not a readable JSON file")


def test_evaluate_context_of_one(run, compressed, tmp_path):
    outcome = run("evaluate", compressed, "--text", tmp_path / "text", "--context", 1)
    _assert_mistake(outcome, "--context 1: must be 2 or more")


def test_evaluate_of_nothing(run, tmp_path):
    edit_text(tmp_path / "ids.json", "[[3, 4]]")
    outcome = run("evaluate", tmp_path / "none", "--token-ids", tmp_path / "ids.json")
    _assert_mistake(outcome, f"{tmp_path}/none: no such folder")


# The command itself


def test_version(run):
    assert run("--version") == (0, f"resmoe-dist {__version__}\n", "")


@pytest.mark.parametrize("arguments", [(), ("squeeze",), ("compress",), ("evaluate", "x")])
def test_usage_errors_exit_2(run, arguments):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("usage: resmoe-dist")


def test_bug_shows_its_traceback_and_exits_1(run, monkeypatch, compressed):
    def crash(checkpoint):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(cli, "describe", crash)
    code, _, err = run("inspect", compressed)
    assert code == 1
    assert "Traceback" in err
    assert "ZeroDivisionError: a bug" in err
