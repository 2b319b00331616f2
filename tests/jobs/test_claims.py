"""Claims: each task is taken once, and a run that is over hands out no tasks."""

from __future__ import annotations

import shutil

import pytest

from resmoe_dist.jobs.claims import Claims, ClaimsClosedError
from tests.checkpoints.damage import mistake
from tests.jobs.runs import acquire_staging, before_each_task, run


def test_task_is_taken_once(tmp_path):
    claims = Claims(tmp_path)
    assert claims.take("a-0")
    assert not claims.take("a-0")
    claims.finish("a-0")
    assert not Claims(tmp_path).take("a-0")
    assert claims.take("a-1")
    assert claims.take("b-0")
    claims.finish("b-0")
    assert claims.finished("a-") == {"a-0"}


def test_claims_are_closed_once_and_for_all_ranks(tmp_path):
    (tmp_path / "claims").mkdir()
    claims, others = Claims(tmp_path / "claims"), Claims(tmp_path / "claims")
    assert others.take("a-0")
    assert claims.close()
    assert not others.close()
    with pytest.raises(ClaimsClosedError):
        others.take("a-1")
    others.finish("a-0")
    assert others.finished("a-") == set()


def test_claims_of_a_killed_run_are_separate_from_the_next_run(tmp_path):
    folder, killed = acquire_staging(tmp_path / "c")
    assert killed.take("compressing-0")
    folder.release()

    folder, claims = acquire_staging(tmp_path / "c", resume=True)

    assert len(list(folder.folder.glob("claims-*"))) == 1
    assert claims.take("compressing-0")
    # A rank that survived the killed run takes no task of this run.
    with pytest.raises(ClaimsClosedError):
        killed.take("compressing-1")


@pytest.mark.usefixtures("one_thread")
def test_run_whose_claims_are_gone_fails(sharded_source, tmp_path, monkeypatch):
    def take_over(_):
        for claims in (tmp_path / "c.partial").glob("claims-*"):
            shutil.rmtree(claims)

    before_each_task(monkeypatch, take_over)
    with mistake(
        f"{tmp_path}/c.partial: was removed or taken over while this run was working in it"
    ):
        run(sharded_source, tmp_path / "c")
