"""Masks against their definition, slot by slot, and the cache that they are for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_model

from kappaquant.runtime.static_cache import Masks, layer_kinds, make_cache, why_not_static

LENGTH, TOKENS = 24, 13
PADDING = torch.tensor([[False] * 4 + [True] * (TOKENS - 4), [True] * TOKENS])


def config(architecture: str) -> Any:
    return tiny_model(architecture).config.get_text_config()


def masks(architecture: str, padding: torch.Tensor | None) -> Masks:
    text = config(architecture)
    if architecture == "gemma3":
        text.layer_types = ["sliding_attention", "full_attention"]
    made = Masks(text, 2, LENGTH, torch.float32, "cpu")
    made.start(padding, TOKENS)
    return made


def seen(row: int, token: int, slot: int, window: int | None, padded: bool) -> bool:
    """Whether the token in slot ``token`` may look at ``slot``: not ahead, not out of the window, not at padding."""
    if slot > token or (window is not None and slot <= token - window):
        return False
    return not padded or slot >= TOKENS or bool(PADDING[row, slot])


def check(mask: torch.Tensor, start: int, window: int | None, padded: bool) -> None:
    for row in range(2):
        for i in range(mask.shape[2]):
            token = start + i
            if padded and token < TOKENS and not PADDING[row, token]:
                continue  # padding may look at whatever is finite
            of_row = mask[row if mask.shape[0] == 2 else 0, 0, i]
            expected = [seen(row, token, slot, window, padded) for slot in range(mask.shape[3])]
            assert (of_row == 0).tolist() == expected, (row, token)
            assert (of_row[~torch.tensor(expected)] == torch.finfo(torch.float32).min).all()


@pytest.mark.parametrize("padded", [False, True])
def test_prompts_and_steps_by_definition(padded: bool) -> None:
    made = masks("gemma3", PADDING if padded else None)
    assert made.window == 8
    for start, stop in ((0, 5), (5, TOKENS)):
        found = made.prompt(start, stop)
        assert isinstance(found, dict)
        if found["full_attention"] is None:
            assert (start, padded) == (0, False), "a first, unpadded chunk may leave its mask to the kernel"
        else:
            check(found["full_attention"], start, None, padded)
        if stop > 8:
            assert found["sliding_attention"] is not None
            check(found["sliding_attention"], start, 8, padded)
    for slot in range(TOKENS, LENGTH):
        found = made.step(torch.tensor([slot]), slot + 1)
        assert isinstance(found, dict)
        assert found["full_attention"] is not None
        assert found["sliding_attention"] is not None
        check(found["full_attention"], slot, None, padded)
        check(found["sliding_attention"], slot, 8, padded)


def test_a_step_s_mask_never_moves() -> None:
    made = masks("llama", None)
    steps = [made.step(torch.tensor([slot]), LENGTH) for slot in range(TOKENS, LENGTH)]
    assert all(isinstance(mask, torch.Tensor) for mask in steps)
    assert len({mask.data_ptr() for mask in steps if isinstance(mask, torch.Tensor)}) == 1


def test_the_cache_shows_as_many_slots_as_it_is_told() -> None:
    cache, slots = make_cache(config("gemma3"), LENGTH)
    assert len(slots) == len(cache.layers) == 2, "sliding layers keep all slots too"
    keys = torch.randn(1, 2, 3, 32)
    slots[0].visible = 3
    shown, _ = cache.layers[0].update(keys, keys, cache_position=torch.arange(3))
    assert torch.equal(shown, keys)
    assert slots[0].get_mask_sizes(1) == (3, 0)
    _, hybrid = make_cache(config("qwen3_5"), LENGTH)
    assert len(hybrid) == 1, "layers of linear attention hold no slots"


def test_why_not() -> None:
    made = config("gemma3")
    assert why_not_static(made) is None
    assert set(layer_kinds(made)) <= {"full_attention", "sliding_attention"}
    made._attn_implementation = "flash_attention_2"
    assert why_not_static(made) == "attention 'flash_attention_2' makes masks of its own; sdpa and eager take ours"
    made = config("llama")
    made.layer_types = ["full_attention", "mamba"]
    assert "layers of type 'mamba' are none of" in str(why_not_static(made))
    del made.layer_types
    made.attention_chunk_size = 8
    assert why_not_static(made) == "attention is chunked"
