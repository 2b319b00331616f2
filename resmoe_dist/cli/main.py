"""The `resmoe-dist` command: its subcommands, each imported only when it runs.

`--help` imports neither torch nor transformers nor DeepSpeed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from resmoe_dist.config import commands
from resmoe_dist.config.arguments import Parser, add_options, parsed_config
from resmoe_dist.config.options import CommandConfig
from resmoe_dist.version import __version__


class Command(NamedTuple):
    """config: its class, whose docstring is the summary. run: module:function, takes the config and
    returns an exit code."""

    config: type[CommandConfig]
    run: str


COMMANDS = {
    "compress": Command(commands.CompressConfig, "resmoe_dist.launch.compress:run_compress"),
    "inspect": Command(commands.InspectConfig, "resmoe_dist.cli.checkpoint:run_inspect"),
    "verify": Command(commands.VerifyConfig, "resmoe_dist.cli.checkpoint:run_verify"),
    "restore": Command(commands.RestoreConfig, "resmoe_dist.cli.checkpoint:run_restore"),
    "evaluate": Command(commands.EvaluateConfig, "resmoe_dist.launch.evaluate:run_alone"),
    "tiny-model": Command(commands.TinyModelConfig, "resmoe_dist.cli.tiny_model:run_tiny_model"),
}


def make_parser() -> Parser:
    """The parser of the whole command."""
    parser = Parser(
        prog="resmoe-dist",
        description="Compress Mixture-of-Experts models, and look at, restore and evaluate them.",
    )
    parser.add_argument("--version", action="version", version=f"resmoe-dist {__version__}")
    added = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        summary = command.config.__doc__
        add_options(added.add_parser(name, help=summary, description=summary), command.config)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: exit code 0, 1 for a failed check, 2 for invalid input."""
    args = make_parser().parse_args(arguments)
    command = COMMANDS[args.command]
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # Imported here: they take seconds, which `--help` should not.
    from resmoe_dist.parallel.entry_point import quiet_libraries, run_entry_point

    quiet_libraries()

    def run() -> int | None:
        config = parsed_config(command.config, args)
        module, _, function = command.run.partition(":")
        return getattr(import_module(module), function)(config)

    run_entry_point(run)
