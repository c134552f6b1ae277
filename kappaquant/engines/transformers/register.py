"""Bridges to other libraries, each imported only when that library is."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_QUANTIZERS = "transformers.quantizers.auto"


def register_when_imported() -> None:
    """Register with transformers now if it is loaded, else as soon as its quantizers are.

    Importing transformers' quantizers takes 2 s and 75 MB, which ``quantize`` and its workers would pay for nothing.
    """
    if _QUANTIZERS in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterImport())


def _register() -> None:
    from kappaquant.engines.transformers.load import register

    register()


class _AfterImport(MetaPathFinder, Loader):
    """Finds transformers' table of quantizers once, loads it as usual, then adds ours."""

    def __init__(self) -> None:
        self._loader: Loader | None = None

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _QUANTIZERS:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec) if self._loader else None

    def exec_module(self, module: ModuleType) -> None:
        assert self._loader is not None
        self._loader.exec_module(module)
        _register()
