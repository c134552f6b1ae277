"""Products of many tokens and sorted experts: compilation and the order of inputs anywhere, products on a Hopper GPU."""

from __future__ import annotations

import pytest
import torch

from kappaquant import codec
from kappaquant.errors import UnsupportedError
from kappaquant.format import BITS, FORMATS, GROUP_SIZES, Format
from kappaquant.kernels import gemm, inputs, nvrtc, sorted_experts, tiles
from kappaquant.kernels.gemm import Launch
from kappaquant.kernels.tensor_cores import Weight

ALL = sorted(FORMATS.values(), key=lambda f: (f.bits, f.group_size))
LAUNCHES = (
    Launch(128, 2, 1, 4, 1), Launch(128, 1, 4, 3, 2), Launch(64, 2, 2, 4, 1), Launch(32, 1, 1, 4, 3), Launch(16, 2, 8, 4, 1),
    Launch(8, 1, 1, 4, 4), Launch(256, 2, 1, 3, 1), Launch(256, 2, 2, 3, 1),
)  # fmt: skip
needs_compiler = pytest.mark.skipif(nvrtc.unavailable() is not None, reason=str(nvrtc.unavailable()))


def hopper(test):  # type: ignore[no-untyped-def]
    reason = gemm.refusal(torch.device("cuda")) if torch.cuda.is_available() else None
    return pytest.mark.gpu(pytest.mark.skipif(reason is not None, reason=str(reason))(test))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@needs_compiler
@pytest.mark.parametrize("bits", BITS)
def test_products_compile(bits: int) -> None:
    for use in LAUNCHES[bits % 2 :: 2]:
        flags = f"{use.tokens}, {use.warpgroups}, {use.split}, {use.stages}, {use.resident}"
        code, name = nvrtc.compiled(
            "gemm.cu", f"gemm<{bits}, 0, 0, 0, 64, {str(bits == 3).lower()}, {flags}>", "sm_90a"
        )
        assert code.startswith(b"\x7fELF")
        assert b"gemm" in name


@needs_compiler
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_120"])
def test_what_surrounds_products_compiles(arch: str) -> None:
    for group in (32, 64, 128, 256):
        for flags in ("2, true, 0, false, true", "0, true, 2, false, true", "1, true, 0, true, true"):
            assert nvrtc.compiled("rotate.cu", f"rotate<{group}, {flags}>", arch)[0].startswith(b"\x7fELF")


@needs_compiler
def test_the_order_of_experts_compiles() -> None:
    for instance in ("sort_experts<1>", "sort_experts<8>", "combine<2, 0, 8>", "combine<0, 2, 1>"):
        assert nvrtc.compiled("sort_experts.cu", instance, "sm_90a")[0].startswith(b"\x7fELF")


def test_every_launch_fits_the_card() -> None:
    """227 KB a block and 228 KB a multiprocessor (compute capability 9.0), 1 KB of each block for the system."""
    chosen = {gemm.choose(m, n, k, 132) for m in (9, 24, 64, 128, 4096) for n in (1, 512, 28672) for k in (1, 16, 224)}
    chosen |= {sorted_experts.choose(slots, e) for slots in (1, 64, 512, 16384, 1 << 20) for e in (1, 8, 256)}
    for use in [*chosen, *LAUNCHES]:
        for bits in BITS:
            assert gemm.shared_bytes(use, bits) <= 227 << 10
        assert use.split in (1, 2, 4, 8)


def test_refusals_say_why() -> None:
    assert "NVIDIA GPU" in str(gemm.refusal(torch.device("cpu")))
    x = inputs.Tokens(torch.empty(1, 1, 16, 8, 8, dtype=torch.float16), torch.empty(8), 128, 3)
    with pytest.raises(UnsupportedError, match="gemm: needs an NVIDIA GPU"):
        gemm.linear(x, [], torch.float32)


def prepared(fmt: Format, *shape: int, seed: int = 0) -> tuple[Weight, torch.Tensor]:
    """(weight on the GPU, decoded in float64)"""
    encoded = codec.encode(random(*shape, seed=seed).cuda() / shape[-1] ** 0.5, fmt, "fast")
    decoded = codec.decode(encoded.packed, encoded.norms, fmt, shape[-1]).double()
    return Weight.of(encoded.packed, encoded.norms, fmt, shape[-1], fmt.codebook), decoded


