"""The decoder layers of a source, one in memory at a time, and the hidden states that pass through them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kappaquant.errors import KappaquantError, NonFiniteError, SourceError, UnsupportedError
from kappaquant.models.skeleton import Place, meta_model, place
from kappaquant.sources.source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 4  # windows at once
Calls = list[list[tuple[tuple[Any, ...], dict[str, Any]]]]
"""What layers are called with beside hidden states: for each piece of windows, layer by layer."""


class Layers:
    """A model of which the embedding is loaded, and one decoder layer when it is asked for.

    Attributes:
        model: on the meta device but for what is loaded.
        places: checkpoint name -> where it goes in the model.

    Raises:
        UnsupportedError: the architecture has no plain list of decoder layers.
        SourceError: the source lacks a tensor that the model needs.
    """

    def __init__(self, source: Source, device: str, dtype: torch.dtype) -> None:
        self.source, self.device, self.dtype = source, torch.device(device), dtype
        self.model: PreTrainedModel = meta_model(source.config).eval()
        found = place(self.model, source.tensors, {name: info.shape for name, info in source.tensors.items()})
        if found.missing:
            raise SourceError(f"{found.missing[0]}: {source.label} has no tensor for it; fetch the model again")
        self.places = found.places
        decoder: Any = self.model.get_decoder() if hasattr(self.model, "get_decoder") else None
        self._decoder = decoder
        layers = getattr(decoder, "layers", None)
        if not isinstance(layers, nn.ModuleList) or not hasattr(decoder, "embed_tokens"):
            raise UnsupportedError(
                f"{type(self.model).__name__}: has no list of decoder layers behind an embedding, through which calibration "
                "could pass; quantize it without --calibration"
            )
        self.prefixes = [f"{_name_of(self.model, layer)}." for layer in layers]
        self._layers = list(layers)
        for number in range(len(layers)):
            for name in self.names(number):
                _check_place(name, self.places[name])
        with self._known():
            self._prepare()

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def width(self) -> int:
        """Of hidden states."""
        return int(self._decoder.embed_tokens.embedding_dim)

    def names(self, number: int) -> list[str]:
        """Checkpoint names of a layer's tensors."""
        prefix = self.prefixes[number]
        return [name for name, at in self.places.items() if at.target.startswith(prefix)]

    def load(self, number: int) -> nn.Module:
        """One layer with the source's weights."""
        layer = self._layers[number].to_empty(device=self.device).to(self.dtype)
        for name in self.names(number):
            self._put_own(name)
        return layer

    def put(self, name: str, weight: Tensor) -> None:
        """A tensor into its place in the model."""
        at = self.places[name]
        _check_place(name, at)
        target = self.target(at)
        if target.shape != weight.shape:
            raise UnsupportedError(
                f"{name}: has shape {list(weight.shape)}, {type(self.model).__name__} wants {list(target.shape)}; is config.json the one "
                "of this model?"
            )
        target.copy_(weight.to(self.device, target.dtype))

    def _put_own(self, name: str) -> None:
        """A tensor of the source into its place."""
        weight = self.source.read(name).view(self.source.tensors[name].shape).to(self.device)
        if not bool(weight.isfinite().all()):
            raise NonFiniteError(
                f"{name}: holds NaN or infinity, with which no activations can be computed; repair the source, or quantize "
                "without --calibration"
            )
        self.put(name, weight)

    def target(self, at: Place) -> Tensor:
        """The parameter, or the part of it, that a place names."""
        parameter = self.model.get_parameter_or_buffer(at.target).detach()
        if at.expert is None or at.shape is None:
            return parameter
        return parameter[at.expert, at.row : at.row + at.shape[0]]

    def unload(self, number: int) -> None:
        """Forget a layer's weights."""
        self._layers[number].to("meta")

    @torch.no_grad()
    def embed(self, windows: Tensor) -> tuple[list[Tensor], Calls]:
        """Windows [n, tokens] in pieces: hidden states [rows, tokens, width] before the first layer, and how layers are called for each."""
        states: list[Tensor] = []
        calls: Calls = []

        def listen(first: bool, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """In place of a layer: remember its arguments, and pass the hidden states on."""
            if first:
                states.append(hidden_states)
                calls.append([])
            calls[-1].append((args, kwargs))
            return hidden_states

        for number, layer in enumerate(self._layers):
            layer.forward = partial(listen, number == 0)
        try:
            for rows in windows.split(ROWS):
                with self._known():
                    self._decoder(input_ids=rows.to(self.device), use_cache=False)
        finally:
            for layer in self._layers:
                del layer.forward
        return states, calls

    @torch.no_grad()
    def forward(self, number: int, states: Sequence[Tensor], calls: Calls) -> Iterator[Tensor]:
        """Hidden states behind a loaded layer, of each [rows, tokens, width] before it; called as ``embed`` found."""
        for state, of_layers in zip(states, calls, strict=True):
            args, kwargs = of_layers[number]
            with self._known():
                out = self._layers[number](state, *args, **kwargs)
            yield out[0] if isinstance(out, tuple) else out

    @contextmanager
    def _known(self) -> Iterator[None]:
        """What goes wrong inside of a model's own code, for it was written to run whole, says that the architecture is not known here."""
        try:
            yield
        except (KappaquantError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as problem:
            said = (str(problem).strip() or type(problem).__name__).splitlines()[0]
            raise UnsupportedError(
                f"{type(self.model).__name__}: calibration does not know how to go through its layers one by one ({said}); quantize "
                "without --calibration"
            ) from problem

    def load_head(self) -> nn.Linear:
        """The module that makes logits, with the source's weights: those of the embedding where both are one.

        Raises:
            UnsupportedError: the model has none.
        """
        head: Any = self.model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise UnsupportedError(
                f"{type(self.model).__name__}: has no linear layer that makes logits, by which to measure"
            )
        weight = f"{_name_of(self.model, head)}.weight"
        if any(at.target == weight for at in self.places.values()):
            self._load(head)
        else:
            head.weight = self._decoder.embed_tokens.weight
        return head

    @torch.no_grad()
    def norm(self, state: Tensor) -> Tensor:
        """What the head reads, of hidden states [rows, tokens, width] behind the last layer."""
        return self._decoder.norm(state)

    @torch.no_grad()
    def logits(self, state: Tensor) -> Tensor:
        """Logits [rows, tokens, vocabulary] by the model's own forward, of hidden states behind the last layer; after ``load_head``."""
        from transformers.modeling_outputs import MoeModelOutputWithPast

        made = MoeModelOutputWithPast(last_hidden_state=self.norm(state))
        self._decoder.forward = lambda *args, **kwargs: made
        try:
            return self.model(input_ids=torch.zeros(state.shape[:2], dtype=torch.int64, device=self.device)).logits
        finally:
            del self._decoder.forward

    def _prepare(self) -> None:
        """Load the embedding, and make anew what holds tables that no file has, such as rotary embeddings."""
        inside = {id(module) for layer in self._layers for module in layer.modules()}
        for name, module in list(self._decoder.named_modules()):
            tables = list(module.buffers(recurse=False))
            if id(module) not in inside and tables and not list(module.parameters(recurse=False)):
                self._decoder.set_submodule(name, _again(module, self._decoder.config, self.device))
        for name, module in self._decoder.named_modules():
            unsaved = module._non_persistent_buffers_set
            if any(module.get_buffer(buffer).is_meta for buffer in unsaved if module._buffers[buffer] is not None):
                raise UnsupportedError(
                    f"{type(module).__name__} ({name}): holds a table that no file has, and that calibration does not know how to "
                    "make; quantize without --calibration"
                )
        self._load(self._decoder.embed_tokens)
        if getattr(self._decoder, "norm", None) is not None:
            self._load(self._decoder.norm)

    def _load(self, module: nn.Module) -> None:
        """The source's weights into a module outside of the layers."""
        module.to_empty(device=self.device).to(self.dtype)
        prefix = f"{_name_of(self.model, module)}."
        for name, at in self.places.items():
            if at.target.startswith(prefix):
                self._put_own(name)


def _check_place(name: str, at: Place) -> None:
    """Raise UnsupportedError for a tensor that goes into the model otherwise than it lies in the file."""
    if at.shape is None or at.transposed or at.interleaved or at.beside:
        raise UnsupportedError(
            f"{name}: transformers rearranges this tensor on loading, which calibration does not follow; quantize without --calibration"
        )


def _again(module: nn.Module, config: Any, device: torch.device) -> nn.Module:
    try:
        return type(module)(config=config).to(device)
    except TypeError:
        raise UnsupportedError(
            f"{type(module).__name__}: holds tables that calibration does not know how to make; quantize without --calibration"
        ) from None


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)
