"""The custom ops against the codec, and the dispatch."""

from __future__ import annotations

import types

import pytest
import torch

from kappaquant.errors import UnsupportedError
from kappaquant.formats import codec
from kappaquant.formats.codebook import BITS, GROUP_SIZES, Format
from kappaquant.kernels import dispatch as ops
from kappaquant.kernels import torch as torch_reference

ALL_FORMATS = [Format(bits, group_size) for bits in BITS for group_size in GROUP_SIZES]


def _quantized(fmt: Format, *shape: int, seed: int = 0) -> tuple[codec.Encoded, torch.Tensor, torch.Tensor]:
    """(encoded weight, codebook, decoded weight)"""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    encoded = codec.encode(weight, fmt, "fast")
    return encoded, torch.tensor(fmt.codebook), codec.decode(encoded.packed, encoded.norms, fmt, shape[-1])


def _relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=lambda fmt: fmt.id)
@pytest.mark.parametrize(("m", "n", "extra"), [(1, 1, 0), (3, 37, -5), (17, 130, 1)])
def test_linear_is_the_product_with_the_decoded_weight(fmt: Format, m: int, n: int, extra: int) -> None:
    k = 2 * fmt.group_size + extra
    encoded, codebook, decoded = _quantized(fmt, n, k)
    x = torch.randn(m, k)
    rotated = ops.rotate(x, fmt.group_size)
    y = ops.linear(rotated, encoded.packed, encoded.norms, codebook, fmt.bits, fmt.group_size)
    assert y.shape == (m, n)
    scale = x.norm(dim=1, keepdim=True) * decoded.norm(dim=1)  # what the product could be at most
    assert float(((y - x @ decoded.T).abs() / scale).max()) < 3e-6


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=lambda fmt: fmt.id)
def test_the_torch_kernel_on_cuda(fmt: Format) -> None:
    encoded, codebook, decoded = _quantized(fmt, 6, 37, fmt.group_size + 3)
    stored = [t.cuda() for t in (encoded.packed, encoded.norms, codebook)]
    x = torch.randn(5, fmt.group_size + 3)
    rotated = ops.rotate(x.cuda(), fmt.group_size)
    rows, experts = torch.tensor([0, 3, 3, 1]), torch.tensor([5, 0, 2, 5])
    y = ops.grouped_linear(
        rotated, rows.cuda(), experts.cuda(), *stored, fmt.bits, fmt.group_size, kernel=torch_reference.NAME
    )
    assert _relative(y.cpu(), torch.einsum("snk,sk->sn", decoded[experts], x[rows])) < 1e-5
    packed, norms, book = stored
    y = ops.linear(rotated, packed[1], norms[1], book, fmt.bits, fmt.group_size, kernel=torch_reference.NAME)
    assert _relative(y.cpu(), x @ decoded[1].T) < 1e-5


def test_linear_keeps_leading_axes_and_takes_no_rows() -> None:
    fmt = Format(3, 32)
    encoded, codebook, decoded = _quantized(fmt, 8, 64)
    x = torch.randn(2, 5, 64)
    y = ops.linear(ops.rotate(x, 32), encoded.packed, encoded.norms, codebook, 3, 32)
    assert _relative(y, x @ decoded.T) < 1e-5
    assert ops.linear(x[:, :0], encoded.packed, encoded.norms, codebook, 3, 32).shape == (2, 0, 8)


