"""The custom ops against the codec, on every format; which kernel is chosen, and every reason when none fits."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from packed_weights import held
from torch.fx.experimental.proxy_tensor import make_fx

from kappaquant.errors import NonFiniteError, RegistrationError, UnsupportedError
from kappaquant.formats.base import Format
from kappaquant.formats.codebook import FORMATS, CodebookFormat
from kappaquant.kernels import dispatch
from kappaquant.kernels import torch as torch_kernels
from kappaquant.kernels.base import Kernel, Use
from kappaquant.runtime.packed import PackedWeight

ALL = list(FORMATS.values())


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def product(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    return dispatch.linear(x, [], weight.tensors, weight.spec, [weight.shape[0]], None, "float32")


@pytest.fixture(params=["torch", "any format"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Only this kernel is there."""
    monkeypatch.setattr(dispatch, "_KERNELS", [k for k in dispatch.kernels() if k.name == request.param])
    return request.param


@pytest.mark.parametrize("fmt", ALL, ids=lambda fmt: fmt.id)
@pytest.mark.parametrize(("m", "n", "extra"), [(1, 1, 0), (3, 37, -5), (17, 130, 1)])
def test_linear_is_the_product_with_the_decoded_weight(
    fmt: CodebookFormat, m: int, n: int, extra: int, kernel: str
) -> None:
    k = 2 * fmt.group_size + extra
    weight, decoded = held(random(n, k), fmt)
    assert weight.kernel.name == kernel
    x = random(m, k, seed=1)
    y = product(x, weight)
    assert y.shape == (m, n)
    scale = x.norm(dim=1, keepdim=True) * decoded.norm(dim=1)  # what the product could be at most
    assert float(((y - x @ decoded.T).abs() / scale).max()) < 3e-6


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", ALL, ids=lambda fmt: fmt.id)
def test_the_torch_kernels_on_cuda(fmt: CodebookFormat, kernel: str) -> None:
    weight, decoded = held(random(6, 37, fmt.group_size + 3), fmt, "grouped", device="cuda")
    assert weight.kernel.name == kernel
    x = random(5, fmt.group_size + 3, seed=1)
    index = torch.tensor([[0, 3], [3, 1], [5, 0], [2, 5], [-1, 6]])
    y = weight.grouped_linear(x.cuda(), index.cuda()).cpu()
    assert relative(y[:4], torch.einsum("tjnk,tk->tjn", decoded[index[:4]], x[:4])) < 1e-5
    assert not y[4].any()
    one, plain = held(random(37, fmt.group_size + 3), fmt, device="cuda")
    assert relative(product(x.cuda(), one).cpu(), x @ plain.T) < 1e-5


def test_linear_keeps_leading_axes_and_takes_no_rows() -> None:
    weight, decoded = held(random(8, 64), CodebookFormat(3, 32))
    x = random(2, 5, 64)
    assert relative(product(x, weight), x @ decoded.T) < 1e-5
    assert product(x[:, :0], weight).shape == (2, 0, 8)


def test_linear_in_many_tiles_equals_one(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _ = held(random(50, 128), CodebookFormat(4, 64))
    x = random(4, 128)
    once = product(x, weight)
    monkeypatch.setitem(torch_kernels._TILE_BYTES, "cpu", 7 * 128 * 4)
    assert relative(product(x, weight), once) < 1e-6


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch, kernel: str) -> list[torch.Size]:
    """Shapes of what is decoded."""
    cls: type[torch_kernels.AnyFormat] = torch_kernels.Lookups if kernel == "torch" else torch_kernels.AnyFormat
    seen: list[torch.Size] = []
    decode = cls._decode

    def watched(*args: object) -> torch.Tensor:
        tile = decode(*args)  # type: ignore[arg-type]
        seen.append(tile.shape)
        return tile

    monkeypatch.setattr(cls, "_decode", watched)
    return seen


def test_decoded_rows_stay_within_a_tile(tiles: list[torch.Size]) -> None:
    weight, _ = held(random(4096, 512), CodebookFormat(3, 128))
    product(random(1, 512), weight)
    assert max(4 * shape.numel() for shape in tiles) <= torch_kernels._TILE_BYTES["cpu"]
    assert sum(shape.numel() for shape in tiles) == 4096 * 512


@pytest.mark.parametrize("fmt", ALL[::3], ids=lambda fmt: fmt.id)
def test_grouped_linear_picks_each_tokens_experts(fmt: CodebookFormat, kernel: str) -> None:
    k = fmt.group_size + 3
    weight, decoded = held(random(6, 9, k), fmt, "grouped")
    x = random(4, k, seed=1)
    index = torch.tensor([[5, 0, 2], [2, 5, 5], [1, 1, 0], [-1, 6, 2**31 - 1]])
    y = weight.grouped_linear(x, index)
    assert relative(y[:3], torch.einsum("tjnk,tk->tjn", decoded[index[:3]], x[:3])) < 1e-5
    assert not y[3].any()  # experts that are none


