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


def embedded_checkpoint(groups: int) -> Path:
    """The embedded Mixtral, compressed at keep 0.25 with `groups` groups, in the user's cache.

    Trained and compressed on first use. Raises UserError if its experts do not divide into that
    many groups.
    """
    # Imported here: serving a model from --model needs neither POT nor SciPy's optimisers.
    from resmoe_dist.jobs.pipeline import Compression

    source_folder = cached_tiny_model()
    made_by = f"{__version__}-format{FORMAT_VERSION}"
    folder = cache_root() / "compressed" / f"{source_folder.name}-ep{groups}-{made_by}"
    if not is_compressed(folder):
        source = SourceCheckpoint(source_folder)
        settings = CompressionSettings(
            groups=groups,
            method=MethodSpec(name="resmoe"),
            residual_codec=CodecSpec(name="pruned", options={"keep": 0.25}),
            layers=list(range(len(source.sites))),
        )
        # Processes may do this at the same time: each writes a separate folder, and the first to
        # finish renames it.
        written = folder.with_name(f"{folder.name}.{os.getpid()}")
        try:
            Compression(source, written, settings).run()
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
