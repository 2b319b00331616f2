"""Random damage to model folders: a result or one line, and no changed result goes unnoticed.

`python -m tests.fuzzing` checks as many mutations as one wants.
"""

from __future__ import annotations

import pytest

from tests.checkpoints.damage import copy_of
from tests.fuzzing import CompressedFolder, FaultError, SourceFolder, attempt
from tests.mutations import mutate


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [(CompressedFolder, 120), (SourceFolder, 40)])
def test_damage_ends_in_one_line_or_is_noticed(kind, count, tmp_path):
    folder = kind(tmp_path)

    outcomes = {folder.check(seed) for seed in range(count)}

    assert len(outcomes) > 1  # not all mutations are alike


def test_a_seed_names_one_mutation(pristine, tmp_path):
    said, content = [], []
    for name in ("a", "b"):
        folder = copy_of(pristine, tmp_path / name)
        said.append(mutate(folder, 11))
        content.append({p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()})

    assert said[0] == said[1]
    assert content[0] == content[1]


@pytest.mark.parametrize("error", [KeyError("x"), RecursionError(), AssertionError()])
def test_other_exceptions_are_failures(error):
    def fail():
        raise error

    with pytest.raises(FaultError, match="Traceback"):
        attempt("work", fail)
