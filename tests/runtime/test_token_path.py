"""The path of a token, as docs/how-it-works.md lists it: a forward pass enters no other files."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

import resmoe_dist
from resmoe_dist.runtime.loading import load_model
from resmoe_dist.runtime.planning import execution_for
from tests.models import compress

PACKAGE = Path(resmoe_dist.__file__).parent
DOCUMENT = PACKAGE.parent / "docs" / "how-it-works.md"


def documented_path() -> set[str]:
    """Python files of the numbered list, relative to the repository."""
    text = DOCUMENT.read_text()
    section = text.partition("\n## The path of a token")[2].partition("\n## ")[0]
    entries = re.split(r"^\d+\. ", section, flags=re.MULTILINE)[1:]
    return {re.search(r"\(\.\./([^)]+)\)", entry)[1] for entry in entries}


def entered_files(action) -> set[str]:
    """Files of the package whose functions run during `action`."""
    entered = set()

    def note(frame, event, argument):
        path = Path(frame.f_code.co_filename)
        if event == "call" and PACKAGE in path.parents:
            entered.add(str(path.relative_to(PACKAGE.parent)))

    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
    return entered


def test_a_forward_pass_stays_within_the_documented_path(family_folder, tmp_path):
    compress(family_folder("mixtral"), tmp_path / "c", groups=1)
    model = load_model(tmp_path / "c", execution=execution_for("shared"))
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        model(ids)  # what is prepared once

        entered = entered_files(lambda: model(ids))

    documented = documented_path()
    assert len(documented) <= 10
    assert "resmoe_dist/kernels/cpu/backend.py" in entered
    assert entered <= documented
