"""The embedded model, compressed: what `launch/infer.py` serves when it is given no model."""

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

    Made on first use. Raises UserError when its experts do not divide into that many groups.
    """
    # Compression needs POT and SciPy's optimisers, which serving a given model does not.
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
        # Another process may be at it too: each works in a folder of its own, the first to finish
        # gives it the name.
        own = folder.with_name(f"{folder.name}.{os.getpid()}")
        Compression(source, own, settings).run()
        with suppress(OSError):
            own.rename(folder)
        shutil.rmtree(own, ignore_errors=True)
    return folder
