"""Products of many tokens and sorted experts: compilation and the order of inputs anywhere, products on a Hopper GPU."""

from __future__ import annotations

import pytest
import torch
from gpu_products import ALL, INT8_NAMES, NAMES, error, named, prepared, random
from nvrtc_here import needs_compiler

from kappaquant.errors import UnsupportedError
from kappaquant.formats import codec
from kappaquant.formats.codebook import CodebookFormat, GroupedFormat
from kappaquant.formats.signs import GROUP_SIZES
from kappaquant.kernels.cuda import gemm, inputs, int8_gemm, nvrtc, sorted_experts, tables, tensor_cores, tiles
from kappaquant.kernels.cuda.cells import cells
from kappaquant.kernels.cuda.gemm import Launch
from kappaquant.kernels.cuda.launches import whole_blocks
from kappaquant.kernels.cuda.tensor_cores import INT8_BITS

LAUNCHES = (
    Launch(128, 2, 1, 4, 1), Launch(128, 1, 4, 3, 2), Launch(64, 2, 2, 4, 1), Launch(32, 1, 1, 4, 3), Launch(16, 2, 8, 4, 1),
    Launch(8, 1, 1, 4, 4), Launch(256, 2, 1, 3, 1), Launch(256, 2, 2, 3, 1),
)  # fmt: skip
INT8_LAUNCHES = (
    int8_gemm.Launch(32, 1, 1, 4, 3), int8_gemm.Launch(32, 2, 2, 3, 1),
    int8_gemm.Launch(128, 2, 1, 4, 1), int8_gemm.Launch(128, 3, 1, 3, 1), int8_gemm.Launch(128, 1, 4, 4, 1),
    int8_gemm.Launch(64, 2, 1, 4, 1), int8_gemm.Launch(64, 1, 2, 3, 2), int8_gemm.Launch(64, 2, 8, 4, 1),
)  # fmt: skip


# None: as chosen for so many tokens
OF_EXPERTS = (
    None, Launch(16, 1, 1, 4, 4), int8_gemm.Launch(32, 1, 1, 4, 3), int8_gemm.Launch(64, 1, 1, 4, 2),
    tensor_cores.Launch(1, 4, 4, 16, 3), tensor_cores.Launch(2, 4, 4, 16, 3), tensor_cores.Launch(2, 2, 4, 16), tensor_cores.Launch(1, 1, 4, 16),
)  # fmt: skip


def hopper(test):  # type: ignore[no-untyped-def]
    reason = gemm.refusal(torch.device("cuda")) if torch.cuda.is_available() else None
    return pytest.mark.gpu(pytest.mark.skipif(reason is not None, reason=str(reason))(test))


@needs_compiler
@pytest.mark.parametrize(
    "name", ["k3", *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES if name != "k3")]
)
def test_products_compile(name: str) -> None:
    number = cells(named(name)).number
    for use in [*LAUNCHES[number % 2 :: 2], *(INT8_LAUNCHES[number % 2 :: 2] if name in INT8_NAMES else ())]:
        code, mangled = nvrtc.compiled(use.file, use.instance([number, 0, 0, 0], 64), "sm_90a")
        assert code.startswith(b"\x7fELF")
        assert b"gemm" in mangled


def weight_of_experts(name: str, experts: int = 256, rows: int = 1024, inputs: int = 2048) -> tensor_cores.Weight:
    """One that has no data."""
    fmt = named(name)
    codes = torch.empty(
        experts, rows // tiles.ROWS, inputs // tiles.INPUTS, fmt.bits, 32, 4, dtype=torch.int32, device="meta"
    )
    return tensor_cores.Weight(tiles.Tiled(codes, codes), fmt, rows, inputs)


@needs_compiler
def test_products_of_experts_compile() -> None:
    for name, slots, half in (("k3", 2000, True), ("k6", 16384, True), ("t3", 8192, False), ("k4", 4096, False)):
        use = sorted_experts.choose(slots, weight_of_experts(name), half)
        assert not isinstance(use, tensor_cores.Launch)
        instance = use.instance([cells(named(name)).number, 0, 0, 0], 128, items=True)
        assert nvrtc.compiled(use.file, instance, "sm_90a")[0].startswith(b"\x7fELF")


