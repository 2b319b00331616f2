"""What a model folder may ask transformers for: checked before anything is built or loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from resmoe_dist.checkpoints.model_folder import SHARD_INDEX, SINGLE_FILE, ModelFiles
from resmoe_dist.checkpoints.tensor_files import is_finite, read_json_object
from resmoe_dist.errors import UserError, first_line
from resmoe_dist.families.models import meta_model
from resmoe_dist.parallel.failures import is_out_of_memory, may_be_lost_peer
from resmoe_dist.runtime.served_folder import ServedFolder

# A model may hold tied tensors, and buffers that it computes, beside what the files hold.
_BEYOND_FILES = 4
_ANY_MODEL = 1 << 24


def check_loadable(served: ServedFolder) -> None:
    """Raise UserError if transformers would read other files than ours, or build another model.

    Reads headers only, and builds the model without memory.
    """
    folder = served.path
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder}: has an adapter_config.json; merge the adapter into the model")
    generation = folder / "generation_config.json"
    # transformers would ignore one that it cannot read.
    if generation.exists():
        read_json_object(generation)
    if getattr(served.config, "transformers_weights", None) is not None:
        raise UserError(
            f"{folder}: config.json names a file of weights; remove transformers_weights"
        )
    if (folder / SINGLE_FILE).exists() and (folder / SHARD_INDEX).exists():
        raise UserError(f"{folder}: has both {SINGLE_FILE} and {SHARD_INDEX}; remove one")
    _check_size(served, meta_model(served.config))


def _check_size(served: ServedFolder, model: nn.Module) -> None:
    """Refuse a model far larger than its files: transformers would make up what they lack."""
    files = ModelFiles(served.path)
    held = sum(files.holding(name).size(name) for name in files.locations)
    for layer in served.index.layers if served.index else []:
        held += layer.num_experts * layer.source_shape.entries * 4
    asked = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if asked > _BEYOND_FILES * held + _ANY_MODEL:
        raise UserError(
            f"{served.path}: config.json describes a model of {asked:.3g} values, the files hold "
            f"{held:.3g} bytes; fetch the model again"
        )


def check_values(folder: Path, model: PreTrainedModel) -> None:
    """Raise UserError if a tensor of a loaded model holds NaN or infinity."""
    for name, tensor in model.state_dict().items():
        if not is_finite(tensor):
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise UserError(
                f"{folder}: tensor {name!r} holds NaN or infinite values in {dtype}; the folder is "
                "damaged, or its values are too large for that dtype"
            )


@torch.no_grad()
def check_runs(folder: Path, model: PreTrainedModel) -> None:
    """Run a loaded model on two tokens, as a config may ask for what no forward pass can do.

    Collective over the grid. Raises UserError.
    """
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    with refusing(folder, "the model does not run"):
        if model.config.is_encoder_decoder:
            model(input_ids=ids, decoder_input_ids=ids)
        else:
            cache = model(input_ids=ids, use_cache=True).past_key_values
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)


@contextmanager
def refusing(folder: Path, what: str) -> Iterator[None]:
    """Whatever fails in the block is the folder's fault: UserError instead of other exceptions.

    Not if memory runs out or another rank ended. RESMOE_TRACEBACK=1 shows where it failed.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # transformers' errors for a bad folder have no common class
        if is_out_of_memory(error) or may_be_lost_peer(error):
            raise
        raise UserError(
            f"{folder}: {what} ({type(error).__name__}: {first_line(error)}); a file of the "
            "folder is damaged or does not fit the others; fetch or rebuild it"
        ) from error
