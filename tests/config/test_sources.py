"""Configurations from files and presets below the command line, and mistakes in files."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from resmoe_dist.config.arguments import parse
from resmoe_dist.config.commands import (
    CompressConfig,
    GridEvaluateConfig,
    InferConfig,
    PlanConfig,
)
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


def test_a_file_may_name_a_preset(tmp_path):
    file = written(tmp_path, "ep: 2\npreset: paper\nalign: none\n")

    below = compress_from("--config", str(file))
    replaced = compress_from("--config", str(file), "--preset", "default")

    assert (below.align, below.center, below.allocate) == ("none", "barycenter", "expert")
    assert (replaced.align, replaced.center, replaced.allocate) == ("none", "auto", "group")


def test_center_mean_drops_the_alignment_of_a_preset():
    config = compress_from("--ep", "2", "--preset", "paper", "--center", "mean")

    assert (config.center, config.align) == ("mean", "none")


KINDS = {"compress": CompressConfig, "evaluate": GridEvaluateConfig}
REQUIRED = {
    CompressConfig: {"source": "s", "output": "o"},
    GridEvaluateConfig: {"model": "m", "text": "t"},
    InferConfig: {},
    PlanConfig: {"model": "m"},
}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_example_configurations_load(path):
    kind = KINDS.get(path.stem.split("-")[0], InferConfig)

    config = build_config(kind, REQUIRED[kind], path)

    for key, value in yaml.safe_load(path.read_text()).items():
        found = getattr(config, key.replace("-", "_"))
        assert found == value or key == "max-memory"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("models/*.json")), ids=lambda path: path.stem)
@pytest.mark.parametrize("kind", [InferConfig, GridEvaluateConfig, PlanConfig])
def test_an_example_of_a_model_serves_every_command_on_a_grid(path, kind):
    file = CONFIGS / f"{path.stem}.yaml"

    config = build_config(kind, REQUIRED[kind] | {"tp": "4"}, file)

    assert (config.ep, config.tp) == (yaml.safe_load(file.read_text())["ep"], 4)


def test_every_preset_loads():
    for name in presets():
        build_config(CompressConfig, SOURCE, preset=name)


@pytest.mark.parametrize(
    ("text", "layers"),
    [("2", "2"), ("[0, 2]", "0,2"), ("0,2", "0,2"), ("8-31", "8-31"), ("last:24", "last:24")],
)
def test_layers_in_a_file_may_be_numbers(tmp_path, text, layers):
    file = written(tmp_path, f"ep: 2\nlayers: {text}\n")

    assert compress_from("--config", str(file)).layers == layers


@pytest.mark.parametrize(
    ("text", "prompts"), [("The lighthouse", ["The lighthouse"]), ("[a, b]", ["a", "b"])]
)
def test_a_file_gives_one_prompt_or_a_list(tmp_path, text, prompts):
    file = written(tmp_path, f"prompt: {text}\n")

    assert parse(InferConfig, "", ["--config", str(file)]).prompt == prompts


def test_a_file_of_comments_gives_nothing(tmp_path):
    file = written(tmp_path, "# keep: 0.5\n")

    assert compress_from("--ep", "2", "--config", str(file)) == compress_from("--ep", "2")


FILES = {
    "unknown key": ("ep: 2\nepp: 3\n", "options.yaml: unknown key 'epp'; choose from"),
    "wrong type": ("ep: [1]\n", "options.yaml: ep: not a whole number"),
    "fraction": ("ep: 2.5\n", "options.yaml: ep 2.5: not a whole number"),
    "truth value as a number": ("ep: yes\n", "options.yaml: ep: YAML reads this value as true"),
    "truth value as a choice": ("align: off\n", "options.yaml: align: YAML reads this value as f"),
    "no truth value": ("ep: 2\nresume: maybe\n", "options.yaml: resume maybe: write true or false"),
    "number as a path": ("ep: 2\ncalibration: 3\n", "options.yaml: calibration 3: not a path"),
    "number as a name": ("ep: 2\ncodec: 3\n", "options.yaml: codec 3: not text; put it in quotes"),
    "two spellings": ("max_memory: 1GB\nmax-memory: 2GB\n", "options.yaml: max-memory is given t"),
    "key given twice": ("keep: 0.5\nep: 2\nkeep: 0.1\n", "keep is given twice; keep one of them"),
    "key that is a list": ("? [ep]\n: 2\n", "not a readable YAML file"),
    "unknown preset": ("preset: best\n", "options.yaml: preset best: choose one of default, p"),
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
