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
from kappaquant.kernels.cpu.library import absence, core
from kappaquant.kernels.cpu.structures import Attention, Cache
from kappaquant.runtime.fused.description import Description, known
from kappaquant.runtime.fused.held import attends, is_static, plain, slots_of, states_of
from kappaquant.runtime.fused.run import taken
from kappaquant.runtime.packed import PackedWeight
from kappaquant.runtime.recurrent import PromptMixer

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
    """``forward`` of one decoder layer; what it can not take goes to the layer's own.

    Attributes:
        layer: the module that it stands in for.
    """

    def __init__(self, layer: Any, description: Description | None = None) -> None:
        self.layer = layer
        self._description = description
        self._cache: Cache | None = None

    def __reduce__(self) -> tuple[type[NativeLayer], tuple[nn.Module]]:
        return NativeLayer, (self.layer,)  # a copy's tensors lie elsewhere

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[B, 1, hidden] -> [B, 1, hidden], or whatever the layer's own takes."""
        takes = not args and self._takes(hidden_states, kwargs)
        done = taken(self, hidden_states, kwargs) if takes else None
        if done is not None:
            return done
        description = self.described() if takes else None
        mixed = None if description is None else self._mix(description, hidden_states, kwargs)
        if description is None or mixed is None:
            out: Tensor = type(self.layer).forward(self.layer, hidden_states, *args, **kwargs)
            return out
        return description.stepper.mlp_(mixed, description.mlp)

    def _takes(self, x: Tensor, kwargs: dict[str, Any]) -> bool:
        asked = self.layer.training or torch.is_grad_enabled() or kwargs.get("output_attentions")
        return x.shape[1] == 1 and plain(x) and not asked and kwargs.get("past_key_values") is not None

    def described(self) -> Description | None:
        """The layer as it is now, or None where it is something else by now than the core takes."""
        if self._description is None or not self._description.current:
            self._cache = None
            try:
                self._description = Description(self.layer)
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
            states = states_of(held, description.delta_net, len(x)) if mask is None else None
            return None if states is None else description.stepper.delta_net(x, description.delta_net, *states)
        layer, rotary = description.attention, kwargs["position_embeddings"]
        assert layer is not None
        if not attends(description, rotary, mask, x):
            return None
        if is_static(held):
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
        found = slots_of(held, layer, len(x))
        slot = int(held.cumulative_length)
        if found is None or slot >= found[0].shape[2] or (mask is not None and slot >= mask.shape[3]):
            return None
        keys, values, filled = found
        cache = self._cache
        if cache is None or (cache.keys, cache.values) != (keys.data_ptr(), values.data_ptr()):
            cache = self._cache = step.cache_of(keys, values)
        filled.add_(1)
        return stepper.attention(x, layer, rotary, cache, slot, mask)


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
        fits = x.shape[-1] == weight.shape[1] and 0 < x.numel() // x.shape[-1] <= _FEW and type(self._head) is nn.Linear
        if not all(map(plain, held)) or not fits or torch.is_grad_enabled():
            return type(self._head).forward(self._head, x)
        stepper = step.Stepper(True, core())
        found = stepper.apply(x.view(-1, 1, x.shape[-1]), step.plain_matrix(weight, bias))
        return found.view(*x.shape[:-1], -1)
