"""transformers models of a folder: their class, their config, their structure without memory."""

from __future__ import annotations

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from resmoe_dist.errors import UserError


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The transformers class that a config's `architectures` names.

    Raises UserError if transformers has none of them.
    """
    for name in config.architectures or []:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    raise UserError(
        f"config.json: 'architectures' is {config.architectures!r}, which transformers "
        f"{transformers.__version__} does not have; name a class such as 'MixtralForCausalLM'"
    )


def load_config(folder: str) -> PretrainedConfig:
    """The config of a model folder or a config.json. Raises UserError if it cannot be read.

    Code that a folder brings along is never run.
    """
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers' errors for a bad config have no common class
        raise UserError(
            f"{folder}: not a readable Hugging Face model folder or config.json ({_reason(error)})"
        ) from error


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a config with its parameters on the meta device: names and shapes, no memory.

    Raises UserError if transformers cannot build the model from the config.
    """
    kind = model_class(config)
    try:
        with torch.device("meta"):
            return kind._from_config(config)
    except Exception as error:  # as in load_config
        raise UserError(
            f"{config.name_or_path}: config.json does not describe a {kind.__name__} "
            f"({_reason(error)})"
        ) from error


def make_unquantized(config: PretrainedConfig) -> None:
    """Make transformers build a plain model from the config of a quantised one."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for part in vars(config).values():
        if isinstance(part, PretrainedConfig):
            make_unquantized(part)


def _reason(error: Exception) -> str:
    """The first two lines of an error's message, as one line."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(said[:2])}"
