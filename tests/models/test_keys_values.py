"""Bytes of keys and values: by config.json, and as a model's own cache holds them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_model

from kappaquant.errors import PlanError
from kappaquant.models.keys_values import kv_bytes

CONFIG = {"num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 512}
LAYER = 2 * 2 * 2 * 64  # bytes of a token: keys and values, 2 bytes each, 2 heads of 64


@pytest.mark.parametrize(
    ("more", "tokens"),
    [
        ({}, 6 * 1000),
        ({"layer_types": ["linear_attention", "full_attention"] * 3}, 3 * 1000),
        ({"layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 10}, 3 * 1010),
        ({"layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 4000}, 6 * 1000),
        ({"full_attention_interval": 3}, 2 * 1000),
        ({"sliding_window_pattern": 6, "sliding_window": 10}, 5 * 10 + 1000),
        ({"head_dim": 128}, 2 * 6 * 1000),
        ({"num_key_value_heads": None}, 4 * 6 * 1000),
    ],
)
def test_layers_that_keep_keys_and_values(more: dict[str, Any], tokens: int) -> None:
    for config in ({**CONFIG, **more}, {"text_config": {**CONFIG, **more}}):
        assert kv_bytes(config, 1000) == LAYER * tokens
    assert kv_bytes({**CONFIG, "num_key_value_heads": 4}, 5, cards=8) == LAYER * 6 * 5 // 2


@pytest.mark.parametrize("architecture", ["llama", "qwen3_5", "qwen3_moe"])
def test_it_is_what_a_models_cache_holds(architecture: str) -> None:
    model = tiny_model(architecture).to(torch.bfloat16)
    cache = model(input_ids=torch.arange(3, 20)[None], use_cache=True).past_key_values
    held = [
        t
        for layer in cache.layers
        for t in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if t is not None
    ]
    assert held
    assert sum(t.numel() * t.element_size() for t in held) == kv_bytes(model.config.to_dict(), 17)


def test_a_config_that_does_not_say() -> None:
    with pytest.raises(PlanError, match=r"config\.json: num_hidden_layers is None, without which .* give a size"):
        kv_bytes({**CONFIG, "num_hidden_layers": None}, 5)
