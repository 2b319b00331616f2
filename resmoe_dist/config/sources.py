"""A configuration from its sources: command line over `--config` file over preset over defaults."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from resmoe_dist.config.options import CommandConfig, option_of
from resmoe_dist.errors import UserError
from resmoe_dist.validation import reason_of

Config = TypeVar("Config", bound=CommandConfig)

_PRESETS = resources.files("resmoe_dist.config") / "presets"


def build_config(
    kind: type[Config],
    command_line: Mapping[str, Any],
    file: Path | None = None,
    preset: str | None = None,
) -> Config:
    """The configuration of a command.

    command_line: the fields that were given there, values as text. file, preset: of `--config` and
    `--preset`; a file may name a preset too. Raises UserError for unknown keys, wrong values, or
    missing fields.
    """
    in_file = {} if file is None else _read(file)
    shown_preset = f"--preset {preset}"
    if kind.has_presets and (named := in_file.pop("preset", None)) is not None and preset is None:
        preset, shown_preset = str(named), f"{file}: preset {named}"
    layers: list[tuple[str | None, dict[str, Any]]] = []
    if preset is not None:
        if preset not in presets():
            raise UserError(f"{shown_preset}: choose one of {', '.join(presets())}")
        layers.append((f"preset {preset}", _fields(kind, f"preset {preset}", _preset(preset))))
    if file is not None:
        layers.append((str(file), _fields(kind, str(file), in_file)))
    layers.append((None, dict(command_line)))
    values: dict[str, Any] = {}
    origin: dict[str, str | None] = {}
    for source, given in layers:
        for members in kind.exclusive_sets().values():
            both = [name for name in members if given.get(name) is not None]
            if len(both) > 1:
                names = " and ".join(kind.shown_name(name) for name in both)
                where = f"{source}: " if source else ""
                raise UserError(f"{where}{names} exclude each other; give one of them")
            if both:
                # What a higher layer gives replaces the whole set.
                values = {k: v for k, v in values.items() if k not in members}
        values |= given
        origin |= dict.fromkeys(given, source)
    _check_required_sets(kind, values)
    try:
        return kind.model_validate(values, context={"preset": _from_preset(origin, preset)})
    except ValidationError as error:
        raise UserError(_message(kind, error.errors()[0], origin)) from None


def presets() -> list[str]:
    """Names of the presets that the package brings along."""
    names = (Path(entry.name) for entry in _PRESETS.iterdir())
    return sorted(name.stem for name in names if name.suffix == ".yaml")


def _preset(name: str) -> dict[str, Any]:
    return yaml.safe_load((_PRESETS / f"{name}.yaml").read_text(encoding="utf-8")) or {}


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice; PyYAML itself takes the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key} is given twice; keep one of them", key_node.start_mark
                )
            if key is not None:
                seen.add(key)
        return super().construct_mapping(node, deep)


def _read(file: Path) -> dict[str, Any]:
    try:
        found = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"--config {file}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file}: not a readable YAML file ({reason})") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise UserError(f"{file}: expected `option: value` lines")
    return found


def _fields(kind: type[CommandConfig], source: str, given: Mapping[Any, Any]) -> dict[str, Any]:
    """Values by field, from keys as users write them (dashes or underscores)."""
    names = {kind.shown_name(name).lstrip("-"): name for name in kind.model_fields}
    fields = {}
    for key, value in given.items():
        written = str(key).replace("_", "-")
        if written not in names:
            raise UserError(f"{source}: unknown key {key!r}; choose from {', '.join(names)}")
        name = names[written]
        if name in fields:
            raise UserError(f"{source}: {written} is given twice; keep one of them")
        if isinstance(value, bool) and kind.model_fields[name].annotation is not bool:
            # YAML reads yes, no, on and off as booleans, and pydantic reads those as 1 and 0.
            raise UserError(
                f"{source}: {written}: YAML reads this value as {str(value).lower()}; "
                "write a number, or put text in quotes"
            )
        fields[name] = value
    return fields


def _check_required_sets(kind: type[CommandConfig], values: Mapping[str, Any]) -> None:
    for members in kind.exclusive_sets().values():
        required = any(option_of(kind.model_fields[name]).required_set for name in members)
        if required and not any(values.get(name) is not None for name in members):
            names = " or ".join(kind.shown_name(name) for name in members)
            raise UserError(f"give {names}")


def _from_preset(origin: Mapping[str, str | None], preset: str | None) -> set[str]:
    """Fields whose value is the preset's."""
    return {name for name, source in origin.items() if preset and source == f"preset {preset}"}


def _message(
    kind: type[CommandConfig], error: ErrorDetails, origin: Mapping[str, str | None]
) -> str:
    """One line of pydantic's first error: what, where, what to do."""
    if not error["loc"]:
        return str(error["msg"]).removeprefix("Value error, ")
    name = str(error["loc"][0])
    shown = kind.shown_name(name)
    if error["type"] == "missing":
        return f"{shown.upper() if not shown.startswith('-') else shown} is missing; see --help"
    source = origin.get(name)
    where = f"{source}: {shown.lstrip('-')}" if source else shown
    value = "" if isinstance(error["input"], list | dict) else f" {error['input']}"
    return f"{where}{value}: {reason_of(error)}"
