"""A compress run from end to end: what it refuses, what it leaves, resuming, and its bytes."""

from __future__ import annotations

import errno
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess

import pytest
import torch

from resmoe_dist import load_model
from resmoe_dist.checkpoints import tensor_files
from resmoe_dist.checkpoints.compressed import CheckpointIndex, CompressionSettings
from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.compression import pipeline
from resmoe_dist.compression.pipeline import Compression, parse_layers
from tests.checkpoints.damage import (
    bytes_by_tensor,
    copy_of,
    edit_tensors,
    edit_text,
    mistake,
    names_in,
    sharded_copy,
    truncate,
)
from tests.models import FAMILIES, dense_model, save_family

GROUP_FILES = [
    f"resmoe-{layer:05d}-of-00002-group-{group:03d}.safetensors"
    for layer in (1, 2)
    for group in (0, 1)
]


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that share matrices this small, or a busy machine, only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _settings(**changes) -> CompressionSettings:
    values = {
        "groups": 2,
        "keep": 0.25,
        "codec": "pruned",
        "align": "loo",
        "center": "joint",
        "layers": [0, 1],
    }
    return CompressionSettings(**(values | changes))


def _run(source, output, *, resume=False, **changes) -> CheckpointIndex:
    return Compression(SourceCheckpoint(source), output, _settings(**changes)).run(resume=resume)


