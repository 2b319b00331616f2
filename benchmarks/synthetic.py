"""The synthetic checkpoint that `layer`, `large`, `spread` and `decode` use.

    python -m benchmarks.synthetic DIR --layers 2

See `resmoe_dist.testing.synthetic_model` for its values.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory

from resmoe_dist.parallel.entry_point import run_entry_point
from resmoe_dist.testing.synthetic_model import SyntheticModel


def add_model_arguments(parser: argparse.ArgumentParser, layers: int | None = None) -> None:
    """The options of a synthetic model but `--seed`. layers: the default; None requires it."""
    add = parser.add_argument
    add("--layers", type=int, default=layers, required=layers is None)
    add("--hidden", type=int, default=4096)
    add("--rows", type=int, default=14336, help="intermediate size of each expert")
    add("--experts", type=int, default=8)
    add("--noise", type=float, default=0.5, help="in units of the base; 1000: unrelated experts")


def model_of(args: argparse.Namespace) -> SyntheticModel:
    """The model that `add_model_arguments` and `--seed` describe."""
    names = [field.name for field in fields(SyntheticModel)]
    return SyntheticModel(**{name: getattr(args, name) for name in names})


@contextmanager
def source_and_scratch(args: argparse.Namespace) -> Iterator[tuple[Path, Path]]:
    """The model's folder, kept if `args.source` names it, and a scratch folder on the same disk.

    The usual temporary folder may be in memory.
    """
    beside = args.source.parent if args.source else None
    if beside:
        beside.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=beside) as scratch:
        source = args.source or Path(scratch) / "source"
        model_of(args).ensure_in(source)
        yield source, Path(scratch)


def main() -> None:
    """Entry point."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    add_model_arguments(parser)
    args = parser.parse_args()
    run_entry_point(lambda: model_of(args).write(args.folder))


if __name__ == "__main__":
    main()