def test_linear_in_many_tiles_equals_one(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = Format(4, 64)
    encoded, codebook, _ = _quantized(fmt, 50, 128)
    x = ops.rotate(torch.randn(4, 128), 64)
    once = ops.linear(x, encoded.packed, encoded.norms, codebook, 4, 64)
    monkeypatch.setitem(torch_reference._TILE_BYTES, "cpu", 7 * 128 * 4)
    assert _relative(ops.linear(x, encoded.packed, encoded.norms, codebook, 4, 64), once) < 1e-6


def test_decoded_rows_stay_within_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = Format(3, 128)
    encoded, codebook, _ = _quantized(fmt, 4096, 512)
    sizes = []
    decode = torch_reference._decode

    def watched(*args: object) -> torch.Tensor:
        sizes.append(decode(*args).nbytes)
        return decode(*args)

    monkeypatch.setattr(torch_reference, "_decode", watched)
    ops.linear(ops.rotate(torch.randn(1, 512), 128), encoded.packed, encoded.norms, codebook, 3, 128)
    assert max(sizes) <= torch_reference._TILE_BYTES["cpu"]
    assert sum(sizes) == 4096 * 512 * 4


@pytest.mark.parametrize("fmt", ALL_FORMATS[::3], ids=lambda fmt: fmt.id)
def test_grouped_linear_picks_each_rows_expert(fmt: Format) -> None:
    k = fmt.group_size + 3
    encoded, codebook, decoded = _quantized(fmt, 6, 9, k)
    x = torch.randn(4, k)
    rows, experts = torch.tensor([0, 3, 3, 1, 2, 0]), torch.tensor([5, 0, 2, 2, 5, 5])
    y = ops.grouped_linear(
        ops.rotate(x, fmt.group_size), rows, experts, encoded.packed, encoded.norms, codebook, fmt.bits, fmt.group_size
    )
    assert _relative(y, torch.einsum("snk,sk->sn", decoded[experts], x[rows])) < 1e-5


def test_grouped_linear_decodes_only_experts_that_occur(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = Format(3, 32)
    encoded, codebook, _ = _quantized(fmt, 64, 8, 32)
    decoded = []
    decode = torch_reference._decode
    monkeypatch.setattr(torch_reference, "_decode", lambda *a: decoded.append(a[0].shape[0]) or decode(*a))
    rows, experts = torch.zeros(3, dtype=torch.int64), torch.tensor([7, 60, 7])
    ops.grouped_linear(torch.randn(1, 32), rows, experts, encoded.packed, encoded.norms, codebook, 3, 32)
    assert decoded == [8, 8]


def test_dequantize_is_decode() -> None:
    fmt = Format(5, 64)
    encoded, codebook, decoded = _quantized(fmt, 7, 100)
    assert torch.equal(ops.dequantize(encoded.packed, encoded.norms, codebook, 5, 64, 100), decoded)


def test_custom_ops_pass_opcheck() -> None:
    fmt = Format(3, 32)
    encoded, codebook, _ = _quantized(fmt, 4, 8, 60)
    x = torch.randn(3, 60)
    rotated = ops.rotate(x, 32)
    rows, experts = torch.tensor([0, 2, 1]), torch.tensor([3, 3, 0])
    stored = (encoded.packed[0], encoded.norms[0], codebook, 3, 32)
    torch.library.opcheck(ops.rotate, (x, 32))
    torch.library.opcheck(ops.linear, (rotated, *stored))
    torch.library.opcheck(ops.grouped_linear, (rotated, rows, experts, encoded.packed, encoded.norms, codebook, 3, 32))
    torch.library.opcheck(ops.dequantize, (*stored, 60))


def _kernel(name: str, reason: str | None) -> types.SimpleNamespace:
    return types.SimpleNamespace(NAME=name, supports=lambda *args: reason, linear=lambda *args: name)


def test_select_takes_the_first_kernel_that_does_not_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = (_kernel("a", "needs a GPU"), _kernel("b", None), _kernel("c", None))
    monkeypatch.setattr(ops, "KERNELS", kernels)
    request = (Format(3, 128), 1, 64, 128, torch.float32, torch.device("cpu"))
    assert ops.select(*request).NAME == "b"
    assert ops.select(*request, kernel="c").NAME == "c"
    with pytest.raises(UnsupportedError, match="a: needs a GPU"):
        ops.select(*request, kernel="a")


def test_select_names_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "KERNELS", (_kernel("a", "needs a GPU"), _kernel("b", "m is above 64")))
    with pytest.raises(UnsupportedError, match=r"tq3g128, m=99, n=64, k=128.*a: needs a GPU; b: m is above 64"):
        ops.select(Format(3, 128), 99, 64, 128, torch.float32, torch.device("cpu"))
    with pytest.raises(UnsupportedError, match="no kernel is called 'z'; there are a, b"):
        ops.select(Format(3, 128), 1, 64, 128, torch.float32, torch.device("cpu"), kernel="z")


def test_an_unrotated_half_input_is_refused_with_the_reason() -> None:
    fmt = Format(3, 32)
    encoded, codebook, _ = _quantized(fmt, 8, 32)
    with pytest.raises(UnsupportedError, match="torch: the rotated input must be float32"):
        ops.linear(torch.randn(1, 32).half(), encoded.packed, encoded.norms, codebook, 3, 32)