def test_grouped_linear_decodes_only_experts_that_occur(tiles: list[torch.Size]) -> None:
    weight, _ = held(random(64, 8, 32), CodebookFormat(3, 32), "grouped")
    weight.grouped_linear(random(1, 32), torch.tensor([[7, 60, 7]]))
    assert [shape[0] for shape in tiles] == [8, 8]


def test_a_graph_writes_a_product_in_one_line() -> None:
    """torch.compile puts what ``format_node`` says in a comment above GPU kernels; a second line of it would be code."""
    weights = [held(random(2, 64), CodebookFormat(bits, 32))[0] for bits in (3, 5)]
    parts = [(weight.spec, weight.tensors, 2) for weight in weights]
    parts.append((dispatch.KEPT, (random(3, 64),), 3))
    graph = make_fx(lambda x: dispatch.fused_linear(x, parts, None, "float32"))(random(4, 64)).graph
    (product,) = [node for node in graph.nodes if "kappaquant.linear" in str(node.target)]
    assert len(str(product.format_node()).splitlines()) == 1


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_weights_that_would_vanish_are_an_error_and_zeros_are_not(bits: int) -> None:
    fmt, weight = CodebookFormat(bits, 64), torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    with pytest.raises(
        NonFiniteError, match=r"q: as tq\dg64 it would lose 100% of its energy; its largest weight is 8.2e-09"
    ):
        dispatch.encode(weight * 2e-9, fmt, name="q")
    assert not dispatch.encode(weight * 0, fmt).squared_error
    weight[2:] *= 2e-9  # of no weight beside the others
    assert dispatch.encode(weight, fmt).relative_mse < 0.15


def test_decode_is_the_codecs() -> None:
    weight, decoded = held(random(7, 100), CodebookFormat(5, 64), "rows")
    assert torch.equal(weight.dequantize(), decoded)


def test_custom_ops_pass_opcheck() -> None:
    weight, _ = held(random(8, 60), CodebookFormat(3, 32))
    experts, _ = held(random(4, 8, 60), CodebookFormat(3, 32), "grouped")
    x, index = random(3, 60), torch.tensor([[3, 0], [3, 2], [0, -1]])
    ops = torch.ops.kappaquant
    torch.library.opcheck(ops.linear, (x, [], list(weight.tensors), weight.spec, [8], None, "float32"))
    shape = list(experts.shape)
    torch.library.opcheck(ops.grouped_linear, (x, index, list(experts.tensors), experts.spec, shape))
    torch.library.opcheck(ops.decode, (list(weight.tensors), weight.spec, 60))


class Picky(Kernel):
    """Refuses, for a reason."""

    uses: frozenset[Use] = frozenset({"linear"})

    def __init__(self, name: str, reason: str | None) -> None:
        self.name, self.reason = name, reason

    def refusal(self, fmt: Format, parts: Mapping[str, torch.Tensor]) -> str | None:
        return self.reason

    def linear(self, *args: object) -> torch.Tensor:  # type: ignore[override]
        raise NotImplementedError


def test_the_first_kernel_that_does_not_refuse_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_KERNELS", [Picky("a", "needs a GPU"), Picky("b", None), Picky("c", None)])
    fmt, parts = CodebookFormat(3, 128), {".x": torch.zeros(1)}
    assert dispatch.choose(fmt, parts, ["linear"])[0].name == "b"
    assert dispatch.choose(fmt, parts, ["linear"], kernel="c")[0].name == "c"
    assert dispatch.choose(fmt, parts, ["experts", "linear"])[1] == "linear"
    with pytest.raises(UnsupportedError, match="a: needs a GPU"):
        dispatch.choose(fmt, parts, ["linear"], kernel="a")


def test_every_reason_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_KERNELS", [Picky("a", "needs a GPU"), Picky("b", "m is above 64")])
    fmt, parts = CodebookFormat(3, 128), {".x": torch.zeros(1)}
    with pytest.raises(UnsupportedError, match=r"tq3g128 \(linear\): a: needs a GPU; b: m is above 64"):
        dispatch.choose(fmt, parts, ["linear"])
    with pytest.raises(UnsupportedError, match="a: does not serve rows; b: does not serve rows"):
        dispatch.choose(fmt, parts, ["rows"])
    with pytest.raises(UnsupportedError, match="no kernel is called 'z'; there are a, b"):
        dispatch.choose(fmt, parts, ["linear"], kernel="z")


def test_a_name_is_given_once() -> None:
    with pytest.raises(RegistrationError, match="kernel 'torch' is taken by Lookups"):
        dispatch.register(Picky("torch", None))
