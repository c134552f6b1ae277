"""Whole decoder layers of Qwen3.5-MoE for one new token a sequence: eleven launches where the modules make ninety.

The layers stay transformers' own, with its cache; only a step of one token, on packed weights on a GPU, takes this way (of
prompts only GatedDeltaNet's rule is replaced, see recurrent.py):

    norm, rotate | q, k, v or qkv, z | attention or GatedDeltaNet | out | add, norm, rotate | router | gate, up | silu, rotate | down, add
"""

from __future__ import annotations

import logging
import weakref
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kappaquant.formats.codebook import CodebookFormat
from kappaquant.kernels.cuda import experts, inputs, tensor_cores
from kappaquant.kernels.cuda.step import attention, deltanet, dense, route
from kappaquant.kernels.cuda.tiled import Tiled, needs_half, weight_of
from kappaquant.runtime.experts import QuantExperts
from kappaquant.runtime.packed import PackedWeight, QuantLinear
from kappaquant.runtime.recurrent import PromptMixer

logger = logging.getLogger("kappaquant")

MOST_SEQUENCES = 16
_LAYER = "Qwen3_5MoeDecoderLayer"


def fuse(model: nn.Module) -> list[str]:
    """Let the decoder layers of a loaded model take the short way whenever one token a sequence comes.

    Layers that can not be fused stay as they are, and a log line says why.

    Returns:
        The names of the fused layers.
    """
    fused, starts = [], Starts()
    unfused: dict[str, list[str]] = defaultdict(list)
    for name, layer in model.named_modules():
        if type(layer).__name__ != _LAYER or not any(isinstance(m, PackedWeight) for m in layer.modules()):
            continue
        reason = _refusal(layer)
        if reason:
            unfused[reason].append(name)
            continue
        if not isinstance(layer.__dict__.get("forward"), FusedLayer):
            layer.forward = FusedLayer(layer, starts)
            if hasattr(layer, "linear_attn") and PromptMixer.refusal(layer.linear_attn) is None:
                layer.linear_attn.forward = PromptMixer(layer.linear_attn)
        fused.append(name)
    for reason, names in unfused.items():
        logger.warning("%s%s: not fused: %s", names[0], f" and {len(names) - 1} more" if names[1:] else "", reason)
    return fused


def tiled(weight: PackedWeight) -> bool:
    """Whether the launches here take a weight as it is ordered now."""
    return weight.whole and isinstance(weight.kernel, Tiled)


def kernel_weight(weight: PackedWeight) -> tensor_cores.Weight:
    """A tiled weight as launches take it."""
    return weight_of(weight.arranged)


def _refusal(layer: Any) -> str | None:
    """Why a layer can not be fused, or None."""
    mlp = layer.mlp
    if not isinstance(getattr(mlp, "experts", None), QuantExperts):
        return "its experts are not packed"
    whole = mlp.experts.in_one_kernel()
    if whole is None or not all(map(tiled, whole)):
        return "its experts do not run on tensor cores"
    for linear in _linears(layer):
        if isinstance(linear, QuantLinear) and not tiled(linear.weight):
            return f"a packed {linear.in_features} x {linear.out_features} layer does not run on tensor cores"
        if not isinstance(linear, QuantLinear | nn.Linear):
            return f"{type(linear).__name__} in place of a linear layer"
    if not isinstance(mlp.gate._parameters.get("weight"), nn.Parameter):
        return "its router is packed"
    dtype = layer.input_layernorm.weight.dtype
    found = {p.dtype for n, p in layer.named_parameters() if p.dim() > 1 and "conv1d" not in n} | {dtype}
    if len(found) > 1 or dtype not in (torch.bfloat16, torch.float16):
        return f"its weights are {', '.join(sorted(map(str, found)))}; one 16-bit dtype is needed"
    groups = {m.fmt.step for m in layer.modules() if isinstance(m, PackedWeight)}
    if len(groups) > 1:
        return f"groups of {', '.join(map(str, sorted(groups)))}"
    return None


