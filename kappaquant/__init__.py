"""kappaquant: mixed-precision codebook quantization of large language models, bits chosen by evidence.

    source = kappaquant.open_source("path/or/owner/name")
    profile = kappaquant.scan(source)
    plan = kappaquant.make_plan(source.tensors, source.config, "kurtosis", profile=profile.kurtosis())
    kappaquant.quantize(source, "output", plan)
    model, tokenizer = kappaquant.load("output")

Importing this package teaches ``transformers`` to load its checkpoints, and imports nothing heavy itself.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kappaquant.engines.transformers.register import register_when_imported
from kappaquant.errors import (
    AlreadyQuantizedError,
    FormatError,
    KappaquantError,
    NonFiniteError,
    OutputError,
    PlanError,
    RegistrationError,
    SourceError,
    UnsupportedError,
)
from kappaquant.version import __version__

if TYPE_CHECKING:
    from kappaquant.checkpoints.checkpoint import Checkpoint
    from kappaquant.checkpoints.open import open_checkpoint
    from kappaquant.engines.transformers.load import load
    from kappaquant.planning.make import make_plan
    from kappaquant.planning.plan import Plan
    from kappaquant.planning.profile import Profile, scan
    from kappaquant.quantizing.quantize import Options, quantize
    from kappaquant.sources.open import open_source

_MODULES = ("generate", "plan")
_HOMES = {
    "Checkpoint": "checkpoints.checkpoint",
    "Options": "quantizing.quantize",
    "Plan": "planning.plan",
    "Profile": "planning.profile",
    "load": "engines.transformers.load",
    "make_plan": "planning.make",
    "open_checkpoint": "checkpoints.open",
    "open_source": "sources.open",
    "quantize": "quantizing.quantize",
    "scan": "planning.profile",
}

__all__ = [
    "AlreadyQuantizedError",
    "Checkpoint",
    "FormatError",
    "KappaquantError",
    "NonFiniteError",
    "Options",
    "OutputError",
    "Plan",
    "PlanError",
    "Profile",
    "RegistrationError",
    "SourceError",
    "UnsupportedError",
    "__version__",
    "load",
    "make_plan",
    "open_checkpoint",
    "open_source",
    "quantize",
    "scan",
]


def __getattr__(name: str) -> Any:
    """Public names are imported from their modules on first use (PEP 562)."""
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


register_when_imported()
