"""The tensor-core kernels: layout and tables on any machine, compilation without a GPU, products on a GPU against the codec."""

from __future__ import annotations

import pytest
import torch
from gpu_products import ALL, INT8_NAMES, NAMES, error, gpu, named, prepared, random
from nvrtc_here import ARCHITECTURES, needs_compiler

from kappaquant.errors import UnsupportedError
from kappaquant.formats import codec
from kappaquant.formats.codebook import CodebookFormat, GroupedFormat
from kappaquant.kernels.cuda import inputs, nvrtc, tables, tensor_cores
from kappaquant.kernels.cuda.cells import cells


@needs_compiler
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile(arch: str) -> None:
    instances = [f"linear<{cells(named(n)).number}, 0, 0, 0, 128, false, 1, 1, 4, 0, 0, false>" for n in INT8_NAMES]
    instances += [f"linear<{cells(named(n)).number}, 0, 0, 0, 64, true, 2, 1, 8, 16, 0, false>" for n in NAMES]
    instances += [
        "linear<3, 4, 5, 2, 256, false, 8, 2, 4, 0, 0, false>",
        "linear<6, 8, 7, 0, 32, true, 1, 1, 4, 16, 0, false>",
    ]
    instances += [
        "linear<19, 20, 3, 18, 256, false, 2, 1, 4, 16, 3, false>",
        "linear<6, 19, 18, 20, 32, true, 1, 1, 4, 16, 0, false>",
        "linear<20, 0, 0, 0, 64, false, 2, 4, 4, 16, 3, true>",
        "linear<6, 0, 0, 0, 128, true, 1, 2, 4, 16, 0, true>",
    ]
    for instance in instances:
        code, name = nvrtc.compiled("linear.cu", instance, arch)
        assert code.startswith(b"\x7fELF")
        assert b"linear" in name
    for flags in ("2, false, 0, false", "1, true, 1, false", "0, false, 2, false", "2, false, 0, true"):
        assert nvrtc.compiled("rotate.cu", f"rotate<128, {flags}>", arch)[0].startswith(b"\x7fELF")


@needs_compiler
def test_a_kernel_that_does_not_compile_says_why() -> None:
    with pytest.raises(UnsupportedError, match=r"(?s)linear.cu: linear<6, .*int8 tables are for 2 to 5 bits"):
        nvrtc.compiled("linear.cu", "linear<6, 0, 0, 0, 128, false, 1, 1, 4, 0, 0, false>", "sm_90")


def test_refusals_say_why() -> None:
    fmt = CodebookFormat(3, 128)
    assert "NVIDIA GPU" in str(tensor_cores.refusal(torch.device("cpu"), fmt))
    encoded = codec.encode(random(4, 128), fmt)
    with pytest.raises(UnsupportedError, match="needs an NVIDIA GPU"):
        tensor_cores.Weight.of(encoded.packed, encoded.norms, fmt, 128)


def test_inputs_that_do_not_go_together_are_refused() -> None:
    fmt, x, gain = CodebookFormat(3, 128), random(4, 256), random(256)
    wrong: list[tuple[str, torch.Tensor, dict[str, torch.Tensor]]] = [
        ("float64", x.double(), {}),
        ("neighbouring columns", random(256, 4).t(), {}),
        ("residual must lie as x does", x, {"residual": random(4, 512)[:, :256], "gain": gain}),
        ("gate_of must lie as x does", x, {"gate_of": x.half()}),
        (r"gain must be torch.float32 \[256\]", x, {"gain": random(128)}),
        ("a residual is added before a norm", x, {"residual": x}),
        ("needs an NVIDIA GPU, got a tensor on cpu", x, {"gain": gain}),
    ]
    for message, given, others in wrong:
        with pytest.raises(UnsupportedError, match=message):
            inputs.rotate(given, fmt, False, **others)  # type: ignore[arg-type]


