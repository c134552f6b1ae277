"""Text from a loaded model: the public name of ``kappaquant.runtime.generate``."""

from kappaquant.runtime.generate import chat, stream

__all__ = ["chat", "stream"]
