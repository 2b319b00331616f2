"""The embedded model, compressed: `launch/infer.py` serves it if --model is left out."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from resmoe_dist.checkpoints.format import CompressionSettings, MethodSpec, is_compressed
from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.checkpoints.upgrade import FORMAT_VERSION
from resmoe_dist.codecs import CodecSpec
from resmoe_dist.testing import cached_tiny_model
from resmoe_dist.user_cache import cache_root
from resmoe_dist.version import __version__

# Of each weight of the experts, everything counted.
EMBEDDED_BITS = 3.0

DEMO_PROMPTS = [
    "def __init__(self, ",
    "import os\nimport sys\n\n",
    "class Error(Exception):\n    ",
    "    for name in ",
    "    if not isinstance(",
    "    return self.",
    "    try:\n        ",
    '    """Return ',
]


def embedded_checkpoint(groups: int, *, may_join: bool = True) -> Path:
    """The embedded Mixtral for EP `groups`, at three bits per weight, in the user's cache.

    It is what `compress --ep GROUPS --target-bits 3` makes. may_join: whether all ranks may share
    one group; otherwise each rank has its own files. Trained and compressed on first use.

    Raises UserError if its experts do not divide into that many groups.
    """
    # Imported here: serving a model from --model needs neither POT nor SciPy's optimisers.
    from resmoe_dist.jobs.pipeline import Compression

    source_folder = cached_tiny_model()
    made_by = f"{__version__}-format{FORMAT_VERSION}"
    centers = "shared" if may_join else "own"
    name = f"{source_folder.name}-ep{groups}-{EMBEDDED_BITS:g}bits-{centers}-{made_by}"
    folder = cache_root() / "compressed" / name
    if not is_compressed(folder):
        source = SourceCheckpoint(source_folder)
        settings = CompressionSettings(
            groups=groups,
            method=MethodSpec(name="resmoe"),
            residual_codec=CodecSpec(name="quantized"),
            center_codec=CodecSpec(name="quantized"),
            target_bytes=EMBEDDED_BITS / (8 * source.dtype(0).itemsize),
            layers=list(range(len(source.sites))),
        )
        # Processes may do this at the same time: each writes a separate folder, and the first to
        # finish renames it.
        written = folder.with_name(f"{folder.name}.{os.getpid()}")
        try:
            Compression(source, written, settings, may_join=may_join).run()
            with suppress(OSError):
                written.rename(folder)
        except KeyboardInterrupt as interruption:
            # There is no command to resume it with.
            interruption.args = ()
            raise
        finally:
            for left in (written, written.with_name(f"{written.name}.partial")):
                shutil.rmtree(left, ignore_errors=True)
    return folder