def error(y: torch.Tensor, x: torch.Tensor, decoded: torch.Tensor) -> float:
    """RMS error over the RMS that products of such vectors have; few outputs may by chance all be near 0."""
    expected = x.double() @ decoded.T
    usual = (x.double().norm(dim=1, keepdim=True) * decoded.norm(dim=1)).norm() / decoded.shape[1] ** 0.5
    return float((y.double() - expected).norm() / usual)


@hopper
@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_inputs_lie_as_products_read_them(group: int) -> None:
    fmt, x = Format(3, group), random(19, 3 * group - 5).cuda().bfloat16()
    tokens, _ = inputs.rotate_tokens(x, fmt)
    units = tokens.values.shape[0]
    token, chunk = torch.arange(8, device=x.device)[:, None], torch.arange(8, device=x.device)
    plain = tokens.values.view(units, -1, 2, 8, 8, 8)[:, :, :, token, chunk ^ token]
    # [unit, block, c // 16, token, c // 2 % 8, (t, c % 2)] -> [block, token, unit, t, c]
    by_quarter = plain.view(units, -1, 2, 8, 8, 4, 2).permute(1, 3, 0, 5, 2, 4, 6).reshape(-1, units, tiles.INPUTS)
    back = torch.empty_like(by_quarter)
    back[..., tiles._order(group, x.device)] = by_quarter
    rotated = back.reshape(-1, units * tiles.INPUTS)[:19].float() * tokens.scales[:19, None]
    assert float((codec.unrotate(rotated, group)[:, : x.shape[1]] - x.float()).norm() / x.float().norm()) < 5e-4


@hopper
@pytest.mark.parametrize("fmt", ALL, ids=lambda f: f.id)
def test_products(fmt: Format) -> None:
    launch = LAUNCHES[(3 * fmt.bits + GROUP_SIZES.index(fmt.group_size)) % len(LAUNCHES)]
    for n, k in ((45, 3 * fmt.group_size - 5), (1, fmt.group_size), (300, 1024 + fmt.group_size)):
        weight, decoded = prepared(fmt, n, k)
        for m in (1, 9, 33, 130, 300):
            x = random(m, k, seed=m).cuda().bfloat16()
            tokens, _ = inputs.rotate_tokens(x, fmt)
            (y,) = gemm.linear(tokens, [weight], torch.float32, launch=launch)
            assert error(y, x, decoded) < (1e-3 if m * n > 100 else 3e-3), (n, k, m, launch)  # few outputs vary more


@hopper
def test_launches_that_are_chosen() -> None:
    fmt = Format(4, 128)
    weight, decoded = prepared(fmt, 700, 2048)
    for m in (1, 17, 40, 100, 300, 4096):
        x = random(m, 2048, seed=m).cuda().bfloat16()
        tokens, _ = inputs.rotate_tokens(x, fmt)
        (y,) = gemm.linear(tokens, [weight], torch.float32)
        assert error(y, x, decoded) < 1e-3, m


@hopper
@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
def test_outputs_of_different_widths_share_an_input(launch: Launch) -> None:
    made = [prepared(Format(b, 128), n, 640, seed=b) for b, n in ((3, 70), (5, 32), (2, 1), (6, 300))]
    biases = [random(w.rows).cuda().bfloat16() if i % 2 else None for i, (w, _) in enumerate(made)]
    x = random(37, 640).cuda().bfloat16()
    tokens, _ = inputs.rotate_tokens(x, Format(3, 128))
    outs = gemm.linear(tokens, [w for w, _ in made], torch.bfloat16, biases, launch)
    for y, bias, (_, decoded) in zip(outs, biases, made, strict=True):
        assert y.dtype == torch.bfloat16
        assert error(y if bias is None else y - bias, x, decoded) < 8e-3  # bfloat16 rounds twice


@hopper
def test_tokens_of_any_size() -> None:
    """One scale a token: a huge token, a tiny one and none at all are as exact as others."""
    fmt = Format(4, 128)
    weight, decoded = prepared(fmt, 256, 512)
    x = random(40, 512).cuda() * torch.logspace(-20, 20, 40).cuda()[:, None]
    x[7] = 0
    tokens, _ = inputs.rotate_tokens(x, fmt)
    (y,) = gemm.linear(tokens, [weight], torch.float32)
    assert not y[7].any()
    keep = torch.arange(40, device=x.device) != 7
    size = x[keep].norm(dim=1, keepdim=True)
    assert error(y[keep] / size, x[keep] / size, decoded) < 1e-3


