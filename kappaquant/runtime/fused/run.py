"""Consecutive layers of a model in one call of the native core, while a decoder takes a step.

Transformers' model still calls each of its layers in turn. The first of a run takes the hidden states through all of them, and the others
hand on what it left. So nobody must look at hidden states in between: within ``together`` nobody asks for them, hooks keep a run from being
taken, and states that come changed nevertheless are an error.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from kappaquant.errors import UnsupportedError
from kappaquant.kernels.cpu import step
from kappaquant.runtime.fused.description import Description
from kappaquant.runtime.fused.held import attends, is_static, slots_of, states_of
from kappaquant.runtime.static_cache import layer_kinds

if TYPE_CHECKING:
    from kappaquant.runtime.fused.native import NativeLayer


class Run:
    """Neighbours with one kind of mixer and one mask. Belongs to one decoder, and so to one thread at a time.

    Args:
        parent: whose children the layers are.
        names: theirs.
    """

    def __init__(self, parent: nn.ModuleList, names: list[str]) -> None:
        self._parent = parent
        self._names = names
        self._modules: list[Any] = [parent._modules[name] for name in names]
        self.layers: list[NativeLayer] = [vars(module)["forward"] for module in self._modules]
        self._hooks = [h for module in self._modules for h in (module._forward_hooks, module._forward_pre_hooks)]
        self._stack: step.Stack | None = None
        self._stacked: tuple[Any, ...] = ()  # what the stack was made of

    def forward(self, x: Tensor, kwargs: dict[str, Any], count: int) -> Tensor | None:
        """x [B, 1, hidden] after all of them, or None if each has to see for itself.

        Args:
            count: of layers, from the parent's first on, that the model takes.
        """
        found = self._described(count)
        if found is None:
            return None
        first, held = found[0], [kwargs["past_key_values"].layers[each.index] for each in found]
        mask, rotary = kwargs.get("attention_mask"), kwargs["position_embeddings"]
        usual = mask is None if first.attention is None else attends(first, rotary, mask, x)
        stack = self._stack_of(found, held, len(x)) if usual and first.hidden == x.shape[-1] else None
        if stack is None:
            return None
        return first.stepper.layers(x, stack, None if first.attention is None else rotary, mask)

    def _described(self, count: int) -> list[Description] | None:
        """The layers as they are now, or None where some are something else, or are looked at."""
        here = [self._parent._modules.get(name) for name in self._names] == self._modules
        whole = here and len(self._parent) == count
        own = all(
            vars(m).get("forward") is f and not m.training for m, f in zip(self._modules, self.layers, strict=True)
        )
        if not whole or not own or any(self._hooks) or _has_any_global_hook():
            return None
        found = [layer.described() for layer in self.layers]
        return None if None in found else found  # type: ignore[return-value]

    def _stack_of(self, found: list[Description], held: list[Any], batch: int) -> step.Stack | None:
        """Made once for as long as descriptions and the cache's tensors stay where they are."""
        tensors: list[Any]
        if found[0].attention is None:
            tensors = [states_of(part, each.delta_net, batch) for part, each in zip(held, found, strict=True)]  # type: ignore[arg-type]
        else:
            tensors = [(p.keys, p.values, p.cumulative_length) if is_static(p) else None for p in held]
        if None in tensors:
            return None
        stacked = (batch, *found, *held, *(tensor.data_ptr() for each in tensors for tensor in each))
        if self._stacked != stacked:
            self._stack, self._stacked = None, stacked
            if _alike(found, held, batch):
                mixers: list[Any] = [each.attention or each.delta_net for each in found]
                self._stack = step.stack_of(mixers, [each.mlp for each in found], tensors)
        return self._stack


def _alike(found: list[Description], held: list[Any], batch: int) -> bool:
    """Whether what fits the first layer fits all, and their parts of the cache fit them."""
    first, attentions = found[0], [each.attention for each in found if each.attention is not None]
    same = all(each.stepper == first.stepper and each.hidden == first.hidden for each in found)
    if first.attention is None or not same:
        return same
    turned = all(each.dim == first.attention.dim for each in attentions)
    masked = all(each.config is first.config for each in found)
    return (
        turned
        and masked
        and all(slots_of(p, each, batch) is not None for p, each in zip(held, attentions, strict=True))
    )


class _Step(threading.local):
    """What this thread's step is of, and what it has done so far.

    Attributes:
        runs: as ``runs_of`` gives them.
        count: of layers that the model takes.
        last: the run that was taken last.
        done: the hidden states that it left.
    """

    def __init__(self) -> None:
        self.runs: dict[NativeLayer, Run] = {}
        self.count = 0
        self.last: Run | None = None
        self.done: Tensor | None = None


_now = _Step()


def runs_of(model: nn.Module) -> dict[NativeLayer, Run]:
    """Those of two layers and more that are fused by the native core, by each of their layers."""
    runs: dict[NativeLayer, Run] = {}
    for parent in model.modules():
        if isinstance(parent, nn.ModuleList):
            for kind, some in groupby(parent._modules, lambda name: _kind(parent._modules[name])):  # noqa: B023
                names = list(some)
                if kind and len(names) > 1:
                    run = Run(parent, names)
                    runs.update(dict.fromkeys(run.layers, run))
    return runs


def _kind(layer: Any) -> str:
    """What layers have to have in common: how they mix, and by which mask; empty for one that is not fused."""
    description = getattr(vars(layer).get("forward"), "described", lambda: None)()
    if description is None:
        return ""
    if description.attention is None:
        return "linear_attention"
    kinds = layer_kinds(description.config)
    return kinds[description.index] if kinds else "attention"


@contextmanager
def together(runs: dict[NativeLayer, Run], count: int) -> Iterator[None]:
    """A step of a model that takes ``count`` layers in turn, without anybody looking at what is between them."""
    _now.runs, _now.count = runs, count
    try:
        yield
    finally:
        _now.runs, _now.last, _now.done = {}, None, None


def taken(layer: NativeLayer, x: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """What a layer leaves of x within ``together``; None where it is for itself.

    Raises:
        UnsupportedError: x is not what the layers before it have left.
    """
    run = _now.runs.get(layer)
    if run is None:
        return None
    if layer is run.layers[0]:
        _now.done = run.forward(x, kwargs, _now.count)
        _now.last = run if _now.done is not None else None
        return _now.done
    if _now.last is not run:
        return None
    if x is not _now.done:
        raise UnsupportedError(
            "hidden states were changed between two layers that a step takes together; change them in a forward hook of a layer"
        )
    return x
