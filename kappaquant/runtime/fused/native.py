"""Whole decoder layers on CPUs for one new token a sequence, by the native core: two or three calls where the modules make sixty.

The layers stay transformers' own, with its cache. A step of one token whose weights lie on the CPU takes this way; everything else, and
what a module's own code has to be for (hooks, adapters, masks of other shapes), goes to the layer's ``forward``. Of prompts only
GatedDeltaNet's rule is replaced, see recurrent.py.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from kappaquant.errors import UnsupportedError
from kappaquant.kernels.cpu import step
from kappaquant.kernels.cpu.library import DTYPES, absence, core
from kappaquant.kernels.cpu.structures import Attention, Cache, DeltaNet
from kappaquant.runtime.fused.description import Description, known
from kappaquant.runtime.packed import PackedWeight
from kappaquant.runtime.recurrent import PromptMixer
from kappaquant.runtime.static_cache import ATTENTION

logger = logging.getLogger("kappaquant")

_FEW = 8  # tokens that a matrix is read once for, or twice


def fuse(model: nn.Module) -> list[str]:
    """Let the decoder layers of a loaded model take the short way whenever one token a sequence comes.

    Layers that can not be fused stay as they are, and a log line says why.

    Returns:
        The names of the fused layers.
    """
    fused: list[str] = []
    unfused: dict[str, list[str]] = defaultdict(list)
    for name, layer in model.named_modules():
        if not known(layer) or absence() or not any(isinstance(m, PackedWeight) for m in layer.modules()):
            continue
        try:
            description = Description(layer)
        except UnsupportedError as reason:
            unfused[str(reason)].append(name)
            continue
        layer.forward = NativeLayer(layer, description)
        if hasattr(layer, "linear_attn") and PromptMixer.refusal(layer.linear_attn) is None:
            layer.linear_attn.forward = PromptMixer(layer.linear_attn)
        fused.append(name)
    head = getattr(model, "get_output_embeddings", lambda: None)() if fused else None
    if type(head) is nn.Linear:
        vars(head).update(forward=NativeHead(head))
    for why, names in unfused.items():
        logger.warning("%s%s: not fused: %s", names[0], f" and {len(names) - 1} more" if names[1:] else "", why)
    return fused


class NativeLayer:
    """``forward`` of one decoder layer; what it can not take goes to the layer's own."""

    def __init__(self, layer: Any, description: Description | None = None) -> None:
        self._layer = layer
        self._description = description
        self._cache: Cache | None = None

    def __reduce__(self) -> tuple[type[NativeLayer], tuple[nn.Module]]:
        return NativeLayer, (self._layer,)  # a copy's tensors lie elsewhere

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[B, 1, hidden] -> [B, 1, hidden], or whatever the layer's own takes."""
        taken = not args and self._takes(hidden_states, kwargs)
        description = self._described() if taken else None
        mixed = None if description is None else self._mix(description, hidden_states, kwargs)
        if description is None or mixed is None:
            out: Tensor = type(self._layer).forward(self._layer, hidden_states, *args, **kwargs)
            return out
        return description.stepper.mlp_(mixed, description.mlp)

    def _takes(self, x: Tensor, kwargs: dict[str, Any]) -> bool:
        plain = x.shape[1] == 1 and x.device.type == "cpu" and x.dtype in DTYPES and x.is_contiguous()
        asked = self._layer.training or torch.is_grad_enabled() or kwargs.get("output_attentions")
        return plain and not asked and kwargs.get("past_key_values") is not None

    def _described(self) -> Description | None:
        """The layer as it is now, or None where it is something else by now than the core takes."""
        if self._description is None or not self._description.current:
            self._cache = None
            try:
                self._description = Description(self._layer)
            except UnsupportedError:
                self._description = None
            if self._description is not None and not self._description.current:
                return None  # hooks
        return self._description

    def _mix(self, description: Description, x: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """x [B, 1, hidden] and what attention or GatedDeltaNet adds to it; None if the layer's own must do it."""
        cache, mask = kwargs["past_key_values"], kwargs.get("attention_mask")
        held = cache.layers[description.index]
        if x.shape[-1] != description.hidden:
            return None
        if description.delta_net is not None:
            return _recurrent(description.stepper, x, description.delta_net, held) if mask is None else None
        layer, rotary = description.attention, kwargs["position_embeddings"]
        assert layer is not None
        known = description.config._attn_implementation in ATTENTION and _fits(rotary, x, layer.dim)
        if not known or not _readable(mask, len(x)):
            return None
        if hasattr(held, "cumulative_length") and held.is_initialized and not held.is_sliding:
            return self._in_slots(description.stepper, x, layer, rotary, held, mask)
        keys = torch.empty(len(x), layer.kv_heads, 1, layer.dim, dtype=x.dtype)
        values = torch.empty_like(keys)
        queries = description.stepper.queries(x, layer, rotary, keys, values)
        keys, values = cache.update(keys, values, description.index)
        return description.stepper.attend(x, layer, queries, keys, values, mask)

    def _in_slots(
        self, stepper: step.Stepper, x: Tensor, layer: Attention, rotary: Any, held: Any, mask: Tensor | None
    ) -> Tensor | None:
        """Attention over a static cache, whose description is made once for as long as it stays where it is."""
        keys, values, slot = held.keys, held.values, int(held.cumulative_length)
        shape = (len(x), layer.kv_heads, keys.shape[2], layer.dim)
        room = slot < keys.shape[2] and (mask is None or slot < mask.shape[3])
        if not room or keys.shape != shape or values.shape != shape or not keys.dtype == values.dtype in DTYPES:
            return None
        places = keys.data_ptr(), values.data_ptr()
        if self._cache is None or (self._cache.keys, self._cache.values) != places:
            self._cache = step.cache_of(keys, values)
        held.cumulative_length.add_(1)
        return stepper.attention(x, layer, rotary, self._cache, slot, mask)


class NativeHead:
    """``forward`` of a linear layer that is not packed, for few tokens: by the core's threads, not by torch's, which would stay awake.

    Everything else goes to the layer's own.
    """

    def __init__(self, head: nn.Linear) -> None:
        self._head = head

    def __reduce__(self) -> tuple[type[NativeHead], tuple[nn.Linear]]:
        return NativeHead, (self._head,)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., vocabulary]."""
        weight, bias = self._head.weight, self._head.bias
        held = [tensor for tensor in (weight, bias, x) if tensor is not None]
        plain = all(t.device.type == "cpu" and t.dtype in DTYPES and t.is_contiguous() for t in held)
        fits = x.shape[-1] == weight.shape[1] and 0 < x.numel() // x.shape[-1] <= _FEW and type(self._head) is nn.Linear
        if not plain or not fits or torch.is_grad_enabled():
            return type(self._head).forward(self._head, x)
        stepper = step.Stepper(True, core())
        found = stepper.apply(x.view(-1, 1, x.shape[-1]), step.plain_matrix(weight, bias))
        return found.view(*x.shape[:-1], -1)


def _recurrent(stepper: step.Stepper, x: Tensor, layer: DeltaNet, held: Any) -> Tensor | None:
    """GatedDeltaNet, if the cache's layer has both of its states as the core takes them."""
    if held.record_past or not (held.has_previous_state[0] and held.is_recurrent_states_initialized[0]):
        return None
    conv, state = held.conv_states[0], held.recurrent_states[0]
    usual = conv.shape[:2] == (len(x), layer.qkv.rows) and layer.taps - 1 <= conv.shape[2] and conv.dtype in DTYPES
    shape = (len(x), layer.value_heads, layer.key_dim, layer.value_dim)
    if not usual or state.shape != shape or state.dtype != torch.float32:
        return None
    return stepper.delta_net(x, layer, conv, state) if conv.is_contiguous() and state.is_contiguous() else None


def _fits(rotary: Any, x: Tensor, dim: int) -> bool:
    """Whether rotary cosines and sines are as ``Stepper.queries`` takes them."""
    cos = rotary[0]
    usual = cos.dim() == 3 and cos.shape[0] in (1, len(x)) and cos.shape[1] == 1 and cos.shape[2] <= dim
    return bool(usual) and all(t.shape == cos.shape and t.dtype == x.dtype and t.is_contiguous() for t in rotary)


def _readable(mask: Any, batch: int) -> bool:
    """Whether a mask is none, or as ``Stepper.attend`` takes it."""
    if mask is None:
        return True
    one = isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[0] in (1, batch) and mask.shape[1:3] == (1, 1)
    return one and mask.dtype in step.MASKS and mask.stride(3) == 1
