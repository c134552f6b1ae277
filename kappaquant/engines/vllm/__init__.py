"""vLLM: ``vllm serve CKPT`` for kappaquant v1 checkpoints, through the entry point group ``vllm.general_plugins``."""

from __future__ import annotations

from importlib import import_module


def register() -> None:
    """Make vLLM know quant_method "kappaquant"; vLLM calls this in each of its processes, and more calls do nothing."""
    import_module("kappaquant.engines.vllm.config")