@needs_compiler
def test_pairs_are_not_for_experts() -> None:
    with pytest.raises(UnsupportedError, match="pairs do not fetch inputs of experts"):
        nvrtc.compiled("gemm.cu", Launch(256, 2, 2, 3, 1).instance([3, 0, 0, 0], 128, items=True), "sm_90a")


@pytest.mark.parametrize("split", [1, 2, 4, 8])
@pytest.mark.parametrize("slots", [132, 264])
def test_blocks_are_split_only_where_the_others_fill_the_card(split: int, slots: int) -> None:
    for blocks in range(1, 3 * slots):
        whole = whole_blocks(blocks, split, slots)
        rest = blocks - whole
        assert 0 <= whole <= blocks
        assert whole % split == 0  # every thread block of a cluster has one
        if blocks % slots * split <= slots:
            assert rest <= slots // split + split  # one turn of each cluster, and what whole clusters leave
        else:
            assert rest < split


@needs_compiler
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_120"])
def test_what_surrounds_products_compiles(arch: str) -> None:
    for group in (32, 64, 128, 256):
        for flags in ("2, true, 0, false, true", "0, true, 2, false, true", "1, false, 0, true, true"):
            assert nvrtc.compiled("rotate.cu", f"rotate<{group}, {flags}>", arch)[0].startswith(b"\x7fELF")


@needs_compiler
def test_the_order_of_experts_compiles() -> None:
    for instance in ("sort_experts<1>", "sort_experts<8>", "combine<2, 0, 8>", "combine<0, 2, 1>"):
        assert nvrtc.compiled("sort_experts.cu", instance, "sm_90a")[0].startswith(b"\x7fELF")


def test_every_launch_fits_the_card() -> None:
    """227 KB a block and 228 KB a multiprocessor (compute capability 9.0), 1 KB of each block for the system."""
    chosen = {gemm.choose(m, n, k, 132) for m in (9, 24, 64, 128, 4096) for n in (1, 512, 28672) for k in (1, 16, 224)}
    chosen |= {
        int8_gemm.choose(m, n, k, 132) for m in (17, 64, 128, 4096) for n in (1, 512, 28672) for k in (1, 16, 224)
    }
    of_experts = {
        sorted_experts.choose(slots, weight_of_experts(name, experts), half)
        for slots in (1, 64, 512, 2000, 4096, 16384, 1 << 20)
        for experts in (1, 8, 256)
        for name in ("k3", "t4", "k8")
        for half in ((True, False) if name != "k8" else (True,))
    }
    assert {type(use) for use in of_experts} == {Launch, int8_gemm.Launch, tensor_cores.Launch}
    wide = [use for use in of_experts if not isinstance(use, tensor_cores.Launch)]
    for use in [*chosen, *wide, *LAUNCHES, *INT8_LAUNCHES]:
        for fmt in (fmt for fmt in ALL if use.half or fmt.bits in INT8_BITS):
            assert use.shared_bytes(fmt.group_size) + tables.shared_bytes(cells(fmt), use.half) <= 227 << 10
        assert use.split in (1, 2, 4, 8)


def test_refusals_say_why() -> None:
    assert "NVIDIA GPU" in str(gemm.refusal(torch.device("cpu")))
    x = inputs.Tokens(torch.empty(1, 1, 16, 8, 8, dtype=torch.float16), torch.empty(8), 128, 3)
    with pytest.raises(UnsupportedError, match="gemm: needs an NVIDIA GPU"):
        gemm.linear(x, [], torch.float32)


@hopper
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_inputs_lie_as_products_read_them(group: int, half: bool) -> None:
    fmt, x = CodebookFormat(3, group), random(19, 3 * group - 5).cuda().bfloat16()
    tokens, _ = inputs.rotate_tokens(x, fmt, half)
    units = tokens.values.shape[0]
    token, chunk = torch.arange(8, device=x.device)[:, None], torch.arange(8, device=x.device)
    if half:
        plain = tokens.values.view(units, -1, 2, 8, 8, 8)[:, :, :, token, chunk ^ token]
        # [unit, block, c // 16, token, c // 2 % 8, (t, c % 2)] -> [block, token, unit, t, c]
        by_quarter = plain.view(units, -1, 2, 8, 8, 4, 2).permute(1, 3, 0, 5, 2, 4, 6)
        scales = tokens.scales[:, None]
    else:
        plain = tokens.values[:, :, token, chunk ^ token]
        # [unit, block, token, c // 4, (t, c % 4)] -> [block, token, unit, t, c]
        by_quarter = plain.view(units, -1, 8, 8, 4, 4).permute(1, 2, 0, 4, 3, 5)
        scales, halves = tokens.scales.movedim(3, 0).flatten(2)  # [k / group, tokens] each
        scales = scales.T.repeat_interleave(group, dim=1)
    by_quarter = by_quarter.reshape(-1, units, tiles.INPUTS)
    back = torch.empty_like(by_quarter)
    back[..., tiles._order(group, x.device)] = by_quarter
    values = back.reshape(-1, units * tiles.INPUTS)[:19].float()
    rotated = values * scales[:19]
    assert float((codec.unrotate(rotated, group)[:, : x.shape[1]] - x.float()).norm() / x.float().norm()) < (
        5e-4 if half else 8e-3
    )
    if not half:
        sums = rotated.view(19, -1, group).sum(2) / 2
        torch.testing.assert_close(halves[:, :19].T, sums, rtol=1e-4, atol=1e-3)


