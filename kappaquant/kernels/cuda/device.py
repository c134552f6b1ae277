"""What a card must offer for any kernel here."""

from __future__ import annotations

from functools import cache

import torch

from kappaquant.kernels.cuda import nvrtc

MOST_TOKENS = 16


@cache
def refusal(device: torch.device) -> str | None:
    """Why kernels of compute capability 8.0 can not run on this device, or None."""
    if device.type != "cuda":
        return f"needs an NVIDIA GPU, got a tensor on {device}"
    if torch.version.cuda is None:
        return "needs a CUDA build of torch"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs compute capability 8.0, {} has {}.{}".format(
            torch.cuda.get_device_name(device), *torch.cuda.get_device_capability(device)
        )
    return nvrtc.unavailable()


def has_clusters(device: torch.device) -> bool:
    """Whether blocks can share their memory."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a card has."""
    return torch.cuda.get_device_properties(device).multi_processor_count
