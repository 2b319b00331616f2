"""The staging folder: who may enter it, and which of its files are kept."""

from __future__ import annotations

import pytest

from resmoe_dist.jobs.staging import StagingFolder
from tests.checkpoints.damage import mistake, names_in
from tests.jobs.runs import IDENTITY, acquire_staging


def test_resume_of_work_of_another_version_is_refused(tmp_path):
    folder, _ = acquire_staging(tmp_path / "c")
    folder.release()
    with mistake("c.partial: the unfinished run was another version's; remove it to start anew"):
        StagingFolder(tmp_path / "c").acquire(IDENTITY | {"producer": "them"}, resume=True)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("kind", ["file", "broken link"])
def test_file_or_link_in_place_of_the_folder_is_left_alone(tmp_path, kind, resume):
    partial = tmp_path / "c.partial"
    if kind == "file":
        partial.write_text("precious")
    else:
        partial.symlink_to("nowhere")
    with mistake(f"{partial}: (an|the) unfinished run"):
        acquire_staging(tmp_path / "c", resume=resume)
    assert names_in(tmp_path) == {"c.partial"}


def test_scratch_is_kept_for_a_resumed_run_but_not_in_the_output(tmp_path):
    folder, _ = acquire_staging(tmp_path / "c")
    (folder.scratch / "note").touch()
    assert folder.give_up(keep=True)

    folder, _ = acquire_staging(tmp_path / "c", resume=True)
    assert names_in(folder.scratch) == {"note"}
    folder.finish()
    assert names_in(tmp_path / "c") == set()
    assert names_in(tmp_path) == {"c"}
