"""transformers knows quantization method `resmoe`, whichever package is imported first."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.imports import imported_by

ORDERS = {
    "resmoe_dist first": "import resmoe_dist\nfrom transformers import AutoModelForCausalLM",
    "transformers first": "import transformers\nfrom transformers import AutoModelForCausalLM\n"
    "import resmoe_dist",
    "registry first": "import transformers.quantizers.auto\nimport resmoe_dist\n"
    "from transformers import AutoModelForCausalLM",
}


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_from_pretrained_reads_a_compressed_folder(order, family_folder, tmp_path):
    from tests.models import compress

    compress(family_folder("mixtral"), tmp_path / "c", groups=2)
    code = f"""
{ORDERS[order]}
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "c")!r})
print(type(model.model.layers[0].mlp.experts).__name__)
"""

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)

    assert done.stdout.splitlines()[-1] == "ResMoE", done.stderr


def test_registration_imports_only_the_registry():
    code = """
import resmoe_dist
import transformers.quantizers.auto as registry
print("resmoe" in registry.AUTO_QUANTIZER_MAPPING)
print("resmoe" in registry.AUTO_QUANTIZATION_CONFIG_MAPPING)
"""

    assert imported_by(code, ("resmoe_dist.runtime", "deepspeed")) == ([], "True\nTrue")


def test_registration_outlasts_a_reload_of_the_registry():
    code = """
import importlib, resmoe_dist
import transformers.quantizers.auto as registry
print("resmoe" in importlib.reload(registry).AUTO_QUANTIZER_MAPPING)
"""

    assert imported_by(code)[1] == "True"


def test_importing_the_package_imports_no_heavy_library():
    assert imported_by("import resmoe_dist")[0] == []


def test_public_names_are_imported_on_first_use():
    import resmoe_dist

    for name in resmoe_dist.__all__:
        assert getattr(resmoe_dist, name) is not None
    assert set(resmoe_dist.__all__) <= set(dir(resmoe_dist))
    with pytest.raises(AttributeError, match="no attribute 'load_modle'"):
        resmoe_dist.load_modle  # noqa: B018
