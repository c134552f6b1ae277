"""The recipes: bits by role, in either layout of experts."""

from __future__ import annotations

from pathlib import Path

import pytest
from headers import in_memory, saved
from planned import plan

from kappaquant.models.roles import Role, role_of

FOUR = {Role.ATTENTION_Q, Role.ATTENTION_K, Role.ATTENTION_V, Role.ATTENTION_O, Role.ROUTED_DOWN, Role.MLP_DOWN}
SHARED = {Role.SHARED_GATE, Role.SHARED_UP, Role.SHARED_DOWN}
THREE = {Role.ROUTED_GATE, Role.ROUTED_UP, Role.ROUTED_GATE_UP, Role.GDN_QKV, Role.GDN_Z, Role.MLP_GATE, Role.MLP_UP}
SENSITIVE = {Role.ATTENTION_O, Role.GDN_OUT, Role.ROUTED_DOWN, Role.SHARED_DOWN, Role.MLP_DOWN}
RECIPES = {
    "apex": {4: SENSITIVE, 3: (FOUR | SHARED | THREE) - SENSITIVE},
    "apex2": {4: FOUR | SHARED, 3: THREE},
    "apex3": {4: (FOUR | SHARED) - {Role.SHARED_DOWN}, 3: THREE},
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("layout", ["fused", "separate"])
@pytest.mark.parametrize("arch", ["qwen3_5_moe", "qwen3_5_text", "mixtral", "gemma3"])
def test_recipes_by_role(arch: str, layout: str, recipe: str, tmp_path: Path) -> None:
    tensors, config = in_memory(arch) if layout == "fused" else saved(arch, tmp_path)
    made = plan("recipe", tensors, config, recipe=recipe)
    for name, info in tensors.items():
        role = role_of(name, info, config)
        expected = next((bits for bits, roles in RECIPES[recipe].items() if role in roles), 16)
        if expected != 16 and info.shape[-1] < 128:
            expected = 16
        assert made.bits(name) == expected, name
