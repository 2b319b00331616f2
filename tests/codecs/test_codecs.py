"""What every codec promises alike: row ranges, adding to a centre, files, bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from resmoe_dist.checkpoints.tensor_files import TensorFile, write_tensors
from resmoe_dist.codecs import CODECS, DenseResidual, EncodedResidual, codec_named

ROWS, COLUMNS = 9, 21
RANGES = [(start, stop) for stop in range(ROWS + 1) for start in range(stop + 1)]
every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def _encode(codec: type[EncodedResidual], dtype: torch.dtype, keep: float = 0.3) -> EncodedResidual:
    residual = torch.randn(ROWS, COLUMNS)
    # Rows of which `pruned` keeps nothing, at both ends and in between.
    residual[[0, 3, 4, ROWS - 1]] *= 1e-3
    return codec.encode(residual, keep=keep, dtype=dtype)


@every_codec
def test_a_codec_is_found_by_its_name(codec):
    assert codec_named(codec.name) is codec


def test_an_unknown_codec_is_a_key_error():
    with pytest.raises(KeyError):
        codec_named("zip")


@every_codec
@every_dtype
def test_decoding_has_the_shape_and_dtype_of_what_was_encoded(codec, dtype):
    encoded = _encode(codec, dtype)

    assert encoded.decode().shape == (ROWS, COLUMNS) == (encoded.rows, encoded.columns)
    assert encoded.decode().dtype == dtype


@every_codec
def test_decoding_sliced_rows_is_slicing_the_decoded(codec):
    encoded = _encode(codec, torch.float32)

    for start, stop in RANGES:
        part = encoded.slice_rows(start, stop)
        assert part.rows == stop - start
        torch.testing.assert_close(part.decode(), encoded.decode()[start:stop], rtol=0, atol=1e-6)


@every_codec
def test_slices_of_slices_are_slices(codec):
    encoded = _encode(codec, torch.float32)

    part = encoded.slice_rows(2, 8).slice_rows(1, 5)

    torch.testing.assert_close(part.decode(), encoded.decode()[3:7], rtol=0, atol=1e-6)


@every_codec
@every_dtype
def test_adding_to_a_centre_is_decoding_and_adding(codec, dtype):
    encoded = _encode(codec, dtype)
    center = torch.randn(ROWS, COLUMNS).to(dtype)
    dense = center.clone()

    encoded.add_to(dense)

    expected = center.double() + encoded.decode().double()
    # Once or twice rounded, by how the product is added.
    bound = 2 * torch.finfo(dtype).eps * (expected.abs().max() + center.abs().max().double())
    assert float((dense.double() - expected).abs().max()) <= float(bound)


def _written(encoded: EncodedResidual, folder: Path) -> TensorFile:
    write_tensors(folder / "expert.safetensors", encoded.tensors(), {})
    return TensorFile(folder / "expert.safetensors")


def _bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape), tensor.flatten().view(torch.uint8).numpy().tobytes()


@every_codec
@every_dtype
@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
def test_a_file_read_back_whole_holds_the_same_bits(tmp_path, codec, dtype, keep):
    encoded = _encode(codec, dtype, keep)

    again = codec.read(_written(encoded, tmp_path).read, COLUMNS, 0, ROWS)

    found, expected = again.tensors(), encoded.tensors()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert _bits(found[name]) == _bits(tensor), name


@every_codec
@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
def test_a_file_read_by_row_range_decodes_to_those_rows(tmp_path, codec, keep):
    encoded = _encode(codec, torch.float32, keep)
    file = _written(encoded, tmp_path)

    for start, stop in RANGES:
        part = codec.read(file.read, COLUMNS, start, stop)
        assert part.rows == stop - start
        torch.testing.assert_close(part.decode(), encoded.decode()[start:stop], rtol=0, atol=1e-6)


@every_codec
def test_reading_a_range_gives_the_tensors_of_slicing_it(tmp_path, codec):
    encoded = _encode(codec, torch.float32)

    found = codec.read(_written(encoded, tmp_path).read, COLUMNS, 2, 7)

    expected = encoded.slice_rows(2, 7)
    assert found.nbytes == expected.nbytes
    for name, tensor in expected.tensors().items():
        assert _bits(found.tensors()[name]) == _bits(tensor), name


@every_codec
def test_the_tensors_have_the_names_and_shapes_that_a_reader_expects(codec):
    found = {name: tuple(t.shape) for name, t in _encode(codec, torch.float32).tensors().items()}

    expected = codec.expected_tensors(ROWS, COLUMNS)

    assert found.keys() == expected.keys()
    for name, shape in expected.items():
        pairs = zip(found[name], shape, strict=True)
        assert all(want in (None, have) for have, want in pairs), name


@every_codec
def test_encoded_tensors_stay_out_of_state_dicts(codec):
    assert not _encode(codec, torch.float32).state_dict()


@every_dtype
def test_the_dense_codec_keeps_everything_whatever_the_share(dtype):
    residual = torch.randn(ROWS, COLUMNS)

    encoded = DenseResidual.encode(residual, keep=0.1, dtype=dtype)

    assert torch.equal(encoded.decode(), residual.to(dtype))
    assert encoded.nbytes == ROWS * COLUMNS * dtype.itemsize
