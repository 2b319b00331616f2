"""Older versions of the compressed format, read as the current one.

Version 1 had one budget per expert, unless centre and entries were chosen together.
Version 2 added groups that are any partition of the experts, and groups without a centre.
Version 3 stores centres by a codec, names the method, counts bytes by kind, and maps experts.
Version 4 may store fewer rows than the model's experts have; with an expert map, errors are those
of the model's experts.

The functions take and return the parsed JSON of resmoe.json, before it is validated. They raise
KeyError, TypeError or AttributeError if a field that they need is missing or malformed.
"""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]

FORMAT_VERSION = 4


def upgrade(index: Json) -> Json:
    """An index of any known version in the form of the current one.

    `format_version` stays, because the names of stored tensors depend on it.
    """
    if index["format_version"] < 2:
        index = _from_1_to_2(index)
    if index["format_version"] < 3:
        index = _from_2_to_3(index)
    return index


def stored_tensor_name(name: str, format_version: int) -> str:
    """The name of a group file's tensor in files of a format version."""
    return "center" if name == "center.weight" and format_version < 3 else name


def _from_1_to_2(index: Json) -> Json:
    settings = index["settings"]
    allocate = "group" if settings["center"] == "joint" else "expert"
    return index | {"settings": settings | {"allocate": allocate}}


def _from_2_to_3(index: Json) -> Json:
    settings = dict(index["settings"])
    options = {
        "align": settings.pop("align"),
        "solver": settings.pop("solver", "scipy"),
        "center": settings.pop("center"),
        "allocate": settings.pop("allocate", "group"),
    }
    has_centers = options["center"] != "none"
    settings["method"] = {"name": "resmoe", "options": options}
    settings["residual_codec"] = {
        "name": settings.pop("codec"),
        "options": {"keep": settings.pop("keep")},
    }
    layers = [_layer_from_2(layer, has_centers) for layer in index["layers"]]
    return index | {"settings": settings, "layers": layers}


def _layer_from_2(layer: Json, has_centers: bool) -> Json:
    layer = dict(layer)
    codec = layer.pop("codec")
    compressed = codec != "dense"
    layer["method"] = "resmoe" if compressed else "dense"
    layer["center_codec"] = "dense" if compressed and has_centers else None
    layer["residual_codec"] = codec
    layer["groups"] = [_group_from_2(group) for group in layer["groups"]]
    return layer


def _group_from_2(group: Json) -> Json:
    group = dict(group)
    group["residual_bytes"] = {
        "values": group.pop("value_bytes"),
        "indices": group.pop("index_bytes"),
    }
    return group
