"""The inventory says what kind_of and fused_groups say, and asks them once."""

import pytest
from headers import in_memory

from kappaquant.models import inventory as module
from kappaquant.models.architectures.base import registered
from kappaquant.models.inventory import Inventory
from kappaquant.models.roles import fused_groups, kind_of, kinds_of


@pytest.mark.parametrize("arch", ["qwen3_5_moe", "gemma3"])
def test_it_agrees_with_the_functions(arch):
    tensors, config = in_memory(arch)
    inventory = Inventory(tensors, config)
    assert inventory.kinds == {name: kind_of(name, info, config) for name, info in tensors.items()}
    assert list(inventory.kinds) == list(tensors)
    assert inventory.fused == fused_groups(tensors, config)
    assert inventory.architecture is registered()[arch]
    assert inventory.known


def test_each_tensor_is_looked_at_once(monkeypatch):
    asked = []

    def counted(tensors, config):
        asked.extend(tensors)
        return kinds_of(tensors, config)

    monkeypatch.setattr(module, "kinds_of", counted)
    tensors, config = in_memory("qwen3")
    inventory = Inventory(tensors, config)
    assert not asked
    assert inventory.fused is inventory.fused
    assert inventory.kinds is inventory.kinds
    assert asked == list(tensors)


def test_an_unknown_architecture():
    tensors, config = in_memory("llama")
    inventory = Inventory(tensors, {**config, "model_type": "phi9"})
    assert inventory.architecture is None
    assert not inventory.known
    assert inventory.fused
