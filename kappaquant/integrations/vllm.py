"""Former name of ``kappaquant.engines.vllm``, which installed entry points still call."""

from kappaquant.engines.vllm import register

__all__ = ["register"]
