"""Modules with packed weights against plain modules that carry the decoded weights."""

from __future__ import annotations

import copy
import gc
import weakref

import preparations
import pytest
import torch
from packed_weights import held
from torch import nn

from kappaquant.formats import codec
from kappaquant.formats.codebook import CodebookFormat
from kappaquant.runtime.packed import PackedWeight, QuantEmbedding, QuantLinear, SharedInput, hold_packed


def _close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    assert float((actual - expected).detach().abs().max() / expected.detach().abs().max()) < tolerance


@pytest.fixture
def rotations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Group sizes of inputs that were prepared."""
    return preparations.counted(monkeypatch)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear(bias: bool, dtype: torch.dtype) -> None:
    weight, decoded = held(torch.randn(20, 90), CodebookFormat(4, 64))
    plain_bias = nn.Parameter(torch.randn(20, dtype=dtype)) if bias else None
    x = torch.randn(2, 3, 90, dtype=dtype)
    y = QuantLinear(weight, plain_bias, SharedInput("float32"))(x)
    assert y.dtype == dtype
    expected = x.float() @ decoded.T + (plain_bias.float() if plain_bias is not None else 0)
    _close(y.float(), expected, 1e-5 if dtype == torch.float32 else 2e-2)


def test_embedding_looks_rows_up() -> None:
    weight, decoded = held(torch.randn(30, 48), CodebookFormat(6, 32))
    ids = torch.tensor([[3, 29], [0, 3]])
    _close(QuantEmbedding(weight, torch.float32)(ids), decoded[ids])
    _close(QuantEmbedding(weight, torch.float32, scale=8.0)(ids), 8 * decoded[ids])


def test_layers_that_read_one_tensor_rotate_it_once(rotations: list[int]) -> None:
    shared = SharedInput("float32")
    q, k, v = (QuantLinear(held(torch.randn(8, 64), CodebookFormat(3, 32))[0], None, shared) for _ in range(3))
    x = torch.randn(5, 64)
    first = [layer(x) for layer in (q, k, v)]
    assert rotations == [32]
    apart = [QuantLinear(layer.weight, None, SharedInput("float32"))(x) for layer in (q, k, v)]
    assert rotations == [32] * 4
    for a, b in zip(first, apart, strict=True):
        assert torch.equal(a, b)


def test_layers_of_two_kinds_in_turns_rotate_it_once_each(rotations: list[int]) -> None:
    shared = SharedInput("float32")
    groups = (32, 64, 32, 64)
    layers = [QuantLinear(held(torch.randn(8, 64), CodebookFormat(3, group))[0], None, shared) for group in groups]
    x = torch.randn(5, 64)
    made = [layer(x) for layer in layers]
    assert rotations == [32, 64]
    for y, layer in zip(made, layers, strict=True):
        assert torch.equal(y, QuantLinear(layer.weight, None, SharedInput("float32"))(x))


def test_a_shared_input_is_never_stale(rotations: list[int]) -> None:
    shared = SharedInput("float32")
    weight, other = (held(torch.randn(8, 32), CodebookFormat(3, group))[0] for group in (32, 64))
    x = torch.randn(2, 32)

    def prepared(x: torch.Tensor, weight: PackedWeight = weight) -> torch.Tensor:
        return shared.prepared(x, weight)[0]

    assert torch.equal(prepared(x), codec.rotate(x, 32))
    x.add_(1)  # the same tensor with other content
    assert torch.equal(prepared(x), codec.rotate(x, 32))
    assert prepared(x, other).shape == (2, 64)  # another group size
    twin = x.clone()
    assert torch.equal(prepared(twin), codec.rotate(x, 32))
    assert len(rotations) == 4
    with torch.inference_mode():
        y = torch.randn(2, 32)
        assert shared.prepared(y, weight) == []  # nothing would tell that it changed: each product prepares its own
        before = weight.linear(y, shared)
        y.add_(1)
        assert not torch.equal(weight.linear(y, shared), before)


def test_a_shared_input_keeps_nothing_alive() -> None:
    shared = SharedInput("float32")
    weight, _ = held(torch.randn(8, 32), CodebookFormat(3, 32))
    x = torch.randn(2, 32)
    rotated = weakref.ref(shared.prepared(x, weight)[0])
    assert rotated() is not None
    alive = weakref.ref(x)
    del x
    gc.collect()
    assert alive() is None
    assert rotated() is None


def test_a_deep_copy_is_independent() -> None:
    shared = SharedInput("float32")
    pair = nn.ModuleList(
        QuantLinear(held(torch.randn(8, 32), CodebookFormat(3, 32))[0], None, shared) for _ in range(2)
    )
    x = torch.randn(1, 32)
    expected = pair[0](x)
    twin = copy.deepcopy(pair)
    assert twin[0].shared is twin[1].shared
    assert twin[0].shared is not shared
    assert torch.equal(twin[0](x), expected)


def test_casting_a_model_leaves_packed_weights_alone() -> None:
    weight, decoded = held(torch.randn(16, 64), CodebookFormat(3, 32))
    layer = QuantLinear(weight, nn.Parameter(torch.zeros(16)), SharedInput("float32")).to(torch.bfloat16)
    assert layer.bias is not None
    assert layer.bias.dtype == torch.bfloat16
    assert weight.get_buffer("tq_norms").dtype == torch.float16
    assert torch.equal(weight.fmt.decode(weight.arranged.parts, 64), decoded)


def test_the_state_dict_holds_bytes_only_once_filled() -> None:
    fmt = CodebookFormat(3, 32)
    weight = PackedWeight(fmt, (4, 32))
    assert not weight.state_dict()
    filled, _ = held(torch.randn(4, 32), fmt)
    assert set(filled.state_dict()) == {"tq_packed", "tq_norms"}


def test_any_module_can_hold_a_packed_weight() -> None:
    router = nn.Bilinear(4, 4, 4)  # some module that is no linear layer
    router.weight = nn.Parameter(torch.randn(4, 32))
    weight, decoded = held(router.weight.detach(), CodebookFormat(4, 32))
    hold_packed(router, "weight", weight, torch.float32)
    assert torch.equal(router.weight, decoded)
    assert "weight" not in dict(router.named_parameters())
    assert isinstance(router, nn.Bilinear)
