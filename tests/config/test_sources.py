"""Configurations from the command line, files and presets, and mistakes in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from resmoe_dist.config.arguments import parse
from resmoe_dist.config.commands import (
    CompressConfig,
    EvaluateConfig,
    GridEvaluateConfig,
    InferConfig,
)
from resmoe_dist.config.options import option_of
from resmoe_dist.config.sources import build_config, presets
from resmoe_dist.errors import UserError
from tests.checkpoints.damage import mistake

CONFIGS = Path(__file__).parents[2] / "configs"
SOURCE = {"source": "s", "output": "o", "ep": "2"}


def compress_from(*arguments: str) -> CompressConfig:
    return parse(CompressConfig, "", [*arguments, "s", "o"])


def written(folder: Path, text: str) -> Path:
    path = folder / "options.yaml"
    path.write_text(text)
    return path


def test_values_of_the_command_line_are_typed():
    config = compress_from("--ep", "2", "--target-bytes", "35%", "--max-memory", "8GB", "--resume")

    assert (config.ep, config.target_bytes, config.max_memory) == (2, 0.35, 8 * 10**9)
    assert config.resume is True
    assert config.source == Path("s")


def test_the_launchers_local_rank_is_accepted():
    assert parse(InferConfig, "", ["--local_rank=3", "--ep", "2"]).ep == 2


def test_a_file_gives_options_and_the_command_line_wins(tmp_path):
    file = written(tmp_path, "ep: 4\nkeep: 0.5\nmax-memory: 8GB\nalign: none\n")

    config = compress_from("--config", str(file), "--keep", "0.125")

    assert (config.ep, config.keep, config.max_memory, config.align) == (
        4,
        0.125,
        8 * 10**9,
        "none",
    )


def test_a_file_may_give_everything(tmp_path):
    file = written(tmp_path, "source: s\noutput: o\nep: 4\nresume: true\n")

    config = parse(CompressConfig, "", ["--config", str(file), "--no-resume"])

    assert (config.source, config.ep, config.resume) == (Path("s"), 4, False)


def test_keys_may_have_dashes_or_underscores(tmp_path):
    for key in ("groups-per-rank", "groups_per_rank"):
        file = written(tmp_path, f"ep: 2\n{key}: 3\n")

        assert compress_from("--config", str(file)).groups_per_rank == 3


def test_an_option_replaces_the_excluded_one_of_a_file(tmp_path):
    file = written(tmp_path, "ep: 2\nkeep: 0.5\n")

    config = compress_from("--config", str(file), "--target-bytes", "0.3")

    assert (config.keep, config.target_bytes) == (None, 0.3)


def test_a_preset_is_below_the_file_and_the_file_below_the_command_line(tmp_path):
    file = written(tmp_path, "ep: 2\nalign: none\n")

    preset = compress_from("--ep", "2", "--preset", "paper")
    both = compress_from("--preset", "paper", "--config", str(file))
    all_three = compress_from("--preset", "paper", "--config", str(file), "--center", "joint")

    assert (preset.align, preset.center, preset.allocate) == ("pot", "barycenter", "expert")
    assert (both.align, both.center) == ("none", "barycenter")
    assert (all_three.align, all_three.center) == ("none", "joint")


def test_the_default_preset_changes_nothing():
    assert compress_from("--ep", "2", "--preset", "default") == compress_from("--ep", "2")


def test_center_mean_drops_the_alignment_of_a_preset():
    config = compress_from("--ep", "2", "--preset", "paper", "--center", "mean")

    assert (config.center, config.align) == ("mean", "none")


def test_prompts_are_collected():
    assert parse(InferConfig, "", ["--prompt", "a", "--prompt", "b"]).prompt == ["a", "b"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_example_configurations_load(path):
    kind = {"compress": CompressConfig, "infer": InferConfig, "evaluate": GridEvaluateConfig}[
        path.stem.split("-")[0]
    ]
    required = {
        "compress": {"source": "s", "output": "o"},
        "infer": {},
        "evaluate": {"model": "m", "text": "t"},
    }[path.stem.split("-")[0]]

    config = build_config(kind, required, path)

    for key, value in yaml.safe_load(path.read_text()).items():
        found = getattr(config, key.replace("-", "_"))
        assert found == value or key == "max-memory"


def test_every_preset_loads():
    for name in presets():
        build_config(CompressConfig, SOURCE, preset=name)


def test_every_field_has_a_help_text():
    for kind in (CompressConfig, InferConfig, GridEvaluateConfig):
        for name, field in kind.model_fields.items():
            assert field.description, name
            assert option_of(field) is not None


MISTAKES = {
    "missing argument": (CompressConfig, ["--ep", "2"], "SOURCE is missing"),
    "missing option": (CompressConfig, ["s", "o"], "--ep is missing"),
    "not a number": (CompressConfig, ["s", "o", "--ep", "x"], "--ep x: not a whole number"),
    "unknown choice": (
        CompressConfig,
        ["s", "o", "--ep", "1", "--align", "best"],
        "--align best: choose one of loo, pot or none",
    ),
    "not a size": (
        CompressConfig,
        ["s", "o", "--ep", "1", "--max-memory", "much"],
        "--max-memory much: not a size; write 8GB or 7500MiB",
    ),
    "not a share": (
        CompressConfig,
        ["s", "o", "--ep", "1", "--target-bytes", "half"],
        "--target-bytes half: not a share",
    ),
    "excluded pair": (
        CompressConfig,
        ["s", "o", "--ep", "1", "--keep", "1", "--target-bytes", "1"],
        "--keep and --target-bytes exclude each other",
    ),
    "no data": (EvaluateConfig, ["m"], "give --text or --token-ids"),
    "context of one": (
        EvaluateConfig,
        ["m", "--text", "t", "--context", "1"],
        "--context 1: must be 2 or more",
    ),
    "temperature of zero": (InferConfig, ["--temperature", "0"], "--temperature 0: must be above"),
    "top-p alone": (InferConfig, ["--top-p", "0.9"], "--top-p 0.9: needs --temperature"),
    "no new tokens": (InferConfig, ["--max-new-tokens", "0"], "--max-new-tokens 0: must be 1"),
    "empty prompt": (InferConfig, ["--prompt", ""], "a prompt is empty"),
    "empty grid": (InferConfig, ["--ep", "0"], "--ep 0 --tp 1: both must be 1 or more"),
    "cache without size": (InferConfig, ["--execution", "cached"], "--cache-size SIZE need each"),
    "size without cache": (InferConfig, ["--cache-size", "1GB"], "--cache-size SIZE need each"),
    "unknown preset": (
        CompressConfig,
        ["s", "o", "--ep", "1", "--preset", "best"],
        "--preset best: choose one of default, paper",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name):
    kind, arguments, text = MISTAKES[name]

    with mistake(text):
        parse(kind, "", arguments)


FILES = {
    "unknown key": ("ep: 2\nepp: 3\n", "options.yaml: unknown key 'epp'; choose from"),
    "wrong type": ("ep: [1]\n", "options.yaml: ep: "),
    "wrong value": ("ep: 2\nalign: best\n", "options.yaml: align best: choose one of"),
    "excluded pair": ("ep: 2\nkeep: 1\ntarget-bytes: 1\n", "options.yaml: --keep and"),
    "not YAML": ("ep: [2\n", "not a readable YAML file"),
    "a list": ("- ep\n", "expected `option: value` lines"),
    "an object": ("ep: !!python/object:os.system {}\n", "not a readable YAML file"),
}


@pytest.mark.parametrize("name", FILES)
def test_mistakes_in_a_file_name_it(tmp_path, name):
    text, message = FILES[name]
    file = written(tmp_path, text)

    with mistake(message):
        compress_from("--config", str(file))


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        compress_from("--config", str(tmp_path / "none.yaml"))
