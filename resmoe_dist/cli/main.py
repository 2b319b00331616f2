"""The `resmoe-dist` command: its subcommands, each imported only when it runs.

`--help` imports neither torch nor transformers nor DeepSpeed.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from resmoe_dist.config import commands
from resmoe_dist.config.arguments import Parser, parse
from resmoe_dist.config.options import CommandConfig
from resmoe_dist.parallel.entry_point import run_entry_point
from resmoe_dist.version import __version__


class Command(NamedTuple):
    """config: its class, whose docstring is the summary. run: module:function, takes the config and
    returns an exit code."""

    config: type[CommandConfig]
    run: str


COMMANDS = {
    "compress": Command(commands.CompressConfig, "resmoe_dist.launch.compress:run_compress"),
    "compare": Command(commands.CompareConfig, "resmoe_dist.comparison.run:run_compare"),
    "plan": Command(commands.PlanConfig, "resmoe_dist.cli.plan:run_plan"),
    "inspect": Command(commands.InspectConfig, "resmoe_dist.cli.checkpoint:run_inspect"),
    "verify": Command(commands.VerifyConfig, "resmoe_dist.cli.checkpoint:run_verify"),
    "restore": Command(commands.RestoreConfig, "resmoe_dist.cli.checkpoint:run_restore"),
    "evaluate": Command(commands.EvaluateConfig, "resmoe_dist.launch.evaluate:run_alone"),
    "tiny-model": Command(commands.TinyModelConfig, "resmoe_dist.cli.tiny_model:run_tiny_model"),
}


def make_parser() -> Parser:
    """The parser of the first argument: a command, --help or --version."""
    parser = Parser(
        prog="resmoe-dist",
        description="Compress Mixture-of-Experts models; plan, inspect, restore and evaluate them.",
        epilog="resmoe-dist COMMAND --help shows the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"resmoe-dist {__version__}")
    added = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        added.add_parser(name, help=command.config.__doc__)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: exit code 0, 1 for a failed check, 2 for invalid input."""
    given = sys.argv[1:] if arguments is None else arguments
    run_entry_point(lambda: run_command(given), alone=given[:1] != ["compress"])


def run_command(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code. arguments: without the program's name."""
    name = make_parser().parse_args(arguments[:1]).command
    command = COMMANDS[name]
    config = parse(
        command.config, command.config.__doc__ or "", arguments[1:], prog=f"resmoe-dist {name}"
    )
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    module, _, function = command.run.partition(":")
    return getattr(import_module(module), function)(config)
