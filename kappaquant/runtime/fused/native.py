"""Whole decoder layers on CPUs for one new token a sequence, by the native core: two or three calls where the modules make sixty.

The layers stay transformers' own, with its cache. A step of one token whose weights lie on the CPU takes this way; everything else, and
what a module's own code has to be for (hooks, adapters, masks of other shapes), goes to the layer's ``forward``.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kappaquant.errors import UnsupportedError
from kappaquant.kernels.cpu import step
from kappaquant.kernels.cpu.library import DTYPES, absence, core, signs_of
from kappaquant.kernels.cpu.native import Native, weight_of
from kappaquant.kernels.cpu.structures import Attention, DeltaNet, Matrix, Mlp, Moe, Norm
from kappaquant.runtime.experts import QuantExperts
from kappaquant.runtime.packed import PackedWeight, QuantLinear
from kappaquant.runtime.static_cache import ATTENTION

logger = logging.getLogger("kappaquant")


@dataclass(frozen=True)
class Family:
    """What the layers of a model family have in common.

    Attributes:
        plus_one: norms multiply by their weight plus one.
        gated: queries have a second part that gates attention's output.
    """

    plus_one: bool = False
    gated: bool = False


FAMILIES = {
    "LlamaDecoderLayer": Family(),
    "MistralDecoderLayer": Family(),
    "Qwen2DecoderLayer": Family(),
    "Qwen3DecoderLayer": Family(),
    "Qwen3MoeDecoderLayer": Family(),
    "Qwen3_5DecoderLayer": Family(plus_one=True, gated=True),
    "Qwen3_5MoeDecoderLayer": Family(plus_one=True, gated=True),
}
"""Classes of transformers, by whose code the steps here were written."""


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
        fused.append(name)
    for reason, names in unfused.items():
        logger.warning("%s%s: not fused: %s", names[0], f" and {len(names) - 1} more" if names[1:] else "", reason)
    return fused


def known(layer: nn.Module) -> bool:
    """Whether it is one of ``FAMILIES``, as transformers has it."""
    return type(layer).__name__ in FAMILIES and type(layer).__module__.startswith("transformers.models.")


class Description:
    """A layer as the native core takes it, for as long as its tensors and modules stay where they are.

    Attributes:
        attention, delta_net: one of them, what the layer has.
        mlp: of the other half.
        exact: whether products are of float32 inputs.

    Raises:
        UnsupportedError: the layer can not be described; the message says why.
    """

    def __init__(self, layer: Any) -> None:
        self._family = FAMILIES[type(layer).__name__]
        self._tensors: list[tuple[dict[str, Any], str, int]] = []
        self._modules: list[tuple[dict[str, Any], str, nn.Module]] = []
        self._inputs: list[Any] = []
        self.attention: Attention | None = None
        self.delta_net: DeltaNet | None = None
        before = self._norm(layer, "input_layernorm")
        if hasattr(layer, "linear_attn"):
            self.delta_net = self._delta_net(self._child(layer, "linear_attn"), before)
        else:
            self.attention = self._attention(self._child(layer, "self_attn"), before)
        after, mlp = self._norm(layer, "post_attention_layernorm"), self._child(layer, "mlp")
        self.mlp = self._moe(mlp, after) if hasattr(mlp, "experts") else self._mlp(mlp, after)
        exact = {shared.activations != "int8" for shared in self._inputs}
        if len(exact) > 1:
            raise UnsupportedError("its layers multiply by inputs of several kinds")
        self.exact = exact == {True}

    @property
    def current(self) -> bool:
        """Whether tensors and modules are still where they were, inputs of the same kind, and nobody waits at a hook for his turn."""
        return (
            all(held.get(name) is module and not _hooked(module) for held, name, module in self._modules)
            and all(held[name].data_ptr() == place for held, name, place in self._tensors)
            and all((shared.activations != "int8") == self.exact for shared in self._inputs)
        )

    def _child(self, module: Any, name: str) -> Any:
        child = getattr(module, name)
        self._modules.append((module._modules, name, child))
        return child

    def _place(self, module: nn.Module, name: str) -> Tensor:
        """A tensor of a module, of a dtype that is taken, in one piece, on the CPU."""
        held = module._parameters if name in module._parameters else module._buffers
        tensor = held.get(name)
        if tensor is None:
            raise UnsupportedError(f"{name} of {type(module).__name__} is packed")
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise UnsupportedError(f"{name} of {type(module).__name__} does not lie in one piece on the CPU")
        self._tensors.append((held, name, tensor.data_ptr()))
        return tensor

    def _floats(self, module: nn.Module, name: str) -> Tensor:
        tensor = self._place(module, name)
        if tensor.dtype not in DTYPES:
            raise UnsupportedError(f"{name} of {type(module).__name__} is {tensor.dtype}, not one of {', '.join(map(str, DTYPES))}")
        return tensor

    def _packed(self, weight: PackedWeight) -> PackedWeight:
        if not weight.whole or not isinstance(weight.kernel, Native):
            raise UnsupportedError(f"its {weight.fmt.id} weights are not multiplied by the native core")
        for name in weight._buffers:
            self._place(weight, name)
        return weight

    def _matrix(self, parent: Any, name: str) -> Matrix:
        linear = self._child(parent, name)
        bias = None if linear._parameters.get("bias") is None else self._floats(linear, "bias")
        if type(linear) is QuantLinear:
            self._inputs.append(linear.shared)
            return step.packed_matrix(self._packed(linear.weight).arranged, bias)
        if type(linear) is nn.Linear:
            return step.plain_matrix(self._floats(linear, "weight"), bias)
        raise UnsupportedError(f"{name} is {type(linear).__name__}, not a linear layer")

    def _norm(self, parent: Any, name: str, plus_one: bool | None = None) -> Norm:
        module = self._child(parent, name)
        epsilon = getattr(module, "variance_epsilon", None)
        epsilon = module.eps if epsilon is None else epsilon
        return step.norm(self._floats(module, "weight"), epsilon, self._family.plus_one if plus_one is None else plus_one)

    def _attention(self, m: Any, before: Norm) -> Attention:
        q, k, v, out = (self._matrix(m, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
        gated = self._family.gated
        norms = [self._norm(m, name) if hasattr(m, name) else Norm() for name in ("q_norm", "k_norm")]
        heads, kv_heads = q.rows // (m.head_dim * (1 + gated)), k.rows // m.head_dim
        if (q.rows, k.rows, v.rows) != (heads * (1 + gated) * m.head_dim, kv_heads * m.head_dim, k.rows) or heads % kv_heads:
            raise UnsupportedError(f"projections to {q.rows}, {k.rows} and {v.rows} for heads of {m.head_dim}")
        return Attention(q, k, v, out, before, *norms, heads, kv_heads, m.head_dim, m.scaling, gated)

    def _delta_net(self, m: Any, before: Norm) -> DeltaNet:
        if m.activation != "silu":
            raise UnsupportedError(f"its convolution is followed by {m.activation}, not silu")
        qkv, z, b, a = (self._matrix(m, f"in_proj_{name}") for name in ("qkv", "z", "b", "a"))
        conv = self._child(m, "conv1d")
        weight, bias = self._floats(conv, "weight"), conv.bias is not None and self._floats(conv, "bias")
        a_log, dt_bias = self._floats(m, "A_log"), self._floats(m, "dt_bias")
        return DeltaNet(
            qkv, z, b, a, self._matrix(m, "out_proj"), before, self._norm(m, "norm", plus_one=False), weight.data_ptr(),
            bias.data_ptr() if isinstance(bias, Tensor) else None, a_log.data_ptr(), dt_bias.data_ptr(), m.num_k_heads,
            m.num_v_heads, m.head_k_dim, m.head_v_dim, weight.shape[-1], DTYPES[weight.dtype], DTYPES[a_log.dtype],
            DTYPES[dt_bias.dtype],
        )  # fmt: skip

    def _mlp(self, m: Any, before: Norm) -> Mlp:
        probe = torch.linspace(-4, 4, 9)
        if not torch.equal(m.act_fn(probe), nn.functional.silu(probe)):
            raise UnsupportedError(f"its MLP's activation is {type(m.act_fn).__name__}, not silu")
        return Mlp(*(self._matrix(m, name) for name in ("gate_proj", "up_proj", "down_proj")), before)

    def _moe(self, m: Any, before: Norm) -> Moe:
        router, experts = self._child(m, "gate"), self._child(m, "experts")
        whole = experts.in_one_kernel() if isinstance(experts, QuantExperts) else None
        if whole is None:
            raise UnsupportedError("its experts are not packed in one format")
        self._inputs.append(experts.shared)
        gate_up, down = (self._packed(weight) for weight in whole)
        shared = Mlp(before=before)
        shared_gate = Matrix()
        if hasattr(m, "shared_expert"):
            shared = self._mlp(self._child(m, "shared_expert"), before)
            shared_gate = self._matrix(m, "shared_expert_gate")
        return Moe(
            step.plain_matrix(self._floats(router, "weight"), None), shared_gate, shared, weight_of(gate_up.arranged),
            weight_of(down.arranged), *(signs_of(weight.fmt.step).data_ptr() for weight in (gate_up, down)), router.top_k,
            getattr(router, "norm_topk_prob", True),
        )  # fmt: skip


class NativeLayer:
    """``forward`` of one decoder layer; what it can not take goes to the layer's own."""

    def __init__(self, layer: Any, description: Description) -> None:
        self._layer = layer
        self._mixer = layer.linear_attn if hasattr(layer, "linear_attn") else layer.self_attn
        self._description: Description | None = description

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[B, 1, hidden] -> [B, 1, hidden], or whatever the layer's own takes."""
        taken = not args and self._takes(hidden_states, kwargs)
        description = self._described() if taken else None
        mixed = None if description is None else self._mix(description, hidden_states.squeeze(1), kwargs)
        if description is None or mixed is None:
            out: Tensor = type(self._layer).forward(self._layer, hidden_states, *args, **kwargs)
            return out
        return step.mlp(mixed, description.mlp, description.exact, core()).unsqueeze(1)

    def _takes(self, x: Tensor, kwargs: dict[str, Any]) -> bool:
        plain = x.shape[1] == 1 and x.device.type == "cpu" and x.dtype in DTYPES and x.is_contiguous()
        asked = self._layer.training or torch.is_grad_enabled() or kwargs.get("output_attentions")
        return plain and not asked and kwargs.get("past_key_values") is not None

    def _described(self) -> Description | None:
        """The layer as it is now, or None where it is something else by now than the core takes."""
        if self._description is None or not self._description.current:
            try:
                self._description = Description(self._layer)
            except UnsupportedError:
                self._description = None
            if self._description is not None and not self._description.current:
                return None  # hooks
        return self._description

    def _mix(self, description: Description, x: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """x [B, hidden] and what attention or GatedDeltaNet adds to it; None if the layer's own must do it."""
        held = kwargs["past_key_values"].layers[self._mixer.layer_idx]
        mask = kwargs.get("attention_mask")
        exact, native = description.exact, core()
        if description.delta_net is not None:
            if mask is not None or not held.has_previous_state[0] or held.record_past or not held.is_recurrent_states_initialized[0]:
                return None
            conv, state = held.conv_states[0], held.recurrent_states[0]
            if state.dtype != torch.float32 or conv.dtype not in DTYPES or not (state.is_contiguous() and conv.is_contiguous()):
                return None
            return step.delta_net(x, description.delta_net, conv, state, exact, native)
        layer, rotary = description.attention, kwargs.get("position_embeddings")
        assert layer is not None
        if self._mixer.config._attn_implementation not in ATTENTION or not _fits(rotary, x) or not _readable(mask):
            return None
        if hasattr(held, "cumulative_length") and held.is_initialized and not held.is_sliding and held.keys.dtype in DTYPES:
            slot = int(held.cumulative_length)
            held.cumulative_length.add_(1)
            keys, values = held.keys[:, :, : slot + 1], held.values[:, :, : slot + 1]
            queries = step.queries(x, layer, rotary, keys[:, :, slot:], values[:, :, slot:], exact, native)
        else:
            keys = torch.empty(x.shape[0], layer.kv_heads, 1, layer.dim, dtype=x.dtype)
            values = torch.empty_like(keys)
            queries = step.queries(x, layer, rotary, keys, values, exact, native)
            keys, values = kwargs["past_key_values"].update(keys, values, self._mixer.layer_idx)
        return step.attend(x, layer, queries, keys, values, mask, exact, native)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _fits(rotary: Any, x: Tensor) -> bool:
    """Whether rotary cosines and sines are as ``step.queries`` takes them."""
    return rotary is not None and all(t.dim() == 3 and t.shape[1] == 1 and t.dtype == x.dtype and t.stride(2) == 1 for t in rotary)


def _readable(mask: Any) -> bool:
    """Whether a mask is none, or as ``step.attend`` takes it."""
    if mask is None:
        return True
    return isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1:3] == (1, 1) and mask.dtype in step.MASKS and mask.stride(3) == 1
