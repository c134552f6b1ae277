"""Modules that hold packed weights: nothing here ever keeps a dequantized copy.

Shapes: ``packed`` uint8 [..., out, G * bytes_per_group], ``norms`` [..., out, G], a weight [..., out, in].
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kappaquant import ops
from kappaquant.format import Format


class SharedRotation:
    """Rotates an input once for all layers that read the same tensor, such as q/k/v or gate/up.

    Remembers the last input only by a weak reference, and its rotation only while that input lives unmodified.
    """

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[Tensor], int, int, Tensor] | None = None

    def __reduce__(self) -> tuple[type[SharedRotation], tuple[()]]:
        return SharedRotation, ()  # a copy starts empty: what is remembered belongs to live tensors

    def __call__(self, x: Tensor, group_size: int) -> Tensor:
        """``ops.rotate(x, group_size)``: [..., in] -> float32 [..., G * group_size]."""
        # tensors of inference mode have no version counter, so a change in place could not be noticed
        if torch.compiler.is_compiling() or x.is_inference():
            return ops.rotate(x, group_size)
        last = self._last
        if last is not None and last[0]() is x and last[1:3] == (x._version, group_size):
            return last[3]
        rotated = ops.rotate(x, group_size)
        self._last = (weakref.ref(x, self._forget), x._version, group_size, rotated)
        return rotated

    def _forget(self, dead: weakref.ref[Tensor]) -> None:
        last = self._last
        if last is not None and last[0] is dead:
            self._last = None


class PackedWeight(nn.Module):
    """A weight [..., out, in] as packed codes and norms. Empty until ``fill``."""

    tq_packed: Tensor
    tq_norms: Tensor
    codebook: Tensor

    def __init__(
        self,
        fmt: Format,
        shape: Sequence[int],
        centroids: Sequence[float],
        norm_dtype: torch.dtype = torch.float16,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__()
        self.fmt = fmt
        self.shape = torch.Size(shape)
        self.centroids = tuple(centroids)
        packed = torch.empty(fmt.packed_shape(tuple(shape)), dtype=torch.uint8, device=device)
        norms = torch.empty(fmt.norms_shape(tuple(shape)), dtype=norm_dtype, device=device)
        # not persistent until filled: transformers then allocates them on the right device but does not miss them
        self.register_buffer("tq_packed", packed, persistent=False)
        self.register_buffer("tq_norms", norms, persistent=False)
        self.register_buffer("codebook", torch.empty(len(centroids), device=device), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored norms; model code asks a weight for its dtype to cast inputs."""
        return self.tq_norms.dtype

    @property
    def device(self) -> torch.device:
        return self.tq_packed.device

    def extra_repr(self) -> str:
        return f"{self.fmt.id}, shape={tuple(self.shape)}"

    def fill(self, at: tuple[int | slice, ...], packed: Tensor, norms: Tensor) -> None:
        """Copy stored bytes into the part ``at`` of the leading axes."""
        self.tq_packed[at] = packed.to(self.device)
        self.tq_norms[at] = norms.to(self.device)

    def finish(self) -> None:
        """All parts are filled: set the codebook, and let the state dict hold the bytes from now on."""
        self.codebook.copy_(torch.tensor(self.centroids))
        self._non_persistent_buffers_set -= {"tq_packed", "tq_norms"}

    def linear(self, rotated: Tensor) -> Tensor:
        """float32 [..., K] -> float32 [..., out], for a weight [out, in]."""
        fmt = self.fmt
        return ops.linear(rotated, self.tq_packed, self.tq_norms, self.codebook, fmt.bits, fmt.group_size)

    def grouped_linear(self, rotated: Tensor, rows: Tensor, experts: Tensor) -> Tensor:
        """out[i] = weight[experts[i]] @ rotated[rows[i]], float32 [len(rows), out], for a weight [E, out, in]."""
        book, fmt = self.codebook, self.fmt
        return ops.grouped_linear(rotated, rows, experts, self.tq_packed, self.tq_norms, book, fmt.bits, fmt.group_size)

    def rows(self, index: Tensor) -> Tensor:
        """weight[index] in float32 [*index.shape, in], for a weight [out, in]."""
        return self._dequantize(self.tq_packed[index], self.tq_norms[index])

    def dequantize(self) -> Tensor:
        """The whole weight in float32; a temporary, for the caller to drop."""
        return self._dequantize(self.tq_packed, self.tq_norms)

    def _dequantize(self, packed: Tensor, norms: Tensor) -> Tensor:
        fmt = self.fmt
        return ops.dequantize(packed, norms, self.codebook, fmt.bits, fmt.group_size, self.shape[-1])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        """Moves between devices as any module does, but keeps its dtypes: norms in bfloat16 would lose bits."""
        dtype = self.tq_norms.dtype
        norms = self.tq_norms
        super()._apply(fn, recurse)
        if self.tq_norms.dtype != dtype:
            self.tq_norms = norms.to(self.tq_packed.device)
        if self.codebook.dtype != torch.float32:
            self.codebook = torch.tensor(self.centroids, device=self.tq_packed.device)
        return self


