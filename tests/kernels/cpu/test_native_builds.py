"""The native core where Python does not run it: built for ARM and emulated, by clang, and with sanitizers, each against the codec."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hard_weights import hard, numbers
from torch import Tensor

from kappaquant.formats import codec
from kappaquant.formats.base import EFFORTS, Effort
from kappaquant.formats.codebook import BITS, CodebookFormat, GroupedFormat
from kappaquant.formats.signs import GROUP_SIZES, signs
from kappaquant.formats.trellis import TRELLIS_FORMATS, TrellisFormat
from kappaquant.kernels import dispatch
from kappaquant.kernels.base import Arranged
from kappaquant.kernels.cpu import library, step
from kappaquant.kernels.cpu.native import weight_of
from kappaquant.kernels.cpu.structures import Attention, DeltaNet, Matrix, Mlp, Moe
from kappaquant.kernels.cpu.tables import Tables, of_codebooks, tables
from kappaquant.quantizing.rounding import groups, rings

pytestmark = pytest.mark.slow

DRIVER = Path(__file__).parents[2] / "support" / "native_driver.cpp"
CORE = Path(codec.__file__).parents[1] / "kernels" / "cpu"
EXPERTS, K, INNER = 3, 2, 40
CODEBOOKS = [CodebookFormat(b, g) for b in BITS for g in GROUP_SIZES]


class Build(NamedTuple):
    """A compiler with its options, and what runs its programs."""

    compiler: str
    options: tuple[str, ...]
    run: tuple[str, ...]


BUILDS = {
    "neon": Build("aarch64-linux-gnu-g++", ("-O2",), ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu")),
    "clang": Build("clang++", ("-O2",), ()),
    "sanitizers": Build("g++", ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"), ()),
}


@pytest.fixture(scope="module", params=BUILDS)
def command(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What runs the driver."""
    build = BUILDS[request.param]
    for needed in (build.compiler, *build.run[:1]):
        if not shutil.which(needed):
            pytest.skip(f"{needed} is not installed")
    program = tmp_path_factory.mktemp(request.param) / "driver"
    sources = [str(path) for path in (DRIVER, *CORE.glob("*.cpp"))]
    options = ["-std=c++17", "-Wno-psabi", "-pthread", f"-I{CORE}", *build.options]
    subprocess.run([build.compiler, *options, *sources, "-o", str(program)], check=True)
    return [*build.run, str(program)]


def driven(command: list[str], given: bytes) -> bytes:
    """What the driver makes of it."""
    ran = subprocess.run(command, input=given, capture_output=True)
    assert ran.returncode == 0, ran.stderr.decode()
    return ran.stdout


def stored(fmt: GroupedFormat, weight: Tensor) -> tuple[bytes, Tensor]:
    """A weight [experts, rows, in] as the driver reads it, and as the codec does."""
    parts = codec.encode(weight, fmt, "fast").parts
    experts, rows, inputs = weight.shape
    trellis = isinstance(fmt, TrellisFormat)
    sizes = struct.pack("<7q", experts, rows, inputs, fmt.groups(inputs), fmt.bits, fmt.group_size, trellis)
    floats = [*fmt.codebook, *(sign for half in signs(fmt.group_size) for sign in half)]
    packed, norms = (part.numpy().tobytes() for part in parts.values())
    return sizes + packed + norms + struct.pack(f"<{len(floats)}f", *floats), fmt.decode(parts, inputs)


