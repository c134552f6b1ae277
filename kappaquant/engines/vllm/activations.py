"""What products multiply by under vLLM, which hands no options on to quantization methods: the environment says it."""

from __future__ import annotations

import os

from kappaquant.errors import UnsupportedError
from kappaquant.kernels.base import ACTIVATIONS

VARIABLE = "KAPPAQUANT_ACTIVATIONS"
CHOSEN = os.environ.get(VARIABLE, ACTIVATIONS[0])
"""Read once, so that compiled layers hold it as a constant."""


def check_chosen() -> None:
    """Raise UnsupportedError unless kernels know such inputs."""
    if CHOSEN not in ACTIVATIONS:
        raise UnsupportedError(f"{VARIABLE}={CHOSEN}: must be one of {', '.join(ACTIVATIONS)}")
