"""The kernel of tiled weights: right at every batch size, width, group and odd size, in ops that compilers and graphs accept."""

from __future__ import annotations

import pytest
import torch
from gpu_products import ALL, error, gpu, named, random
from packed_weights import held

from kappaquant.errors import UnsupportedError
from kappaquant.formats import codec
from kappaquant.formats.codebook import NORMS_SUFFIX, CodebookFormat, GroupedFormat
from kappaquant.kernels import dispatch
from kappaquant.kernels.base import ACTIVATIONS, check_activations
from kappaquant.kernels.cuda import tensor_cores, tiled, tiles
from kappaquant.kernels.cuda.tiled import Tiled
from kappaquant.runtime.packed import SharedInput

GPU_ACTIVATIONS = [kind for kind in ACTIVATIONS if kind != "float32"]
BATCHES = (1, 2, 7, 8, 9, 16, 17, 31, 64, 129, 500, 1025, 4096)


def test_float32_is_refused_on_gpus() -> None:
    with pytest.raises(UnsupportedError, match="'float32': kernels on NVIDIA GPUs multiply by int8 or by bf16"):
        check_activations("float32", "cuda")


def test_which_inputs_a_width_wants() -> None:
    assert not tiled.needs_half("int8", 3)
    assert tiled.needs_half("int8", 6)
    assert tiled.needs_half("bf16", 3)
    with pytest.raises(UnsupportedError, match="activations 'int4': must be one of int8, bf16"):
        check_activations("int4")


