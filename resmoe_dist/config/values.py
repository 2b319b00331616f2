"""Values of options: how users and YAML files write them, and what is valid."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator

from resmoe_dist.sizes import parse_share, parse_size


def _layer_positions(value: Any) -> Any:
    """YAML reads `layers: 2` as a number and `layers: [0, 2]` as a list; options are text."""
    if isinstance(value, list):
        return ",".join(str(position) for position in value)
    return str(value) if isinstance(value, int) else value


def _shares(value: Any) -> Any:
    """From `0.25,50%`, or a list or number of a file."""
    parts = value if isinstance(value, list) else str(value).split(",")
    return [parse_share(part) for part in parts]


def _positive(shares: list[float]) -> list[float]:
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ValueError("each share must lie in (0, 1]")
    return shares


def _names(value: Any) -> Any:
    """From `piqa,winogrande`, or a list of a file."""
    return value if isinstance(value, list) else [part.strip() for part in str(value).split(",")]


Dtype = Literal["float32", "float16", "bfloat16"]
# 0.35 or 35%.
Share = Annotated[float, BeforeValidator(parse_share)]
# 25%,50%; a file may give a list.
Shares = Annotated[list[float], BeforeValidator(_shares), AfterValidator(_positive)]
# piqa,winogrande; a file may give a list.
Names = Annotated[list[str], BeforeValidator(_names)]
# Bytes, written 8GB or 7500MiB.
Size = Annotated[int, BeforeValidator(parse_size)]
# all, last:24, 8-31 or 0,2.
Layers = Annotated[str, BeforeValidator(_layer_positions)]


def _as_list(value: Any) -> Any:
    """A file may give a single text: `prompt: The lighthouse`."""
    return [value] if isinstance(value, str) else value


def _not_empty(prompts: list[str]) -> list[str]:
    if not prompts or not all(prompts):
        raise ValueError("a prompt is empty; give text to continue")
    return prompts


Prompts = Annotated[list[str], BeforeValidator(_as_list), AfterValidator(_not_empty)]
