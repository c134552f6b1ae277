"""Modules of routed experts whose weights are packed, or partly kept in 16 bits.

Shapes: a weight is [E, out, in]; slots are (token, expert) pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from kappaquant.kernels import dispatch
from kappaquant.runtime.packed import PackedWeight, SharedInput


class KeptWeight(nn.Module):
    """Expert matrices [E, out, in] that the plan keeps in 16 bits, beside packed ones."""

    tensor: Tensor

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "meta") -> None:
        super().__init__()
        self.register_buffer("tensor", torch.empty(tuple(shape), dtype=dtype, device=device), persistent=False)

    def fill(self, at: tuple[int | slice, ...], tensor: Tensor) -> None:
        self.tensor[at] = tensor.to(self.tensor.device, self.tensor.dtype)

    def finish(self) -> None:
        self._non_persistent_buffers_set -= {"tensor"}

    def grouped_linear(self, x: Tensor, rows: Tensor, experts: Tensor, shared: SharedInput) -> Tensor:
        """out[i] = tensor[experts[i]] @ x[rows[i]], [len(rows), out]."""
        out = x.new_empty(rows.shape[0], self.tensor.shape[1])
        for expert in experts.unique().tolist():
            mine = (experts == expert).nonzero().squeeze(1)
            out[mine] = nn.functional.linear(x[rows[mine]], self.tensor[expert])
        return out


class ExpertBlock(nn.Module):
    """Rows [row, row + n) of some experts' matrices, all in one format: ``weight`` is [len(experts), n, in]."""

    slots: Tensor

    def __init__(self, weight: PackedWeight | KeptWeight, experts: Sequence[int], row: int, num_experts: int) -> None:
        super().__init__()
        self.weight = weight
        self.experts = tuple(experts)
        self.num_experts = num_experts
        self.row = row
        self.everyone = self.experts == tuple(range(num_experts))
        if not self.everyone:
            self.register_buffer("slots", torch.empty(num_experts, dtype=torch.int64, device="meta"), persistent=False)

    def find(self, experts: Tensor) -> tuple[Tensor | slice, Tensor]:
        """(which of ``experts`` [s] are here, their places in this block)."""
        if self.everyone:
            return slice(None), experts
        local = self.slots[experts]
        mine = (local >= 0).nonzero().squeeze(1)
        return mine, local[mine]

    def finish(self) -> None:
        self.weight.finish()
        if not self.everyone:  # expert -> its place in this block, -1 for experts that are not here
            self.slots.fill_(-1)
            self.slots[torch.tensor(self.experts, device=self.slots.device)] = torch.arange(
                len(self.experts), device=self.slots.device
            )


class ExpertWeights(nn.Module):
    """One projection [E, out, in] of all experts, as blocks of one format each: experts may differ in bits."""

    def __init__(self, blocks: Sequence[ExpertBlock], out_features: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.num_experts = blocks[0].num_experts
        self.out_features = out_features

    def forward(self, x: Tensor, rows: Tensor, experts: Tensor, shared: SharedInput) -> Tensor:
        """out[i] = weight[experts[i]] @ x[rows[i]]: x [m, in], rows and experts int64 [s] -> [s, out] in x's dtype."""
        out = x.new_empty(rows.shape[0], self.out_features)
        for block in self.blocks:
            assert isinstance(block, ExpertBlock)
            mine, local = block.find(experts)
            y = block.weight.grouped_linear(x, rows[mine], local, shared)
            out[mine, block.row : block.row + y.shape[1]] = y.to(x.dtype)
        return out


class QuantExperts(nn.Module):
    """Stands in for the experts modules of transformers 5: routed, gated experts with fused gate and up projections.

    Attributes:
        gate_up_proj: [E, 2 * intermediate, hidden].
        down_proj: [E, hidden, intermediate].
        act_fn: applied to the gate half.
    """

    def __init__(
        self,
        gate_up_proj: ExpertWeights,
        down_proj: ExpertWeights,
        act_fn: Callable[[Tensor], Tensor],
        shared: SharedInput,
    ) -> None:
        super().__init__()
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj
        self.act_fn = act_fn
        self.shared = shared
        self.whole = self._whole_weights()

    def _whole_weights(self) -> tuple[PackedWeight, PackedWeight] | None:
        """(gate and up, down), if kernels could take each as one weight of all experts; else every part is multiplied by itself."""
        blocks = [*self.gate_up_proj.blocks, *self.down_proj.blocks]
        packed = [block.weight for block in blocks if isinstance(block.weight, PackedWeight)]
        probe = torch.linspace(-4, 4, 9, device="cpu")
        whole = len(blocks) == len(packed) == 2 and torch.equal(self.act_fn(probe), nn.functional.silu(probe))
        for weight in packed:
            weight.serve(*(("experts", "grouped") if whole else ("grouped",)))
        return (packed[0], packed[1]) if whole else None

    def in_one_kernel(self) -> tuple[PackedWeight, PackedWeight] | None:
        """(gate and up, down), if one kernel runs them as a whole block of experts where they are now."""
        if self.whole is None:
            return None
        gate_up, down = self.whole
        alike = gate_up.serves == down.serves == "experts" and gate_up.kernel is down.kernel
        if alike and gate_up.kernel.experts_refusal(gate_up.arranged, down.arranged) is None:
            return self.whole
        for weight in self.whole:  # what one of them can not have, the other must not be ordered for
            weight.serve("grouped")
        return None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, hidden], top_k_index and top_k_weights [tokens, k] -> [tokens, hidden].

        Ids outside [0, E) count nothing; see ``Kernel.experts``.
        """
        whole = self.in_one_kernel()
        if whole:
            gate_up, down = whole
            return dispatch.experts(
                hidden_states, top_k_index, top_k_weights, gate_up.tensors, down.tensors,
                f"{gate_up.spec}\n{down.spec}", [*gate_up.shape, *down.shape], self.shared.activations,
            )  # fmt: skip
        tokens, k = top_k_index.shape
        experts = top_k_index.reshape(-1)
        slots = ((experts >= 0) & (experts < self.gate_up_proj.num_experts)).nonzero().squeeze(1)
        experts, every = experts[slots], torch.arange(len(slots), device=experts.device)
        gate, up = self.gate_up_proj(hidden_states, slots // k, experts, self.shared).chunk(2, dim=-1)
        inner = self.act_fn(gate) * up
        products = self.down_proj(inner, every, experts, self.shared) * top_k_weights.reshape(-1, 1)[slots]
        out = products.new_zeros(tokens * k, products.shape[1])
        out[slots] = products
        return out.view(tokens, k, -1).sum(dim=1).to(hidden_states.dtype)
