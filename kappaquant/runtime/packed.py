"""Modules that hold packed weights: nothing here ever keeps a dequantized copy, and nothing knows how a kernel orders one."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kappaquant.errors import UnsupportedError
from kappaquant.files.tensors import TORCH_DTYPES
from kappaquant.formats.base import Format
from kappaquant.kernels import dispatch
from kappaquant.kernels.base import ACTIVATIONS, Arranged, Kernel, Use
from kappaquant.runtime.gradients import GroupedProduct, LinearProduct, wanted


class SharedInput:
    """Prepares an input once for all layers that read the same tensor, such as q/k/v or gate/up.

    Remembers the last input only by a weak reference, and what was made of it only while that input lives unmodified.

    Attributes:
        activations: what kernels multiply by: "int8"; "bf16", which is float16 with a scale on GPUs, and loses less than bf16 does;
            "float32" on CPUs. Torch kernels always use float32.
    """

    def __init__(self, activations: str = ACTIVATIONS[0]) -> None:
        self.activations = activations
        self._last: tuple[weakref.ref[Tensor], int, dict[tuple[Any, ...], list[Tensor]]] | None = None

    def __reduce__(self) -> tuple[type[SharedInput], tuple[str]]:
        return SharedInput, (self.activations,)  # a copy starts empty: what is remembered belongs to live tensors

    def prepared(self, x: Tensor, weight: PackedWeight) -> list[Tensor]:
        """What the kernel of a weight [..., out, in] makes of x [..., in], or nothing where the product is to do that itself."""
        # tensors of inference mode have no version counter, so a change in place could not be noticed
        if torch.compiler.is_compiling() or x.is_inference():
            return []
        rows, tokens = weight.shape[-2], x.numel() // x.shape[-1]
        kind = weight.kernel.input_kind(weight.fmt, tokens, rows, self.activations, x.device)
        if kind is None:
            return []
        key, last = (weight.kernel.name, kind), self._last
        if last is None or last[0]() is not x or last[1] != x._version:
            self._last = last = weakref.ref(x, self._forget), x._version, {}
        if key not in last[2]:
            last[2][key] = dispatch.prepare(x, weight.spec, rows, self.activations)
        return last[2][key]

    def _forget(self, dead: weakref.ref[Tensor]) -> None:
        last = self._last
        if last is not None and last[0] is dead:
            self._last = None


class PackedWeight(nn.Module):
    """A weight [..., out, in] as the parts of its format. Empty until ``fill``.

    Buffers are the parts as on disk, by suffix, until the weight is whole; then those that the kernel which serves it on its device
    orders them in, and as on disk again if it moves to where another kernel serves it.

    Attributes:
        uses: what it is for; the first that a kernel serves on its device.
        kernel, serves: which does, and for what; set by ``finish``.
        spec: of both kernel and format, for ops.
    """

    kernel: Kernel
    serves: Use
    spec: str

    def __init__(
        self, fmt: Format, shape: Sequence[int], device: torch.device | str = "meta", uses: Sequence[Use] = ("linear",)
    ) -> None:
        super().__init__()
        self.fmt = fmt
        self.shape = torch.Size(shape)
        self.uses = tuple(uses)
        self.whole = False
        parts = {s: (TORCH_DTYPES[dtype], part) for s, (dtype, part) in fmt.parts(tuple(shape)).items()}
        floats = [dtype for dtype, _ in parts.values() if dtype.is_floating_point]
        self.dtype = floats[0] if floats else torch.float32  # model code asks a weight for its dtype to cast inputs
        # not persistent until filled: transformers then allocates them on the right device but does not miss them
        for suffix, (dtype, part) in parts.items():
            self.register_buffer(suffix[1:], torch.empty(part, dtype=dtype, device=device), persistent=False)

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Its buffers, in the order of the format's parts or the kernel's."""
        return tuple(self.buffers())

    @property
    def arranged(self) -> Arranged:
        """As its kernel has ordered it."""
        return Arranged(self.fmt, tuple(self.shape), self.tensors)

    def extra_repr(self) -> str:
        served = f", {self.kernel.name}" if self.whole else ""
        return f"{self.fmt.key}, shape={tuple(self.shape)}{served}"

    def part(self, suffix: str) -> Tensor | None:
        """The buffer that a stored part fills, if the format has one of this suffix."""
        return self._buffers.get(suffix[1:])

    def fill(self, at: tuple[int | slice | Tensor, ...], parts: Mapping[str, Tensor]) -> None:
        """Copy stored parts into the slice ``at`` of the leading axes."""
        for suffix, part in parts.items():
            self.get_buffer(suffix[1:])[at] = part.to(self.device)

    def finish(self) -> None:
        """All parts are filled: let the state dict hold them from now on, and a kernel order them."""
        self.whole = True
        self._non_persistent_buffers_set.clear()
        self.kernel, self.serves = dispatch.choose(self.fmt, self._parts(), self.uses)
        self._arrange(self._parts())

    def serve(self, *uses: Use) -> None:
        """Be for something else from now on."""
        if self.uses != uses:
            self.uses = uses
            self._settle()

    def stored(self) -> dict[str, Tensor]:
        """Its parts as on disk, whatever order its kernel holds them in."""
        return self.kernel.restore(self.arranged)

    @property
    def data(self) -> Tensor:
        """What would be changed in place, to merge an adapter for one. Raises UnsupportedError."""
        raise UnsupportedError(
            "a packed weight cannot be changed: keep the adapter beside it, or merge it into the model that kappaquant dequantize writes"
        )

    def _parts(self) -> dict[str, Tensor]:
        """As the format describes them: only of a weight that is not arranged."""
        return self.arranged.parts

    def _arrange(self, parts: Mapping[str, Tensor]) -> None:
        self._buffers.clear()
        for name, tensor in self.kernel.arrange(self.fmt, parts).items():
            self.register_buffer(name, tensor)
        self.spec = dispatch.spec_of(self.kernel, self.fmt)

    def _settle(self) -> None:
        """Ask again which kernel serves it, where it is now; nothing happens before it is whole."""
        if not self.whole:
            return
        parts = self.stored()
        kernel, self.serves = dispatch.choose(self.fmt, parts, self.uses)
        if kernel is not self.kernel:
            self.kernel = kernel
            self._arrange(parts)

    def linear(self, x: Tensor, shared: SharedInput, bias: Tensor | None = None) -> Tensor:
        """[..., in] -> [..., out] in x's dtype, for a weight [out, in]."""
        prepared = shared.prepared(x, self)
        if wanted(x, *(() if bias is None else (bias,))):
            return LinearProduct.apply(x, bias, self, prepared, shared.activations)
        rows = [self.shape[0]]
        return dispatch.linear(x, prepared, self.tensors, self.spec, rows, bias, shared.activations)

    def grouped_linear(self, x: Tensor, index: Tensor) -> Tensor:
        """x [tokens, in] times weight[index]: float32 [tokens, k, out], for a weight [E, out, in] that serves "grouped".

        ``index`` is int64 [tokens, k]; the result is 0 for what lies outside [0, E).
        """
        if wanted(x):
            return GroupedProduct.apply(x, index, self)
        return dispatch.grouped_linear(x, index, self.tensors, self.spec, list(self.shape))

    @property
    def waits_for_host(self) -> bool:
        """Whether its products do, so that no CUDA graph can hold them."""
        return self.serves in self.kernel.waits_for_host

    def rows(self, index: Tensor | int) -> Tensor:
        """weight[index] in float32: rows [*index.shape, in] of a weight [out, in], matrices of a stack; it must serve "rows"."""
        return dispatch.decode([part[index] for part in self.tensors], self.spec, self.shape[-1])

    def dequantize(self) -> Tensor:
        """The whole weight in float32, if it serves "rows"; a temporary, for the caller to drop."""
        if (
            not self.whole
        ):  # a loader initializes what it has not loaded yet: that is lost, and the parts are filled later
            return torch.empty(self.shape, device=self.device)
        return dispatch.decode(self.tensors, self.spec, self.shape[-1])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        """Moves between devices as any module does, but keeps its dtypes: norms in bfloat16 would lose bits."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, held in before.items():
            assert held is not None
            if self.get_buffer(name).dtype != held.dtype:
                self._buffers[name] = held.to(self.device)
        self._settle()
        return self


class QuantLinear(nn.Linear):
    """``nn.Linear`` with a packed weight [out, in]; its bias, if any, stays a plain parameter.

    It is one to libraries that look for such layers, as PEFT does for adapters, which are trained beside it.
    """

    weight: PackedWeight  # type: ignore[assignment]

    def __init__(self, weight: PackedWeight, bias: nn.Parameter | None, shared: SharedInput) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a dense weight
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.bias = bias  # type: ignore[assignment]  # None is what nn.Linear has without one, too
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.linear(x, self.shared, self.bias)


class QuantEmbedding(nn.Module):
    """``nn.Embedding`` with a packed weight [vocabulary, dim]; ``scale`` multiplies the result, as gemma wants it."""

    def __init__(self, weight: PackedWeight, dtype: torch.dtype, scale: float = 1.0) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        weight.serve("rows")
        self.weight = weight
        self.dtype = dtype
        self.scale = torch.tensor(
            scale, dtype=dtype, device="cpu"
        ).item()  # rounded once, as the model's own tensor of it is

    def forward(self, ids: Tensor) -> Tensor:
        found = self.weight.rows(ids).to(self.dtype)
        return found if self.scale == 1.0 else found * self.scale


class DecodedStack:
    """A packed weight [E, out, in] as its module's own code reads it: one matrix is decoded for ``stack[e]``, all for anything else."""

    def __init__(self, weight: PackedWeight, dtype: torch.dtype, transposed: bool) -> None:
        self._weight, self.dtype, self._transposed = weight, dtype, transposed
        *lead, rows, inputs = weight.shape
        self.shape = torch.Size((*lead, inputs, rows) if transposed else weight.shape)

    def __getitem__(self, index: Any) -> Tensor:
        if not isinstance(index, int | Tensor):
            return self.dense()[index]
        return self._as_read(self._weight.rows(index))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        dense = [each.dense() if isinstance(each, DecodedStack) else each for each in args]
        named = {key: each.dense() if isinstance(each, DecodedStack) else each for key, each in (kwargs or {}).items()}
        return function(*dense, **named)

    def dense(self) -> Tensor:
        """All of it; a temporary."""
        return self._as_read(self._weight.dequantize())

    def _as_read(self, matrices: Tensor) -> Tensor:
        return (matrices.mT if self._transposed else matrices).to(self.dtype)


def hold_packed(
    module: nn.Module, name: str, weight: PackedWeight, dtype: torch.dtype, transposed: bool = False
) -> None:
    """Replace parameter ``name`` of any module by a packed weight that is decoded each time the module reads it.

    For modules whose own forward is to be kept: routers, linear layers of another kind, experts that transformers does not describe.

    Args:
        transposed: the module reads [..., in, out].
    """
    held = f"{name}_packed"
    weight.serve("rows")
    del module._parameters[name]
    module.add_module(held, weight)

    def read(self: nn.Module) -> Tensor | DecodedStack:
        stack = DecodedStack(getattr(self, held), dtype, transposed)
        return stack if len(stack.shape) > 2 else stack.dense()

    if len(weight.shape) > 2:
        module._is_hf_initialized = True  # type: ignore[assignment]  # transformers need not look for random values, in place, for it
    cls = type(module)
    module.__class__ = type(cls.__name__, (cls,), {name: property(read), "__module__": cls.__module__})
