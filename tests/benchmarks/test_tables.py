"""Tables from declared columns."""

from __future__ import annotations

from benchmarks.tables import spread, table_of
from benchmarks.timing import summary

ROWS = [
    {"name": "a", "size": 2048, "seconds": {"x": summary([0.5]), "y": summary([0.1, 0.2, 0.4])}},
    {"name": "b", "size": None, "seconds": {"x": summary([2.0])}, "share": 0.25},
]


def test_columns_are_formatted_and_missing_values_are_dashes():
    columns = ("case=name", "size:bytes", "dense share=share:.0%")
    assert table_of(ROWS, columns).splitlines() == [
        "case     size  dense share",
        "----  -------  -----------",
        "a     2.0 KiB            -",
        "b           -          25%",
    ]


def test_star_makes_a_column_of_every_key():
    lines = table_of(ROWS, ["case=name", "{} ms=seconds.*:ms"]).splitlines()
    assert lines[0].split() == ["case", "x", "ms", "y", "ms"]
    assert lines[2].split() == ["a", "500", "200", "(100-400)"]
    assert lines[3].split() == ["b", "2000", "-"]


def test_lists_are_names_or_their_number():
    rows = [{"files": []}, {"files": ["a", "b"]}]
    columns = ["files:names", "number=files:count"]
    assert [line.split() for line in table_of(rows, columns).splitlines()[2:]] == [
        ["none", "0"],
        ["a,", "b", "2"],
    ]


def test_spread_of_one_value_is_the_value():
    assert spread(summary([1.2345])) == "1.23"
    assert spread(summary([1.0, 1.2, 130.4])) == "1.2 (1-130)"
