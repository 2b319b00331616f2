"""A model folder that is to be served: its config and index, read once for every check and load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from resmoe_dist.checkpoints.format import CheckpointIndex, is_compressed, read_index
from resmoe_dist.errors import UserError
from resmoe_dist.families.models import load_config, model_class
from resmoe_dist.parallel.topology import owned_experts


@dataclass(frozen=True)
class ServedFolder:
    """index: None for a plain model folder."""

    path: Path
    config: PretrainedConfig
    index: CheckpointIndex | None

    @classmethod
    def read(cls, path: Path) -> ServedFolder:
        """Read config.json and, in a compressed folder, the index.

        Raises UserError if one is missing, damaged or too new.
        """
        if not path.is_dir():
            raise UserError(f"{path}: no such folder; give a model folder")
        index = read_index(path) if is_compressed(path) else None
        return cls(path, load_config(str(path)), index)

    def check_grid(self, ep: int, tp: int) -> None:
        """Raise UserError if the model cannot be loaded on an ep x tp grid."""
        if ep < 1 or tp < 1:
            raise UserError(f"--ep {ep} --tp {tp}: both must be 1 or more")
        if self.index is None:
            if ep * tp > 1:
                raise UserError(
                    f"{self.path}: not compressed, so it cannot be sharded; run resmoe-dist "
                    "compress first"
                )
            return
        for layer in self.index.layers:
            for count in (layer.stored_experts, len(layer.kept_experts)):
                owned_experts(count, 0, ep)
            if tp > layer.rows:
                raise UserError(
                    f"--tp {tp}: {layer.module} has {layer.rows} rows, fewer than ranks to share "
                    "them"
                )

    def check_language_model(self) -> None:
        """Raise UserError if the model has no language-model head, which predicts tokens."""
        kind = model_class(self.config)
        if not kind.can_generate():
            raise UserError(
                f"{self.path}: a {kind.__name__} has no language-model head, so it predicts no "
                "tokens; give a model such as a …ForCausalLM"
            )

    @property
    def vocabulary(self) -> int | None:
        """Tokens that the model knows; None if its config does not say."""
        found = getattr(self.config.get_text_config(), "vocab_size", None)
        return found if isinstance(found, int) else None
