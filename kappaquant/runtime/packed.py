"""Modules that hold packed weights: nothing here ever keeps a dequantized copy.

Shapes: ``packed`` uint8 [..., out, G * bytes_per_group], ``norms`` [..., out, G], a weight [..., out, in].
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from kappaquant.formats.codebook import Format
from kappaquant.kernels import dispatch as ops
from kappaquant.kernels import tiled as gpu_ops

logger = logging.getLogger("kappaquant")


@cache
def _say_once(message: str) -> None:
    logger.warning(message)


class SharedRotation:
    """Rotates an input once for all layers that read the same tensor, such as q/k/v or gate/up.

    Remembers the last input only by a weak reference, and its rotation only while that input lives unmodified.

    Attributes:
        activations: what GPU kernels multiply by: "int8", or "bf16" for float16 with a scale, which loses less than
            bf16 does; torch kernels use float32.
    """

    def __init__(self, activations: str = gpu_ops.ACTIVATIONS[0]) -> None:
        self.activations = activations
        self._last: tuple[weakref.ref[Tensor], int, tuple[Any, ...], Any] | None = None

    def __reduce__(self) -> tuple[type[SharedRotation], tuple[str]]:
        return SharedRotation, (self.activations,)  # a copy starts empty: what is remembered belongs to live tensors

    def __call__(self, x: Tensor, group_size: int) -> Tensor:
        """``ops.rotate(x, group_size)``: [..., in] -> float32 [..., G * group_size]."""
        return self._once(x, ("float32", group_size), lambda: ops.rotate(x, group_size))

    def quantized(self, x: Tensor, fmt: Format, rows: int) -> gpu_ops.QuantizedInput:
        """``gpu_ops.quantize_input`` of x [..., in] for a weight [rows, in] of this format."""
        half = gpu_ops.needs_half(self.activations, fmt.bits, x.numel() // x.shape[-1], rows)
        return self._once(x, ("kernel", fmt.group_size, half), lambda: gpu_ops.quantize_input(x, fmt.group_size, half))

    def _once(self, x: Tensor, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        # tensors of inference mode have no version counter, so a change in place could not be noticed
        if torch.compiler.is_compiling() or x.is_inference():
            return make()
        last = self._last
        if last is not None and last[0]() is x and last[1:3] == (x._version, key):
            return last[3]
        made = make()
        self._last = (weakref.ref(x, self._forget), x._version, key, made)
        return made

    def _forget(self, dead: weakref.ref[Tensor]) -> None:
        last = self._last
        if last is not None and last[0] is dead:
            self._last = None


class PackedWeight(nn.Module):
    """A weight [..., out, in] as packed codes and norms. Empty until ``fill``.

    On a GPU whose kernels take it, ``tiled`` weights lie as those want them: ``codes`` and ``tile_norms`` (kernels/tiles.py)
    then stand in for ``tq_packed`` and ``tq_norms``, and moving back to a CPU restores these.
    """

    tq_packed: Tensor
    tq_norms: Tensor
    codes: Tensor
    tile_norms: Tensor
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
        self.dtype = norm_dtype  # model code asks a weight for its dtype to cast inputs
        self.disk_order = False  # to be read row by row, or whole, which tiles do not serve
        packed = torch.empty(fmt.packed_shape(tuple(shape)), dtype=torch.uint8, device=device)
        norms = torch.empty(fmt.norms_shape(tuple(shape)), dtype=norm_dtype, device=device)
        # not persistent until filled: transformers then allocates them on the right device but does not miss them
        self.register_buffer("tq_packed", packed, persistent=False)
        self.register_buffer("tq_norms", norms, persistent=False)
        self.register_buffer(
            "codebook", torch.empty(len(centroids), dtype=torch.float32, device=device), persistent=False
        )

    @property
    def device(self) -> torch.device:
        return self.codebook.device

    def extra_repr(self) -> str:
        return f"{self.fmt.id}, shape={tuple(self.shape)}{', tiled' if self.tiled else ''}"

    def fill(self, at: tuple[int | slice, ...], packed: Tensor, norms: Tensor) -> None:
        """Copy stored bytes into the part ``at`` of the leading axes."""
        self.tq_packed[at] = packed.to(self.device)
        self.tq_norms[at] = norms.to(self.device)

    def finish(self) -> None:
        """All parts are filled: set the codebook, and let the state dict hold the bytes from now on."""
        self.codebook.copy_(torch.tensor(self.centroids, dtype=torch.float32))
        self._non_persistent_buffers_set -= {"tq_packed", "tq_norms"}
        self.arrange()

    def arrange(self) -> None:
        """Order the bytes as kernels of the device take them, or as on disk; nothing happens before they are filled."""
        if "tq_packed" in self._non_persistent_buffers_set:
            return
        wanted = self.device.type == "cuda" and not self.disk_order
        if wanted and not self.tiled:
            reason = gpu_ops.refusal(self.tq_norms, self.centroids)
            if reason:
                _say_once(f"{reason}; this weight runs in torch, which is slower")
                return
            codes, norms = gpu_ops.tile(self.tq_packed, self.tq_norms, self.fmt)
            del self.tq_packed, self.tq_norms
            self.register_buffer("codes", codes)
            self.register_buffer("tile_norms", norms)
        elif self.tiled and not wanted:
            packed, norms = gpu_ops.untile(self.codes, self.tile_norms, self.fmt, self.shape)
            del self.codes, self.tile_norms
            self.register_buffer("tq_packed", packed)
            self.register_buffer("tq_norms", norms.to(self.dtype))

    @property
    def tiled(self) -> bool:
        return "codes" in self._buffers

    def linear(self, x: Tensor, rotation: SharedRotation, bias: Tensor | None = None) -> Tensor:
        """[..., in] -> [..., out] in x's dtype, for a weight [out, in]."""
        fmt = self.fmt
        if self.tiled:
            flat = x.reshape(-1, x.shape[-1])
            if gpu_ops.decodes_first(flat.shape[0], x.device):
                held = (self.codes, self.tile_norms, self.centroids, fmt.bits, fmt.group_size)
                return gpu_ops.decoded_linear(flat, *held, *self.shape, bias).view(*x.shape[:-1], -1)
            quantized = rotation.quantized(x, fmt, self.shape[0])
            args = (quantized, self.codes, self.tile_norms, self.centroids, fmt, self.shape, bias, x.dtype)
            return gpu_ops.tiled_linear(*args).view(*x.shape[:-1], -1)
        rotated = rotation(x, fmt.group_size)
        y = ops.linear(rotated, self.tq_packed, self.tq_norms, self.codebook, fmt.bits, fmt.group_size).to(x.dtype)
        return y if bias is None else y + bias

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
        name = "tile_norms" if self.tiled else "tq_norms"
        norms = getattr(self, name)
        super()._apply(fn, recurse)
        if getattr(self, name).dtype != norms.dtype:
            setattr(self, name, norms.to(self.device))
        if self.codebook.dtype != torch.float32:
            self.codebook = torch.tensor(self.centroids, dtype=torch.float32, device=self.device)
        self.arrange()
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
        return self.weight.linear(x, self.rotation, self.bias)


