"""Makes transformers know quantization method `resmoe`, without importing transformers for it.

`import resmoe_dist` must stay cheap. So placeholders are registered as soon as transformers' own
registry is imported, before or after this package; the first use imports the real classes.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

QUANT_METHOD = "resmoe"
_REGISTRY = "transformers.quantizers.auto"
_CLASSES = "resmoe_dist.runtime.quantizer"


class LazyClass:
    """Stands for a class of `runtime.quantizer` until it is used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def _real(self) -> Any:
        return getattr(import_module(_CLASSES), self._name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._real()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real(), name)


def register() -> None:
    """Register now if transformers' registry is imported already, and whenever it is imported."""
    if not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder())
    registry = sys.modules.get(_REGISTRY)
    if registry is not None and hasattr(registry, "AUTO_QUANTIZATION_CONFIG_MAPPING"):
        _add_to(registry)


def _add_to(registry: ModuleType) -> None:
    registry.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = LazyClass("ResMoEQuantizationConfig")
    registry.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = LazyClass("ResMoEQuantizer")


class _RegistryFinder(MetaPathFinder):
    """Finds transformers' registry as usual, and adds to it once it is loaded."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegistryLoader(spec.loader)
        return spec


class _RegistryLoader(Loader):
    """The registry's own loader, followed by `_add_to`."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _add_to(module)
