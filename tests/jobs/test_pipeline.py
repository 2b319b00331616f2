"""A compress run from end to end: what it refuses, what it leaves, and its bytes."""

from __future__ import annotations

import errno
import math
import os
import re
import resource
import shutil
import subprocess

import pytest
import torch

from resmoe_dist import load_model
from resmoe_dist.checkpoints import tensor_files
from resmoe_dist.errors import UserError
from resmoe_dist.jobs import model_files, pipeline
from tests.checkpoints.damage import (
    bytes_by_tensor,
    copy_of,
    edit_tensors,
    mistake,
    names_in,
)
from tests.jobs.runs import GROUP_FILES, contents, finished_in, run
from tests.models import FAMILIES, dense_model, save_family

pytestmark = pytest.mark.usefixtures("one_thread")


def _mixtral(folder, dtype, **sizes):
    save_family(FAMILIES["mixtral"], folder, **sizes)
    if dtype != torch.float32:
        model = dense_model(folder).to(dtype)
        shutil.rmtree(folder)
        model.save_pretrained(folder)
    return folder


KEPT = "finished work is kept, run again with --resume"

SIZES = {
    "odd": {"hidden_size": 20, "intermediate_size": 27},
    "even": {"hidden_size": 128, "intermediate_size": 128},
}


@pytest.fixture(scope="module")
def sized(tmp_path_factory):
    """sized(name, dtype): a Mixtral of two layers of four experts."""
    made = {}

    def make(name, dtype):
        if (name, dtype) not in made:
            folder = tmp_path_factory.mktemp(f"{name}-{dtype}") / "source"
            made[name, dtype] = _mixtral(folder, getattr(torch, dtype), **SIZES[name])
        return made[name, dtype]

    return make


# What is refused


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_output_that_exists_is_left_alone(sharded_source, tmp_path, kind):
    if kind == "folder":
        (tmp_path / "c").mkdir()
        (tmp_path / "c" / "precious").touch()
    else:
        (tmp_path / "c").write_text("precious")
    with mistake(f"{tmp_path}/c: exists already; remove it or choose another one"):
        run(sharded_source, tmp_path / "c")
    assert names_in(tmp_path) == {"c"}
    if kind == "folder":
        assert names_in(tmp_path / "c") == {"precious"}


