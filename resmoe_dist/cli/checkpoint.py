"""`inspect`, `verify` and `restore`: commands on a compressed folder."""

from __future__ import annotations

from resmoe_dist.checkpoints.compressed import CompressedCheckpoint
from resmoe_dist.checkpoints.entries import STORED_DTYPES
from resmoe_dist.checkpoints.restore import restore_checkpoint
from resmoe_dist.checkpoints.tensor_files import check_writable, write_json
from resmoe_dist.config.commands import InspectConfig, RestoreConfig, VerifyConfig
from resmoe_dist.evaluation.report import describe, layer_table, settings_line


def run_inspect(config: InspectConfig) -> int:
    """Print what a folder holds; exit code 0."""
    if config.json_file:
        check_writable(config.json_file)
    description = describe(CompressedCheckpoint(config.folder))
    settings = settings_line(description["settings"])
    print(f"{config.folder}: {settings}; written by {description['producer']}")
    print(layer_table(description))
    if config.json_file:
        write_json(config.json_file, description)
    return 0


def run_verify(config: VerifyConfig) -> int:
    """Print one line for each bad file; exit code 1 if there is any."""
    checkpoint = CompressedCheckpoint(config.folder)
    faults = checkpoint.faults()
    for fault in faults:
        print(fault)
    if faults:
        return 1
    print(f"{config.folder}: all {len(checkpoint.files())} files are whole")
    return 0


def run_restore(config: RestoreConfig) -> int:
    """Write the dense model; exit code 0."""
    dtype = STORED_DTYPES[config.dtype] if config.dtype else None
    remarks = restore_checkpoint(config.folder, config.output, dtype, full_rows=config.full_rows)
    print(f"{config.output}: dense model written")
    for remark in remarks:
        print(remark)
    return 0