def _linears(layer: Any) -> list[Any]:
    mixer = layer.linear_attn if hasattr(layer, "linear_attn") else layer.self_attn
    shared = layer.mlp.shared_expert
    own = [m for n, m in mixer.named_children() if n.endswith("_proj") or n.startswith("in_proj")]
    return [*own, shared.gate_proj, shared.up_proj, shared.down_proj, layer.mlp.shared_expert_gate]


class Projections:
    """Linear layers that read one input: packed ones in one launch for every four, the others in one of their own."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = list(layers)
        packed = [(i, m) for i, m in enumerate(self.layers) if isinstance(m, QuantLinear)]
        self._packed = [(i, kernel_weight(m.weight), m.bias) for i, m in packed]
        self._plain = [i for i, m in enumerate(self.layers) if not isinstance(m, QuantLinear)]
        self.bits = [w.fmt.bits for _, w, _ in self._packed]
        self.activations = packed[0][1].shared.activations if packed else "bf16"
        self.half = any(needs_half(self.activations, bits) for bits in self.bits)
        self.fmt = self._packed[0][1].fmt if packed else CodebookFormat(2, 128)

    def __call__(self, rotated: inputs.Input | None, plain: Tensor) -> list[Tensor]:
        """Outputs in the order of the layers, of an input as it is and, for packed layers, rotated."""
        outs: dict[int, Tensor] = {}
        for at in range(0, len(self._packed), tensor_cores.MOST_OUTPUTS):
            assert rotated is not None
            some = self._packed[at : at + tensor_cores.MOST_OUTPUTS]
            made = tensor_cores.linear(rotated, [w for _, w, _ in some], plain.dtype, [bias for _, _, bias in some])
            outs |= {i: y for (i, _, _), y in zip(some, made, strict=True)}
        if self._plain:
            kept: list[Any] = [self.layers[i] for i in self._plain]
            made = dense.dense(plain, [m.weight for m in kept], [m.bias for m in kept], early=True)
            outs |= dict(zip(self._plain, made, strict=True))
        return [outs[i] for i in range(len(self.layers))]

    def alone(self, x: Tensor) -> list[Tensor]:
        """The same for an input that nothing has rotated yet."""
        rotated = inputs.rotate(x, self.fmt, self.half)[0] if self._packed else None
        return self(rotated, x)


class Starts:
    """The first slot that is no padding, [B], found once a step: all layers are given one tensor of rotary cosines."""

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[Tensor], Tensor | None] | None = None

    def of(self, mask: Tensor | None, step: Tensor) -> Tensor | None:
        """From an additive or boolean mask [B, 1, 1, slots] of the new token; ``step`` is an object that each step has anew."""
        if self._last is None or self._last[0]() is not step:
            visible = None if mask is None else mask[:, 0, 0] if mask.dtype == torch.bool else mask[:, 0, 0] == 0
            self._last = weakref.ref(step), None if visible is None else visible.byte().argmax(-1)
        return self._last[1]


class FusedLayer:
    """``forward`` of one decoder layer; what it can not take goes to the layer's own."""

    def __init__(self, layer: Any, starts: Starts) -> None:
        self._layer = layer
        self._starts = starts
        self._recurrent = hasattr(layer, "linear_attn")
        self._mixer = layer.linear_attn if self._recurrent else layer.self_attn
        self._made_of: tuple[Tensor, str] | None = None

    def _prepare(self) -> bool:
        """Take the weights from where they lie now; False while they are not tiled."""
        mlp, mixer = self._layer.mlp, self._mixer
        if not all(map(tiled, mlp.experts.whole)):
            return False
        codes, activations = mlp.experts.whole[0].tensors[0], mlp.experts.shared.activations
        if self._made_of and self._made_of[0] is codes and self._made_of[1] == activations:
            return True
        self._made_of = codes, activations
        names = (
            ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
            if self._recurrent
            else ("q_proj", "k_proj", "v_proj")
        )
        self._in = Projections([getattr(mixer, name) for name in names])
        self._out = Projections([mixer.out_proj if self._recurrent else mixer.o_proj])
        self._gate_up, self._down = (kernel_weight(weight) for weight in mlp.experts.whole)
        shared = mlp.shared_expert
        parts = (shared.gate_proj, shared.up_proj, shared.down_proj)
        beside = all(isinstance(p, QuantLinear) and p.bias is None for p in parts)
        beside = beside and shared.gate_proj.out_features * 2 == self._gate_up.rows
        self._shared = [kernel_weight(p.weight) for p in parts] if beside else []
        used = [self._gate_up, self._down, *self._shared]
        self._half = any(needs_half(mlp.experts.shared.activations, w.fmt.bits) for w in used)
        return True

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        cache: Any = kwargs.get("past_key_values")
        if args or not self._takes(hidden_states, cache) or not self._prepare():
            return type(self._layer).forward(self._layer, hidden_states, *args, **kwargs)
        x = hidden_states.squeeze(1)
        mixed = self._mix(x, cache.layers[self._mixer.layer_idx], kwargs)
        return self._experts(mixed, x).unsqueeze(1)

    def _takes(self, x: Tensor, cache: Any) -> bool:
        if x.shape[1] != 1 or x.shape[0] > MOST_SEQUENCES or cache is None or torch.is_grad_enabled() or not x.is_cuda:
            return False
        held = cache.layers[self._mixer.layer_idx]
        if self._recurrent:
            return bool(held.has_previous_state[0]) and not held.record_past and held.is_recurrent_states_initialized[0]
        return hasattr(held, "cumulative_length") and held.is_initialized and not held.is_sliding

    def _mix(self, x: Tensor, held: Any, kwargs: dict[str, Any]) -> Tensor:
        """Attention or GatedDeltaNet, with the norm before it: x [B, hidden] -> [B, hidden]."""
        norm, m = self._layer.input_layernorm, self._mixer
        plain = torch.empty_like(x)
        rotated, _ = inputs.rotate(
            x, self._in.fmt, self._in.half, gain=norm.weight, one_plus_gain=True, epsilon=norm.eps, normed=plain
        )
        made = self._in(rotated, plain)
        if self._recurrent:
            qkv, z, b, a = made
            core = deltanet.step(
                qkv, z, a, b, m.conv1d.weight, m.conv1d.bias, held.conv_states[0], held.recurrent_states[0],
                m.A_log, m.dt_bias, m.norm.weight, m.norm.variance_epsilon, early=True,
            )  # fmt: skip
        else:
            q, k, v = made
            cos, sin = (t.flatten(0, 1) for t in kwargs["position_embeddings"])
            start = self._starts.of(kwargs.get("attention_mask"), kwargs["position_embeddings"][0])
            core = attention.step(
                q, k, v, cos, sin, held.keys, held.values, held.cumulative_length, m.scaling, q_norm=m.q_norm.weight,
                k_norm=m.k_norm.weight, one_plus_norm=True, eps=m.q_norm.eps, gated=True, start=start,
            )  # fmt: skip
            held.cumulative_length.add_(1)
        return self._out.alone(core)[0]

    def _experts(self, mixed: Tensor, residual: Tensor) -> Tensor:
        """residual + mixed, and the experts' output of its norm added to that."""
        norm, mlp = self._layer.post_attention_layernorm, self._layer.mlp
        plain = torch.empty_like(mixed)
        rotated, total = inputs.rotate(
            mixed, self._gate_up.fmt, self._half, residual=residual, gain=norm.weight, one_plus_gain=True,
            epsilon=norm.eps, normed=plain,
        )  # fmt: skip
        gate_weight = mlp.shared_expert_gate.weight
        kept = [] if isinstance(gate_weight, PackedWeight) else [gate_weight]
        index, weights, logits = route.route(plain, mlp.gate.weight, mlp.gate.top_k, others=kept, early=True)
        gate_logit = logits[0] if kept else mlp.shared_expert_gate(plain)
        if not self._shared:
            inner = experts.gate_up(rotated, index, self._gate_up, None, plain.dtype)
            beside = mlp.shared_expert(plain)
            total = total + torch.sigmoid(gate_logit) * beside
        else:
            inner = experts.gate_up(rotated, index, self._gate_up, (self._shared[0], self._shared[1]), plain.dtype)
        gate, up = inner.chunk(2, dim=-1)
        again, _ = inputs.rotate(gate, self._down.fmt, self._half, gate_of=up)
        shared_down = self._shared[2] if self._shared else None
        return experts.down(again, index, weights, self._down, shared_down, gate_logit if shared_down else None, total)