class QuantLinear(nn.Module):
    """``nn.Linear`` with a packed weight [out, in]; its bias, if any, stays a plain parameter."""

    def __init__(self, weight: PackedWeight, bias: nn.Parameter | None, rotation: SharedRotation) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.bias = bias
        self.rotation = rotation

    def forward(self, x: Tensor) -> Tensor:
        y = self.weight.linear(self.rotation(x, self.weight.fmt.group_size)).to(x.dtype)
        return y if self.bias is None else y + self.bias


class QuantEmbedding(nn.Module):
    """``nn.Embedding`` with a packed weight [vocabulary, dim]; ``scale`` multiplies the result, as gemma wants it."""

    def __init__(self, weight: PackedWeight, dtype: torch.dtype, scale: float = 1.0) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.weight = weight
        self.dtype = dtype
        self.scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        found = self.weight.rows(ids).to(self.dtype)
        return found if self.scale == 1.0 else found * torch.tensor(self.scale, dtype=self.dtype, device=found.device)


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

    def grouped_linear(self, x: Tensor, rows: Tensor, experts: Tensor) -> Tensor:
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
        self.out_features = out_features

    def forward(self, x: Tensor, rows: Tensor, experts: Tensor, rotation: SharedRotation) -> Tensor:
        """out[i] = weight[experts[i]] @ x[rows[i]]: x [m, in], rows and experts int64 [s] -> [s, out] in x's dtype."""
        out = x.new_empty(rows.shape[0], self.out_features)
        for block in self.blocks:
            assert isinstance(block, ExpertBlock)
            mine, local = block.find(experts)
            weight = block.weight
            source = rotation(x, weight.fmt.group_size) if isinstance(weight, PackedWeight) else x
            y = weight.grouped_linear(source, rows[mine], local)
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
        rotation: SharedRotation,
    ) -> None:
        super().__init__()
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj
        self.act_fn = act_fn
        self.rotation = rotation

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, hidden], top_k_index and top_k_weights [tokens, k] -> [tokens, hidden]."""
        tokens, k = top_k_index.shape
        experts = top_k_index.reshape(-1)
        every = torch.arange(tokens * k, device=experts.device)
        gate, up = self.gate_up_proj(hidden_states, every // k, experts, self.rotation).chunk(2, dim=-1)
        inner = self.act_fn(gate) * up
        out = self.down_proj(inner, every, experts, self.rotation) * top_k_weights.reshape(-1, 1)
        return out.view(tokens, k, -1).sum(dim=1).to(hidden_states.dtype)


def hold_packed(module: nn.Module, name: str, weight: PackedWeight, dtype: torch.dtype) -> None:
    """Replace parameter ``name`` of any module by a packed weight that is decoded each time the module reads it.

    For modules that are neither linear layers nor embeddings, such as routers.
    """
    held = f"{name}_packed"
    del module._parameters[name]
    module.add_module(held, weight)

    def read(self: nn.Module) -> Tensor:
        packed: Any = getattr(self, held)
        return packed.dequantize().to(dtype)

    cls = type(module)
    module.__class__ = type(cls.__name__, (cls,), {name: property(read), "__module__": cls.__module__})
