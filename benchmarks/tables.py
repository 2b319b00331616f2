"""Tables of a benchmark's results, from a declaration of their columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.timing import Summary
from resmoe_dist.evaluation.tables import human_bytes, text_table

Row = dict[str, Any]


def table_of(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Rows as a text table.

    columns: `header=path:format`. A path is a key, or keys of nested dicts with dots between them;
    with `*` for the last key, every key gets a column, and replaces {} in the header. The header
    defaults to the path. Formats: `s` and `ms` (a summary of seconds), `bytes`, `GB/s`, `names` and
    `count` (of a list), or as the built-in `format` takes them. Missing values are `-`.
    """
    paths: dict[str, tuple[list[str], str]] = {}
    for column in columns:
        header, _, source = column.rpartition("=")
        path, _, kind = source.partition(":")
        header = header or path.replace("_", " ")
        *parents, last = path.split(".")
        keys = [last]
        if last == "*":
            keys = list(dict.fromkeys(key for row in rows for key in _value(row, parents)))
        paths |= {header.replace("{}", key): ([*parents, key], kind) for key in keys}
    values = [[_value(row, path) for path, _ in paths.values()] for row in rows]
    kinds = [kind for _, kind in paths.values()]
    cells = [[_cell(v, k) for v, k in zip(line, kinds, strict=True)] for line in values]
    # Names to the left, figures to the right.
    names = [isinstance(value, str) for value in values[0]]
    return text_table(list(paths), cells, left=(*names, False).index(False) or 1)


def spread(found: Summary, scale: float = 1) -> str:
    """A summary as text: `1.2 (1.18-1.31)`; of one value only the value."""
    median, least, most = (_digits(scale * found[key]) for key in ("median", "least", "most"))
    return median if len(found["all"]) == 1 else f"{median} ({least}-{most})"


_FORMATS: dict[str, Callable[[Any], str]] = {
    "": str,
    "s": spread,
    "ms": lambda found: spread(found, 1000),
    "bytes": human_bytes,
    "GB/s": lambda rate: f"{rate / 1e9:.1f}",
    "names": lambda names: ", ".join(names) or "none",
    "count": lambda names: str(len(names)),
}


def _cell(value: Any, kind: str) -> str:
    if value is None:
        return "-"
    return _FORMATS[kind](value) if kind in _FORMATS else format(value, kind)


def _value(row: Row, path: Sequence[str]) -> Any:
    value: Any = row
    for key in path:
        value = None if value is None else value.get(key)
    return value


def _digits(number: float) -> str:
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:.3g}"
