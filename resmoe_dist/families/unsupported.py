"""Mixtures of Experts that cannot be compressed, and why."""

from __future__ import annotations

import re

from transformers import PreTrainedModel

from resmoe_dist.errors import UserError

# By the config's `model_type`.
UNSUPPORTED = {
    "doge": "an expert is one row of an embedding table, and a token takes many of them",
    "jetmoe": "experts and router are one module, and attention has experts that are not MLPs",
    "muse_spark": "each expert's output is normalised, which a sum of rows cannot express",
}

_MOE_CLASS = re.compile(r"(Experts?|MoE|Moe)(GLU|MLP|Block|Layer)?$")


def no_experts(folder: str, model: PreTrainedModel) -> UserError:
    """Why a model in which no experts were found cannot be compressed."""
    kind = model.config.model_type
    types = {
        part.config.model_type for part in model.modules() if isinstance(part, PreTrainedModel)
    }
    moe = next((each for each in model.modules() if _MOE_CLASS.search(type(each).__name__)), None)
    if moe is None:
        return UserError(
            f"{folder}: a {kind!r} model has no experts to compress; give a Mixture-of-Experts "
            "model"
        )
    reasons = [UNSUPPORTED[each] for each in sorted(types) if each in UNSUPPORTED]
    why = reasons[0] if reasons else "this version does not know how it keeps and calls its experts"
    return UserError(
        f"{folder}: a {kind!r} model is a Mixture of Experts ({type(moe).__name__}) of a family "
        f"that is not supported: {why}"
    )
