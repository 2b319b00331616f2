"""What `inspect` shows adds up, and agrees with the files and tensors."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from resmoe_dist.checkpoints.compressed import CompressedCheckpoint
from resmoe_dist.checkpoints.restore import restore_checkpoint
from resmoe_dist.evaluation.report import describe, human_bytes, layer_table, settings_line
from tests.checkpoints.damage import bytes_by_tensor, copy_of, edit_tensors
from tests.models import compress

CASES = [
    ("mixtral", {"groups": 2}),
    ("mixtral", {"groups": 4, "codec": "low_rank"}),
    ("mixtral", {"layers": [1]}),
    ("gpt_oss", {"groups": 2, "dtype": "bfloat16"}),
    ("switch", {}),
]
NAMES = [f"{name}-{'-'.join(map(str, changes.values()))}" for name, changes in CASES]


@pytest.fixture(scope="module", params=CASES, ids=NAMES)
def case(request, family_folder, tmp_path_factory):
    """The source, the compressed folder and its description."""
    name, changes = request.param
    folder = tmp_path_factory.mktemp(name) / "c"
    compress(family_folder(name), folder, **changes)
    return family_folder(name), folder, describe(CompressedCheckpoint(folder))


def _expert_tensors(folder):
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
        if ".experts." in name
    }


def test_bytes_are_those_in_the_files(case):
    _, folder, found = case
    sizes = {
        (path.name, name): size
        for path in folder.glob("*.safetensors")
        for name, size in bytes_by_tensor(path).items()
    }
    experts = {key: size for key, size in sizes.items() if key[0].startswith("resmoe-")}

    total = found["experts"]
    assert total["stored_bytes"] == sum(experts.values())
    assert found["other_bytes"] == sum(sizes.values()) - sum(experts.values())
    assert found["total_bytes"] == sum(sizes.values())
    assert total["center_bytes"] == sum(
        s for (_, name), s in experts.items() if name == "center.weight"
    )
    indices = ("bitmap", "row_offsets")
    assert total["residual_bytes"]["indices"] == sum(
        s for (_, name), s in experts.items() if name.rpartition(".")[2] in indices
    )


def test_bytes_of_the_kinds_and_of_the_layers_add_up(case):
    _, _, found = case
    layers, total = found["layers"], found["experts"]
    for part in [*layers, total]:
        kinds = part["residual_bytes"]
        assert set(kinds) == {"values", "indices", "scales"}
        assert part["stored_bytes"] == part["center_bytes"] + sum(kinds.values())
        assert part["ratio"] == part["stored_bytes"] / part["source_bytes"]
    for key in ("source_bytes", "center_bytes", "stored_bytes"):
        assert total[key] == sum(layer[key] for layer in layers)
    for kind, size in total["residual_bytes"].items():
        assert size == sum(layer["residual_bytes"][kind] for layer in layers)


def test_bytes_recorded_in_the_index_are_those_described(case):
    _, folder, found = case
    for layer, described in zip(
        CompressedCheckpoint(folder).index.layers, found["layers"], strict=True
    ):
        assert described["stored_bytes"] == sum(group.stored_bytes for group in layer.groups)
        assert described["center_bytes"] == sum(group.center_bytes for group in layer.groups)
        for kind, size in described["residual_bytes"].items():
            assert size == sum(group.residual_bytes.get(kind, 0) for group in layer.groups)


def test_source_bytes_are_those_of_the_sources_experts(case):
    source, _, found = case
    tensors = _expert_tensors(source).values()
    assert found["experts"]["source_bytes"] == sum(tensor.nbytes for tensor in tensors)


def test_bits_per_entry_count_everything_stored(case):
    _, _, found = case
    for layer in found["layers"]:
        entries = layer["experts"] * layer["rows"] * layer["columns"]
        assert layer["bits_per_entry"] == 8 * layer["stored_bytes"] / entries


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("codec", ["pruned", "low_rank"])
def test_errors_are_the_distance_from_the_source(family_folder, tmp_path, codec, fused):
    # Without alignment the rows keep their order, so tensors can be compared directly.
    source = family_folder("mixtral", fused)
    compress(source, tmp_path / "c", groups=2, align="none", codec=codec)
    restore_checkpoint(tmp_path / "c", tmp_path / "d")
    before, after = _expert_tensors(source), _expert_tensors(tmp_path / "d")

    found = describe(CompressedCheckpoint(tmp_path / "c"))

    errors, norms = [], []
    for i, layer in enumerate(found["layers"]):
        names = [name for name in before if f".layers.{i}." in name]
        error = sum(float((before[n].double() - after[n].double()).square().sum()) for n in names)
        norm = sum(float(before[n].double().square().sum()) for n in names)
        assert layer["error"] == pytest.approx(error / 4, rel=1e-4)
        assert layer["norm"] == pytest.approx(norm / 4, rel=1e-6)
        assert layer["relative_error"] == pytest.approx(error / norm, rel=1e-4)
        errors.append(error)
        norms.append(norm)
    assert found["experts"]["relative_error"] == pytest.approx(sum(errors) / sum(norms), rel=1e-4)


def test_keeping_everything_has_next_to_no_error(family_folder, tmp_path):
    compress(family_folder("mixtral"), tmp_path / "c", keep=1.0)
    found = describe(CompressedCheckpoint(tmp_path / "c"))
    assert found["experts"]["relative_error"] < 1e-12


def test_layers_left_dense_count_as_they_are_and_not_into_the_error(family_folder, tmp_path):
    compress(family_folder("mixtral"), tmp_path / "c", layers=[1])
    dense, compressed = (found := describe(CompressedCheckpoint(tmp_path / "c")))["layers"]

    assert dense["stored_bytes"] == dense["source_bytes"]
    assert dense["error"] == 0
    assert found["experts"]["relative_error"] == compressed["relative_error"]


@pytest.mark.parametrize("layers", [[], [0]])
def test_error_without_compressed_or_nonzero_experts_is_zero(family_folder, tmp_path, layers):
    # No layer is compressed, or the one that is consists of zeros.
    source = copy_of(family_folder("mixtral"), tmp_path / "source")

    def zero(tensors):
        for name, tensor in tensors.items():
            if "layers.0." in name and ".experts." in name:
                tensor.zero_()

    edit_tensors(source / "model.safetensors", zero)
    compress(source, tmp_path / "c", layers=layers)
    assert describe(CompressedCheckpoint(tmp_path / "c"))["experts"]["relative_error"] == 0


def test_description_is_json(case):
    _, _, found = case
    assert json.loads(json.dumps(found)) == found


def test_table_has_a_line_per_layer_and_the_totals(case):
    _, _, found = case
    lines = layer_table(found).splitlines()

    for line, layer in zip(lines[2:], found["layers"], strict=False):
        assert line.startswith(layer["module"])
        assert line.endswith(f"{layer['ratio']:.1%}")
    assert lines[2 + len(found["layers"])].startswith("all experts")
    assert human_bytes(found["total_bytes"]) in lines[-1]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (1024**2, "1.0 MiB"),
        (3 * 1024**3, "3.0 GiB"),
        (2 * 1024**4, "2.0 TiB"),
        (5000 * 1024**4, "5000.0 TiB"),
    ],
)
def test_bytes_for_people(count, text):
    assert human_bytes(count) == text


def test_half_precision_source_counts_two_bytes_per_entry(family_folder, tmp_path):
    source = copy_of(family_folder("mixtral"), tmp_path / "source")

    def halve(tensors):
        tensors.update({name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()})

    edit_tensors(source / "model.safetensors", halve)
    compress(source, tmp_path / "c")
    found = describe(CompressedCheckpoint(tmp_path / "c"))
    assert found["experts"]["source_bytes"] == 2 * 4 * 27 * 60 * 2  # layers, experts, I, D, bytes


def test_narrower_dtype_is_not_counted_as_compression(family_folder, tmp_path):
    compress(family_folder("mixtral"), tmp_path / "c", dtype="bfloat16")
    description = describe(CompressedCheckpoint(tmp_path / "c"))

    experts = description["experts"]
    assert experts["dense_bytes"] * 2 == experts["source_bytes"]
    share = experts["stored_bytes"] / experts["dense_bytes"]
    assert f"in the stored dtype would take {human_bytes(experts['dense_bytes'])}: {share:.1%}" in (
        layer_table(description)
    )


def test_stored_dtype_is_mentioned_only_if_it_differs_from_the_source(family_folder, tmp_path):
    compress(family_folder("mixtral"), tmp_path / "c")

    assert "stored dtype" not in layer_table(describe(CompressedCheckpoint(tmp_path / "c")))


@pytest.mark.parametrize(("groups", "keep", "said"), [(4, 0.25, True), (1, 0.25, False)])
def test_checkpoint_no_smaller_than_dense_says_so(family_folder, tmp_path, groups, keep, said):
    # With one centre per expert, the centres alone are as large as the dense model.
    compress(family_folder("mixtral"), tmp_path / "c", groups=groups, keep=keep)

    assert (
        "no smaller than dense" in layer_table(describe(CompressedCheckpoint(tmp_path / "c")))
    ) is said


def test_codecs_of_centre_and_residuals_are_named(case):
    _, _, found = case
    lines = layer_table(found).splitlines()[2:]
    for line, layer in zip(lines, found["layers"], strict=False):
        codec = layer["residual_codec"]
        expected = codec if layer["center_codec"] is None else f"dense + {codec}"
        assert line.removeprefix(layer["module"]).strip().startswith(f"{expected}  ")


def test_settings_are_shown_in_one_line(family_folder, tmp_path):
    compress(family_folder("mixtral"), tmp_path / "c", groups=2, keep=0.5)

    assert settings_line(describe(CompressedCheckpoint(tmp_path / "c"))["settings"]) == (
        "groups 2, groups_per_rank 1, method resmoe (align loo, solver scipy, center joint, "
        "allocate group), center_codec dense, residual_codec pruned (keep 0.5)"
    )