class QuantEmbedding(nn.Module):
    """``nn.Embedding`` with a packed weight [vocabulary, dim]; ``scale`` multiplies the result, as gemma wants it."""

    def __init__(self, weight: PackedWeight, dtype: torch.dtype, scale: float = 1.0) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        weight.disk_order = True
        self.weight = weight
        self.dtype = dtype
        self.scale = torch.tensor(
            scale, dtype=dtype, device="cpu"
        ).item()  # rounded once, as the model's own tensor of it is

    def forward(self, ids: Tensor) -> Tensor:
        found = self.weight.rows(ids).to(self.dtype)
        return found if self.scale == 1.0 else found * self.scale


def hold_packed(module: nn.Module, name: str, weight: PackedWeight, dtype: torch.dtype) -> None:
    """Replace parameter ``name`` of any module by a packed weight that is decoded each time the module reads it.

    For modules that are neither linear layers nor embeddings, such as routers.
    """
    held = f"{name}_packed"
    weight.disk_order = True
    del module._parameters[name]
    module.add_module(held, weight)

    def read(self: nn.Module) -> Tensor:
        packed: Any = getattr(self, held)
        return packed.dequantize().to(dtype)

    cls = type(module)
    module.__class__ = type(cls.__name__, (cls,), {name: property(read), "__module__": cls.__module__})
