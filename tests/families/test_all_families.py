"""Every Mixture-of-Experts family of the installed transformers: served exactly, or refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from resmoe_dist.errors import UserError
from resmoe_dist.families.unsupported import UNSUPPORTED
from resmoe_dist.runtime.loading import load_model
from tests.all_families import family_names, tiny_model
from tests.models import VOCABULARY, compress, relative_difference

ROOT = Path(__file__).parents[2]
FAMILIES = family_names()
SUPPORTED = [name for name in FAMILIES if name not in UNSUPPORTED]


@torch.no_grad()
def outputs_of(model):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (2, 8), generator=generator)
    if model.config.is_encoder_decoder or model.config.model_type == "diffusion_gemma":
        return model(input_ids=ids, decoder_input_ids=ids.flip(1)[:, :4]).logits
    # Some caches need layers that two-layer models do not have.
    caches = {} if model.config.model_type == "openai_privacy_filter" else {"use_cache": False}
    return model(input_ids=ids, **caches).logits


@pytest.mark.parametrize("family", SUPPORTED)
def test_a_family_is_served_exactly(family, tmp_path):
    model = tiny_model(family)
    expected = outputs_of(model)
    model.save_pretrained(tmp_path / "source")

    compress(tmp_path / "source", tmp_path / "compressed", keep=1.0, dtype="float32")

    served = load_model(tmp_path / "compressed")
    assert relative_difference(outputs_of(served), expected) < 1e-4


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_a_family_that_cannot_be_expressed_is_refused_with_its_reason(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path / "source")
    with pytest.raises(UserError, match=re.escape(UNSUPPORTED[family])):
        compress(tmp_path / "source", tmp_path / "compressed")


def test_the_documentation_lists_every_family():
    listed = (ROOT / "docs" / "models.md").read_text()
    supported, refused = listed.split("## Refused")
    assert re.findall(r"`(\w+)`", supported.split("## Supported")[1]) == SUPPORTED
    assert re.findall(r"^\| `(\w+)`", refused, re.MULTILINE) == sorted(UNSUPPORTED)
    readme = (ROOT / "README.md").read_text()
    assert f"{len(SUPPORTED)} of the {len(FAMILIES)} Mixture-of-Experts families" in readme
