"""What all codecs have in common: names and options, row ranges, files, bytes, dtype changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import tests.codecs.rounded_codec  # noqa: F401  (registers codec `rounded`)
from resmoe_dist.checkpoints.tensor_files import TensorFile, write_tensors
from resmoe_dist.codecs import (
    BYTE_KINDS,
    CODECS,
    DENSE,
    BudgetConfig,
    CodecSpec,
    EncodedMatrix,
    StoredTensor,
    codec_named,
)

ROWS, COLUMNS = 9, 21
RANGES = [(start, stop) for stop in range(ROWS + 1) for start in range(stop + 1)]
every_codec = pytest.mark.parametrize(
    "codec", sorted(name for name in CODECS if codec_named(name).standalone)
)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
every_keep = pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])


def _spec(codec: str, keep: float = 0.3) -> CodecSpec:
    spec = CodecSpec(name=codec)
    return spec if spec.keep is None else spec.with_keep(keep)


def _encode(codec: str, dtype: torch.dtype = torch.float32, keep: float = 0.3) -> EncodedMatrix:
    matrix = torch.randn(ROWS, COLUMNS)
    # Rows of which `pruned` keeps nothing, at both ends and in between.
    matrix[[0, 3, 4, ROWS - 1]] *= 1e-3
    spec = _spec(codec, keep)
    return spec.codec.encode(matrix, spec.config, dtype)


def _written(encoded: EncodedMatrix, folder: Path) -> TensorFile:
    write_tensors(folder / "expert.safetensors", encoded.tensors(), {})
    return TensorFile(folder / "expert.safetensors")


def _bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape), tensor.flatten().view(torch.uint8).numpy().tobytes()


def _assert_same_tensors(found: EncodedMatrix, expected: EncodedMatrix) -> None:
    assert found.tensors().keys() == expected.tensors().keys()
    for name, tensor in expected.tensors().items():
        assert _bits(found.tensors()[name]) == _bits(tensor), name


# Names and options


@every_codec
def test_codec_is_found_by_its_name(codec):
    assert codec_named(codec).name == codec
    assert CodecSpec(name=codec).codec is codec_named(codec)


def test_unknown_codec_is_refused():
    with pytest.raises(ValueError, match=r"unknown codec 'zip'; choose one of .*pruned"):
        codec_named("zip")
    with pytest.raises(ValueError, match="unknown codec 'zip'"):
        CodecSpec(name="zip")


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("pruned", {"keep": 1.5}, "codec pruned: keep 1.5: must be 1 or less"),
        ("pruned", {"keep": float("nan")}, "codec pruned: keep nan: must be "),
        ("pruned", {"kep": 1}, "codec pruned: no option kep; its options: keep"),
        ("dense", {"keep": 0.5}, "codec dense: no option keep; its options: none"),
        ("low_rank", {"rank": 0}, "codec low_rank: rank 0: must be 1 or more"),
    ],
)
def test_unknown_options_and_values_are_refused(name, options, reason):
    with pytest.raises(ValueError, match=reason):
        CodecSpec(name=name, options=options)


def test_defaults_are_written_out():
    assert CodecSpec(name="pruned").options == {"keep": 0.25}
    assert CodecSpec(name="dense").options == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dense", DENSE),
        ("pruned:keep=0.5", CodecSpec(name="pruned", options={"keep": 0.5})),
        ("low_rank: rank = 3 , keep=1", CodecSpec(name="low_rank", options={"rank": 3, "keep": 1})),
    ],
)
def test_text_becomes_a_spec(text, expected):
    assert CodecSpec.parse(text).config == expected.config
    assert CodecSpec.parse(text).name == expected.name


@pytest.mark.parametrize("text", ["", "zip", "pruned:keep", "pruned:keep=", "pruned:keep=much"])
def test_malformed_text_is_refused(text):
    with pytest.raises(ValueError, match=r"codec|write NAME:option=value"):
        CodecSpec.parse(text)


@every_codec
def test_only_codecs_with_a_budget_take_another_one(codec):
    spec = CodecSpec(name=codec)
    if issubclass(spec.codec.config, BudgetConfig):
        assert spec.with_keep(0.125).keep == 0.125
    else:
        assert spec.keep is None
        with pytest.raises(ValueError, match=f"codec {codec} has no option keep"):
            spec.with_keep(0.5)


@every_codec
def test_codec_that_selects_entries_has_a_budget(codec):
    assert not codec_named(codec).selects_entries or CodecSpec(name=codec).keep is not None


# Decoding and row ranges


@every_codec
@every_dtype
def test_decoding_gives_the_shape_and_dtype_of_the_encoded(codec, dtype):
    encoded = _encode(codec, dtype)

    assert encoded.decode().shape == (ROWS, COLUMNS) == (encoded.rows, encoded.columns)
    assert encoded.decode().dtype == dtype == encoded.dtype


@every_codec
@every_dtype
def test_only_dense_codecs_decode_to_the_rounded_matrix(codec, dtype):
    matrix = torch.randn(ROWS, COLUMNS)
    spec = _spec(codec)

    decoded = spec.codec.encode(matrix, spec.config, dtype).decode()

    assert torch.equal(decoded, matrix.to(dtype)) is spec.codec.is_dense


@every_codec
def test_decoding_sliced_rows_equals_slicing_the_decoded(codec):
    encoded = _encode(codec)

    for start, stop in RANGES:
        part = encoded.slice_rows(start, stop)
        assert part.rows == stop - start
        torch.testing.assert_close(part.decode(), encoded.decode()[start:stop], rtol=0, atol=1e-6)


@every_codec
def test_slices_of_slices_are_slices(codec):
    encoded = _encode(codec)

    part = encoded.slice_rows(2, 8).slice_rows(1, 5)

    torch.testing.assert_close(part.decode(), encoded.decode()[3:7], rtol=0, atol=1e-6)


@every_codec
@every_dtype
def test_adding_to_a_centre_equals_decoding_and_adding(codec, dtype):
    encoded = _encode(codec, dtype)
    center = torch.randn(ROWS, COLUMNS).to(dtype)
    dense = center.clone()

    encoded.add_to(dense)

    expected = center.double() + encoded.decode().double()
    # Rounded once or twice, depending on how the product is added.
    bound = 2 * torch.finfo(dtype).eps * (expected.abs().max() + center.abs().max().double())
    assert float((dense.double() - expected).abs().max()) <= float(bound)


# Files


@every_codec
@every_dtype
@every_keep
def test_file_read_back_whole_holds_the_same_bits(tmp_path, codec, dtype, keep):
    encoded = _encode(codec, dtype, keep)

    again = codec_named(codec).read(_written(encoded, tmp_path).read, COLUMNS, 0, ROWS, dtype)

    _assert_same_tensors(again, encoded)
    assert again.dtype == dtype


@every_codec
@every_keep
def test_row_range_read_from_a_file_decodes_to_those_rows(tmp_path, codec, keep):
    encoded = _encode(codec, keep=keep)
    file = _written(encoded, tmp_path)

    for start, stop in RANGES:
        part = codec_named(codec).read(file.read, COLUMNS, start, stop, torch.float32)
        assert part.rows == stop - start
        torch.testing.assert_close(part.decode(), encoded.decode()[start:stop], rtol=0, atol=1e-6)


@every_codec
def test_reading_a_range_gives_the_tensors_of_slicing_it(tmp_path, codec):
    encoded = _encode(codec)

    found = codec_named(codec).read(_written(encoded, tmp_path).read, COLUMNS, 2, 7, torch.float32)

    expected = encoded.slice_rows(2, 7)
    assert found.nbytes == expected.nbytes
    _assert_same_tensors(found, expected)


@every_codec
@every_dtype
def test_tensors_are_those_that_the_codec_declares(codec, dtype):
    encoded, kind = _encode(codec, dtype), codec_named(codec)

    shapes = kind.shapes(ROWS, COLUMNS)

    assert encoded.tensors().keys() == shapes.keys() == kind.stored.keys()
    for name, tensor in encoded.tensors().items():
        pairs = zip(tensor.shape, shapes[name], strict=True)
        assert all(want in (None, have) for have, want in pairs), name
        assert tensor.dtype in (kind.stored[name].dtypes or (dtype,)), name


# Bytes and modules


@every_codec
@every_dtype
@every_keep
def test_bytes_by_kind_add_up_and_stay_below_the_prediction(codec, dtype, keep):
    encoded, spec = _encode(codec, dtype, keep), _spec(codec, keep)

    found = encoded.bytes_by_kind()

    assert set(found) <= set(BYTE_KINDS)
    assert sum(found.values()) == encoded.nbytes
    predicted = spec.codec.stored_bytes(ROWS, COLUMNS, spec.config, dtype.itemsize)
    assert encoded.nbytes <= predicted


@every_codec
@every_keep
def test_bytes_of_row_ranges_are_predicted(codec, keep):
    encoded, spec = _encode(codec, torch.bfloat16, keep), _spec(codec, keep)

    def predicted(held: int) -> int:
        return spec.codec.sliced_bytes(ROWS, COLUMNS, held, spec.config, 2)

    assert predicted(ROWS) == spec.codec.stored_bytes(ROWS, COLUMNS, spec.config, 2)
    for parts in (1, 2, 3, ROWS):
        ranges = [(i * ROWS // parts, (i + 1) * ROWS // parts) for i in range(parts)]
        found = [encoded.slice_rows(start, stop).nbytes for start, stop in ranges]
        # A value more for each range: codecs round up.
        surplus = sum(predicted(stop - start) for start, stop in ranges) - sum(found)
        assert 0 <= surplus <= 2 * parts


def test_bytes_of_a_codec_with_shared_tensors_count_whole():
    class Shared(codec_named("dense")):  # type: ignore[misc]
        stored = {"weight": StoredTensor("values", per_row=False)}

    assert Shared.sliced_bytes(4, 5, 1, None, 2) == Shared.stored_bytes(4, 5, None, 2) == 40


@every_codec
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_casts_only_tensors_that_follow_the_model(codec, dtype):
    encoded = _encode(codec)
    before = {name: _bits(tensor) for name, tensor in encoded.tensors().items()}

    moved = encoded.to(dtype)

    assert moved.decode().dtype == dtype
    for name, tensor in moved.tensors().items():
        if moved.stored[name].dtypes is None:
            assert tensor.dtype == dtype, name
        else:
            assert _bits(tensor) == before[name], name


@every_codec
def test_encoded_tensors_stay_out_of_state_dicts(codec):
    assert not _encode(codec).state_dict()