@pytest.mark.parametrize("fmt", [*CODEBOOKS, *TRELLIS_FORMATS.values()], ids=lambda fmt: fmt.id)
def test_products(command: list[str], fmt: GroupedFormat) -> None:
    inputs, tokens = 2 * fmt.group_size - 9, 2 if fmt.bits % 2 else 11
    one, gate_up = stored(fmt, numbers(EXPERTS, 2 * INNER, inputs))
    other, down = stored(TrellisFormat(4, 32), numbers(EXPERTS, inputs, INNER, seed=1))
    x, bias = numbers(tokens, inputs, seed=2), numbers(2 * INNER, seed=3)
    index = torch.randint(-1, EXPERTS + 1, (tokens, K), generator=torch.Generator().manual_seed(4))
    shares = numbers(tokens, K, seed=5).softmax(-1)
    given = (
        one + other + struct.pack("<2q", tokens, K) + b"".join(t.numpy().tobytes() for t in (x, bias, index, shares))
    )
    found = torch.frombuffer(bytearray(driven(command, b"products" + given)), dtype=torch.float32)
    grouped, block = torch.zeros(tokens, K, 2 * INNER), torch.zeros(tokens, inputs)
    for token in range(tokens):
        for slot, expert in enumerate(index[token].tolist()):
            if 0 <= expert < EXPERTS:
                grouped[token, slot] = gate_up[expert] @ x[token]
                gate, up = grouped[token, slot].chunk(2)
                block[token] += shares[token, slot] * (down[expert] @ (torch.nn.functional.silu(gate) * up))
    expected = [x @ gate_up[0].T + bias, grouped, block]
    made = found.split([part.numel() for part in expected] * 2)
    for number, part in enumerate(made):
        truth = expected[number % 3].flatten()
        error = float((part - truth).norm() / truth.norm())
        assert error < (0.03 if number < 3 else 2e-6 * inputs**0.5), number


