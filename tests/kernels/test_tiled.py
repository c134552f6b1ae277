"""The dispatch to GPU kernels: right at every batch size, width, group and odd size; custom ops that compilers accept."""

from __future__ import annotations

import pytest
import torch
from gpu_products import ALL, error, gpu, random

from kappaquant.formats import codec
from kappaquant.formats.codebook import Format
from kappaquant.kernels import tiled as gpu_ops
from kappaquant.kernels.cuda import tiles

BATCHES = (1, 2, 7, 8, 9, 16, 17, 31, 64, 129, 500, 1025, 4096)


def test_which_inputs_a_width_wants() -> None:
    assert not gpu_ops.needs_half("int8", 3)
    assert gpu_ops.needs_half("int8", 6)
    assert gpu_ops.needs_half("bf16", 3)


def test_a_weight_on_a_cpu_is_refused_with_the_reason() -> None:
    book = Format(3, 128).codebook
    assert gpu_ops.refusal(torch.ones(2, 2).half(), book) == "tensor_cores: needs an NVIDIA GPU, got a tensor on cpu"


def test_norms_that_float16_can_not_hold_are_refused() -> None:
    """A loader never zeroes: 1e-9 would become 0, 1e-6 would lose most of its digits."""
    fine = torch.tensor([[1.0, 0.0], [6.2e-5, 65504.0]])
    assert gpu_ops.norms_refusal(fine) is None
    assert gpu_ops.norms_refusal(torch.tensor([1e-6]).half()) is None  # as it stands on disk
    for bad, message in (
        (1e-9, "a norm is 1e-09, float16 loses digits"),
        (1e-6, "1e-06"),
        (1e6, "1e+06, float16 holds at most 65504"),
    ):
        assert message in str(gpu_ops.norms_refusal(torch.tensor([[1.0, bad]])))


@gpu
def test_a_weight_is_refused_for_its_norms_or_its_codebook() -> None:
    norms = torch.full((2, 2), 1e6, device="cuda")
    assert "a norm is 1e+06, float16 holds at most 65504" in str(gpu_ops.refusal(norms, Format(3, 128).codebook))
    assert gpu_ops.refusal(norms / 1e6, Format(3, 128).codebook) is None
    assert "not symmetric" in str(gpu_ops.refusal(norms.half(), (-1.0, 0.0, 0.5, 1.0)))


@gpu
@pytest.mark.parametrize("activations", gpu_ops.ACTIVATIONS)
@pytest.mark.parametrize("fmt", ALL, ids=lambda f: f.id)
def test_linear_at_every_batch(fmt: Format, activations: str) -> None:
    n, k = 333, 1024 + fmt.group_size - 3
    encoded = codec.encode(random(n, k).cuda(), fmt, "fast")
    decoded = codec.decode(encoded.packed, encoded.norms, fmt, k).double()
    codes, norms = gpu_ops.tile(encoded.packed, encoded.norms, fmt)
    packed, stored = gpu_ops.untile(codes, norms, fmt, (n, k))
    assert torch.equal(packed, encoded.packed)
    assert torch.equal(stored, encoded.norms)
    half = gpu_ops.needs_half(activations, fmt.bits)
    bias = random(n, seed=5).cuda()
    for m in BATCHES:
        x = random(m, k, seed=m).cuda().bfloat16()
        quantized = gpu_ops.quantize_input(x, fmt.group_size, half)
        y = gpu_ops.tiled_linear(quantized, codes, norms, fmt.codebook, fmt, (n, k), bias, torch.float32)
        assert error(y - bias, x, decoded) < (4e-3 if half else 0.01), m


@gpu
@pytest.mark.parametrize("half", [False, True])
def test_experts_at_every_batch(half: bool) -> None:
    hidden, inner, count, top_k = 640, 384, 20, 4
    weights = []
    for seed, (bits, shape) in enumerate(((3, (count, 2 * inner, hidden)), (4, (count, hidden, inner)))):
        fmt = Format(bits, 128)
        encoded = codec.encode(random(*shape, seed=seed).cuda() / 20, fmt, "fast")
        plain = codec.decode(encoded.packed, encoded.norms, fmt, shape[-1])
        weights.append((*gpu_ops.tile(encoded.packed, encoded.norms, fmt), fmt, plain))
    (c1, n1, f1, gate_up), (c2, n2, f2, down) = weights
    for m in BATCHES:
        x = random(m, hidden, seed=m).cuda().bfloat16()
        index = torch.rand(m, count, device="cuda").topk(top_k).indices
        index[: m // 2] = torch.arange(top_k, device="cuda")  # some experts get many tokens, others none
        factors = torch.rand(m, top_k, device="cuda").bfloat16()
        y = gpu_ops.tiled_experts(
            x, index, factors, [c1, c2], [n1, n2], [*f1.codebook, *f2.codebook], [3, 4], 128, inner, half
        )
        expected = torch.zeros(m, hidden, device="cuda")
        for expert in range(count):
            token, place = torch.where(index == expert)
            gate, up = (x[token].float() @ gate_up[expert].T).chunk(2, -1)
            inside = torch.nn.functional.silu(gate) * up
            expected.index_add_(0, token, inside @ down[expert].T * factors[token, place, None].float())
        assert float((y.float() - expected).norm() / expected.norm()) < (0.01 if half else 0.03), m


@gpu
def test_compilers_accept_the_ops() -> None:
    fmt = Format(3, 128)
    book = fmt.codebook  # modules hold theirs, too
    encoded = codec.encode(random(64, 256).cuda(), fmt, "fast")
    codes, norms = gpu_ops.tile(encoded.packed, encoded.norms, fmt)
    x = random(8, 256).cuda()  # a whole block of tokens: what fills up a block is not defined
    torch.library.opcheck(torch.ops.kappaquant.quantize_input.default, (x, 128, False))

    def product(x: torch.Tensor) -> torch.Tensor:
        quantized = gpu_ops.quantize_input(x, 128, False)
        return gpu_ops.tiled_linear(quantized, codes, norms, book, fmt, (64, 256), None, x.dtype)

    torch.testing.assert_close(torch.compile(product, fullgraph=True)(x), product(x))


def test_a_compiler_sees_one_graph_of_two_ops() -> None:
    """Traced through the ops' shapes alone, so without a GPU."""
    fmt, shape = Format(3, 128), (64, 256)
    tiled = tiles.tile(torch.zeros(fmt.packed_shape(shape), dtype=torch.uint8), torch.zeros(64, 2).half(), fmt)
    book, seen = fmt.codebook, []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> object:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return lambda *_: (torch.zeros(8, 64),)

    @torch.compile(fullgraph=True, backend=backend)
    def product(x: torch.Tensor) -> torch.Tensor:
        quantized = gpu_ops.quantize_input(x, 128, False)
        return gpu_ops.tiled_linear(quantized, tiled.codes, tiled.norms, book, fmt, shape, None, x.dtype)

    assert product(random(8, 256)).shape == (8, 64)
    assert [name for name in seen if name.startswith("kappaquant")] == [
        "kappaquant.quantize_input.default",
        "kappaquant.tiled_linear.default",
    ]
