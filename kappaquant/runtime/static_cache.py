"""A cache and masks whose tensors never move, so that one captured step serves every position.

Shapes: B rows of a batch, L slots of the cache, T tokens of a prompt. A prompt is left-padded: its last token is in the
same slot in every row, and one slot counter serves the whole batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import Cache, PretrainedConfig

ATTENTION = ("sdpa", "eager")  # the implementations that add a mask to their scores
KINDS = ("full_attention", "sliding_attention", "linear_attention")

Mask = Tensor | dict[str, Tensor | None] | None


def why_not_static(config: PretrainedConfig) -> str | None:
    """Why a model of this (text) configuration has no static cache here, or None."""
    used = getattr(config, "_attn_implementation", None)
    if used not in ATTENTION:
        return f"attention {used!r} makes masks of its own; {' and '.join(ATTENTION)} take ours"
    unknown = [kind for kind in layer_kinds(config) or () if kind not in KINDS]
    if unknown:
        return f"layers of type {unknown[0]!r} are none of {', '.join(KINDS)}"
    if not layer_kinds(config) and getattr(config, "attention_chunk_size", None):
        return "attention is chunked"
    return None


def layer_kinds(config: PretrainedConfig) -> tuple[str, ...]:
    """Type of each layer, or nothing where all layers share one mask."""
    return tuple(getattr(config, "layer_types", None) or ())


def make_cache(config: PretrainedConfig, length: int) -> tuple[Cache, list[Any]]:
    """(transformers' static cache of ``length`` slots, those of its layers that hold keys and values).

    Sliding layers keep all slots as well, and leave the window to the mask: transformers' own go by a position in
    Python, which a captured step would take for a constant.
    """
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

    class Slots(StaticLayer):
        """Shows only its first ``visible`` slots, so that attention over a prompt does not walk the empty ones."""

        def __init__(self) -> None:
            super().__init__(max_cache_len=length)
            self.visible = length

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            keys, values = super().update(key_states, value_states, *args, **kwargs)
            return keys[:, :, : self.visible], values[:, :, : self.visible]

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self.visible, 0

    cache = StaticCache(config=config, max_cache_len=length)
    slots = []
    for i, layer in enumerate(cache.layers):
        if type(layer) in (StaticLayer, StaticSlidingWindowLayer):
            cache.layers[i] = Slots()
            slots.append(cache.layers[i])
    return cache, slots


class Masks:
    """What each token may look at, as numbers added to attention scores: 0, or the lowest of the dtype.

    Attributes:
        full: [B, 1, 1, L], of the next token over all slots.
        sliding: the same within the window, or ``full`` itself where no window ends within L.
    """

    def __init__(self, config: PretrainedConfig, batch: int, length: int, dtype: torch.dtype, device: Any) -> None:
        self.kinds = layer_kinds(config)
        window = getattr(config, "sliding_window", None)
        slides = not self.kinds or "sliding_attention" in self.kinds
        self.window: int | None = window if slides and window and window < length else None
        self.causal_kernel = getattr(config, "_attn_implementation", None) == "sdpa"
        self.hidden = torch.tensor(torch.finfo(dtype).min, dtype=dtype, device=device)
        self.full = self.hidden.expand(batch, 1, 1, length).clone()
        self.sliding = self.full.clone() if self.window else self.full
        self.columns = torch.arange(length, device=device)
        self.padded: Tensor | None = None

    def start(self, attention_mask: Tensor | None, tokens: int) -> None:
        """A prompt of T tokens begins; attention_mask [B, T] is False at padding, None for none."""
        self.padded = attention_mask
        self.full.copy_(self.hidden)
        seen = self.full[..., :tokens]
        seen.zero_() if attention_mask is None else seen.masked_fill_(attention_mask[:, None, None], 0)

    def prompt(self, start: int, stop: int) -> Mask:
        """For tokens start to stop of the prompt over slots 0 to stop."""
        plain = self.padded is None and start == 0 and stop > 1 and self.causal_kernel
        full = None if plain else self._rows(start, stop, None)
        sliding = full
        if self.window is not None and stop > self.window:
            sliding = self._rows(start, stop, self.window)
        return self._choose(full, sliding, None if self.padded is None else self.padded[:, start:stop])

    def step(self, slot: Tensor, slots: int) -> Mask:
        """For the token in ``slot`` (int64 [1]) over the first ``slots``, in place; whatever happens here is captured."""
        self.full.index_fill_(3, slot, 0)
        full, sliding = self.full[..., :slots], self.sliding[..., :slots]
        if self.window is not None:
            torch.where(self.columns[:slots] > slot - self.window, full, self.hidden, out=sliding)
        return self._choose(full, sliding, None)

    def _rows(self, start: int, stop: int, window: int | None) -> Tensor:
        columns = self.columns[:stop]
        rows = columns[start:, None]
        visible = columns <= rows  # [T, slots]
        if window is not None:
            visible = visible & (columns > rows - window)
        if self.padded is not None:
            # padding looks at itself, for a row without any slot would be 0 / 0
            visible = visible & self.padded[:, None, None, :stop] | (columns == rows)
        visible = visible.expand(-1 if visible.dim() == 4 else 1, 1, -1, -1)
        return torch.zeros_like(visible, dtype=self.full.dtype).masked_fill_(~visible, self.hidden)

    def _choose(self, full: Tensor | None, sliding: Tensor | None, linear: Tensor | None) -> Mask:
        """In the form the model wants: by type of layer, or one for all."""
        if not self.kinds:
            return sliding if self.window is not None else full
        found = {"full_attention": full, "sliding_attention": sliding, "linear_attention": linear}
        return {kind: found[kind] for kind in set(self.kinds)}
