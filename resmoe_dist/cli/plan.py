"""`plan`: what a model needs on a grid, from its config or the index of a compressed folder."""

from __future__ import annotations

from resmoe_dist.checkpoints.entries import STORED_DTYPES
from resmoe_dist.checkpoints.format import CompressionSettings, MethodSpec, is_compressed
from resmoe_dist.checkpoints.tensor_files import check_writable, write_json
from resmoe_dist.config.commands import PlanConfig
from resmoe_dist.config.storage import StorageConfig
from resmoe_dist.errors import UserError
from resmoe_dist.footprint.grid import Footprint, footprint, grid_for, grids_up_to
from resmoe_dist.footprint.layout import CheckpointLayout, Layout, SettingsLayout
from resmoe_dist.footprint.report import as_json, footprint_table, grid_table
from resmoe_dist.footprint.structure import ModelStructure, read_structure
from resmoe_dist.jobs.settings import parse_codecs, parse_layers, with_budget
from resmoe_dist.launch.compress import target_share
from resmoe_dist.parallel.entry_point import quiet_libraries


def run_plan(config: PlanConfig) -> int:
    """Print the asked grid, then every grid; exit code 0."""
    quiet_libraries()
    if config.json_file:
        check_writable(config.json_file)
    dtype = STORED_DTYPES[config.dtype] if config.dtype else None
    structure = read_structure(config.model, config.context, dtype)
    layout = layout_of(config, structure)
    grid = grid_for(config.ep, config.tp, config.lanes, config.batch_size)
    asked = footprint(structure, layout, grid, config.batch_size)
    print(footprint_table(structure, asked, config.gpu_memory))
    found: list[Footprint] = []
    refused: dict[int, str] = {}
    for other in grids_up_to(structure, config.ranks, config.lanes, config.batch_size):
        try:
            found.append(footprint(structure, layout, other, config.batch_size))
        except UserError as error:
            refused[other.ep] = str(error)
    if found:
        print(f"\n{grid_table(found, config.gpu_memory)}")
    for ep, reason in refused.items():
        print(f"ep {ep}: {reason}")
    if config.json_file:
        write_json(config.json_file, as_json(structure, asked, found, config.gpu_memory))
    return 0


def layout_of(config: PlanConfig, structure: ModelStructure) -> Layout:
    """How the experts are or will be stored.

    Raises UserError for unknown codecs or layers, and for options that a compressed folder has
    settled.
    """
    if is_compressed(config.model):
        settled = (set(StorageConfig.model_fields) | {"groups"}) - {"dtype"}
        if given := sorted(settled & config.model_fields_set):
            raise UserError(
                f"{config.model}: compressed already; leave {config.shown_name(given[0])} out, or "
                "give the model it was made from"
            )
        return CheckpointLayout(config.model)
    residual, center = parse_codecs(config.residual_text, config.center_text)
    if config.keep is not None:
        residual = with_budget(residual, config.keep)
    settings = CompressionSettings(
        groups=config.groups or config.ep,
        groups_per_rank=config.clusters,
        method=MethodSpec(name="resmoe"),
        center_codec=center,
        residual_codec=residual,
        target_bytes=target_share(config, structure.source_dtype.itemsize),
        layers=parse_layers(config.layers, len(structure.sites)),
        dtype=config.dtype,
    )
    return SettingsLayout(structure, settings, fixed_groups=config.groups is not None)