@hopper
@pytest.mark.parametrize("fmt", ALL, ids=lambda f: f.id)
def test_products(fmt: GroupedFormat) -> None:
    at = 3 * fmt.bits + GROUP_SIZES.index(fmt.group_size)
    made = [(True, LAUNCHES[at % len(LAUNCHES)])]
    if fmt.bits in INT8_BITS:
        made.append((False, INT8_LAUNCHES[at % len(INT8_LAUNCHES)]))
    for n, k in ((45, 3 * fmt.group_size - 5), (1, fmt.group_size), (300, 1024 + fmt.group_size)):
        weight, decoded = prepared(fmt, n, k, scale=k**-0.5)
        for m in (1, 9, 33, 130, 300):
            x = random(m, k, seed=m).cuda().bfloat16()
            for half, launch in made:
                tokens, _ = inputs.rotate_tokens(x, fmt, half)
                most = 1e-3 if half else 1e-2
                for dtype in (torch.float32, torch.bfloat16):  # stored one by one, or by fours
                    (y,) = gemm.linear(tokens, [weight], dtype, launch=launch)
                    allowed = most if m * n > 100 else 3 * most  # few outputs vary more
                    if dtype == torch.bfloat16:
                        allowed = max(allowed, 3e-3 if m * n > 100 else 9e-3)
                    assert error(y, x, decoded) < allowed, (n, k, m, launch, dtype)


