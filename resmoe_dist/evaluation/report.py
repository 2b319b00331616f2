"""Bytes and errors of a compressed checkpoint, measured from its files, as a table and as JSON.

Legend: N experts, I rows, D columns.
"""

from __future__ import annotations

from typing import Any

from resmoe_dist.checkpoints.compressed import STORED_DTYPES, CompressedCheckpoint, LayerEntry
from resmoe_dist.checkpoints.tensor_files import tensor_bytes
from resmoe_dist.codecs import codec_named


def describe(checkpoint: CompressedCheckpoint) -> dict[str, Any]:
    """Settings, and per layer and in total: error, and bytes before and after by kind.

    `error` is (1/N) Σ_k ‖T_k W_k − restored_k‖² (paper 001, appendix A.6), `relative_error` its
    share of (1/N) Σ_k ‖W_k‖², `weighted_relative_error` the same in the activation-weighted norm.
    `keep` is the share of residual entries kept. These last two are None where the index does not
    say. `groups_without_center` leaves layers stored dense out. Bytes are what the files' headers
    say lies in them; `dense_bytes` is what the experts would take dense in the stored dtype,
    `source_bytes` what they took in theirs.
    """
    index = checkpoint.index
    layers = [_describe_layer(checkpoint, layer) for layer in index.layers]
    keys = ("source_bytes", "dense_bytes")
    keys += ("center_bytes", "value_bytes", "index_bytes", "stored_bytes")
    total: dict[str, Any] = {key: sum(layer[key] for layer in layers) for key in keys}
    total["ratio"] = total["stored_bytes"] / total["source_bytes"]
    total |= _accuracy([layer for layer in index.layers if layer.codec != "dense"])
    total["groups_without_center"] = sum(layer["groups_without_center"] for layer in layers)
    other = sum(
        sum(tensor_bytes(checkpoint.folder / entry.file).values())
        for entry in index.other_files
        if entry.file.endswith(".safetensors")
    )
    return {
        "folder": str(checkpoint.folder),
        "format_version": index.format_version,
        "producer": index.producer,
        "settings": index.settings.model_dump(),
        "layers": layers,
        "experts": total,
        "other_bytes": other,
        "total_bytes": other + total["stored_bytes"],
    }


def _describe_layer(checkpoint: CompressedCheckpoint, layer: LayerEntry) -> dict[str, Any]:
    bytes_by_kind = {"center": 0, "value": 0, "index": 0}
    for group in layer.groups:
        for name, size in tensor_bytes(checkpoint.folder / group.file.file).items():
            bytes_by_kind[_kind(name)] += size
    stored = sum(bytes_by_kind.values())
    source = sum(group.source_bytes for group in layer.groups)
    error = sum(e for group in layer.groups for e in group.squared_errors) / layer.num_experts
    norm = sum(n for group in layer.groups for n in group.squared_norms) / layer.num_experts
    return {
        "module": layer.module,
        "codec": layer.codec,
        "dtype": layer.dtype,
        "experts": layer.num_experts,
        "groups": len(layer.groups),
        "groups_without_center": _groups_without_center(layer),
        "rows": layer.rows,
        "columns": layer.shape.columns,
        "error": error,
        "norm": norm,
        **_accuracy([layer]),
        "source_bytes": source,
        "dense_bytes": _dense_bytes(layer),
        "center_bytes": bytes_by_kind["center"],
        "value_bytes": bytes_by_kind["value"],
        "index_bytes": bytes_by_kind["index"],
        "stored_bytes": stored,
        "ratio": stored / source,
        "bits_per_entry": 8 * stored / (layer.num_experts * layer.shape.entries),
    }


def _accuracy(layers: list[LayerEntry]) -> dict[str, float | None]:
    """Relative errors and kept share over all experts of some layers."""
    groups = [group for layer in layers for group in layer.groups]
    errors = [group.weighted_squared_errors for group in groups]
    norms = [group.weighted_squared_norms for group in groups]
    calibrated = bool(groups) and None not in errors + norms
    masked = bool(groups) and all(group.keep is not None for group in groups)
    sizes = [len(g.experts) * layer.shape.entries for layer in layers for g in layer.groups]
    return {
        "relative_error": _relative(
            [group.squared_errors for group in groups], [group.squared_norms for group in groups]
        ),
        "weighted_relative_error": _relative(errors, norms) if calibrated else None,
        "keep": (
            sum(group.keep * size for group, size in zip(groups, sizes, strict=True)) / sum(sizes)
            if masked
            else None
        ),
    }


def _relative(errors: list[list[float]], norms: list[list[float]]) -> float:
    norm = sum(map(sum, norms))
    return sum(map(sum, errors)) / norm if norm else 0.0


def _groups_without_center(layer: LayerEntry) -> int:
    return sum(codec_named(layer.codec).uses_center and not g.has_center for g in layer.groups)


def _dense_bytes(layer: LayerEntry) -> int:
    values = layer.shape.entries + (layer.hidden if layer.output_bias else 0)
    return layer.num_experts * values * STORED_DTYPES[layer.dtype].itemsize


def _kind(tensor_name: str) -> str:
    if tensor_name == "center":
        return "center"
    return "index" if tensor_name.endswith((".bitmap", ".row_offsets")) else "value"


def layer_table(description: dict[str, Any]) -> str:
    """The layers and the total of `describe` as a text table."""
    layers, total = description["layers"], description["experts"]
    rows = [_row(layer["module"], layer) for layer in layers]
    rows.append(_row("all experts", {"codec": "", "groups": "", "error": None} | total))
    # A column that there is nothing to say in is left out.
    header = [name for name in rows[0] if any(row[name] for row in rows)]
    lines = [text_table(header, [[row[name] for name in header] for row in rows], left=2)]
    if without := total["groups_without_center"]:
        groups = sum(layer["groups"] for layer in layers if layer["codec"] != "dense")
        asked_for = description["settings"]["center"] == "none"
        why = "as --center none asks" if asked_for else "there it would not pay for its bytes"
        lines.append(f"no centre in {without} of {groups} groups: {why}")
    if total["dense_bytes"] != total["source_bytes"]:
        # Narrower values alone are no achievement of the compression.
        share = total["stored_bytes"] / total["dense_bytes"]
        dense = human_bytes(total["dense_bytes"])
        lines.append(f"dense experts in the stored dtype would take {dense}: {share:.1%} of that")
    if total["stored_bytes"] >= total["dense_bytes"]:
        lines.append("no smaller than dense: share centres among more experts, or keep less")
    lines.append(
        f"everything else {human_bytes(description['other_bytes'])}, "
        f"the whole checkpoint {human_bytes(description['total_bytes'])}"
    )
    return "\n".join(lines)


def _row(name: str, values: dict[str, Any]) -> dict[str, str]:
    """Cells by column."""

    def cell(value: float | None, digits: str) -> str:
        return "" if value is None else format(value, digits)

    return {
        "layer": name,
        "codec": values["codec"],
        "groups": str(values["groups"]),
        "keep": cell(values["keep"], ".3f"),
        "error": cell(values["error"], ".4g"),
        "relative": cell(values["relative_error"], ".4f"),
        "weighted": cell(values["weighted_relative_error"], ".4f"),
        "before": human_bytes(values["source_bytes"]),
        "centre": human_bytes(values["center_bytes"]),
        "values": human_bytes(values["value_bytes"]),
        "indices": human_bytes(values["index_bytes"]),
        "after": human_bytes(values["stored_bytes"]),
        "share": f"{values['ratio']:.1%}",
    }


def text_table(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    """Columns aligned: the first `left` to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: list[str]) -> str:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def human_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
