"""Write a version-3 checkpoint as versions 2 and 1 did. Does not use the program's own upgrade."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file


def as_version_2(folder: Path) -> Path:
    """Rewrite a checkpoint of method `resmoe` with dense centres, in place."""
    index = json.loads((folder / "resmoe.json").read_text())
    index["format_version"] = 2
    del index["digest"]
    index["settings"] = _settings(index["settings"])
    for layer in index["layers"]:
        assert layer.pop("expert_map") is None
        assert layer.pop("center_codec") in ("dense", None)
        layer.pop("method")
        layer["codec"] = layer.pop("residual_codec")
        for group in layer["groups"]:
            sizes = group.pop("residual_bytes")
            group["value_bytes"] = sizes.get("values", 0)
            group["index_bytes"] = sizes.get("indices", 0)
            _rename_center(folder / group["file"]["file"], group["file"])
    (folder / "resmoe.json").write_text(json.dumps(index, indent=2))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "resmoe",
        "format_version": 2,
        "groups": index["settings"]["groups"],
        "codec": index["settings"]["codec"],
        "keep": index["settings"]["keep"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    for entry in index["other_files"]:
        if entry["file"] == "config.json":
            _describe(folder / "config.json", entry)
    (folder / "resmoe.json").write_text(json.dumps(index, indent=2))
    return folder


def as_version_1(folder: Path) -> Path:
    """Rewrite a checkpoint of version 2 with the fields of version 1 only, in place."""
    index = json.loads((folder / "resmoe.json").read_text())
    assert index["format_version"] == 2
    index["format_version"] = 1
    known = {"groups", "keep", "codec", "align", "center", "layers", "dtype"}
    index["settings"] = {key: index["settings"][key] for key in known}
    known = {"file", "experts", "squared_errors", "squared_norms", "source_bytes", "objective"}
    known |= {"center_bytes", "value_bytes", "index_bytes"}
    for layer in index["layers"]:
        layer["groups"] = [{key: group[key] for key in known} for group in layer["groups"]]
    (folder / "resmoe.json").write_text(json.dumps(index))
    return folder


def _settings(settings: dict[str, Any]) -> dict[str, Any]:
    method, residual = settings["method"]["options"], settings["residual_codec"]
    return {
        "groups": settings["groups"],
        "groups_per_rank": settings["groups_per_rank"],
        "keep": residual["options"]["keep"],
        "target_bytes": settings["target_bytes"],
        "allocate": method["allocate"],
        "codec": residual["name"],
        "align": method["align"],
        "solver": method["solver"],
        "center": method["center"],
        "calibration": settings["calibration"],
        "layers": settings["layers"],
        "dtype": settings["dtype"],
    }


def _rename_center(path: Path, entry: dict[str, Any]) -> None:
    """Give the centre of a group file its old name, and describe the new file in its entry."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    if "center.weight" in tensors:
        tensors["center"] = tensors.pop("center.weight")
    save_file(tensors, path, metadata=metadata)
    _describe(path, entry)


def _describe(path: Path, entry: dict[str, Any]) -> None:
    entry["bytes"] = path.stat().st_size
    entry["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
