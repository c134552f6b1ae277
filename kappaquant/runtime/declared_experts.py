"""Experts as transformers declares them, whatever their biases, gate and norm: its own module, with packed matrices.

transformers marks a class of experts with what its matrices look like, so that other products than the class' own can stand in. The
same marks are read here; parameters that are not packed, such as biases, and the gate stay the module's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from kappaquant.runtime.experts import ExpertWeights

_MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")


class DeclaredExperts(nn.Module):
    """What ``hold_experts`` puts before a class of experts of transformers: the product in the order that its marks tell."""

    has_gate: bool
    has_bias: bool
    down_proj: ExpertWeights
    act_fn: Any
    post_expert_norm: Any
    _apply_gate: Any

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, hidden], top_k_index and top_k_weights [tokens, k] -> [tokens, hidden].

        Ids outside [0, E) count nothing.
        """
        first, last = first_of(self), "down_proj"
        known = (top_k_index >= 0) & (top_k_index < getattr(self, last).num_experts)
        index = top_k_index.masked_fill(~known, -1)
        inner = self._product(first, hidden_states, index).flatten(0, 1)
        inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
        products = self._product(last, inner, index.reshape(-1, 1)).view(*top_k_index.shape, -1)
        if getattr(self, "has_post_expert_norm", False):
            products = self.post_expert_norm(products)
        return (products * top_k_weights.masked_fill(~known, 0)[..., None]).sum(dim=1).to(hidden_states.dtype)

    def waits_for_host(self) -> bool:
        """Whether something in them does, so that no CUDA graph can hold them."""
        first: ExpertWeights = getattr(self, first_of(self))
        return first.waits_for_host or self.down_proj.waits_for_host

    def _product(self, name: str, x: Tensor, index: Tensor) -> Tensor:
        out: Tensor = getattr(self, name)(x, index)
        return out + getattr(self, f"{name}_bias")[index.clamp(min=0)] if self.has_bias else out


def declared(experts: nn.Module) -> bool:
    """Whether transformers says of a module of experts all that its products need."""
    marked = all(hasattr(experts, mark) for mark in _MARKS)
    return marked and all(
        getattr(getattr(experts, name, None), "ndim", 0) == 3 for name in (first_of(experts), "down_proj")
    )


def first_of(experts: Any) -> str:
    """The parameter that the hidden states meet."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def hold_experts(module: nn.Module, weights: Mapping[str, ExpertWeights]) -> None:
    """Replace the matrices of a module of declared experts by packed ones, row-wise [E, out, in] whatever its own were."""
    for name, weight in weights.items():
        del module._parameters[name]
        module.add_module(name, weight)
    module._is_hf_initialized = True  # type: ignore[assignment]  # transformers would fill the matrices with random values, in place
    cls = type(module)
    module.__class__ = type(cls.__name__, (DeclaredExperts, cls), {"__module__": cls.__module__})
