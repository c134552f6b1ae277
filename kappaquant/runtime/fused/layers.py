"""Whole layers in few calls, by what the model's device has for them."""

from __future__ import annotations

from torch import nn

from kappaquant.runtime.fused import native, qwen3_5


def fuse(model: nn.Module) -> list[str]:
    """Let the decoder layers of a loaded model take a short way for steps of one token, where there is one for them.

    Returns:
        The names of the fused layers.
    """
    device = next((parameter.device.type for parameter in model.parameters()), "")
    if device == "cuda":
        return qwen3_5.fuse(model)
    return native.fuse(model) if device == "cpu" else []
