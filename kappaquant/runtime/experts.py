"""Modules of routed experts whose weights are packed, or partly kept in 16 bits.

Shapes: a weight is [E, out, in]; slots are (token, expert) pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from kappaquant.kernels import dispatch
from kappaquant.runtime.gradients import ExpertsProduct, wanted
from kappaquant.runtime.packed import PackedWeight, SharedInput


class KeptWeight(nn.Module):
    """Expert matrices [E, out, in] that the plan keeps in 16 bits, beside packed ones."""

    tensor: Tensor

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "meta") -> None:
        super().__init__()
        self.register_buffer("tensor", torch.empty(tuple(shape), dtype=dtype, device=device), persistent=False)

    def fill(self, at: tuple[int | slice | Tensor, ...], tensor: Tensor) -> None:
        self.tensor[at] = tensor.to(self.tensor.device, self.tensor.dtype)

    def finish(self) -> None:
        self._non_persistent_buffers_set -= {"tensor"}

    @property
    def waits_for_host(self) -> bool:
        """Whether its products do, so that no CUDA graph can hold them."""
        # torch's grouped product wants whole 16 bytes of both axes; where it is not, or not for this dtype, experts take turns
        aligned = all(size % 8 == 0 for size in self.tensor.shape[1:])
        fits = self.tensor.is_cuda and self.tensor.dtype == torch.bfloat16 and aligned
        return not (
            fits
            and hasattr(nn.functional, "grouped_mm")
            and torch.cuda.get_device_capability(self.tensor.device) >= (8, 0)
        )

    def grouped_linear(self, x: Tensor, index: Tensor) -> Tensor:
        """x [tokens, in] times tensor[index], [tokens, k, out]; 0 for what lies outside [0, E). ``index`` is int64 [tokens, k]."""
        experts, k = len(self.tensor), index.shape[1]
        out = x.new_zeros(*index.shape, self.tensor.shape[1])
        if self.waits_for_host:
            for expert in index.unique().tolist():
                if 0 <= expert < experts:
                    mine = (index == expert).nonzero(as_tuple=True)
                    out[mine] = nn.functional.linear(x[mine[0]], self.tensor[expert])
            return out
        known = (index >= 0) & (index < experts)
        ids, order = (
            index.masked_fill(~known, experts).flatten().sort()
        )  # what is none comes last, and is not multiplied
        ends = torch.searchsorted(ids, torch.arange(experts, device=ids.device), right=True, out_int32=True)
        products = nn.functional.grouped_mm(x[order // k], self.tensor.mT, offs=ends)
        out.view(-1, out.shape[-1])[order] = products
        return out.masked_fill_(~known[..., None], 0)


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

    def places(self, index: Tensor) -> Tensor:
        """Where experts are in this block; outside of it for those that are elsewhere, or none."""
        if self.everyone:
            return index
        known = (index >= 0) & (index < self.num_experts)
        return self.slots[index.clamp(0, self.num_experts - 1)].masked_fill(~known, -1)

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

    @property
    def waits_for_host(self) -> bool:
        """Whether its products do, so that no CUDA graph can hold them."""
        return any(block.weight.waits_for_host for block in self.blocks if isinstance(block, ExpertBlock))

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """x [tokens, in] times weight[index], for index int64 [tokens, k]: [tokens, k, out] in x's dtype.

        0 for what lies outside [0, E).
        """
        out = x.new_zeros(*index.shape, self.out_features)
        for block in self.blocks:
            assert isinstance(block, ExpertBlock)
            y = block.weight.grouped_linear(x, block.places(index))
            out[..., block.row : block.row + y.shape[-1]] += y.to(x.dtype)
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

    def waits_for_host(self) -> bool:
        """Whether something in them does, so that no CUDA graph can hold them."""
        return self.in_one_kernel() is None and (self.gate_up_proj.waits_for_host or self.down_proj.waits_for_host)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, hidden], top_k_index and top_k_weights [tokens, k] -> [tokens, hidden].

        Ids outside [0, E) count nothing; see ``Kernel.experts``.
        """
        whole = self.in_one_kernel()
        if whole:
            gate_up, down = whole
            if wanted(hidden_states, top_k_weights):
                return ExpertsProduct.apply(
                    hidden_states, top_k_index, top_k_weights, gate_up, down, self.shared.activations
                )
            return dispatch.experts(
                hidden_states, top_k_index, top_k_weights, gate_up.tensors, down.tensors,
                dispatch.SEPARATOR.join((gate_up.spec, down.spec)), [*gate_up.shape, *down.shape], self.shared.activations,
            )  # fmt: skip
        gate, up = self.gate_up_proj(hidden_states, top_k_index).chunk(2, dim=-1)
        inner = self.act_fn(gate) * up
        products = self.down_proj(inner.flatten(0, 1), top_k_index.reshape(-1, 1)).view(*top_k_index.shape, -1)
        known = (top_k_index >= 0) & (top_k_index < self.gate_up_proj.num_experts)
        return (products * top_k_weights.masked_fill(~known, 0)[..., None]).sum(dim=1).to(hidden_states.dtype)
