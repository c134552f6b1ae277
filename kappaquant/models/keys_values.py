"""Bytes of keys and values that decoding keeps beside the weights, from config.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kappaquant.errors import PlanError

_BYTES = 2  # of a key's or value's element, in bfloat16
_FULL, _SLIDING = "full_attention", "sliding_attention"
# where layer_types is missing: the key whose value says which layers, one in so many, have full attention, and what the others have
_INTERVALS = (("full_attention_interval", "linear_attention"), ("sliding_window_pattern", _SLIDING))


def kv_bytes(config: Mapping[str, Any], context: int, cards: int = 1) -> int:
    """Bytes of bfloat16 keys and values of one sequence of ``context`` tokens, on each of so many cards.

    Layers with a sliding window keep the tokens in it; linear attention keeps none (its state does not grow with the text).

    Raises:
        PlanError: config.json lacks a number that it takes.
    """
    text = config.get("text_config") or config
    kinds = _kinds(text)
    heads = _number(text, "num_key_value_heads" if text.get("num_key_value_heads") else "num_attention_heads")
    width = text.get("head_dim") or _number(text, "hidden_size") // _number(text, "num_attention_heads")
    window = text.get("sliding_window") or context
    tokens = kinds.count(_FULL) * context + kinds.count(_SLIDING) * min(window, context)
    return 2 * _BYTES * max(1, heads // cards) * width * tokens


def _kinds(text: Mapping[str, Any]) -> list[str]:
    """What each layer attends by."""
    if kinds := text.get("layer_types"):
        return list(kinds)
    layers = _number(text, "num_hidden_layers")
    every, other = next(((text[key], other) for key, other in _INTERVALS if text.get(key)), (1, _FULL))
    return [_FULL if (layer + 1) % every == 0 else other for layer in range(layers)]


def _number(text: Mapping[str, Any], key: str) -> int:
    value = text.get(key)
    if not isinstance(value, int) or value < 1:
        raise PlanError(
            f"config.json: {key} is {value!r}, without which keys and values cannot be counted; give a size"
        )
    return value
