"""transformers models of a folder: their class, their config, their structure without memory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from resmoe_dist.errors import UserError
from resmoe_dist.model_paths import check_model_folder

# Entries of a config that transformers counts through, and the most that can be built in seconds.
_COUNTS = {re.compile("(layers?|blocks?|stages?)$"): 1024, re.compile("experts?$"): 8192}


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The transformers class that a config's `architectures` names.

    Raises UserError if transformers has none of them.
    """
    named = config.architectures
    for name in named if isinstance(named, list) else []:
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    raise UserError(
        f"config.json: 'architectures' is {config.architectures!r}, which transformers "
        f"{transformers.__version__} does not have; name a class such as 'MixtralForCausalLM'"
    )


def load_config(folder: str) -> PretrainedConfig:
    """The config of a model folder or a config.json. Raises UserError if it cannot be read.

    Code that a folder brings along or asks for is never run, and links out of it are refused.
    """
    check_model_folder(Path(folder))
    try:
        raw, _ = PretrainedConfig.get_config_dict(folder, local_files_only=True)
        _check_entries(raw)
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers' errors for a bad config have no common class
        raise UserError(
            f"{folder}: not a readable Hugging Face model folder or config.json ({_reason(error)})"
        ) from error


def _check_entries(raw: Any) -> None:
    """Raise ValueError for more layers or experts than can be built, and for code from elsewhere.

    transformers builds layers one by one, and loads attention kernels from the hub by their name.
    """
    pending = [raw]
    while pending:
        found = pending.pop()
        if isinstance(found, list):
            pending += found
        if not isinstance(found, dict):
            continue
        pending += found.values()
        for name, value in found.items():
            for pattern, most in _COUNTS.items():
                number = isinstance(value, int | float) and pattern.search(name)
                if number and not -most <= value <= most:
                    raise ValueError(f"{name} is {value:.6g}, more than any model has")
            if name.endswith(("attn_implementation", "experts_implementation")):
                chosen = value.values() if isinstance(value, dict) else [value]
                if any("/" in str(each) for each in chosen):
                    raise ValueError(f"{name} asks for code from elsewhere: {value!r}")


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
