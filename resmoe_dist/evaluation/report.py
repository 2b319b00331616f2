"""Bytes and errors of a compressed checkpoint, measured from its files, as a table and as JSON."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from resmoe_dist.checkpoints.compressed import CompressedCheckpoint
from resmoe_dist.checkpoints.entries import STORED_DTYPES, LayerEntry
from resmoe_dist.checkpoints.tensor_files import tensor_bytes
from resmoe_dist.codecs import BYTE_KINDS, ByteKind
from resmoe_dist.evaluation.tables import human_bytes, text_table

_NO_BYTES = "0 B"


def describe(checkpoint: CompressedCheckpoint) -> dict[str, Any]:
    """Settings, and per layer and in total: error, and bytes before and after by kind.

    `error` is (1/E) Σ_k ‖T_k W_k − restored_k‖² over the E experts of the layer (paper 001,
    appendix A.6), `relative_error` its share of (1/E) Σ_k ‖W_k‖², `weighted_relative_error` the
    same in the activation-weighted norm. `keep` is the share of residual entries kept. The last two
    are None if the index does not have them. `router` is the agreement of a refitted router with
    the source's, None if it is the source's. `sensitivity` is the layer's, in nats per token and
    share of energy lost, None if the index has none. `groups_without_center` does not count layers
    that the settings left out. Bytes are those in the files' headers, `residual_bytes` by kind.
    `dense_bytes` is what the experts would take dense in the stored dtype, `source_bytes` what they
    took in the source.

    Raises UserError if a file is missing or does not fit the index.
    """
    index = checkpoint.index
    chosen = set(index.settings.layers)
    layers = [
        _describe_layer(checkpoint, layer, is_compressed=i in chosen)
        for i, layer in enumerate(index.layers)
    ]
    keys = ("source_bytes", "dense_bytes", "center_bytes", "stored_bytes")
    total: dict[str, Any] = {key: sum(layer[key] for layer in layers) for key in keys}
    total["residual_bytes"] = _sum_by_kind(layer["residual_bytes"] for layer in layers)
    total["ratio"] = total["stored_bytes"] / total["source_bytes"]
    total |= _accuracy([layer for i, layer in enumerate(index.layers) if i in chosen])
    total["router"] = _mean_agreement([layer["router"] for layer in layers])
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


def _describe_layer(
    checkpoint: CompressedCheckpoint, layer: LayerEntry, *, is_compressed: bool
) -> dict[str, Any]:
    for group in layer.groups:
        # Raises unless the bytes in the file are those of the index.
        checkpoint.open_group(layer, group)
    stored = sum(group.stored_bytes for group in layer.groups)
    source = sum(group.source_bytes for group in layer.groups)
    error = sum(e for group in layer.groups for e in group.squared_errors) / layer.num_experts
    norm = sum(n for group in layer.groups for n in group.squared_norms) / layer.num_experts
    without_center = sum(not group.has_center for group in layer.groups)
    return {
        "module": layer.module,
        "method": layer.method,
        "center_codec": layer.center_codec,
        "residual_codec": layer.residual_codec,
        "compressed": is_compressed,
        "dtype": layer.dtype,
        "experts": layer.num_experts,
        "stored_experts": layer.stored_experts,
        "groups": len(layer.groups),
        "groups_without_center": without_center if is_compressed else 0,
        "router": None if layer.router is None else layer.router.model_dump(),
        "sensitivity": layer.sensitivity,
        "rows": layer.rows,
        "columns": layer.shape.columns,
        "bits": _counted(bits for group in layer.groups for bits in group.residual_bits or []),
        "center_bits": _counted(group.center_bits for group in layer.groups),
        "error": error,
        "norm": norm,
        **_accuracy([layer]),
        "source_bytes": source,
        "dense_bytes": _dense_bytes(layer),
        "center_bytes": sum(group.center_bytes for group in layer.groups),
        "residual_bytes": _sum_by_kind(group.residual_bytes for group in layer.groups),
        "stored_bytes": stored,
        "ratio": stored / source,
        "bits_per_entry": 8 * stored / (layer.num_experts * layer.source_shape.entries),
    }


def _mean_agreement(routers: Sequence[dict[str, float] | None]) -> dict[str, float] | None:
    """The mean over the refitted routers; None if no router was refitted."""
    refitted = [router for router in routers if router is not None]
    if not refitted:
        return None
    return {key: statistics.fmean(router[key] for router in refitted) for key in refitted[0]}


def _counted(bits: Iterable[int | None]) -> dict[int, int]:
    """How many matrices have how many bits."""
    return dict(sorted(Counter(each for each in bits if each is not None).items()))


def _sum_by_kind(parts: Iterable[Mapping[ByteKind, int]]) -> dict[ByteKind, int]:
    """Bytes of every kind, also of those that no part has."""
    total: Counter[ByteKind] = Counter(dict.fromkeys(BYTE_KINDS, 0))
    for part in parts:
        total.update(part)
    return dict(total)


def _accuracy(layers: list[LayerEntry]) -> dict[str, float | None]:
    """Relative errors and kept share over all experts of some layers."""
    groups = [group for layer in layers for group in layer.groups]
    errors = [e for group in groups if (e := group.weighted_squared_errors) is not None]
    norms = [n for group in groups if (n := group.weighted_squared_norms) is not None]
    calibrated = len(errors) == len(norms) == len(groups) > 0
    keeps = [group.keep for group in groups if group.keep is not None]
    masked = len(keeps) == len(groups) > 0
    sizes = [len(g.experts) * layer.source_shape.entries for layer in layers for g in layer.groups]
    return {
        "relative_error": _relative(
            [group.squared_errors for group in groups], [group.squared_norms for group in groups]
        ),
        "weighted_relative_error": _relative(errors, norms) if calibrated else None,
        "keep": (
            sum(keep * size for keep, size in zip(keeps, sizes, strict=True)) / sum(sizes)
            if masked
            else None
        ),
    }


def _relative(errors: list[list[float]], norms: list[list[float]]) -> float:
    norm = sum(map(sum, norms))
    return sum(map(sum, errors)) / norm if norm else 0.0


def _dense_bytes(layer: LayerEntry) -> int:
    values = layer.source_shape.entries + (layer.hidden if layer.output_bias else 0)
    return layer.num_experts * values * STORED_DTYPES[layer.dtype].itemsize


def settings_line(settings: dict[str, Any]) -> str:
    """Settings of `describe` as text: `groups 4, residual_codec pruned (keep 0.25)`."""
    shown = {key: value for key, value in settings.items() if key not in ("layers", "calibration")}
    return ", ".join(
        f"{key} {_setting(value)}" for key, value in shown.items() if value is not None
    )


def _setting(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    options = ", ".join(f"{key} {option}" for key, option in value["options"].items())
    return f"{value['name']} ({options})" if options else value["name"]


def layer_table(description: dict[str, Any]) -> str:
    """The layers and the total of `describe` as a text table."""
    layers, total = description["layers"], description["experts"]
    rows = [_row(layer["module"], _codecs_of(layer), layer) for layer in layers]
    rows.append(_row("all experts", "", {"groups": "", "error": None} | total))
    # Columns that are empty or zero in all rows are left out.
    header = [name for name in rows[0] if any(row[name] not in ("", _NO_BYTES) for row in rows)]
    lines = [text_table(header, [[row[name] for name in header] for row in rows], left=2)]
    lines += _center_remarks([layer for layer in layers if layer["compressed"]])
    if total["dense_bytes"] != total["source_bytes"]:
        # A narrower dtype alone is not counted as compression.
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


def _codecs_of(layer: dict[str, Any]) -> str:
    """`dense + pruned`: the codecs of centres and residuals."""
    return " + ".join(filter(None, (layer["center_codec"], layer["residual_codec"])))


def _center_remarks(compressed: list[dict[str, Any]]) -> list[str]:
    """Lines about groups without a centre: by choice of the settings, or of the method."""
    groups = sum(layer["groups"] for layer in compressed)
    remarks = []
    for by_settings, why in (
        (True, "as the settings ask"),
        (False, "there it would not pay for its bytes"),
    ):
        without = sum(
            layer["groups_without_center"]
            for layer in compressed
            if (layer["center_codec"] is None) is by_settings
        )
        if without:
            remarks.append(f"no centre in {without} of {groups} groups: {why}")
    return remarks


def _shown_bits(counts: Mapping[int, int]) -> str:
    """`2×5 3×3`: five matrices with 2 bits per entry and three with 3."""
    return " ".join(f"{bits}×{count}" for bits, count in counts.items())


def _shown_router(agreement: Mapping[str, float] | None) -> str:
    """`96.1% → 97.2%`: the share of the source's choices that a router makes too."""
    if agreement is None:
        return ""
    return f"{agreement['agreement_before']:.1%} → {agreement['agreement_after']:.1%}"


def _row(name: str, codecs: str, values: dict[str, Any]) -> dict[str, str]:
    """Cells by column."""

    def cell(value: float | None, digits: str) -> str:
        return "" if value is None else format(value, digits)

    residual_bytes = values["residual_bytes"]
    return {
        "layer": name,
        "codec": codecs,
        "groups": str(values["groups"]),
        "keep": cell(values["keep"], ".3f"),
        "bits": _shown_bits(values.get("bits", {})),
        "centre bits": _shown_bits(values.get("center_bits", {})),
        "error": cell(values["error"], ".4g"),
        "relative": cell(values["relative_error"], ".4f"),
        "weighted": cell(values["weighted_relative_error"], ".4f"),
        "sensitivity": cell(values.get("sensitivity"), ".3g"),
        "routing": _shown_router(values["router"]),
        "before": human_bytes(values["source_bytes"]),
        "centre": human_bytes(values["center_bytes"]),
        **{kind: human_bytes(residual_bytes[kind]) for kind in BYTE_KINDS},
        "after": human_bytes(values["stored_bytes"]),
        "share": f"{values['ratio']:.1%}",
    }
