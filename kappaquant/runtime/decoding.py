"""One token at a time from transformers' own model: a static cache and, on CUDA, one graph per step.

The same step runs without a graph on the CPU, and wherever capture is not possible. Models that keep their state in another way
than in a cache of transformers' standard kinds are left to their own ``generate``.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kappaquant.errors import UnsupportedError
from kappaquant.kernels.cpu.threads import core_only
from kappaquant.runtime.fused.native import NativeLayer
from kappaquant.runtime.fused.run import runs_of, together
from kappaquant.runtime.graphs import Graph
from kappaquant.runtime.own_generate import OwnGenerate
from kappaquant.runtime.prompts import check_prompt, check_room, check_step, device_of
from kappaquant.runtime.static_cache import Mask, Masks, make_cache, why_not_static

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

logger = logging.getLogger("kappaquant")

CHUNK = 4096  # tokens at once, all rows together: bounds the memory of activations
ALIGNED = 16  # slots: attention kernels take masks of such rows without a copy
FEWEST = 256  # slots that a step attends to at least; below, fewer are hardly faster
_NEEDED = ("input_ids", "attention_mask", "position_ids", "past_key_values")  # what a step gives to a model


def why_not(model: Any) -> str | None:
    """Why ``Decoder`` cannot be trusted with a model, or None; told by what the model takes and claims, not by its name."""
    if not model.can_generate():
        return "it has no head that predicts tokens"
    takes = inspect.signature(model.__class__.forward).parameters
    # what **kwargs swallows, such as the cache of a model that calls it otherwise, is forgotten without a word
    if missing := [name for name in _NEEDED if name not in takes]:
        return f"the model takes no {missing[0]}"
    if not model._supports_default_dynamic_cache():
        return "the model has a cache of its own"
    if not model._can_compile_fullgraph:
        return "the model is not known to work with a static cache"
    if len({t.device for t in model.parameters()}) > 1:
        return "the model lies on several devices"
    return why_not_static(model.config.get_text_config(decoder=True))


def decoder_of(
    model: PreTrainedModel, batch: int, max_length: int, *, graph: bool | None = None
) -> Decoder | OwnGenerate:
    """The fastest decoder that is right for a model; arguments as for ``Decoder``.

    Where a graph was to be had and is not, one warning says why.
    """
    reason = why_not(model)
    if reason is None:
        return Decoder(model, batch, max_length, graph=graph)
    if graph or (graph is None and device_of(model).type == "cuda"):
        _warn(model, f"{reason}, so transformers' generate runs it")
    return OwnGenerate(model, batch, max_length)


class Decoder:
    """Runs prompts of one batch size through a model, then one token per row and step.

    Args:
        model: a causal language model of transformers for which there is no reason ``why_not``.
        batch: rows, B.
        max_length: tokens of prompt and answer together, at most.
        graph: capture the step; default on CUDA. If it can not be captured, the reason is logged once as a warning.

    Attributes:
        graphed: whether the last step replayed a graph.
        length: slots filled so far, padding included.
    """

    def __init__(self, model: PreTrainedModel, batch: int, max_length: int, *, graph: bool | None = None) -> None:
        check_room(batch, max_length)
        if reason := why_not(model):
            raise UnsupportedError(
                f"{model.__class__.__name__}: {reason}; decoder_of leaves it to transformers' generate"
            )
        self.model = model
        self.batch = batch
        self.max_length = -(-max_length // ALIGNED) * ALIGNED
        self.device = device_of(model)
        self.config: Any = model.config.get_text_config(decoder=True)
        self.length = 0
        self._graph: Graph | None = None  # of the last step
        self._graphs: dict[int, Graph] = {}  # by the slots they show
        self._captured: int | None = None  # what the graphs were captured of
        self._want_graph = self.device.type == "cuda" if graph is None else graph
        # what the prompt's other logits would cost, where the model can leave them out
        takes = inspect.signature(model.__class__.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._positions = torch.zeros(batch, 1, dtype=torch.int64, device=self.device)
        if self._want_graph and self.device.type != "cuda":
            self._refuse(f"the model is on {self.device}")
        self.cache, self._slots = make_cache(self.config, self.max_length)
        self._masks = Masks(self.config, batch, self.max_length, self._embedded_dtype(), self.device)
        self._native = any(isinstance(vars(module).get("forward"), NativeLayer) for module in model.modules())
        self._runs = runs_of(model)
        self._tokens = torch.zeros_like(self._positions)
        self._slot = torch.zeros(1, dtype=torch.int64, device=self.device)

    @property
    def graphed(self) -> bool:
        return self._graph is not None

    @property
    def kernels_per_step(self) -> int | None:
        """Kernels of the last step; None where it replayed no graph, or without the package cuda-bindings."""
        return self._graph.kernels() if self._graph else None

    def fits(self, model: PreTrainedModel) -> bool:
        """Whether the model is still where, and attends as, it did when this decoder was made."""
        return device_of(model) == self.device and why_not(model) is None

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Forget what was before and read prompts [B, T], padded on the left; returns the logits of the next token, [B, V].

        Raises:
            UnsupportedError: the shape does not fit, or the padding is not on the left.
        """
        input_ids = input_ids.to(self.device)
        check_prompt(input_ids, attention_mask, self.batch, self.max_length)
        visible = None
        if attention_mask is not None and not bool((attention_mask != 0).all()):
            visible = (attention_mask != 0).to(self.device)
        tokens = input_ids.shape[1]
        if self._want_graph and self._captured != (now := self._signature()):
            self._graph, self._graphs, self._captured = None, {}, now
        self.length = 0
        self.cache.reset()
        positions = torch.arange(tokens, device=self.device).expand(self.batch, -1)
        if visible is not None:
            positions = (visible.cumsum(1) - 1).clamp(min=0)
        self._masks.start(visible, tokens)
        chunk = max(1, CHUNK // self.batch)
        for start in range(0, tokens, chunk):
            stop = min(start + chunk, tokens)
            self._show(stop)
            mask = self._masks.prompt(start, stop)
            logits = self._forward(input_ids[:, start:stop], positions[:, start:stop], mask)
        self.length = tokens
        self._positions.copy_(positions[:, -1:] + 1)
        self._slot.fill_(tokens)
        return logits

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """The token of each row, int64 [B], is in: logits of the next, [B, V], which the next step overwrites.

        Raises:
            UnsupportedError: ``max_length`` tokens are in already.
        """
        check_step(self.length, self.max_length)
        self.length += 1
        self._tokens.copy_(tokens.view(self.batch, 1))
        # attention walks all slots it is shown, so it is shown few while the text is short: one graph for each power of two
        slots = min(max(FEWEST, 1 << (self.length - 1).bit_length()), self.max_length)
        self._show(slots)
        if self._want_graph and slots not in self._graphs:
            self._capture(slots)
        self._graph = self._graphs.get(slots)
        if self._graph:
            return self._graph.replay()
        if not self._native:
            return self._step(slots)
        with core_only(), together(self._runs, self.config.num_hidden_layers):
            return self._step(slots)

    def _step(self, slots: int) -> Tensor:
        """What is captured: reads and advances the static tensors only."""
        logits = self._forward(self._tokens, self._positions, self._masks.step(self._slot, slots))
        self._slot.add_(1)
        self._positions.add_(1)
        return logits

    def _forward(self, input_ids: Tensor, positions: Tensor, mask: Mask) -> Tensor:
        out = self.model(
            input_ids=input_ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache, use_cache=True,
            **self._last_only,
        )  # fmt: skip
        logits: Tensor = out.logits[:, -1].to(self.device)
        return logits

    def _show(self, slots: int) -> None:
        for layer in self._slots:
            layer.visible = slots

    def _capture(self, slots: int) -> None:
        """Between two steps of a text: all that trying the step changes is put back."""
        found: list[Any] = [self._slot, self._positions, self._masks.full]
        for layer in map(vars, self.cache.layers):
            found.append(layer.get("cumulative_length"))
            found += (state for kind in ("conv_states", "recurrent_states") for state in layer.get(kind, {}).values())
        changed = [tensor for tensor in found if isinstance(tensor, Tensor)]
        saved = [tensor.clone() for tensor in changed]

        def restore() -> None:
            for tensor, value in zip(changed, saved, strict=True):
                tensor.copy_(value)

        try:
            self._graphs[slots] = Graph(lambda: self._step(slots), restore, self.device, self._graph)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as problem:
            self._refuse(str(problem))

    def _refuse(self, reason: str) -> None:
        if self._want_graph:
            _warn(self.model, reason)
        self._want_graph, self._graphs = False, {}

    def _signature(self) -> int:
        """Changes when a weight has moved or a module was replaced, of which a graph would go on using the old one."""
        held: list[Any] = []
        for module in self.model.modules():
            held += type(module), vars(module).get("forward")
            held += (
                t.data_ptr() for kind in (module._parameters, module._buffers) for t in kind.values() if t is not None
            )
        return hash(tuple(held))

    def _embedded_dtype(self) -> torch.dtype:
        """Of keys and queries; a model with packed weights may have no other place to read it from."""
        with torch.no_grad():
            token = torch.zeros(1, dtype=torch.int64, device=self.device)
            dtype: torch.dtype = self.model.get_input_embeddings()(token).dtype
        return dtype


def _warn(model: PreTrainedModel, reason: str) -> None:
    model_type = model.config.get_text_config(decoder=True).model_type
    logger.warning("%s: decoding runs without a CUDA graph: %s", model_type, reason)


_KEPT: weakref.WeakKeyDictionary[PreTrainedModel, Decoder] = weakref.WeakKeyDictionary()
ROOM = 1024  # slots of the smallest decoder that is kept


@contextmanager
def borrowed(model: PreTrainedModel, batch: int, max_length: int) -> Iterator[Decoder | OwnGenerate]:
    """A decoder that is large enough: the one kept since the model's last use, unless that is in use right now."""
    if why_not(model):
        own = decoder_of(model, batch, max_length)
        assert isinstance(own, OwnGenerate)
        with closing(own):
            yield own
        return
    decoder = _KEPT.pop(model, None)
    if decoder is None or decoder.batch != batch or decoder.max_length < max_length or not decoder.fits(model):
        decoder = None  # its memory is free before the next takes as much
        # a proxy, for a decoder that held its model would keep it alive here
        held: Any = weakref.proxy(model)
        decoder = Decoder(held, batch, max(ROOM, 1 << (max_length - 1).bit_length()))
    try:
        yield decoder
    finally:
        _KEPT[model] = decoder