@hopper
def test_an_input_of_another_kind_is_refused() -> None:
    fmt = Format(3, 128)
    weight, _ = prepared(fmt, 32, 256)
    tokens, _ = inputs.rotate_tokens(random(30, 128).cuda(), fmt)
    with pytest.raises(UnsupportedError, match=r"a weight \[32, 256\] is tq3g128"):
        gemm.linear(tokens, [weight], torch.float32)
    with pytest.raises(UnsupportedError, match="5 weights"):
        gemm.linear(tokens, [weight] * 5, torch.float32)
    experts, _ = prepared(fmt, 2, 32, 128)
    with pytest.raises(UnsupportedError, match="weights of experts need items"):
        gemm.linear(tokens, [experts], torch.float32)


def plain_experts(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """Every product in float32 [tokens, hidden], rounded between them as ``forward`` does."""
    out = x.new_zeros(x.shape, dtype=torch.float32)
    for choice in range(index.shape[1]):
        inner = torch.einsum("tnk,tk->tn", gate_up.float()[index[:, choice]], x.float()).to(x.dtype)
        gate, up = inner.chunk(2, dim=-1)
        hidden = torch.nn.functional.silu(gate) * up
        out += weights[:, choice, None].float() * torch.einsum(
            "tnk,tk->tn", down.float()[index[:, choice]], hidden.float()
        )
    return out


@hopper
@pytest.mark.parametrize(
    ("experts", "hidden", "inner", "top_k", "tokens", "bits", "group"),
    [
        (5, 256, 128, 2, 37, (3, 4), 128),
        (16, 200, 72, 4, 130, (3, 4), 64),
        (8, 512, 256, 8, 300, (5, 2), 128),
        (64, 128, 128, 2, 9, (4, 6), 32),
        (3, 256, 256, 3, 1, (8, 3), 256),
    ],
)
def test_sorted_experts(experts: int, hidden: int, inner: int, top_k: int, tokens: int, bits: tuple[int, int], group: int) -> None:  # fmt: skip
    gate_up, plain_gate_up = prepared(Format(bits[0], group), experts, 2 * inner, hidden)
    down, plain_down = prepared(Format(bits[1], group), experts, hidden, inner, seed=1)
    x = random(tokens, hidden).cuda().bfloat16()
    weights, index = random(tokens, experts, seed=2).cuda().softmax(-1).topk(top_k)
    index[: tokens // 2] = torch.arange(top_k, device=index.device)  # crowds a few experts, leaves others empty
    for given in (weights, weights.bfloat16()):
        y = sorted_experts.forward(x, index, given, gate_up, down)
        assert y.dtype == x.dtype
        expected = plain_experts(x, index, given, plain_gate_up, plain_down)
        assert float((y.float() - expected).norm() / expected.norm()) < 6e-3  # of which bfloat16's rounding is 3e-3
        assert torch.equal(y, sorted_experts.forward(x, index, given, gate_up, down))


@hopper
def test_a_graph_replays_other_tokens_and_routes() -> None:
    gate_up, plain_gate_up = prepared(Format(3, 128), 8, 256, 128)
    down, plain_down = prepared(Format(4, 128), 8, 128, 128, seed=1)
    x, weights = random(50, 128).cuda().bfloat16(), torch.full((50, 2), 0.5, device="cuda")
    index = torch.zeros(50, 2, dtype=torch.int64, device="cuda")
    sorted_experts.forward(x, index, weights, gate_up, down)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sorted_experts.forward(x, index, weights, gate_up, down)
    x.copy_(random(50, 128, seed=3))
    index.copy_(random(50, 8, seed=4).topk(2).indices)
    graph.replay()
    expected = plain_experts(x, index, weights, plain_gate_up, plain_down)
    assert float((y.float() - expected).norm() / expected.norm()) < 6e-3


@hopper
def test_no_tokens_give_no_rows() -> None:
    fmt = Format(3, 128)
    weight, _ = prepared(fmt, 32, 256)
    tokens, _ = inputs.rotate_tokens(torch.empty(0, 256, device="cuda"), fmt)
    assert gemm.linear(tokens, [weight], torch.float32)[0].shape == (0, 32)