@hopper
@pytest.mark.parametrize(
    "launch",
    [
        Launch(256, 2, 2, 3, 1),
        Launch(256, 2, 1, 3, 1),
        Launch(128, 1, 1, 3, 1),
        Launch(32, 1, 1, 4, 2),
        Launch(64, 1, 2, 4, 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("k", [128, 384, 1664])
def test_more_blocks_than_fit_the_card(launch: Launch, k: int) -> None:
    """Of four outputs of different widths in one launch: whole ones first, and the rest by those that share the input axis."""
    m, dtype = 2 * launch.tokens + 9, torch.bfloat16 if k == 384 else torch.float16
    x = random(m, k).cuda().to(dtype)
    tokens, _ = inputs.rotate_tokens(x, CodebookFormat(3, 128), True)
    made = [prepared(named(name), n, k, seed=n) for name, n in (("k3", 33_304), ("k7", 5000), ("t4", 904), ("k8", 264))]
    biases = [None, random(5000).cuda().to(dtype), None, random(264).cuda().to(dtype)]
    outs = gemm.linear(tokens, [w for w, _ in made], dtype, biases, launch)
    again = gemm.linear(tokens, [w for w, _ in made], dtype, biases, launch)
    for y, same, bias, (_, decoded) in zip(outs, again, biases, made, strict=True):
        assert torch.equal(y, same)
        expected = x.double() @ decoded.T + (0 if bias is None else bias.double())
        assert float((y.double() - expected).norm() / expected.norm()) < 3e-3


@hopper
def test_launches_that_are_chosen() -> None:
    fmt = CodebookFormat(4, 128)
    weight, decoded = prepared(fmt, 700, 2048)
    for m in (1, 17, 40, 100, 300, 4096):
        x = random(m, 2048, seed=m).cuda().bfloat16()
        for half in (True, False):
            tokens, _ = inputs.rotate_tokens(x, fmt, half)
            (y,) = gemm.linear(tokens, [weight], torch.float32)
            assert error(y, x, decoded) < (1e-3 if half else 1e-2), m


@hopper
def test_int8_inputs_give_what_they_give_few_tokens() -> None:
    """The same integers and scales: only the order of sums differs."""
    of = [("k2", 32), ("k3", 128), ("k4", 256), ("k5", 64), ("t2", 256), ("t3", 128), ("t4", 32)]
    for fmt in (named(*each) for each in of):
        weight, _ = prepared(fmt, 200, 768)
        x = random(12, 768).cuda().bfloat16()
        (few,) = tensor_cores.linear(inputs.rotate(x, fmt, False)[0], [weight], torch.float32)
        (many,) = gemm.linear(inputs.rotate_tokens(x, fmt, False)[0], [weight], torch.float32)
        torch.testing.assert_close(many, few, rtol=1e-4, atol=1e-5)


@hopper
@pytest.mark.parametrize("launch", [*LAUNCHES, *INT8_LAUNCHES], ids=str)
def test_outputs_of_different_widths_share_an_input(launch: Launch | int8_gemm.Launch) -> None:
    outputs = (("t3", 70), ("k5", 32), ("t2", 1), ("k6" if launch.half else "t4", 300))
    made = [prepared(named(name), n, 640, seed=n) for name, n in outputs]
    biases = [random(w.rows).cuda().bfloat16() if i % 2 else None for i, (w, _) in enumerate(made)]
    x = random(37, 640).cuda().bfloat16()
    tokens, _ = inputs.rotate_tokens(x, CodebookFormat(3, 128), launch.half)
    outs = gemm.linear(tokens, [w for w, _ in made], torch.bfloat16, biases, launch)
    for y, bias, (_, decoded) in zip(outs, biases, made, strict=True):
        assert y.dtype == torch.bfloat16
        assert error(y if bias is None else y - bias, x, decoded) < (
            8e-3 if launch.half else 1.5e-2
        )  # bfloat16 rounds twice


@hopper
@pytest.mark.parametrize("half", [True, False])
def test_tokens_of_any_size(half: bool) -> None:
    """Scales are a token's own: a huge token, a tiny one and none at all are as exact as others."""
    fmt = CodebookFormat(4, 128)
    weight, decoded = prepared(fmt, 256, 512)
    x = random(40, 512).cuda() * torch.logspace(-30, 30, 40).cuda()[:, None]
    x[7] = 0
    tokens, _ = inputs.rotate_tokens(x, fmt, half)
    (y,) = gemm.linear(tokens, [weight], torch.float32)
    assert not y[7].any()
    keep = torch.arange(40, device=x.device) != 7
    x, y = x[keep].double(), y[keep].double()
    size = x.norm(dim=1, keepdim=True)
    assert error(y / size, x / size, decoded) < (1e-3 if half else 1e-2)


@hopper
def test_an_input_of_another_kind_is_refused() -> None:
    fmt = CodebookFormat(3, 128)
    weight, _ = prepared(fmt, 32, 256)
    tokens, _ = inputs.rotate_tokens(random(30, 128).cuda(), fmt, True)
    with pytest.raises(UnsupportedError, match=r"a weight \[32, 256\] is tq3g128"):
        gemm.linear(tokens, [weight], torch.float32)
    with pytest.raises(UnsupportedError, match="not for inputs in"):
        gemm.linear(tokens, [prepared(fmt, 32, 128)[0]], torch.float32, launch=INT8_LAUNCHES[0])
    wide, _ = prepared(CodebookFormat(6, 128), 32, 128)
    with pytest.raises(UnsupportedError, match="int8 inputs serve 2, 3, 4, 5 bits, not 6"):
        gemm.linear(inputs.rotate_tokens(random(30, 128).cuda(), fmt, False)[0], [wide], torch.float32)
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
    ("experts", "hidden", "inner", "top_k", "tokens", "names", "group"),
    [
        (5, 256, 128, 2, 37, ("k3", "k4"), 128),
        (16, 200, 72, 4, 130, ("k3", "k4"), 64),
        (8, 512, 256, 8, 300, ("k5", "k2"), 128),
        (64, 128, 128, 2, 9, ("k4", "k6"), 32),
        (3, 256, 256, 3, 1, ("k8", "k3"), 256),
        (5, 256, 128, 2, 37, ("t3", "t4"), 128),
        (16, 200, 72, 4, 130, ("t2", "k4"), 64),
        (64, 128, 128, 2, 9, ("t4", "t2"), 32),
        (3, 256, 256, 3, 1, ("t4", "t3"), 256),
    ],
)
@pytest.mark.parametrize("launch", OF_EXPERTS, ids=str)
def test_sorted_experts(launch: sorted_experts.Launch | None, experts: int, hidden: int, inner: int, top_k: int, tokens: int, names: tuple[str, str], group: int) -> None:  # fmt: skip
    half = isinstance(launch, Launch) or not set(names) <= set(INT8_NAMES)
    if launch and half and not isinstance(launch, Launch | tensor_cores.Launch):
        pytest.skip("int8 inputs serve 2 to 5 bits")
    gate_up, plain_gate_up = prepared(named(names[0], group), experts, 2 * inner, hidden, scale=hidden**-0.5)
    down, plain_down = prepared(named(names[1], group), experts, hidden, inner, seed=1, scale=inner**-0.5)
    x = random(tokens, hidden).cuda().bfloat16()
    weights, index = random(tokens, experts, seed=2).cuda().softmax(-1).topk(top_k)
    index[: tokens // 2] = torch.arange(top_k, device=index.device)  # crowds a few experts, leaves others empty
    for given in (weights, weights.bfloat16()):
        launches = (launch, launch) if launch else None
        y = sorted_experts.forward(x, index, given, gate_up, down, half, launches)
        assert y.dtype == x.dtype
        expected = plain_experts(x, index, given, plain_gate_up, plain_down)
        allowed = 6e-3 if half else 0.02  # of which bfloat16's rounding is 3e-3
        assert float((y.float() - expected).norm() / expected.norm()) < allowed
        assert torch.equal(y, sorted_experts.forward(x, index, given, gate_up, down, half, launches))


@hopper
@pytest.mark.parametrize("launch", OF_EXPERTS, ids=str)
def test_sorted_slots_without_an_expert_and_tokens_that_are_no_numbers(launch: sorted_experts.Launch | None) -> None:
    gate_up, _ = prepared(named("t3"), 6, 256, 256)
    down, _ = prepared(named("k4"), 6, 256, 128, seed=1)
    launches, half = (launch, launch) if launch else None, isinstance(launch, Launch)
    x, weights = random(50, 256).cuda().bfloat16(), torch.rand(50, 2, device="cuda")
    index = random(50, 6, seed=4).cuda().topk(2).indices
    nobody = torch.arange(100, device="cuda").view(50, 2) % 5 == 1
    expected = sorted_experts.forward(x, index, weights.masked_fill(nobody, 0), gate_up, down, half, launches)
    hostile, spoilt = index.masked_fill(nobody, -1), weights.masked_fill(nobody, torch.nan)
    spoilt[4], x[1], x[3, 7] = torch.nan, torch.nan, torch.inf
    y = sorted_experts.forward(x, hostile, spoilt, gate_up, down, half, launches)
    others = [t for t in range(50) if t not in (1, 3, 4)]
    assert torch.equal(y[others], expected[others])
    assert y[4].isnan().all()


@hopper
@pytest.mark.parametrize("half", [True, False])
def test_a_graph_replays_other_tokens_and_routes(half: bool) -> None:
    gate_up, plain_gate_up = prepared(CodebookFormat(3, 128), 8, 256, 128, scale=128**-0.5)
    down, plain_down = prepared(CodebookFormat(4, 128), 8, 128, 128, seed=1, scale=128**-0.5)
    x, weights = random(50, 128).cuda().bfloat16(), torch.full((50, 2), 0.5, device="cuda")
    index = torch.zeros(50, 2, dtype=torch.int64, device="cuda")
    sorted_experts.forward(x, index, weights, gate_up, down, half)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sorted_experts.forward(x, index, weights, gate_up, down, half)
    x.copy_(random(50, 128, seed=3))
    index.copy_(random(50, 8, seed=4).topk(2).indices)
    graph.replay()
    expected = plain_experts(x, index, weights, plain_gate_up, plain_down)
    assert float((y.float() - expected).norm() / expected.norm()) < (6e-3 if half else 0.02)


@hopper
def test_no_tokens_give_no_rows() -> None:
    fmt = CodebookFormat(3, 128)
    weight, _ = prepared(fmt, 32, 256)
    tokens, _ = inputs.rotate_tokens(torch.empty(0, 256, device="cuda"), fmt, True)
    assert gemm.linear(tokens, [weight], torch.float32)[0].shape == (0, 32)