def _contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def source(family_folder, tmp_path_factory):
    """A Mixtral in two shards with tokenizer files beside it."""
    folder = sharded_copy(family_folder("mixtral"), tmp_path_factory.mktemp("pipeline") / "source")
    edit_text(folder / "tokenizer.json", "{}")
    edit_text(folder / "merges.txt", "#")
    return folder


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory):
    """The content of every file of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("pipeline") / "c"
    _run(source, folder)
    return _contents(folder)


def _mixtral(folder, dtype, **sizes):
    save_family(FAMILIES["mixtral"], folder, **sizes)
    if dtype != torch.float32:
        model = dense_model(folder).to(dtype)
        shutil.rmtree(folder)
        model.save_pretrained(folder)
    return folder


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


# Which layers


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("all", [0, 1, 2, 3, 4]),
        ("last:2", [3, 4]),
        ("last:5", [0, 1, 2, 3, 4]),
        ("1-3", [1, 2, 3]),
        ("2-2", [2]),
        ("4", [4]),
        ("3,0,3", [0, 3]),
    ],
)
def test_layers_by_name(text, chosen):
    assert parse_layers(text, 5) == chosen


@pytest.mark.parametrize("text", ["", "some", "1,", "-1", "1-", "last", "last:", "0 1", "1.5"])
def test_layers_that_make_no_sense(text):
    with mistake(f"--layers {re.escape(text)}: not understood; write all, last:24, 8-31 or 0,2"):
        parse_layers(text, 5)


@pytest.mark.parametrize(
    "text",
    ["5", "0,9", "3-5", "3-1", "last:0", "last:6", "0-99999999999999", "last:99999999999999"],
)
def test_layers_the_model_does_not_have(text):
    with mistake(f"--layers {text}: this model has 5 MoE layers, 0 to 4"):
        parse_layers(text, 5)


# What is refused


def test_experts_that_do_not_divide(source, tmp_path):
    with mistake("--ep 3: model.layers.0.mlp.experts has 4 experts, which do not divide into 3"):
        _run(source, tmp_path / "c", groups=3)
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize("groups", [0, -2])
def test_number_of_groups_below_one(source, tmp_path, groups):
    with mistake(f"--ep {groups}: must be 1 or more"):
        _run(source, tmp_path / "c", groups=groups)
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.01, math.nan, math.inf])
def test_keep_out_of_range(source, tmp_path, keep):
    with mistake(rf"--keep {keep}: must lie in \(0, 1\]"):
        _run(source, tmp_path / "c", keep=keep)
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_output_that_exists_is_left_alone(source, tmp_path, kind):
    if kind == "folder":
        (tmp_path / "c").mkdir()
        (tmp_path / "c" / "precious").touch()
    else:
        (tmp_path / "c").write_text("precious")
    with mistake(f"{tmp_path}/c: exists already; remove it or choose another one"):
        _run(source, tmp_path / "c")
    assert names_in(tmp_path) == {"c"}
    if kind == "folder":
        assert names_in(tmp_path / "c") == {"precious"}


@pytest.mark.parametrize("output", [".", "..", "/"])
def test_output_without_a_name_of_its_own(source, tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    with mistake("exists already; remove it or choose another one"):
        _run(source, pipeline.Path(output))
    assert names_in(tmp_path) == set()


def test_output_below_a_file(source, tmp_path):
    (tmp_path / "file").touch()
    with mistake(f"{tmp_path}/file/c.partial: cannot be made"):
        _run(source, tmp_path / "file" / "c")
    assert names_in(tmp_path) == {"file"}


def test_output_that_appears_while_the_run_is_on(source, tmp_path, monkeypatch):
    write_json = pipeline.write_json

    def write_and_interfere(path, value):
        write_json(path, value)
        if path.name == "resmoe.json":
            (tmp_path / "c").mkdir()
            (tmp_path / "c" / "precious").touch()

    monkeypatch.setattr(pipeline, "write_json", write_and_interfere)
    with mistake(f"{tmp_path}/c: cannot be made"):
        _run(source, tmp_path / "c")
    assert names_in(tmp_path / "c") == {"precious"}
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
        _run(harmed, tmp_path / "c")
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


def test_disk_that_fills_up_at_any_moment_is_left_as_it_was(source, expected, small_disk):
    pages = _pages(expected)
    limits = [f"size={n * resource.getpagesize()}" for n in range(1, pages, 3)]
    # A file system can also run out of files; the folders themselves count.
    limits += [f"nr_inodes={n}" for n in range(2, len(expected) + 2)]
    for limit in limits:
        disk = small_disk(limit)
        with mistake(f"{disk}.*: the disk is full; free some space and run again"):
            _run(source, disk / "c")
        assert names_in(disk) == set(), limit


def test_disk_with_just_enough_room_is_enough(source, expected, small_disk):
    # Beside the result, for a while: the settings of the run.
    disk = small_disk(f"size={(_pages(expected) + 1) * resource.getpagesize()}")
    _run(source, disk / "c")
    assert _contents(disk / "c") == expected


def _pages(contents):
    """Of a tmpfs, which keeps each file in whole pages."""
    return sum(-(-len(content) // resource.getpagesize()) for content in contents.values())


@pytest.mark.parametrize("number", range(0, 13, 2))
def test_any_write_that_finds_no_space_leaves_nothing(source, tmp_path, monkeypatch, number):
    calls = []
    replace = os.replace

    def full(first, second):
        calls.append(second)
        if len(calls) > number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(first, second)

    monkeypatch.setattr(tensor_files.os, "replace", full)
    with mistake(f"{tmp_path}/c.partial: the disk is full"):
        _run(source, tmp_path / "c")
    assert len(calls) == number + 1
    assert names_in(tmp_path) == set()


# The same bytes every time


@pytest.mark.parametrize("align", ["loo", "none"])
def test_number_of_threads_changes_no_byte(sized, tmp_path, align):
    for count in (1, 2):
        torch.set_num_threads(count)
        _run(sized("even", "float32"), tmp_path / f"{count}", align=align)
    assert _contents(tmp_path / "2") == _contents(tmp_path / "1")


# Resuming


def _interrupt_after(tasks, monkeypatch):
    """Make a run end as by Ctrl-C when it begins the task after `tasks` many."""
    begun = []
    do = Compression._do

    def count(self, task):
        if len(begun) == tasks:
            raise KeyboardInterrupt
        begun.append(task)
        return do(self, task)

    monkeypatch.setattr(Compression, "_do", count)


def _interrupted(source, output, monkeypatch, tasks=3):
    """The staging folder of a run that ended after `tasks` of four groups and two copies."""
    with monkeypatch.context() as patch:
        _interrupt_after(tasks, patch)
        with pytest.raises(KeyboardInterrupt):
            _run(source, output)
    return output.with_name(f"{output.name}.partial")


@pytest.mark.parametrize("tasks", [0, 1, 3, 4, 5])
def test_resumed_run_gives_the_bytes_of_an_uninterrupted_one(
    source, expected, tmp_path, monkeypatch, tasks
):
    staging = _interrupted(source, tmp_path / "c", monkeypatch, tasks)
    assert names_in(tmp_path) == {"c.partial"}
    assert len([name for name in names_in(staging) if name.endswith(".safetensors")]) == tasks

    _run(source, tmp_path / "c", resume=True)

    assert _contents(tmp_path / "c") == expected
    assert names_in(tmp_path) == {"c"}


def test_resumed_run_computes_only_what_is_missing(source, tmp_path, monkeypatch):
    staging = _interrupted(source, tmp_path / "c", monkeypatch)
    before = {name: (staging / name).stat() for name in GROUP_FILES[:3]}
    aligned, read = [], []
    align, read_expert = pipeline.align, SourceCheckpoint.read_expert
    monkeypatch.setattr(pipeline, "align", lambda *args: aligned.append(args) or align(*args))
    monkeypatch.setattr(
        SourceCheckpoint,
        "read_expert",
        lambda self, *args: read.append(args) or read_expert(self, *args),
    )

    _run(source, tmp_path / "c", resume=True)

    assert len(aligned) == 1
    assert read == [(1, 2), (1, 3)]  # the experts of the last group
    for name, stat in before.items():
        now = (tmp_path / "c" / name).stat()
        assert (now.st_ino, now.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)


def test_resuming_a_finished_run_changes_nothing(source, expected, tmp_path):
    _run(source, tmp_path / "c")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "c").iterdir()}

    _run(source, tmp_path / "c", resume=True)

    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "c").iterdir()} == before
    assert _contents(tmp_path / "c") == expected


def _compress_until_killed(source, output, writes):
    """A run that gets SIGKILL when file number `writes` is written but not yet renamed."""
    calls = []
    replace = os.replace

    def kill(first, second):
        calls.append(second)
        if len(calls) == writes:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(first, second)

    tensor_files.os.replace = kill
    _run(source, output)


@pytest.mark.parametrize("writes", [3, 11, 13])  # a group; a companion file; the index
def test_killed_run_resumes_and_leaves_no_stray_files(source, expected, tmp_path, writes):
    import tests.ranks  # noqa: F401  (has the fork server import what is heavy, once)

    process = multiprocessing.get_context("forkserver").Process(
        target=_compress_until_killed, args=(source, tmp_path / "c", writes)
    )
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    staging = tmp_path / "c.partial"
    assert [name for name in names_in(staging) if name.endswith(".tmp")]
    # What safetensors itself leaves when it is killed while writing.
    (staging / ".tmpA1b2C3").write_bytes(b"half")

    _run(source, tmp_path / "c", resume=True)

    assert _contents(tmp_path / "c") == expected


def test_run_that_met_a_full_disk_resumes_when_there_is_room(source, expected, tmp_path):
    # With --resume from the start, what was finished is kept; the index is written last.
    def full(path, value):
        if path.name == "resmoe.json":
            raise tensor_files.UserError("full")
        tensor_files.write_json(path, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "write_json", full)
        with mistake("full"):
            _run(source, tmp_path / "c", resume=True)
    assert names_in(tmp_path) == {"c.partial"}

    _run(source, tmp_path / "c", resume=True)

    assert _contents(tmp_path / "c") == expected


@pytest.mark.parametrize("name", [GROUP_FILES[1], "model-00001-of-00002.safetensors"])
def test_finished_file_that_was_damaged_since_is_made_anew(
    source, expected, tmp_path, monkeypatch, name
):
    staging = _interrupted(source, tmp_path / "c", monkeypatch, tasks=5)
    truncate(staging / name, 500)

    _run(source, tmp_path / "c", resume=True)

    assert _contents(tmp_path / "c") == expected


def test_unfinished_run_is_not_overwritten_without_resume(source, tmp_path, monkeypatch):
    staging = _interrupted(source, tmp_path / "c", monkeypatch)
    before = _contents(staging)
    with mistake(f"{staging}: an unfinished run is here; continue it with --resume or remove it"):
        _run(source, tmp_path / "c")
    assert _contents(staging) == before


@pytest.mark.parametrize(
    "change",
    [{"keep": 0.5}, {"groups": 1}, {"codec": "low_rank"}, {"layers": [1]}, {"dtype": "bfloat16"}],
)
@pytest.mark.parametrize("finished", [False, True])
def test_resume_with_other_options_is_refused(source, tmp_path, monkeypatch, change, finished):
    if finished:
        _run(source, tmp_path / "c")
        folder = tmp_path / "c"
    else:
        folder = _interrupted(source, tmp_path / "c", monkeypatch)
    before = _contents(folder)
    with mistake(f"{folder}: .*other options"):
        _run(source, tmp_path / "c", resume=True, **change)
    assert _contents(folder) == before


def test_resume_with_another_source_is_refused(source, tmp_path, monkeypatch):
    staging = _interrupted(source, tmp_path / "c", monkeypatch)
    other = copy_of(source, tmp_path / "other")
    with mistake(f"{staging}: the unfinished run had other options"):
        _run(other, tmp_path / "c", resume=True)


@pytest.mark.parametrize("text", [None, "{cut"])
def test_resume_of_a_folder_that_is_no_unfinished_run_is_refused(source, tmp_path, text):
    staging = tmp_path / "c.partial"
    staging.mkdir()
    (staging / "precious").touch()
    if text:
        edit_text(staging / "resmoe-settings.json", text)
    with mistake(f"{staging}: the unfinished run had other options; remove it to start anew"):
        _run(source, tmp_path / "c", resume=True)
    assert "precious" in names_in(staging)


# What comes along


def test_companion_files_come_along_and_weights_do_not_twice(source, expected):
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
    _run(sized(size, dtype), tmp_path / "c", keep=keep, center=center)

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
    _run(sized(size, dtype), tmp_path / "c", keep=keep, codec="low_rank")

    rows, columns = SIZES[size]["intermediate_size"], 3 * SIZES[size]["hidden_size"]
    value = {"float32": 4, "bfloat16": 2}[dtype]
    rank = math.floor(keep * rows * columns / (rows + columns))
    group = (rows * columns + 2 * rank * (rows + columns)) * value
    for file in GROUP_FILES:
        assert sum(bytes_by_tensor(tmp_path / "c" / file).values()) == group


def test_stored_dtype_can_be_another_than_the_sources(source, tmp_path):
    _run(source, tmp_path / "half", dtype="bfloat16", keep=1.0)
    _run(source, tmp_path / "full", keep=1.0)

    half, full = (bytes_by_tensor(tmp_path / x / GROUP_FILES[0]) for x in ("half", "full"))
    assert half["center"] * 2 == full["center"]
    assert half["experts.0.values"] * 2 == pytest.approx(full["experts.0.values"], rel=0.05)
    assert load_model(tmp_path / "half").dtype == torch.bfloat16


def test_not_a_number_outside_the_experts_leaves_nothing(family_folder, tmp_path):
    harmed = copy_of(family_folder("mixtral"), tmp_path / "source")
    name = "model.layers.1.self_attn.k_proj.weight"
    edit_tensors(harmed / "model.safetensors", lambda tensors: tensors[name][2].fill_(math.nan))

    with mistake(f"{re.escape(name)}' holds NaN"):
        _run(harmed, tmp_path / "c")
    assert names_in(tmp_path) == {"source"}


def test_weights_too_large_for_the_stored_dtype_leave_nothing(family_folder, tmp_path):
    large = copy_of(family_folder("mixtral"), tmp_path / "source")
    name = "model.layers.0.block_sparse_moe.experts.2.w1.weight"
    edit_tensors(large / "model.safetensors", lambda tensors: tensors[name][3].fill_(1e6))

    with mistake("too large for torch.float16; choose"):
        _run(large, tmp_path / "c", dtype="float16", groups=2)
    assert names_in(tmp_path) == {"source"}
    _run(large, tmp_path / "c", dtype="bfloat16", groups=2)
