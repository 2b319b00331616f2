"""The command line of a command, generated from its configuration."""

from __future__ import annotations

import argparse
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic.fields import FieldInfo

from resmoe_dist.config.options import CommandConfig, option_of
from resmoe_dist.config.sources import build_config, presets

Config = TypeVar("Config", bound=CommandConfig)

USER_ERROR = 2


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(USER_ERROR)


def add_options(parser: argparse.ArgumentParser, kind: type[CommandConfig]) -> None:
    """One argument for each field of `kind`, `--config` and, if it has presets, `--preset`.

    Values stay text: `build_config` checks them, as it checks those of files.
    """
    for name, field in kind.model_fields.items():
        option, shown = option_of(field), kind.shown_name(name)
        choices = _choices(field)
        metavar = option.metavar or (f"{{{','.join(choices)}}}" if choices else None)
        help_text = (field.description or "").replace("%", "%%")
        if not field.is_required() and field.default not in (None, False):
            help_text += f" (default: {field.default})"
        if option.positional:
            # Optional for argparse, because a file may give it.
            parser.add_argument(
                name, nargs="?", default=argparse.SUPPRESS, metavar=name.upper(), help=help_text
            )
            continue
        common: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": help_text}
        if field.annotation is bool:
            parser.add_argument(shown, action=argparse.BooleanOptionalAction, **common)
        else:
            action = "append" if option.repeatable else "store"
            metavar = metavar or shown.lstrip("-").upper()
            parser.add_argument(shown, action=action, metavar=metavar, **common)
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE.yaml",
        help="YAML options; the command line wins",
    )
    if kind.has_presets:
        parser.add_argument(
            "--preset",
            metavar=f"{{{','.join(presets())}}}",
            help="options from a file of the package; --config and the command line win. "
            "paper: --align pot --center barycenter --allocate expert",
        )


def parsed_config(kind: type[Config], args: argparse.Namespace) -> Config:
    """The configuration from parsed arguments. Raises UserError as `build_config` does."""
    given = {name: value for name, value in vars(args).items() if name in kind.model_fields}
    return build_config(kind, given, args.config, getattr(args, "preset", None))


def parse(
    kind: type[Config], description: str, arguments: Sequence[str] | None = None, **parser: Any
) -> Config:
    """The configuration of a script with one command, from its command line.

    Also accepts `--local_rank`, which the `deepspeed` launcher adds to every command line.
    """
    made = Parser(description=description, **parser)
    made.add_argument("--local_rank", help=argparse.SUPPRESS)
    add_options(made, kind)
    return parsed_config(kind, made.parse_args(arguments))


def _choices(field: FieldInfo) -> list[str]:
    """The values of a Literal, also of an optional one."""
    kinds = [field.annotation]
    if typing.get_origin(field.annotation) in (typing.Union, types.UnionType):
        kinds = list(typing.get_args(field.annotation))
    for kind in kinds:
        if typing.get_origin(kind) is typing.Literal:
            return [str(value) for value in typing.get_args(kind)]
    return []
