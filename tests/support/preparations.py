"""How often inputs are prepared, whichever kernel of this machine does it."""

from __future__ import annotations

from typing import Any

import pytest

from kappaquant.kernels.cpu.library import absence
from kappaquant.kernels.cpu.native import Native
from kappaquant.kernels.torch import AnyFormat

PLAIN = "torch" if absence() else "native"
"""The kernel that serves codebook formats here."""


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Group sizes of the inputs that are prepared from now on."""
    found: list[int] = []
    for kind in (Native, AnyFormat):

        def prepare(self: Any, x: Any, fmt: Any, kind: Any, own: Any = kind.prepare) -> Any:
            found.append(fmt.step)
            return own(self, x, fmt, kind)

        monkeypatch.setattr(kind, "prepare", prepare)
    return found
