"""A codec that is defined in one file is compressed to, verified, inspected and restored."""

from __future__ import annotations

import json

import pytest
import torch

import tests.codecs.rounded_codec  # noqa: F401  (registers codec `rounded`)
from resmoe_dist.checkpoints.compressed import CompressedCheckpoint
from resmoe_dist.checkpoints.restore import restore_checkpoint
from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.evaluation.report import describe, layer_table
from resmoe_dist.jobs.pipeline import Compression
from resmoe_dist.jobs.workers import DeepSpeedWorkers
from tests.checkpoints.damage import flip_byte_of, header_of
from tests.compress_settings import compression_settings
from tests.jobs.runs import contents
from tests.models import compress, dense_model, logits_of, relative_difference
from tests.ranks import run_on_ranks

# As a centre, as a residual, as both, and alone.
CASES = [
    {"center_codec": "rounded", "codec": "pruned"},
    {"center_codec": "dense", "codec": "rounded"},
    {"center_codec": "rounded", "codec": "rounded"},
    {"center": "none", "codec": "rounded"},
]
every_case = pytest.mark.parametrize("options", CASES, ids=[str([*c.values()]) for c in CASES])
# Of the tiny Mixtral: two layers, four experts each.
ROWS, COLUMNS, GROUPS, EXPERTS = 27, 60, 4, 8


@every_case
def test_rounded_checkpoint_is_whole_and_close_to_the_source(family_folder, tmp_path, options):
    source = family_folder("mixtral")
    compress(source, tmp_path / "c", groups=2, **options)
    checkpoint = CompressedCheckpoint(tmp_path / "c")

    assert checkpoint.faults() == []
    restore_checkpoint(tmp_path / "c", tmp_path / "d")
    if options["codec"] == "rounded":
        found, expected = (logits_of(dense_model(f)) for f in (tmp_path / "d", source))
        assert relative_difference(found, expected) < 0.05


@every_case
def test_rounded_checkpoint_is_described(family_folder, tmp_path, options):
    compress(family_folder("mixtral"), tmp_path / "c", groups=2, **options)

    found = describe(CompressedCheckpoint(tmp_path / "c"))

    one = ROWS * COLUMNS + 4 * ROWS
    if options.get("center_codec") == "rounded":
        assert found["experts"]["center_bytes"] == GROUPS * one
    if options["codec"] == "rounded":
        sizes = {"values": EXPERTS * ROWS * COLUMNS, "indices": 0, "scales": EXPERTS * 4 * ROWS}
        assert found["experts"]["residual_bytes"] == sizes
    header = layer_table(found).splitlines()[0].split()
    assert ("scales" in header) is (options["codec"] == "rounded")
    assert json.loads(json.dumps(found)) == found


@every_case
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_errors_in_the_index_are_those_of_the_decoded_tensors(
    family_folder, tmp_path, options, dtype
):
    source = SourceCheckpoint(family_folder("mixtral"))
    compress(family_folder("mixtral"), tmp_path / "c", align="none", dtype=dtype, **options)
    checkpoint = CompressedCheckpoint(tmp_path / "c")

    for i, layer in enumerate(checkpoint.index.layers):
        (group,) = layer.groups
        file = checkpoint.open_group(layer, group)
        for k, told in enumerate(group.squared_errors):
            lost_ID = source.read_expert(i, k)[0].double()
            for part in (file.read_center(0, ROWS), file.read_residual(k, 0, ROWS)):
                lost_ID -= 0.0 if part is None else part.decode().double()
            assert told == pytest.approx(float(lost_ID.square().sum()), rel=1e-3)


def test_row_range_reads_a_byte_per_entry_and_a_scale_per_row(family_folder, tmp_path):
    compress(family_folder("mixtral"), tmp_path / "c", center_codec="rounded", codec="rounded")
    checkpoint = CompressedCheckpoint(tmp_path / "c")
    layer = checkpoint.index.layers[0]
    file = checkpoint.open_group(layer, layer.groups[0])

    for whole, part in (
        (file.read_center(0, ROWS), file.read_center(5, 12)),
        (file.read_residual(2, 0, ROWS), file.read_residual(2, 5, 12)),
    ):
        assert part.nbytes == 7 * COLUMNS + 7 * 4
        assert torch.equal(part.decode(), whole.decode()[5:12])


def test_changed_bytes_are_found(family_folder, tmp_path):
    compress(family_folder("mixtral"), tmp_path / "c", center_codec="rounded", codec="rounded")
    path = next((tmp_path / "c").glob("resmoe-*.safetensors"))
    header, _ = header_of(path)
    assert {header[f"center.{name}"]["dtype"] for name in ("values", "scales")} == {"I8", "F32"}

    flip_byte_of(path, "center.values", offset=3)

    (fault,) = CompressedCheckpoint(tmp_path / "c").faults()
    assert fault.startswith(path.name)


def test_target_bytes_count_the_centre_by_its_codec(family_folder, tmp_path):
    # Dense centres alone take a quarter; rounded ones leave room for residuals.
    options = {"codec": "pruned", "center_codec": "rounded", "target_bytes": 0.2}
    compress(family_folder("mixtral"), tmp_path / "c", **options)

    ratio = describe(CompressedCheckpoint(tmp_path / "c"))["experts"]["ratio"]
    assert 0.19 < ratio <= 0.2


def _compress_rounded(source, output, workers=None):
    checkpoint = SourceCheckpoint(source)
    layers = list(range(len(checkpoint.sites)))
    chosen = compression_settings(groups=2, layers=layers, center_codec="rounded", codec="rounded")
    Compression(checkpoint, output, chosen, workers).run()


def _on_a_rank(source, output):
    _compress_rounded(source, output, DeepSpeedWorkers())


def test_ranks_that_import_the_codec_make_the_same_bytes(family_folder, tmp_path):
    source = family_folder("mixtral")
    _compress_rounded(source, tmp_path / "one")
    run_on_ranks(2, _on_a_rank, source, tmp_path / "two")

    assert contents(tmp_path / "two") == contents(tmp_path / "one")
