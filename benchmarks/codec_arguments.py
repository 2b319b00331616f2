"""The options that say how a benchmark's experts are stored."""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.harness import positive, share
from resmoe_dist.codecs import CodecSpec
from resmoe_dist.codecs.coders import BITS

_CODECS = ("pruned", "low_rank", "quantized")


def add_codec_arguments(parser: argparse.ArgumentParser) -> None:
    """`--codec`, and the options of each codec."""
    add = parser.add_argument
    add("--codec", choices=_CODECS, default="pruned")
    add("--keep", type=share, default=0.25, help="of pruned and low-rank residuals")
    add("--bits", type=int, choices=BITS, default=3, help="of quantised residuals")
    add("--center-bits", type=int, choices=BITS, help="of a quantised centre (default: none)")
    add("--coder", choices=("scalar", "trellis"), default="trellis", help="up to 4 bits")
    add("--group-size", type=positive, help="entries that share a scale (default: of a projection)")


def codec_specs(args: argparse.Namespace) -> tuple[CodecSpec, CodecSpec | None]:
    """Of the residuals, and of the centre if it is quantised."""
    if args.codec != "quantized":
        return CodecSpec(name=args.codec, options={"keep": args.keep}), None

    def spec(bits: int) -> CodecSpec:
        return CodecSpec(name="quantized", options=_quantized_options(args, bits))

    return spec(args.bits), spec(args.center_bits) if args.center_bits else None


def compress_options(args: argparse.Namespace) -> dict[str, Any]:
    """The same as options of `CompressConfig`."""
    if args.codec != "quantized":
        return {"codec": args.codec, "keep": args.keep}

    def text(bits: int) -> str:
        options = _quantized_options(args, bits)
        return f"quantized:{','.join(f'{name}={value}' for name, value in options.items())}"

    if args.center_bits is None:
        return {"codec": text(args.bits), "center": "none"}
    return {"codec": text(args.bits), "center_codec": text(args.center_bits)}


def codec_name(args: argparse.Namespace) -> str:
    """The same as the name of a folder: all that decides the files."""
    if args.codec != "quantized":
        return f"{args.codec}-{args.keep:g}"
    parts = [args.codec, f"{args.bits}bits", args.coder, f"center{args.center_bits or 0}"]
    return "-".join(parts + ([f"group{args.group_size}"] if args.group_size else []))


def _quantized_options(args: argparse.Namespace, bits: int) -> dict[str, Any]:
    options = {"bits": bits, "coder": args.coder if bits <= 4 else "scalar"}
    return options | ({"group_size": args.group_size} if args.group_size else {})