def test_few_rows_are_multiplied_as_few_tokens_are(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")

    def few(tokens: int, rows: int, activations: str = "int8", bits: int = 3) -> bool:
        kind = Tiled().input_kind(CodebookFormat(bits, 128), tokens, rows, activations, device)
        assert isinstance(kind, tiled.InputKind)
        return kind.few

    monkeypatch.setattr(tiled.gemm, "refusal", lambda _: None)
    assert [few(tokens, 28672) for tokens in (1, 16, 17)] == [True, True, False]
    assert [few(tokens, 8192) for tokens in (17, 32, 33)] == [True, True, False]
    assert [few(tokens, 4096) for tokens in (33, 64, 65)] == [True, True, False]
    assert not few(17, 64, "bf16")
    assert not few(17, 64, bits=6)
    monkeypatch.setattr(tiled.gemm, "refusal", lambda _: "no Hopper")
    assert few(100, 28672)


def of_experts(name: str, experts: int, rows: int, width: int) -> tensor_cores.Weight:
    """A weight without data."""
    fmt, count = named(name), rows * width
    codes = torch.empty(experts, count * fmt.bits // 32, dtype=torch.int32, device="meta")
    return tensor_cores.Weight(
        tiles.Tiled(codes, torch.empty(experts, count // 128, dtype=torch.float16, device="meta")), fmt, rows, width
    )


@pytest.mark.parametrize(
    ("experts", "hidden", "inner", "top_k", "last", "first"),
    [
        (256, 2048, 512, 8, 8, 12),
        (128, 2048, 768, 8, 5, 7),
        (32, 2880, 2880, 4, 2, 4),
        (8, 4096, 1024, 2, 3, 6),
        (8, 6144, 16384, 2, 1, 2),
        (16, 6144, 10752, 4, 1, 2),
    ],
)
def test_slots_are_sorted_where_that_was_measured_to_pay(
    experts: int, hidden: int, inner: int, top_k: int, last: int, first: int
) -> None:
    pair = of_experts("k3", experts, 2 * inner, hidden), of_experts("k4", experts, hidden, inner)
    assert not tiled._sorting_pays(last, top_k, *pair)
    assert tiled._sorting_pays(first, top_k, *pair)


def test_cards_without_wide_products_sort_so_many_slots_at_a_time() -> None:
    x, index = torch.empty(10_000, 1), torch.empty(10_000, 8)
    pieces = tiled._pieces(x, index)
    assert [piece.stop - piece.start for piece in pieces] == [4096] * 3
    assert len(x[pieces[-1]]) == 10_000 - 2 * 4096


def test_a_weight_on_a_cpu_is_refused_with_the_reason() -> None:
    parts = {NORMS_SUFFIX: torch.ones(2, 2).half()}
    assert Tiled().refusal(CodebookFormat(3, 128), parts) == "needs an NVIDIA GPU, got a tensor on cpu"


def test_norms_that_float16_can_not_hold_are_refused() -> None:
    """A loader never zeroes: 1e-9 would become 0, 1e-6 would lose most of its digits."""
    fine = torch.tensor([[1.0, 0.0], [6.2e-5, 65504.0]])
    assert codec.norms_refusal(fine) is None
    assert codec.norms_refusal(torch.tensor([1e-6]).half()) is None  # as it stands on disk
    for bad, message in (
        (1e-9, "a norm is 1e-09, float16 loses digits"),
        (1e-6, "1e-06"),
        (1e6, "1e+06, float16 holds at most 65504"),
    ):
        assert message in str(codec.norms_refusal(torch.tensor([[1.0, bad]])))


@gpu
def test_a_weight_is_refused_for_its_norms_or_its_codebook() -> None:
    norms, fmt = torch.full((2, 2), 1e6, device="cuda"), CodebookFormat(3, 128, norms="F32")
    assert "a norm is 1e+06, float16 holds at most 65504" in str(Tiled().refusal(fmt, {NORMS_SUFFIX: norms}))
    assert Tiled().refusal(fmt, {NORMS_SUFFIX: norms / 1e6}) is None
    crooked = CodebookFormat(2, 128, (-1.0, 0.0, 0.5, 1.0))
    assert "not symmetric" in str(Tiled().refusal(crooked, {NORMS_SUFFIX: norms.half()}))


@gpu
@pytest.mark.parametrize("activations", GPU_ACTIVATIONS)
@pytest.mark.parametrize("fmt", ALL, ids=lambda f: f.id)
def test_linear_at_every_batch(fmt: GroupedFormat, activations: str) -> None:
    n, k = 333, 1024 + fmt.group_size - 3
    weight, decoded = held(random(n, k).cuda(), fmt, device="cuda")
    assert weight.kernel.name == "tensor_cores"
    encoded = codec.encode(random(n, k).cuda(), fmt, "fast")
    restored = weight.kernel.restore(weight.arranged)
    assert all(torch.equal(part, encoded.parts[suffix]) for suffix, part in restored.items())
    half = tiled.needs_half(activations, fmt.bits)
    bias, shared = random(n, seed=5).cuda(), SharedInput(activations)
    for m in BATCHES:
        x = random(m, k, seed=m).cuda()
        y = weight.linear(x, shared, bias)
        assert error(y - bias, x, decoded.double()) < (4e-3 if half else 0.01), m
        assert torch.equal(y, weight.linear(x, shared, bias))  # its input prepared before
        assert weight.linear(x.bfloat16(), shared).dtype == torch.bfloat16


@gpu
@pytest.mark.parametrize("names", [("k3", "k4"), ("t3", "t4")])
@pytest.mark.parametrize("groups", [(128, 128), (128, 64), (32, 128)])
@pytest.mark.parametrize("activations", GPU_ACTIVATIONS)
def test_experts_at_every_batch(activations: str, groups: tuple[int, int], names: tuple[str, str]) -> None:
    hidden, inner, count, top_k = 640, 384, 20, 4
    first, gate_up = held(
        random(count, 2 * inner, hidden).cuda() / 20, named(names[0], groups[0]), "experts", device="cuda"
    )
    second, down = held(
        random(count, hidden, inner, seed=1).cuda() / 20, named(names[1], groups[1]), "experts", device="cuda"
    )
    specs, shapes = dispatch.SEPARATOR.join((first.spec, second.spec)), [*first.shape, *second.shape]
    for m in BATCHES:
        x = random(m, hidden, seed=m).cuda().bfloat16()
        index = torch.rand(m, count, device="cuda").topk(top_k).indices
        index[: m // 2] = torch.arange(top_k, device="cuda")  # some experts get many tokens, others none
        factors = torch.rand(m, top_k, device="cuda").bfloat16()
        y = dispatch.experts(x, index, factors, first.tensors, second.tensors, specs, shapes, activations)
        expected = torch.zeros(m, hidden, device="cuda")
        for expert in range(count):
            token, place = torch.where(index == expert)
            gate, up = (x[token].float() @ gate_up[expert].T).chunk(2, -1)
            inside = torch.nn.functional.silu(gate) * up
            expected.index_add_(0, token, inside @ down[expert].T * factors[token, place, None].float())
        assert float((y.float() - expected).norm() / expected.norm()) < (0.01 if activations == "bf16" else 0.03), m


@gpu
def test_compilers_accept_the_ops() -> None:
    weight, _ = held(random(64, 256).cuda(), CodebookFormat(3, 128), device="cuda")
    x = random(8, 256).cuda()  # a whole block of tokens: what fills up a block is not defined
    arguments = (x, [], list(weight.tensors), weight.spec, [64], None, "int8")
    torch.library.opcheck(torch.ops.kappaquant.linear, arguments)

    def product(x: torch.Tensor) -> torch.Tensor:
        return weight.linear(x, SharedInput())

    torch.testing.assert_close(torch.compile(product, fullgraph=True)(x), product(x))


def test_a_compiler_sees_one_graph_of_one_op() -> None:
    """Traced through the op's shapes alone."""
    weight, _ = held(random(64, 256), CodebookFormat(3, 128))
    shared, seen = SharedInput(), []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> object:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return lambda *_: (torch.zeros(8, 64),)

    @torch.compile(fullgraph=True, backend=backend)
    def product(x: torch.Tensor) -> torch.Tensor:
        return weight.linear(x, shared)

    assert product(random(8, 256)).shape == (8, 64)
    assert [name for name in seen if name.startswith("kappaquant")] == ["kappaquant.linear.default"]
