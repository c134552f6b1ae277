"""What a step is given besides hidden states, a cache's tensors, masks and angles: whether the native core can take it as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kappaquant.kernels.cpu import step
from kappaquant.kernels.cpu.library import DTYPES
from kappaquant.kernels.cpu.structures import Attention, DeltaNet
from kappaquant.runtime.fused.description import Description
from kappaquant.runtime.static_cache import ATTENTION


def plain(tensor: Tensor) -> bool:
    """Whether it lies in one piece on the CPU, in a dtype of the core's."""
    return tensor.device.type == "cpu" and tensor.dtype in DTYPES and tensor.is_contiguous()


def is_static(held: Any) -> bool:
    """Whether a cache's layer keeps all tokens in slots that do not move."""
    return hasattr(held, "cumulative_length") and held.is_initialized and not held.is_sliding


def slots_of(held: Any, layer: Attention, batch: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """(keys, values, int64 [1] filled slots) of a static layer of a cache, if they are as ``step.cache_of`` takes them."""
    keys, values, filled = held.keys, held.values, held.cumulative_length
    shape = (batch, layer.kv_heads, keys.shape[2], layer.dim)
    if keys.shape != shape or values.shape != shape or not keys.dtype == values.dtype in DTYPES:
        return None
    counted = filled.dtype == torch.int64 and filled.numel() == 1
    return (keys, values, filled) if counted and keys.stride(3) == values.stride(3) == 1 else None


def states_of(held: Any, layer: DeltaNet, batch: int) -> tuple[Tensor, Tensor] | None:
    """(state of the convolution, recurrent state) of a cache's layer, if it has both as ``Stepper.delta_net`` takes them."""
    if held.record_past or not (held.has_previous_state[0] and held.is_recurrent_states_initialized[0]):
        return None
    conv, state = held.conv_states[0], held.recurrent_states[0]
    usual = conv.shape[:2] == (batch, layer.qkv.rows) and layer.taps - 1 <= conv.shape[2] and plain(conv)
    shape = (batch, layer.value_heads, layer.key_dim, layer.value_dim)
    if not usual or state.shape != shape or state.dtype != torch.float32 or not plain(state):
        return None
    return conv, state


def attends(description: Description, rotary: Any, mask: Any, x: Tensor) -> bool:
    """Whether attention, its cosines and sines, and its mask are as ``Stepper.attention`` takes them."""
    assert description.attention is not None
    cos = rotary[0]
    usual = cos.dim() == 3 and cos.shape[0] in (1, len(x)) and cos.shape[1] == 1
    usual = usual and cos.shape[2] <= description.attention.dim
    turned = usual and all(t.shape == cos.shape and t.dtype == x.dtype and t.is_contiguous() for t in rotary)
    return bool(turned) and description.config._attn_implementation in ATTENTION and _readable(mask, len(x))


def _readable(mask: Any, batch: int) -> bool:
    if mask is None:
        return True
    one = isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[0] in (1, batch) and mask.shape[1:3] == (1, 1)
    return one and mask.dtype in step.MASKS and mask.stride(3) == 1
