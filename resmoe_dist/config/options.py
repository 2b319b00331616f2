"""A command's configuration as a pydantic model: one field per option.

The model is the only source of an option's name, type, choices, default and help. The command line
(`arguments`) and YAML files (`sources`) both follow from it.

This package must stay cheap to import: `--help` needs nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo


@dataclass(frozen=True)
class Option:
    """How a field looks on the command line.

    name: if it differs from the field's. positional: an argument without a name. metavar:
    placeholder for the value in help. exclusive: name of a set of options of which at most one may
    be given. required_set: whether one of that set must be given. repeatable: the option may be
    given several times and collects a list.
    """

    name: str | None = None
    positional: bool = False
    metavar: str | None = None
    exclusive: str | None = None
    required_set: bool = False
    repeatable: bool = False


def option(
    default: Any = ...,
    help: str = "",
    *,
    name: str | None = None,
    positional: bool = False,
    metavar: str | None = None,
    exclusive: str | None = None,
    required_set: bool = False,
    repeatable: bool = False,
    **constraints: Any,
) -> Any:
    """A field of a command's configuration. constraints: pydantic's (ge, gt, le …)."""
    shown = Option(name, positional, metavar, exclusive, required_set, repeatable)
    extra: dict[str, Any] = {"option": shown}
    return Field(default, description=help, json_schema_extra=extra, **constraints)


def option_of(field: FieldInfo) -> Option:
    """How a field looks on the command line."""
    extra = field.json_schema_extra
    return extra["option"] if isinstance(extra, dict) else Option()  # type: ignore[return-value]


class CommandConfig(BaseModel):
    """Base of all commands' configurations."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # Whether `--preset` names a file of options that the package brings along.
    has_presets: ClassVar[bool] = False

    @classmethod
    def exclusive_sets(cls) -> dict[str, list[str]]:
        """Fields of which at most one may be given, by the name of the set."""
        sets: dict[str, list[str]] = {}
        for name, field in cls.model_fields.items():
            if exclusive := option_of(field).exclusive:
                sets.setdefault(exclusive, []).append(name)
        return sets

    @classmethod
    def shown_name(cls, name: str) -> str:
        """A field's name as users write it: `--max-memory`, or `source` for a positional one."""
        shown = option_of(cls.model_fields[name])
        written = (shown.name or name).replace("_", "-")
        return written if shown.positional else f"--{written}"
