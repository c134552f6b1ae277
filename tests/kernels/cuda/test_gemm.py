"""Products of many tokens: compilation and the order of inputs anywhere, products on a Hopper GPU."""

from __future__ import annotations

import pytest
import torch
from gpu_products import ALL, INT8_NAMES, NAMES, error, fits, hopper, named, prepared, random
from nvrtc_here import needs_compiler

from kappaquant.errors import UnsupportedError
from kappaquant.formats import codec
from kappaquant.formats.codebook import CodebookFormat, GroupedFormat
from kappaquant.formats.signs import GROUP_SIZES
from kappaquant.kernels.cuda import gemm, inputs, int8_gemm, nvrtc, tensor_cores, tiles
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


def test_every_launch_fits_the_card() -> None:
    """227 KB a block and 228 KB a multiprocessor (compute capability 9.0), 1 KB of each block for the system."""
    chosen = {gemm.choose(m, n, k, 132) for m in (9, 24, 64, 128, 4096) for n in (1, 512, 28672) for k in (1, 16, 224)}
    chosen |= {
        int8_gemm.choose(m, n, k, 132) for m in (17, 64, 128, 4096) for n in (1, 512, 28672) for k in (1, 16, 224)
    }
    for use in [*chosen, *LAUNCHES, *INT8_LAUNCHES]:
        assert fits(use)
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
    """The same integers and scales: only the order of sums differs, and what few tokens lose below an integer."""
    of = [("k2", 32), ("k3", 128), ("k4", 256), ("k5", 64), ("t2", 256), ("t3", 128), ("t4", 32)]
    for fmt in (named(*each) for each in of):
        weight, _ = prepared(fmt, 200, 768)
        x = random(12, 768).cuda().bfloat16()
        (few,) = tensor_cores.linear(inputs.rotate(x, fmt, False)[0], [weight], torch.float32)
        (many,) = gemm.linear(inputs.rotate_tokens(x, fmt, False)[0], [weight], torch.float32)
        torch.testing.assert_close(many, few, rtol=1e-4, atol=1e-4 * float(many.std()))


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


@hopper
def test_no_tokens_give_no_rows() -> None:
    fmt = CodebookFormat(3, 128)
    weight, _ = prepared(fmt, 32, 256)
    tokens, _ = inputs.rotate_tokens(torch.empty(0, 256, device="cuda"), fmt, True)
    assert gemm.linear(tokens, [weight], torch.float32)[0].shape == (0, 32)
