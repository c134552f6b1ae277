"""Whether CUDA can be compiled here, and for which cards the tests do."""

from __future__ import annotations

import pytest

from kappaquant.kernels.cuda import nvrtc

needs_compiler = pytest.mark.skipif(nvrtc.unavailable() is not None, reason=str(nvrtc.unavailable()))
# Hopper after each change, the oldest and the newest in continuous integration
ARCHITECTURES = [
    "sm_90",
    pytest.param("sm_80", marks=pytest.mark.slow),
    pytest.param("sm_120", marks=pytest.mark.slow),
]