@pytest.mark.parametrize("output", [".", "..", "/"])
def test_output_path_without_a_final_name(sharded_source, tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    with mistake("exists already; remove it or choose another one"):
        run(sharded_source, pipeline.Path(output))
    assert names_in(tmp_path) == set()


def test_output_below_a_file(sharded_source, tmp_path):
    (tmp_path / "file").touch()
    with mistake(f"{tmp_path}/file/c.partial: cannot be made"):
        run(sharded_source, tmp_path / "file" / "c")
    assert names_in(tmp_path) == {"file"}


def test_output_that_appears_while_the_run_is_on(sharded_source, expected, tmp_path, monkeypatch):
    write_index = model_files.write_index

    def write_and_interfere(folder, index):
        write_index(folder, index)
        (tmp_path / "c").mkdir()
        (tmp_path / "c" / "precious").touch()

    with monkeypatch.context() as patch, mistake(f"{tmp_path}/c: cannot be made .*{KEPT}"):
        patch.setattr(model_files, "write_index", write_and_interfere)
        run(sharded_source, tmp_path / "c")
    assert names_in(tmp_path / "c") == {"precious"}

    # The work is not lost: with that out of the way it needs no more than a name.
    shutil.rmtree(tmp_path / "c")
    run(sharded_source, tmp_path / "c", resume=True)
    assert contents(tmp_path / "c") == expected
    assert names_in(tmp_path) == {"c"}


@pytest.mark.parametrize("fused", [False, True])
def test_not_a_number_in_the_last_expert_leaves_nothing(family_folder, tmp_path, fused):
    harmed = copy_of(family_folder("mixtral", fused), tmp_path / "source")
    name = (
        "model.layers.1.mlp.experts.down_proj"
        if fused
        else ("model.layers.1.block_sparse_moe.experts.3.w2.weight")
    )

    def harm(tensors):
        (tensors[name][3] if fused else tensors[name])[0, 0] = math.nan

    edit_tensors(harmed / "model.safetensors", harm)
    tensor = re.escape(f"{name}[3]" if fused else name)
    with mistake(f"{harmed}/model.safetensors: tensor '{tensor}' holds NaN or infinite values"):
        run(harmed, tmp_path / "c")
    assert names_in(tmp_path) == {"source"}


# A full disk


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(limit): a folder on a tmpfs with that limit, such as size=64k or nr_inodes=9."""
    mounted = []

    def make(limit):
        folder = tmp_path / limit
        folder.mkdir()
        try:
            command = ["mount", "-t", "tmpfs", "-o", limit, "tmpfs", str(folder)]
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("mounting a small file system is not permitted here")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_disk_that_fills_up_at_any_moment_loses_no_finished_work(
    sharded_source, expected, small_disk
):
    page, pages = resource.getpagesize(), _pages(expected)
    limits = [(f"size={n * page}", f"size={2 * pages * page}") for n in range(1, pages, 3)]
    # A file system can also run out of files; the folders themselves count.
    limits += [(f"nr_inodes={n}", "nr_inodes=99") for n in range(2, len(expected) + 6)]
    kept = []
    for limit, enough in limits:
        disk = small_disk(limit)
        with pytest.raises(UserError, match=f"{disk}.*: the disk is full; free some") as caught:
            run(sharded_source, disk / "c")
        if KEPT not in str(caught.value):
            assert names_in(disk) == set(), limit
            continue
        kept.append(len(finished_in(disk / "c")))
        subprocess.run(["mount", "-o", f"remount,{enough}", str(disk)], check=True)
        run(sharded_source, disk / "c", resume=True)
        assert contents(disk / "c") == expected, limit
        assert names_in(disk) == {"c"}
    assert set(kept) == set(range(1, 7))


def test_disk_with_just_enough_room_is_enough(sharded_source, expected, small_disk):
    # Beside the result, for a while: the settings of the run, and whose it is.
    disk = small_disk(f"size={(_pages(expected) + 2) * resource.getpagesize()}")
    run(sharded_source, disk / "c")
    assert contents(disk / "c") == expected


def _pages(contents):
    """Of a tmpfs, which keeps each file in whole pages."""
    return sum(-(-len(content) // resource.getpagesize()) for content in contents.values())


@pytest.mark.parametrize("number", range(0, 13, 2))
def test_any_write_that_finds_no_space_keeps_what_was_written(
    sharded_source, expected, tmp_path, monkeypatch, number
):
    calls = []
    replace = os.replace

    def full(first, second):
        calls.append(second)
        if len(calls) > number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(first, second)

    with monkeypatch.context() as patch, mistake(f"{tmp_path}/c.partial.*: the disk is full"):
        patch.setattr(tensor_files.os, "replace", full)
        run(sharded_source, tmp_path / "c")
    assert len(calls) == number + 1
    assert names_in(tmp_path) == ({"c.partial"} if number > 1 else set())

    run(sharded_source, tmp_path / "c", resume=number > 1)

    assert contents(tmp_path / "c") == expected


# The same bytes every time


@pytest.mark.parametrize("align", ["loo", "none"])
def test_number_of_threads_changes_no_byte(sized, tmp_path, align):
    for count in (1, 2):
        torch.set_num_threads(count)
        run(sized("even", "float32"), tmp_path / f"{count}", align=align)
    assert contents(tmp_path / "2") == contents(tmp_path / "1")


# What comes along


def test_companion_files_come_along_and_weights_do_not_twice(sharded_source, expected):
    assert set(expected) == {
        *GROUP_FILES,
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "merges.txt",
        "resmoe.json",
    }
    assert expected["tokenizer.json"] == b"{}"


# Bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("keep", [0.25, 0.5])
@pytest.mark.parametrize("center", ["joint", "barycenter"])
def test_pruned_bytes_are_the_designs(sized, tmp_path, size, dtype, keep, center):
    run(sized(size, dtype), tmp_path / "c", keep=keep, center=center)

    rows, columns = SIZES[size]["intermediate_size"], 3 * SIZES[size]["hidden_size"]
    value = {"float32": 4, "bfloat16": 2}[dtype]
    bitmap = rows * math.ceil(columns / 8)
    residual = bitmap + keep * rows * columns * value + (rows + 1) * 4
    group = rows * columns * value + 2 * residual  # one centre, two experts
    for file in GROUP_FILES:
        found = sum(bytes_by_tensor(tmp_path / "c" / file).values())
        assert found == pytest.approx(group, rel=0.03)
        assert found <= group


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("keep", [0.25, 0.5])
def test_low_rank_bytes_are_the_designs(sized, tmp_path, size, dtype, keep):
    run(sized(size, dtype), tmp_path / "c", keep=keep, codec="low_rank")

    rows, columns = SIZES[size]["intermediate_size"], 3 * SIZES[size]["hidden_size"]
    value = {"float32": 4, "bfloat16": 2}[dtype]
    rank = math.floor(keep * rows * columns / (rows + columns))
    group = (rows * columns + 2 * rank * (rows + columns)) * value
    for file in GROUP_FILES:
        assert sum(bytes_by_tensor(tmp_path / "c" / file).values()) == group


def test_stored_dtype_can_be_another_than_the_sources(sharded_source, tmp_path):
    run(sharded_source, tmp_path / "half", dtype="bfloat16")
    run(sharded_source, tmp_path / "full")

    half, full = (bytes_by_tensor(tmp_path / x / GROUP_FILES[0]) for x in ("half", "full"))
    assert half["center.weight"] * 2 == full["center.weight"]
    assert half["experts.0.values"] * 2 == pytest.approx(full["experts.0.values"], rel=0.05)
    assert load_model(tmp_path / "half").dtype == torch.bfloat16


def test_not_a_number_outside_the_experts_leaves_nothing(family_folder, tmp_path):
    harmed = copy_of(family_folder("mixtral"), tmp_path / "source")
    name = "model.layers.1.self_attn.k_proj.weight"
    edit_tensors(harmed / "model.safetensors", lambda tensors: tensors[name][2].fill_(math.nan))

    with mistake(f"{re.escape(name)}' holds NaN"):
        run(harmed, tmp_path / "c")
    assert names_in(tmp_path) == {"source"}


def test_weights_too_large_for_the_stored_dtype_leave_nothing(family_folder, tmp_path):
    large = copy_of(family_folder("mixtral"), tmp_path / "source")
    name = "model.layers.0.block_sparse_moe.experts.2.w1.weight"
    edit_tensors(large / "model.safetensors", lambda tensors: tensors[name][3].fill_(1e6))

    with mistake("too large for torch.float16; choose"):
        run(large, tmp_path / "c", dtype="float16", groups=2)
    assert names_in(tmp_path) == {"source"}
    run(large, tmp_path / "c", dtype="bfloat16", groups=2)
