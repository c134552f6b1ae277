"""A decoder layer of transformers as the native core takes it: where its tensors lie, and whether they still do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kappaquant.errors import UnsupportedError
from kappaquant.kernels.base import Arranged
from kappaquant.kernels.cpu import step
from kappaquant.kernels.cpu.library import DTYPES, core, signs_of
from kappaquant.kernels.cpu.native import Native, weight_of
from kappaquant.kernels.cpu.structures import Attention, DeltaNet, Matrix, Mlp, Moe, Norm
from kappaquant.runtime.experts import QuantExperts
from kappaquant.runtime.packed import PackedWeight, QuantLinear, SharedInput
from kappaquant.runtime.recurrent import PromptMixer


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


def known(layer: nn.Module) -> bool:
    """Whether it is one of ``FAMILIES``, as transformers has it."""
    return type(layer).__name__ in FAMILIES and type(layer).__module__.startswith("transformers.models.")


class Description:
    """A layer as the native core takes it, for as long as its tensors and modules stay where they are.

    Attributes:
        attention, delta_net: one of them, what the layer has.
        mlp: of the other half.
        index: of the layer in a cache.
        config: attention's.
        hidden: size of the hidden states.
        stepper: with the inputs that the layer's products are of.

    Raises:
        UnsupportedError: the layer can not be described; the message says why.
    """

    def __init__(self, layer: Any) -> None:
        self._family = FAMILIES[type(layer).__name__]
        self._held: list[tuple[dict[str, Any], str]] = []  # where each of the modules is
        self._modules: list[nn.Module] = []
        self._hooks: list[dict[int, Any]] = []
        self._own: list[dict[str, Any]] = []  # attributes of modules, that have no ``forward`` of their own
        self._filled: list[tuple[dict[str, Any], str]] = []  # where each of the tensors is
        self._places: list[int] = []
        self._inputs: list[SharedInput] = []
        self.attention: Attention | None = None
        self.delta_net: DeltaNet | None = None
        self.hidden: int = layer.input_layernorm.weight.numel()
        before = self._norm(layer, "input_layernorm", self.hidden, self._family.plus_one)
        mixer = self._child(layer, "linear_attn" if hasattr(layer, "linear_attn") else "self_attn")
        self.index: int = mixer.layer_idx
        self.config: Any = getattr(mixer, "config", None)
        if hasattr(layer, "linear_attn"):
            self.delta_net = self._delta_net(mixer, before)
        else:
            self.attention = self._attention(mixer, before)
        after = self._norm(layer, "post_attention_layernorm", self.hidden, self._family.plus_one)
        mlp = self._child(layer, "mlp")
        self.mlp = self._moe(mlp, after) if hasattr(mlp, "experts") else self._mlp(mlp, after)
        self._activations = [shared.activations for shared in self._inputs]
        if len(set(self._activations)) > 1:
            raise UnsupportedError(
                f"its layers multiply by inputs of several kinds, {', '.join(sorted(set(self._activations)))}"
            )
        self.stepper = step.Stepper("int8" not in self._activations, core())

    @property
    def current(self) -> bool:
        """Whether tensors and modules are still where they were, inputs of the same kind, and no hook waits for a module's turn."""
        return (
            [held.get(name) for held, name in self._held] == self._modules
            and [held[name].data_ptr() for held, name in self._filled] == self._places
            and [shared.activations for shared in self._inputs] == self._activations
            and not any(self._hooks)
            and not any("forward" in own for own in self._own)
        )

    def _child(self, module: Any, name: str) -> Any:
        child = getattr(module, name)
        self._held.append((module._modules, name))
        self._modules.append(child)
        self._hooks += child._forward_hooks, child._forward_pre_hooks
        if not isinstance(vars(child).get("forward"), PromptMixer):
            self._own.append(vars(child))
        return child

    def _place(self, module: nn.Module, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor of a module: of that shape, in one piece, on the CPU."""
        what = f"{name} of {type(module).__name__}"
        held = module._parameters if name in module._parameters else module._buffers
        tensor = held.get(name)
        if tensor is None:
            raise UnsupportedError(f"{what} is packed")
        if tuple(tensor.shape) != shape:
            raise UnsupportedError(f"{what} has shape {list(tensor.shape)}, not {list(shape)}")
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise UnsupportedError(f"{what} does not lie in one piece on the CPU")
        self._filled.append((held, name))
        self._places.append(tensor.data_ptr())
        return tensor

    def _floats(self, module: nn.Module, name: str, *shape: int) -> Tensor:
        tensor = self._place(module, name, shape)
        if tensor.dtype not in DTYPES:
            allowed = ", ".join(map(str, DTYPES))
            raise UnsupportedError(f"{name} of {type(module).__name__} is {tensor.dtype}, not one of {allowed}")
        return tensor

    def _packed(self, weight: PackedWeight, *shape: int) -> Arranged:
        if not weight.whole or not isinstance(weight.kernel, Native):
            raise UnsupportedError(f"its {weight.fmt.id} weights are not multiplied by the native core")
        if tuple(weight.shape) != shape:
            raise UnsupportedError(f"a packed weight has shape {list(weight.shape)}, not {list(shape)}")
        for name, part in weight._buffers.items():
            assert part is not None
            self._place(weight, name, tuple(part.shape))
        return weight.arranged

    def _matrix(self, parent: Any, name: str, rows: int, inputs: int) -> Matrix:
        linear = self._child(parent, name)
        bias = None if linear._parameters.get("bias") is None else self._floats(linear, "bias", rows)
        if type(linear) is QuantLinear:
            self._inputs.append(linear.shared)
            return step.packed_matrix(self._packed(linear.weight, rows, inputs), bias)
        if type(linear) is nn.Linear:
            return step.plain_matrix(self._floats(linear, "weight", rows, inputs), bias)
        raise UnsupportedError(f"{name} is {type(linear).__name__}, not a linear layer")

    def _norm(self, parent: Any, name: str, size: int, plus_one: bool) -> Norm:
        module = self._child(parent, name)
        epsilon = getattr(module, "variance_epsilon", None)
        return step.norm(self._floats(module, "weight", size), module.eps if epsilon is None else epsilon, plus_one)

    def _attention(self, m: Any, before: Norm) -> Attention:
        hidden, dim, gated, plus_one = self.hidden, m.head_dim, self._family.gated, self._family.plus_one
        parts = dim * (1 + gated)  # of a query head
        heads, kv_heads = m.config.num_attention_heads, m.config.num_key_value_heads
        if heads % kv_heads:
            raise UnsupportedError(f"{heads} query heads are no multiple of {kv_heads} key-value heads")
        norms = [self._norm(m, name, dim, plus_one) if hasattr(m, name) else Norm() for name in ("q_norm", "k_norm")]
        return Attention(
            self._matrix(m, "q_proj", heads * parts, hidden), self._matrix(m, "k_proj", kv_heads * dim, hidden),
            self._matrix(m, "v_proj", kv_heads * dim, hidden), self._matrix(m, "o_proj", hidden, heads * dim), before,
            *norms, heads, kv_heads, dim, m.scaling, gated,
        )  # fmt: skip

    def _delta_net(self, m: Any, before: Norm) -> DeltaNet:
        if m.activation != "silu":
            raise UnsupportedError(f"its convolution is followed by {m.activation}, not silu")
        heads, columns = m.num_v_heads, m.num_v_heads * m.head_v_dim
        channels, taps = 2 * m.num_k_heads * m.head_k_dim + columns, m.conv_kernel_size
        rows = {"qkv": channels, "z": columns, "b": heads, "a": heads}
        inputs = [self._matrix(m, f"in_proj_{name}", size, self.hidden) for name, size in rows.items()]
        conv = self._child(m, "conv1d")
        weight = self._floats(conv, "weight", channels, 1, taps)
        bias = None if conv.bias is None else self._floats(conv, "bias", channels)
        if bias is not None and bias.dtype != weight.dtype:
            raise UnsupportedError(f"its convolution's bias is {bias.dtype}, its weight {weight.dtype}")
        a_log, dt_bias = self._floats(m, "A_log", heads), self._floats(m, "dt_bias", heads)
        return DeltaNet(
            *inputs, self._matrix(m, "out_proj", self.hidden, columns), before, self._norm(m, "norm", m.head_v_dim, False),
            weight.data_ptr(), None if bias is None else bias.data_ptr(), a_log.data_ptr(), dt_bias.data_ptr(),
            m.num_k_heads, heads, m.head_k_dim, m.head_v_dim, taps, DTYPES[weight.dtype], DTYPES[a_log.dtype],
            DTYPES[dt_bias.dtype],
        )  # fmt: skip

    def _mlp(self, m: Any, before: Norm) -> Mlp:
        probe = torch.linspace(-4, 4, 9)
        if not torch.equal(m.act_fn(probe), nn.functional.silu(probe)):
            raise UnsupportedError(f"its MLP's activation is {type(m.act_fn).__name__}, not silu")
        inner = m.intermediate_size
        gate, up = (self._matrix(m, name, inner, self.hidden) for name in ("gate_proj", "up_proj"))
        return Mlp(gate, up, self._matrix(m, "down_proj", self.hidden, inner), before)

    def _moe(self, m: Any, before: Norm) -> Moe:
        router, experts = self._child(m, "gate"), self._child(m, "experts")
        whole = experts.in_one_kernel() if isinstance(experts, QuantExperts) else None
        if whole is None:
            raise UnsupportedError("its experts are not packed in one format")
        self._inputs.append(experts.shared)
        count, _, inner = whole[1].shape
        if not 0 < router.top_k <= count:
            raise UnsupportedError(f"its router takes {router.top_k} of {count} experts")
        gate_up = self._packed(whole[0], count, 2 * inner, self.hidden)
        down = self._packed(whole[1], count, self.hidden, inner)
        shared, shared_gate = Mlp(before=before), Matrix()
        if hasattr(m, "shared_expert"):
            shared = self._mlp(self._child(m, "shared_expert"), before)
            shared_gate = self._matrix(m, "shared_expert_gate", 1, self.hidden)
        return Moe(
            step.plain_matrix(self._floats(router, "weight", count, self.hidden), None), shared_gate, shared,
            weight_of(gate_up), weight_of(down), *(signs_of(weight.fmt.step).data_ptr() for weight in (gate_up, down)),
            router.top_k, getattr(router, "norm_topk_prob", True),
        )  # fmt: skip
