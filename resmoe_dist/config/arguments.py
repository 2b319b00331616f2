"""The command line of a command, generated from its configuration."""

from __future__ import annotations

import argparse
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic.fields import FieldInfo

from resmoe_dist.config.options import CommandConfig, option_of
from resmoe_dist.config.sources import build_config, presets
from resmoe_dist.errors import OptionError, UserError

Config = TypeVar("Config", bound=CommandConfig)


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UserError, so that only one of several ranks reports it."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def parse(
    kind: type[Config], description: str, arguments: Sequence[str] | None = None, **parser: Any
) -> Config:
    """A command's configuration, from its command line and the files that the command line names.

    arguments: `sys.argv` without the program by default. parser: options of `ArgumentParser`. Also
    accepts `--local_rank`, which the `deepspeed` launcher adds to every command line. Raises
    OptionError for whatever the user can correct.
    """
    made = Parser(description=description, **parser)
    made.add_argument("--local_rank", help=argparse.SUPPRESS)
    add_options(made, kind)
    # Intermixed: `compress SOURCE --ep 4 OUTPUT` works although a file may give both folders.
    try:
        args = made.parse_intermixed_args(arguments)
        given = {name: value for name, value in vars(args).items() if name in kind.model_fields}
        return build_config(kind, given, args.config, getattr(args, "preset", None))
    except UserError as error:
        raise OptionError(str(error)) from error


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
        help="YAML file with these options; the command line takes precedence",
    )
    if kind.has_presets:
        parser.add_argument(
            "--preset",
            metavar=f"{{{','.join(presets())}}}",
            help="options from a file of the package; --config and the command line take "
            "precedence. paper: --align pot --center barycenter --allocate expert",
        )


def _choices(field: FieldInfo) -> list[str]:
    """The values of a Literal, also of an optional one."""
    kinds = [field.annotation]
    if typing.get_origin(field.annotation) in (typing.Union, types.UnionType):
        kinds = list(typing.get_args(field.annotation))
    for kind in kinds:
        if typing.get_origin(kind) is typing.Literal:
            return [str(value) for value in typing.get_args(kind)]
    return []