@pytest.mark.parametrize(("dim", "value_dim", "slot"), [(20, 35, 3), (32, 64, 300)])
@pytest.mark.skipif(bool(library.absence()), reason=library.absence())
def test_steps(command: list[str], dim: int, value_dim: int, slot: int) -> None:
    """Against this processor's core, which is tested against torch."""
    tokens, size, heads, kv, key_heads, value_heads, key_dim, taps, inner, k = 2, 76, 6, 2, 2, 4, 24, 4, 40, 2
    room, columns, dtype = slot + 2, value_heads * value_dim, torch.bfloat16
    channels = 2 * key_heads * key_dim + columns
    given: list[bytes] = []

    def made(*shape: int, of: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        tensor = (numbers(*shape, seed=len(given)) * scale).to(of)
        given.append(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return tensor

    def matrix(rows: int, inputs: int, of: torch.dtype = torch.float32) -> Matrix:
        kept.append(made(rows, inputs, of=of, scale=inputs**-0.5))
        return step.plain_matrix(kept[-1], None)

    kept: list[Tensor] = []
    x, gain, head_gain, value_gain = made(tokens, size), made(size), made(dim), made(value_dim)
    before, over_heads = step.norm(gain, 1e-5, False), step.norm(head_gain, 1e-5, True)
    rows = (2 * heads * dim, kv * dim, kv * dim)
    attention = Attention(
        *(matrix(count, size, dtype) for count in rows), matrix(size, heads * dim, dtype), before, over_heads, over_heads, heads,
        kv, dim, 0.3, 1,
    )  # fmt: skip
    cos, sin = (made(1, 1, dim // 2) for _ in range(2))
    keys, values = (made(tokens, kv, room, dim, of=torch.float16) for _ in range(2))
    mask = made(tokens, 1, 1, room)
    inputs = [matrix(count, size) for count in (channels, columns, value_heads, value_heads)]
    last, conv, a_log, dt_bias = matrix(size, columns), made(channels, 1, taps), made(value_heads), made(value_heads)
    delta_net = DeltaNet(
        *inputs, last, before, step.norm(value_gain, 1e-5, False), conv.data_ptr(), None, a_log.data_ptr(), dt_bias.data_ptr(),
        key_heads, value_heads, key_dim, value_dim, taps,
    )  # fmt: skip
    window, state = made(tokens, channels, taps, of=dtype), made(tokens, value_heads, key_dim, value_dim)
    packed = []
    formats: tuple[tuple[tuple[int, ...], GroupedFormat], ...] = (
        ((EXPERTS, 2 * inner, size), CodebookFormat(3, 64)),
        ((EXPERTS, size, inner), TrellisFormat(4, 32)),
    )
    for shape, fmt in formats:
        weight = numbers(*shape, seed=len(given)) * shape[-1] ** -0.5
        given.append(stored(fmt, weight)[0])
        packed.append(Arranged(fmt, shape, tuple(codec.encode(weight, fmt, "fast").parts.values())))
    mlp = Mlp(matrix(inner, size), matrix(inner, size), matrix(size, inner), before)
    moe = Moe(
        matrix(EXPERTS, size), matrix(1, size), mlp, *map(weight_of, packed),
        *(library.signs_of(each.fmt.step).data_ptr() for each in packed), k, 1,
    )  # fmt: skip
    sizes = (tokens, size, heads, kv, dim, room, slot, key_heads, value_heads, key_dim, value_dim, taps, k)
    found = driven(command, b"stepping" + struct.pack("<13q", *sizes) + b"".join(given))

    stepper, rows_of = step.Stepper(True, library.core()), x[:, None]
    expected = [
        stepper.attention(rows_of, attention, (cos, sin), step.cache_of(keys, values), slot, mask),
        stepper.delta_net(rows_of, delta_net, window, state), state, stepper.mlp_(rows_of.clone(), mlp),
        stepper.mlp_(rows_of.clone(), moe),
    ]  # fmt: skip
    parts = torch.frombuffer(bytearray(found), dtype=torch.float32).split([part.numel() for part in expected])
    for number, (part, truth) in enumerate(zip(parts, expected, strict=True)):
        assert float((part - truth.flatten()).norm() / truth.norm()) < 1e-5, number


def values_of(of: Tables) -> tuple[Tensor, ...]:
    return of.books, of.magnitudes, of.scales, of.steps, of.subsets


def told(weight: Tensor, group: int, bits: Sequence[int], of: Tables, codes: bool, wide: bool) -> bytes:
    """An encoding as the driver reads it."""
    sizes = (
        *weight.shape,
        -(-weight.shape[1] // group),
        library.DTYPES[weight.dtype],
        group,
        wide,
        len(of.scales),
        len(bits),
        codes,
        of.told["states"],
    )
    parts = (weight.view(torch.uint8), library.signs_of(group), *values_of(of))
    widths = struct.pack(f"<{len(bits)}i", *bits)
    return b"encoding" + struct.pack("<10q", *sizes) + widths + b"".join(part.numpy().tobytes() for part in parts)


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("fmt", [*CODEBOOKS, *TRELLIS_FORMATS.values()], ids=lambda fmt: fmt.id)
def test_encoding(command: list[str], fmt: GroupedFormat, effort: Effort) -> None:
    """The bytes are the codec's, whatever a compiler may fuse."""
    dtype = list(library.DTYPES)[(fmt.bits + fmt.group_size // 32) % 3]
    for wide in (False, True):
        fmt = fmt.variant(fmt.codebook, "F32" if wide else "F16")
        weight = hard(fmt).to(dtype)
        expected = codec.encode(weight, fmt, effort)
        found = driven(command, told(weight, fmt.group_size, [fmt.bits], tables(fmt, effort == "best"), True, wide))
        assert found.startswith(b"".join(part.numpy().tobytes() for part in expected.parts.values()))
        errors, energies = torch.frombuffer(bytearray(found), dtype=torch.float32)[-2 * expected.norms.numel() :].chunk(
            2
        )
        assert errors.sum(dtype=torch.float64).item() == expected.squared_error
        assert energies.sum(dtype=torch.float64).item() == expected.energy


@pytest.mark.parametrize("group", GROUP_SIZES)
def test_errors_of_a_scan(command: list[str], group: int) -> None:
    weight = hard(CodebookFormat(4, group))
    of = of_codebooks(tuple(CodebookFormat(bits, group).codebook for bits in BITS))
    found = torch.frombuffer(
        bytearray(driven(command, told(weight, group, BITS, of, False, False))), dtype=torch.float32
    )
    errors = found.view(len(BITS) + 1, -1)[:-1].sum(1, dtype=torch.float64)
    assert dict(zip(BITS, errors.tolist(), strict=True)) == codec.squared_errors(weight, group)


def test_numbers_that_are_none_are_survived(command: list[str]) -> None:
    """What they become is not finite, by which the caller knows them."""
    for fmt in (CodebookFormat(3, 64), CodebookFormat(8, 64), TrellisFormat(3, 64)):
        weight = numbers(5, 192)
        weight[1, 3], weight[2, 70], weight[4, 191] = torch.nan, torch.inf, 3e38
        found = driven(command, told(weight, 64, [fmt.bits], tables(fmt, True), True, False))
        energies = torch.frombuffer(bytearray(found[-4 * 15 :]), dtype=torch.float32)
        assert (~energies.isfinite()).nonzero().flatten().tolist() == [3, 7, 14]


def told_to_feed_back(
    fmt: GroupedFormat, first: Tensor, across: Tensor, scales: Sequence[float], *now: Tensor
) -> bytes:
    """A group to be rounded as the driver reads it: with scales to be tried, or with values of before, inverses and norms."""
    matrices, group, rows = first.shape
    of, wide = tables(fmt, bool(scales)), fmt.norms == "F32"
    sizes = struct.pack("<8q", matrices, group, rows, fmt.bits, wide, len(of.scales), len(scales), of.told["states"])
    parts = (*values_of(of), first, across.mT, torch.tensor(scales), *now)
    return b"feedback" + sizes + b"".join(part.contiguous().numpy().tobytes() for part in parts)


@pytest.mark.parametrize("fmt", CODEBOOKS, ids=lambda fmt: fmt.id)
def test_feedback(command: list[str], fmt: CodebookFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes are those of torch, whatever a compiler may fuse."""
    monkeypatch.setattr(dispatch, "_FEEDBACKS", ())
    fmt = CodebookFormat(fmt.bits, fmt.group_size, norms="F32" if fmt.bits % 2 else "F16")
    size, rows, scales = fmt.group_size, 67 if fmt.bits % 3 else 16, (1.0, 0.88, 1.12)
    block, values, norms = (
        numbers(2, size, rows),
        numbers(2, size, rows, seed=1),
        numbers(2, rows, seed=2).abs() * size**0.5,
    )
    block[1, :, 0] = norms[0, 3] = 0
    x = numbers(2, 4 * size, size, seed=3)
    gram = x.mT @ x
    upper, left, inverses = (
        torch.linalg.cholesky(gram).mT / size,
        gram @ (block - values),
        1 / gram.diagonal(dim1=1, dim2=2),
    )
    chosen = driven(command, told_to_feed_back(fmt, block, upper, scales))
    assert chosen == b"".join(part.numpy().tobytes() for part in groups.choose(block, upper, scales, fmt))
    changed = driven(command, told_to_feed_back(fmt, left, gram, (), values, inverses, norms))
    expected = groups.descend(left, values, norms, gram, inverses, fmt)
    assert changed == b"".join(part.contiguous().numpy().tobytes() for part in expected)


@pytest.mark.parametrize("fmt", TRELLIS_FORMATS.values(), ids=lambda fmt: fmt.id)
def test_feedback_of_trellis_codes(command: list[str], fmt: TrellisFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is lost is what torch loses, but for roundings."""
    monkeypatch.setattr(dispatch, "_TRELLIS_FEEDBACKS", ())
    size, rows, scales = fmt.group_size, 19, (1.0, 0.94)
    block, x = numbers(2, size, rows), numbers(2, 4 * size, size, seed=3)
    block[1, :, 0] = 0
    upper = torch.linalg.cholesky(x.mT @ x).mT / size
    codes, _, errors = rings.choose(block, upper, scales, fmt)
    found = driven(command, told_to_feed_back(fmt, block, upper, scales))
    mine = torch.frombuffer(bytearray(found[: codes.numel()]), dtype=torch.uint8).view_as(codes)
    assert (mine == codes).float().mean() > 0.97
    assert torch.equal(
        fmt.unpack_block(fmt.pack_block(mine.transpose(0, 1).flatten(1))), mine.transpose(0, 1).flatten(1)
    )
    others = torch.frombuffer(bytearray(found[-4 * errors.numel() :]), dtype=torch.float32)
    assert float(others.square().sum()) == pytest.approx(float(errors.square().sum()), rel=5e-3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_a_group_with_numbers_that_are_none_is_survived(command: list[str], value: float) -> None:
    for bits in (3, 8):
        fmt, block, upper = CodebookFormat(bits, 64), numbers(1, 64, 5), torch.eye(64)[None]
        block[0, 7, 3] = value
        for given in (
            told_to_feed_back(fmt, block, upper, (1.0,)),
            told_to_feed_back(fmt, block, upper, (), block, torch.ones(1, 64), torch.ones(1, 5)),
        ):
            assert max(driven(command, given)[: 64 * 5]) < 1 << bits
    trellis = TrellisFormat(3, 64)
    assert max(driven(command, told_to_feed_back(trellis, block, upper, (1.0,)))[: 64 * 5]) < 16