def test_every_launch_fits_the_card() -> None:
    """Shared memory of 99 KB a block, the least of compute capability 8.0 and later, holds the sums and the widest table or the stages."""
    numbers = {cells(named(name)).number: named(name) for name in NAMES}
    for tokens in (1, 8, 9, 16, 17, 64, 65, 128, 4096):
        for tile_count in (1, 64, 896, 10000):
            for units in (1, 4, 32, 256):
                for number, fmt in numbers.items():
                    for half in (False, True):
                        use = tensor_cores.choose(tokens, tile_count, units, [number, 3, 0, 0], half)
                        assert use.warps % use.tiles == 0
                        assert use.warps <= 16
                        stages = use.stages * (512 * max(fmt.bits, 3) + 256 + 128)
                        table = tables.shared_bytes(cells(fmt), half)
                        assert use.warps * (4 * 8 * use.token_tiles * 33 + stages) + table <= 99 << 10
                        padded = 8 if tokens <= 8 else -(-tokens // 128) * 128
                        assert -(-tokens // (8 * use.token_tiles)) * 8 * use.token_tiles <= padded


def test_warps_share_the_tiles_of_few_experts() -> None:
    number = cells(named("t3")).number
    launches = [tensor_cores.choose_for_experts(8, items, 32, 16, number, False) for items in (4, 60, 200)]
    assert [(use.tiles, use.stages) for use in launches] == [(1, 0), (2, 0), (4, 3)]
    assert tensor_cores.choose_for_experts(8, 4, 32, 4, number, False).tiles == 4, "a warp has four units or more"
    assert tensor_cores.choose_for_experts(16, 200, 32, 16, number, True) == tensor_cores.Launch(2, 2, 4, 16)


def test_a_matrix_of_few_rows_takes_many_tokens_by_sixteens() -> None:
    chosen = [tensor_cores.choose(tokens, 128, 32, [3, 0, 0, 0], False) for tokens in (8, 16, 32, 64, 65)]
    assert [use.token_tiles for use in chosen] == [1, 2, 2, 2, 16]
    assert [use.warps for use in chosen[1:4]] == [16, 8, 4], "as many warps as fill a card"
    assert tensor_cores.choose(64, 896, 32, [3, 0, 0, 0], False).token_tiles == 4


@gpu
@pytest.mark.parametrize("half", [False, True], ids=["int8", "float16"])
@pytest.mark.parametrize("fmt", ALL, ids=lambda f: f.id)
def test_products(fmt: GroupedFormat, half: bool) -> None:
    if not half and fmt.bits not in tensor_cores.INT8_BITS:
        pytest.skip("int8 inputs serve 2 to 5 bits")
    for n, k in ((45, 3 * fmt.group_size - 5), (1, fmt.group_size), (300, 1024 + fmt.group_size)):
        weight, decoded = prepared(fmt, n, k)
        for m in (1, 3, 8, 9, 33, 64, 130):
            x = random(m, k, seed=m).cuda().bfloat16()
            rotated, _ = inputs.rotate(x, fmt, half)
            (y,) = tensor_cores.linear(rotated, [weight], torch.float32)
            allowed = (1e-3 if half else 0.013) * (1 if m * n > 100 else 3)  # few outputs vary more
            assert error(y, x, decoded) < allowed, (n, k, m)


@gpu
@pytest.mark.parametrize("half", [False, True], ids=["int8", "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_error_on_a_layer_of_usual_size(name: str, half: bool) -> None:
    if not half and name not in INT8_NAMES:
        pytest.skip("int8 inputs serve 2 to 5 bits")
    fmt = named(name)
    weight, decoded = prepared(fmt, 2048, 4096)
    x = random(16, 4096, seed=1).cuda().bfloat16()
    rotated, _ = inputs.rotate(x, fmt, half)
    (y,) = tensor_cores.linear(rotated, [weight], torch.float32)
    assert error(y, x, decoded) < (4e-3 if half else 0.01)


@gpu
@pytest.mark.parametrize("half", [False, True], ids=["int8", "float16"])
@pytest.mark.parametrize("group", [32, 128, 256])
@pytest.mark.parametrize(
    "outputs",
    [
        (("k2", 40), ("t3", 70)),
        (("k3", 70), ("k5", 32), ("k2", 1), ("k4", 129)),
        (("t3", 70), ("k4", 32), ("t2", 1), ("t4", 129)),
    ],
)
def test_outputs_of_different_formats_share_an_input(
    outputs: tuple[tuple[str, int], ...], group: int, half: bool
) -> None:
    made = [prepared(named(name, group), n, 640, seed=n) for name, n in outputs]
    biases = [random(w.rows).cuda().bfloat16() if i % 2 else None for i, (w, _) in enumerate(made)]
    x = random(5, 640).cuda().bfloat16()
    rotated, _ = inputs.rotate(x, named("k3", group), half)
    for launch in (None,) if half else (None, tensor_cores.Launch(1, 1, 4, 16, 3)):
        outs = tensor_cores.linear(rotated, [w for w, _ in made], torch.bfloat16, biases, launch)
        for y, bias, (_, decoded) in zip(outs, biases, made, strict=True):
            assert y.dtype == torch.bfloat16
            assert error(y if bias is None else y - bias, x, decoded) < 0.015


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_goes_before_the_rotation(dtype: torch.dtype) -> None:
    fmt, width = CodebookFormat(3, 128), 500
    x, residual = random(5, width).cuda().to(dtype), random(5, width, seed=1).cuda().to(dtype)
    gain = random(width, seed=2).cuda().to(dtype)

    def back(rotated: inputs.Input) -> torch.Tensor:
        values = rotated.values.float().view(5, -1, 128) * rotated.scales.t()[:5, :, None]
        return codec.unrotate(values.view(5, -1), 128)[:, :width]

    def close(rotated: inputs.Input, expected: torch.Tensor) -> bool:
        return float((back(rotated) - expected.float()).norm() / expected.float().norm()) < 5e-4

    assert close(inputs.rotate(x, fmt, True)[0], x)
    rotated, total = inputs.rotate(x, fmt, True, residual=residual, gain=gain, one_plus_gain=True)
    assert torch.equal(total, x + residual)
    h = (x + residual).float()
    normed = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)
    assert close(rotated, (normed * (1 + gain.float())).to(dtype))
    kept = torch.full_like(x, torch.nan)
    assert close(inputs.rotate(x + residual, fmt, True, gain=gain, normed=kept)[0], gain * normed.to(dtype))
    assert float((kept.float() - gain.float() * normed).norm() / kept.float().norm()) < 5e-3
    gated = torch.nn.functional.silu(x) * residual
    assert close(inputs.rotate(x, fmt, True, gate_of=residual)[0], gated)
    integers, _ = inputs.rotate(x, fmt, False)
    sums, scales = integers.values.view(5, -1, 128).double().sum(-1).t() / 2, integers.scales[:, :5].double()
    torch.testing.assert_close(integers.offsets[:, :5].double(), (sums - 12582912) * scales, rtol=2e-7, atol=0)
    assert int(integers.values.abs().max()) == 127


def test_units_are_staged_where_warps_have_many() -> None:
    def stages(name: str, tile_count: int, units: int, tokens: int = 1, half: bool = False) -> int:
        return tensor_cores.choose(tokens, tile_count, units, [cells(named(name)).number, 0, 0, 0], half).stages

    assert [stages(name, 896, 32) for name in ("k2", "k3", "k4", "k5", "t2", "t3", "t4")] == [0, 0, 3, 0, 3, 3, 3]
    assert [stages("t3", *size) for size in ((128, 32), (896, 31), (64, 4))] == [
        0,
        0,
        0,
    ]  # warps share a tile, or have few units
    assert [stages(name, 896, 32, tokens=16) for name in ("k4", "t4")] == [0, 3]
    assert stages("t3", 896, 32, half=True) == 0


@needs_compiler
@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_stages_are_as_large_as_kernels_have_them(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [
        f"static_assert(Staged<{cells(fmt).number}, {group}, 3>::BYTES == {tensor_cores.stage_bytes(fmt)});"
        for fmt in (named(name, group) for name in INT8_NAMES)
    ]
    source = nvrtc._source
    monkeypatch.setattr(nvrtc, "_source", lambda file: "\n".join([source(file), *checks]))
    instance = tensor_cores.Launch(1, 1, 4, 16, 3).instance([19, 0, 0, 0], group, False)
    nvrtc.compiled("linear.cu", instance, "sm_90")
    checks.append(f"static_assert(Staged<19, {group}, 3>::BYTES == 0);")
    with pytest.raises(UnsupportedError, match="static assertion failed"):
        nvrtc.compiled("linear.cu", instance, "sm_90")


@gpu
@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("name", INT8_NAMES)
def test_stages_give_what_registers_give(name: str, group: int, stages: int) -> None:
    fmt = named(name, group)
    for n, k in ((45, 3 * group - 5), (300, 1024 + group)):
        weight, _ = prepared(fmt, n, k)
        for m, tiles in ((1, 1), (13, 2)):
            rotated, _ = inputs.rotate(random(m, k).cuda().bfloat16(), fmt, False)
            launches = (tensor_cores.Launch(tiles, 1, 4, 16), tensor_cores.Launch(tiles, 1, 4, 16, stages))
            one, other = (tensor_cores.linear(rotated, [weight], torch.float32, launch=each)[0] for each in launches)
            assert torch.equal(one, other)


@gpu
def test_no_tokens_give_no_rows() -> None:
    fmt = CodebookFormat(3, 128)
    weight, _ = prepared(fmt, 32, 256)
    rotated, _ = inputs.rotate(torch.empty(0, 256, device="cuda"), fmt, False)
    assert tensor_cores.linear(rotated, [weight], torch.float32)[0].shape == (0, 32)


@gpu
def test_a_graph_replays_the_kernels() -> None:
    fmt = CodebookFormat(4, 128)
    weight, decoded = prepared(fmt, 256, 512)
    x = random(1, 512).cuda().bfloat16()

    def step() -> torch.Tensor:
        return tensor_cores.linear(inputs.rotate(x, fmt, False)[0], [weight], torch.float32)[0]

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    x.copy_(random(1, 512, seed=7))
    graph.replay()
    assert error(y, x, decoded) < 0.013


@gpu
def test_an_input_of_another_kind_is_refused() -> None:
    fmt = CodebookFormat(3, 128)
    weight, _ = prepared(fmt, 32, 256)
    wide, _ = prepared(CodebookFormat(6, 128), 32, 256)
    x = random(1, 256).cuda().bfloat16()
    rotated, _ = inputs.rotate(x[:, :128].contiguous(), fmt, False)
    with pytest.raises(UnsupportedError, match=r"a weight \[32, 256\] is tq3g128"):
        tensor_cores.linear(rotated, [weight], torch.float32)
    rotated, _ = inputs.rotate(x, fmt, False)
    with pytest.raises(UnsupportedError, match="int8 inputs serve 2, 3, 4, 5 bits, not 6"):
        tensor_cores.linear(rotated, [wide], torch.float32)
    with pytest.raises(UnsupportedError, match="5 weights"):
        tensor_cores.linear(rotated, [weight] * 5, torch.float32)
