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
from safetensors.torch import load_file, save_file

from resmoe_dist.checkpoints import tensor_files
from resmoe_dist.checkpoints.tensor_files import (
    TensorFile,
    copy_file,
    tensor_bytes,
    write_json,
    write_tensors,
)
from tests.checkpoints.damage import bytes_by_tensor, header_of, mistake, names_in, truncate
from tests.checkpoints.resident import MIB, at_most_resident

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


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0), (4, 3), (3, 2, 5)])
def test_tensors_of_every_type_and_rank(tmp_path, dtype, shape):
    raw = torch.randint(0, 2, (*shape, dtype.itemsize), dtype=torch.uint8)
    tensor = raw.view(-1).view(dtype).view(shape)
    save_file({"before": torch.ones(3), "x": tensor}, tmp_path / "x")

    read = TensorFile(tmp_path / "x").read("x")

    assert (read.dtype, read.shape) == (dtype, shape)
    assert read.reshape(-1).view(torch.uint8).tolist() == raw.view(-1).tolist()


@pytest.mark.parametrize("stop", [None, 0, 1, 3, 5, 8])
@pytest.mark.parametrize("start", [0, 1, 4, 5, 7])
def test_ranges_are_those_of_slicing(tmp_path, start, stop):
    whole = torch.arange(60.0).view(5, 4, 3)
    write_tensors(tmp_path / "x", {"x": whole, "y": torch.ones(2)}, {})
    file = TensorFile(tmp_path / "x")

    assert torch.equal(file.read("x", start, stop), whole[start:stop])
    for k in range(5):
        assert torch.equal(file.read_index("x", k, start, stop), whole[k, start:stop])


def test_a_type_that_pytorch_has_not_is_named(tmp_path):
    save_file({"x": torch.ones(4, dtype=torch.uint8)}, tmp_path / "x")
    raw = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(raw.replace(b'"U8","shape":[4]', b'"F4","shape":[8]'))

    with mistake(f"{tmp_path}/x: tensor 'x' is stored as F4, which is not supported"):
        TensorFile(tmp_path / "x").read("x")


def test_the_header_is_given_as_it_stands_in_the_file(tmp_path):
    write_tensors(tmp_path / "x", TENSORS, {})

    _, begin = header_of(tmp_path / "x")
    assert TensorFile(tmp_path / "x").header() == (tmp_path / "x").read_bytes()[8:begin]


def test_file_that_is_cut_short_after_it_was_opened(tmp_path):
    write_tensors(tmp_path / "x", TENSORS, {})
    file = TensorFile(tmp_path / "x")
    truncate(tmp_path / "x", (tmp_path / "x").stat().st_size - 1)

    with mistake(f"{tmp_path}/x: was cut short while it was read"):
        [file.read(name) for name in file.names]


def test_file_that_is_gone_after_it_was_opened(tmp_path):
    write_tensors(tmp_path / "x", TENSORS, {})
    file = TensorFile(tmp_path / "x")
    (tmp_path / "x").unlink()

    with mistake(f"{tmp_path}/x: cannot be read .*No such file"):
        file.read("a")


@pytest.fixture
def large(tmp_path):
    """A file of four tensors [8, 2, 2 Mi] in uint8, each 32 MiB."""
    tensors = {str(i): torch.full((8, 2, 2 * MIB), i, dtype=torch.uint8) for i in range(4)}
    write_tensors(tmp_path / "x", tensors, {})
    return TensorFile(tmp_path / "x")


def test_what_was_read_before_takes_no_memory(large):
    with at_most_resident(36 * MIB):
        for name in large.names:
            assert large.read(name).aminmax() == (int(name), int(name))


def test_reading_a_part_takes_the_memory_of_the_part(large):
    large.read("3", 0, 1)  # the allocator's own reserve grows once
    with at_most_resident(16 * MIB):  # parts of 4 MiB; half of what the tensor takes
        for k in range(8):
            large.read("3", k, k + 1)
            large.read_index("3", k)
            large.read_index("3", k, 1, 2)


def test_writing_takes_no_second_copy(tmp_path):
    tensors = {str(i): torch.ones(8 * MIB) for i in range(4)}

    with at_most_resident(8 * MIB):
        write_tensors(tmp_path / "x", tensors, {})


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
def test_file_that_is_not_safetensors(tmp_path, read, content):
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
