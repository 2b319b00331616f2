"""Files appear whole or not at all, with the same bytes each time, and errors say what to do."""

from __future__ import annotations

import errno
import os
import re
import resource
import stat

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from resmoe_dist.checkpoints import tensor_files
from resmoe_dist.checkpoints.tensor_files import (
    TensorFile,
    copy_file,
    tensor_bytes,
    write_json,
    write_tensors,
)
from tests.checkpoints.damage import bytes_by_tensor, mistake, names_in

TENSORS = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(5, dtype=torch.bfloat16)}


def test_what_is_written_is_what_is_read(tmp_path):
    write_tensors(tmp_path / "x.safetensors", TENSORS, {"record": "{}"})

    file = TensorFile(tmp_path / "x.safetensors")
    assert file.names == {"a", "b"}
    assert file.metadata["record"] == "{}"
    assert file.shape("b") == (2, 3)
    assert file.dtype("a") == "BF16"
    assert torch.equal(file.read("b"), TENSORS["b"])
    assert torch.equal(file.read("b", 1, 2), TENSORS["b"][1:2])
    assert torch.equal(file.read_index("b", 1), TENSORS["b"][1])


@pytest.mark.parametrize("metadata", [{}, {"record": "{}"}])
def test_the_same_tensors_give_the_same_bytes(tmp_path, metadata):
    contents = set()
    for _ in range(20):
        write_tensors(tmp_path / "x.safetensors", TENSORS, metadata)
        contents.add((tmp_path / "x.safetensors").read_bytes())
    assert len(contents) == 1


def test_model_shards_name_the_format_that_transformers_asks_for(tmp_path):
    write_tensors(tmp_path / "x.safetensors", TENSORS, {})
    assert TensorFile(tmp_path / "x.safetensors").metadata == {"format": "pt"}


def test_files_can_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "x.safetensors", TENSORS, {})
        write_json(tmp_path / "x.json", {})
    finally:
        os.umask(before)
    for name in ("x.safetensors", "x.json"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640


def test_tensor_bytes_are_the_headers(tmp_path):
    write_tensors(tmp_path / "x.safetensors", TENSORS, {"record": "{}"})

    assert tensor_bytes(tmp_path / "x.safetensors") == {"b": 24, "a": 10}
    assert bytes_by_tensor(tmp_path / "x.safetensors") == {"b": 24, "a": 10}


def test_tensor_that_is_not_there(tmp_path):
    write_tensors(tmp_path / "x.safetensors", TENSORS, {})
    with mistake(f"{tmp_path}/x.safetensors: tensor 'c' is missing"):
        TensorFile(tmp_path / "x.safetensors").read("c")


@pytest.mark.parametrize("read", [TensorFile, tensor_bytes])
@pytest.mark.parametrize("content", [None, b"", b"12345", b"\xff" * 20, b"\2\0\0\0\0\0\0\0{}x"])
def test_file_that_is_no_safetensors(tmp_path, read, content):
    if content is not None:
        (tmp_path / "x").write_bytes(content)
    with mistake(f"{tmp_path}/x: (this file is missing|not a whole safetensors file)"):
        read(tmp_path / "x")


def _write_tensors(path):
    write_tensors(path, TENSORS, {})


def _write_json(path):
    write_json(path, {"x": 1})


def _copy_file(path):
    copy_file(__file__, path)


# As safetensors 0.8 reports it from a full tmpfs, and as Python does.
NO_SPACE = [
    (
        "save_file",
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
    ),
    ("os.replace", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
    ("os.fsync", OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))),
]


@pytest.mark.parametrize(("where", "error"), NO_SPACE, ids=[where for where, _ in NO_SPACE])
def test_full_disk_leaves_no_file(tmp_path, monkeypatch, where, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(f"resmoe_dist.checkpoints.tensor_files.{where}", fail)
    with mistake(f"{tmp_path}: the disk is full; free some space and run again"):
        _write_tensors(tmp_path / "x")
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize("write", [_write_tensors, _write_json, _copy_file])
def test_file_that_would_be_too_large_is_not_left_half_written(tmp_path, write):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, limits[1]))
    try:
        with mistake(f"{tmp_path}/x: cannot be written .*File too large"):
            write(tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize("write", [_write_tensors, _write_json, _copy_file])
def test_folder_that_does_not_exist(tmp_path, write):
    with mistake(f"{tmp_path}/none/x: cannot be written"):
        write(tmp_path / "none" / "x")


def test_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    write_tensors(tmp_path / "x", {"old": torch.ones(1)}, {})

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(tensor_files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_tensors(tmp_path / "x", TENSORS, {})

    assert set(load_file(tmp_path / "x")) == {"old"}
    assert names_in(tmp_path) == {"x"}


def test_bytes_are_synced_before_the_file_gets_its_name(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def named(source, target):
        done.append(str(target))
        replace(source, target)

    monkeypatch.setattr(tensor_files.os, "fsync", synced)
    monkeypatch.setattr(tensor_files.os, "replace", named)
    write_tensors(tmp_path / "x", TENSORS, {})

    assert re.fullmatch(rf"{tmp_path}/\.x\.\d+\.tmp", done[0])
    assert done[1:] == [str(tmp_path / "x")]
