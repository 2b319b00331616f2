"""Running the command in this process."""

from __future__ import annotations

import pytest

from resmoe_dist import cli
from resmoe_dist.parallel import entry_point
from tests.cli.commands import Outcome


@pytest.fixture
def run(monkeypatch, capfd):
    """run(*arguments): the outcome of the command, run in this process."""

    def leave(code):
        raise SystemExit(code)

    # Failing processes end by os._exit, which would end pytest.
    monkeypatch.setattr(entry_point, "leave", leave)

    def run_here(*arguments):
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main([str(argument) for argument in arguments])
        return Outcome(left.value.code, *capfd.readouterr())

    return run_here
