"""Footprints as text tables and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from resmoe_dist.checkpoints.entries import dtype_name
from resmoe_dist.codecs import CodecSpec
from resmoe_dist.evaluation.tables import human_bytes, text_table
from resmoe_dist.footprint.grid import Footprint
from resmoe_dist.footprint.layout import StoredExperts
from resmoe_dist.footprint.structure import ModelStructure


def footprint_table(
    structure: ModelStructure, found: Footprint, gpu_memory: int | None = None
) -> str:
    """What a rank of one grid holds, compressed and dense. gpu_memory: bytes of each rank."""
    grid, dense_disk = found.grid, dense_bytes(structure)
    rows = [
        *_expert_rows(found),
        ["everything else", human_bytes(found.other), human_bytes(found.other)],
        ["KV cache", human_bytes(found.cache), human_bytes(found.cache)],
        ["together", human_bytes(found.total), human_bytes(found.dense_total)],
    ]
    if gpu_memory is not None:
        fits = [_fits(total, gpu_memory) for total in (found.total, found.dense_total)]
        rows.append([f"fits {human_bytes(gpu_memory)}", *fits])
    rows.append(["on disk, in all", human_bytes(found.stored.disk_bytes), human_bytes(dense_disk)])
    lines = [
        f"{structure.kind}: {structure.parameters / 1e9:.1f} B parameters, "
        f"{dtype_name(structure.dtype)}; experts as {_codecs(found.stored)}",
        f"ep {grid.ep} x tp {grid.tp}, lanes {grid.lanes}; on each rank {found.sequences} of "
        f"{found.batch_size} sequences of {structure.context} tokens",
        text_table(["bytes per rank", "compressed", "dense"], rows),
        "leave room for activations, which are not counted",
    ]
    if gpu_memory is not None:
        need = dense_disk + structure.cache_bytes * found.batch_size
        lines.append(
            f"the dense model with its KV cache needs {human_bytes(need)}: at least "
            f"{-(-need // gpu_memory)} GPUs of {human_bytes(gpu_memory)}"
        )
    if structure.quantization is not None:
        lines.append(
            f"the source is quantised ({structure.quantization}); its figures here are for "
            f"{dtype_name(structure.source_dtype)}"
        )
    return "\n".join(lines)


def _expert_rows(found: Footprint) -> list[list[str]]:
    dense = human_bytes(found.dense_experts)
    if found.stored.settings.chooses_bits:
        return [["experts", human_bytes(found.experts.total), dense]]
    return [
        ["centres", human_bytes(found.experts.center), "-"],
        ["residuals", human_bytes(found.experts.residual), dense],
    ]


def grid_table(footprints: Sequence[Footprint], gpu_memory: int | None = None) -> str:
    """One line per grid: bytes of the rank that holds most."""
    header = [
        "ep",
        "tp",
        "ranks",
        "lanes",
        "experts",
        "other",
        "KV cache",
        "together",
        "dense",
        "disk",
    ]
    if gpu_memory is not None:
        header += ["fits", "dense fits"]
    rows = []
    for found in footprints:
        grid = found.grid
        row = [str(number) for number in (grid.ep, grid.tp, grid.replica_size, grid.lanes)]
        parts = [found.experts.total, found.other, found.cache, found.total, found.dense_total]
        parts.append(found.stored.disk_bytes)
        row += [human_bytes(part) for part in parts]
        if gpu_memory is not None:
            row += [_fits(total, gpu_memory) for total in (found.total, found.dense_total)]
        rows.append(row)
    return text_table(header, rows, left=0)


def dense_bytes(structure: ModelStructure) -> int:
    """Bytes of the whole model, not compressed, in the dtype that it has in memory."""
    itemsize = structure.dtype.itemsize
    experts = sum(
        site.num_experts
        * (site.shape.entries + (site.shape.hidden if site.shape.output_bias else 0))
        for site in structure.sites
    )
    return experts * itemsize + structure.other_bytes


def as_json(
    structure: ModelStructure,
    asked: Footprint,
    footprints: Sequence[Footprint],
    gpu_memory: int | None,
) -> dict[str, Any]:
    """Everything that the tables show, in bytes."""
    return {
        "model": structure.kind,
        "parameters": structure.parameters,
        "dtype": dtype_name(structure.dtype),
        "moe_layers": len(structure.sites),
        "context": structure.context,
        "batch_size": asked.batch_size,
        "cache_bytes_per_sequence": structure.cache_bytes,
        "dense_bytes": dense_bytes(structure),
        "gpu_memory": gpu_memory,
        "settings": asked.stored.settings.model_dump(),
        "grid": _grid_json(asked, gpu_memory),
        "grids": [_grid_json(found, gpu_memory) for found in footprints],
    }


def _grid_json(found: Footprint, gpu_memory: int | None) -> dict[str, Any]:
    grid = found.grid
    written: dict[str, Any] = {
        "ep": grid.ep,
        "tp": grid.tp,
        "lanes": grid.lanes,
        "center_bytes": found.experts.center,
        "residual_bytes": found.experts.residual,
        "other_bytes": found.other,
        "cache_bytes": found.cache,
        "total_bytes": found.total,
        "dense_total_bytes": found.dense_total,
        "disk_bytes": found.stored.disk_bytes,
    }
    if gpu_memory is not None:
        written["fits"] = found.total <= gpu_memory
        written["dense_fits"] = found.dense_total <= gpu_memory
    return written


def _fits(total: int, gpu_memory: int) -> str:
    return "yes" if total <= gpu_memory else "no"


def _codecs(stored: StoredExperts) -> str:
    """`dense + pruned (keep 0.25), groups per layer 4`: centres, then residuals."""
    settings = stored.settings
    if settings.chooses_bits:
        codecs = (
            f"{settings.residual_codec.name}, {settings.target_bytes:.2%} of the dense bytes with "
            "centres"
        )
    else:
        codecs = f"{_codec(settings.center_codec)} + {_codec(settings.residual_codec)}"
    groups = " or ".join(str(n) for n in sorted({len(layer.groups) for layer in stored.layers}))
    layers = f" in {len(settings.layers)} of {len(stored.layers)} layers"
    return (
        f"{codecs}, groups per layer "
        f"{groups}{layers if len(settings.layers) < len(stored.layers) else ''}"
    )


def _codec(spec: CodecSpec) -> str:
    options = ", ".join(
        f"{name} {option:.4g}" if isinstance(option, float) else f"{name} {option}"
        for name, option in spec.options.items()
    )
    return f"{spec.name} ({options})" if options else spec.name
