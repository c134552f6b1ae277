"""The native core against the codec: every width, group and instruction set that this processor has, odd shapes, few and many tokens."""

from __future__ import annotations

import itertools
import os
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kappaquant.errors import UnsupportedError
from kappaquant.formats import codec
from kappaquant.formats.codebook import BITS, NORMS_SUFFIX, PACKED_SUFFIX, CodebookFormat, GroupedFormat
from kappaquant.formats.signs import GROUP_SIZES
from kappaquant.formats.trellis import TRELLIS_BITS, TrellisFormat
from kappaquant.kernels.base import Arranged
from kappaquant.kernels.cpu import library
from kappaquant.kernels.cpu.native import Native

if library.absence():
    pytest.skip(library.absence(), allow_module_level=True)
LEVELS = [name for name, here in library.levels().items() if here]
FORMATS: list[GroupedFormat] = [CodebookFormat(bits, group) for bits in BITS for group in GROUP_SIZES]
FORMATS += [TrellisFormat(bits, group) for bits in TRELLIS_BITS for group in GROUP_SIZES]
INT8_ERROR = 0.02  # of a few products by inputs in 255 steps of their group; 0.007 in the mean


@pytest.fixture(params=LEVELS)
def native(request: pytest.FixtureRequest) -> Native:
    return Native(request.param)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(fmt: GroupedFormat, *shape: int) -> tuple[Arranged, Tensor]:
    """A weight of about unit variance, and what it is by the codec: any bytes are codes."""
    generator = torch.Generator().manual_seed(sum(shape))
    codes = torch.randint(256, fmt.packed_shape(shape), generator=generator).byte()
    norms = (torch.rand(fmt.norms_shape(shape), generator=generator) + 0.5) * fmt.group_size**0.5
    parts = {PACKED_SUFFIX: codes, NORMS_SUFFIX: norms.half() if fmt.norms == "F16" else norms}
    return Arranged(fmt, shape, tuple(parts.values())), fmt.decode(parts, shape[-1])


def unpacked(codes: Tensor, fmt: GroupedFormat) -> Tensor:
    """Which value of the codebook each weight has: bytes [rows, G * D * bits / 8] -> int64 [rows, G * D]."""
    return fmt.unpack_block(codes.view(-1, fmt.bytes_per_group).T.contiguous()).T.reshape(len(codes), -1).long()


def error(found: Tensor, x: Tensor, weight: Tensor) -> float:
    """Of products x [tokens, in] times weight [out, in]: relative to the size that products of such numbers have."""
    return float((found - x @ weight.T).norm() / (x.norm() * weight.norm() / x.shape[1] ** 0.5))


def by_bytes(x: Tensor, weight: Arranged, native: Native) -> Tensor:
    """x [tokens, in] times weight in float64, from what int8 products are to multiply: rounded inputs, and a codebook of bytes."""
    fmt = weight.fmt
    assert isinstance(fmt, GroupedFormat)
    values, scales, _ = native.prepare(x, fmt, ("int8", fmt.step))
    groups = fmt.groups(x.shape[1])
    inputs = values.view(len(x), groups, -1).double() * scales[:, :groups, None]
    most = max(map(abs, fmt.codebook))
    book = torch.tensor([round(value / most * 127) for value in fmt.codebook], dtype=torch.float64) * most / 127
    codes, norms = unpacked(weight.tensors[0], fmt), weight.tensors[1]
    decoded = book[codes].view(*norms.shape, -1) * norms.double()[..., None]
    return inputs.flatten(1) @ decoded.flatten(1).T


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.id)
def test_products_are_the_codecs(native: Native, fmt: GroupedFormat) -> None:
    """Rows and inputs that no block divides; norms in passes of sixteen, and one more."""
    for rows, inputs in ((37, 3 * fmt.group_size - 5), (9, 17 * fmt.group_size)):
        weight, decoded = packed(fmt, rows, inputs)
        bias = numbers(rows, seed=1)
        for tokens in (1, 2, 3, 4, 5, 23):
            x = numbers(tokens, inputs, seed=tokens)
            exact = native.linear(x, [], ("float32", fmt.step), weight, bias)
            torch.testing.assert_close(exact, F.linear(x, decoded, bias), rtol=1e-5, atol=1e-5 * inputs**0.5)
            found = native.linear(x, [], ("int8", fmt.step), weight, None)
            torch.testing.assert_close(found.double(), by_bytes(x, weight, native), rtol=1e-5, atol=1e-5 * inputs**0.5)
            assert error(found, x, decoded) < INT8_ERROR


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.id)
def test_the_largest_products_do_not_overflow(native: Native, fmt: GroupedFormat) -> None:
    """Nothing but weights and inputs of almost 127 in size, in any order and all alike, against whole numbers."""
    book = [1 - 1e-4 * i for i in range(len(fmt.codebook) // 2)]
    fmt = fmt.variant((*(-value for value in book), *reversed(book)), "F32")
    rows, groups, tokens = 13, 19, 11
    generator = torch.Generator().manual_seed(fmt.bits)
    packed = torch.randint(256, fmt.packed_shape((rows, groups * fmt.group_size)), generator=generator).byte()
    packed[0], packed[1] = 0, 255
    norms = torch.rand(rows, groups, generator=generator) + 0.5
    weight = Arranged(fmt, (rows, groups * fmt.group_size), (packed, norms))
    values = torch.randint(2, (tokens, groups * fmt.group_size), generator=generator) * 254 - 127
    values[0], values[4], values[8], values[9] = 127, -127, -127, 127
    scales = torch.zeros(tokens, 32)
    scales[:, :groups] = torch.rand(tokens, groups, generator=generator) + 0.5
    sums = values.view(tokens, groups, -1).sum(-1)
    offsets = torch.zeros_like(scales)
    offsets[:, :groups] = -128 * scales[:, :groups] * sums
    decoded = torch.tensor([round(value * 127) for value in fmt.codebook])[unpacked(packed, fmt)]
    dots = torch.einsum("tgi,rgi->trg", *(part.view(-1, groups, fmt.group_size).double() for part in (values, decoded)))
    expected = torch.einsum("trg,tg,rg->tr", dots, scales[:, :groups].double(), norms.double()) / 127
    size = float(expected.abs().max())
    for first, last in ((0, 1), (4, 5), (1, 3), (0, 3), (4, 8), (0, 5), (0, 11)):
        prepared = [part[first:last].contiguous() for part in (values.to(torch.int8), scales, offsets)]
        x = torch.zeros(last - first, groups * fmt.group_size)
        found = native.linear(x, prepared, ("int8", fmt.step), weight, None)
        torch.testing.assert_close(found.double(), expected[first:last], rtol=1e-5, atol=1e-5 * size)


@pytest.mark.parametrize("group", GROUP_SIZES)
def test_inputs_are_rotated_as_the_codec_does_it(native: Native, group: int) -> None:
    x = numbers(5, 7 * group - 3)
    fmt = CodebookFormat(4, group)
    (rotated,) = native.prepare(x, fmt, ("float32", group))
    assert torch.equal(rotated, codec.rotate(x, group))
    values, scales, offsets = native.prepare(x, fmt, ("int8", group))
    grouped = rotated.view(5, 7, group)
    torch.testing.assert_close(scales[:, :7], grouped.abs().amax(-1) / 127)
    assert not scales[:, 7:].any()
    steps = values.view(5, 7, group) * scales[:, :7, None]
    assert bool(((steps - grouped).abs() <= scales[:, :7, None] * 0.501).all())
    torch.testing.assert_close(offsets[:, :7], -128 * scales[:, :7] * values.view(5, 7, group).sum(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_result_has_the_dtype_of_the_input(native: Native, dtype: torch.dtype) -> None:
    weight, decoded = packed(CodebookFormat(3, 128), 24, 256)
    x = numbers(4, 256).to(dtype)
    found = native.linear(x, [], ("float32", 128), weight, None)
    assert found.dtype == dtype
    expected = F.linear(x.float(), decoded)
    torch.testing.assert_close(found, expected.to(dtype), rtol=2e-3 if dtype == torch.float16 else 1e-2, atol=1e-4)


def test_float16_is_rounded_as_torch_rounds_it(native: Native) -> None:
    """Subnormal, overflowing and halfway numbers, by a weight that hands them through."""
    fmt = CodebookFormat(8, 32, tuple(sorted((i - 127.5) / 127.5 for i in range(256))), "F32")
    weight, _ = packed(fmt, 64, 32)
    x = torch.tensor([[10.0**power] * 32 for power in range(-9, 5)])
    plain = native.linear(x, [], ("float32", 32), weight, None)
    half = native.linear(x.half(), [], ("float32", 32), weight, None)
    again = native.linear(x.half().float(), [], ("float32", 32), weight, None)
    assert torch.equal(half, again.half())
    assert bool(plain.isfinite().all())


def test_norms_may_be_float32_and_codebooks_others(native: Native) -> None:
    fmt = CodebookFormat(3, 64, (-1.0, -0.5, -0.2, -0.1, 0.1, 0.2, 0.5, 1.0), "F32")
    weight, decoded = packed(fmt, 40, 192)
    x = numbers(2, 192)
    torch.testing.assert_close(
        native.linear(x, [], ("float32", 64), weight, None), F.linear(x, decoded), rtol=1e-5, atol=1e-4
    )
    assert error(native.linear(x, [], ("int8", 64), weight, None), x, decoded) < INT8_ERROR


def test_a_token_that_is_no_number_spoils_no_other(native: Native) -> None:
    weight, _ = packed(CodebookFormat(4, 128), 16, 256)
    for strange, kind in itertools.product((torch.nan, torch.inf), ("int8", "float32")):
        x = numbers(3, 256)
        clean = native.linear(x, [], (kind, 128), weight, None)
        x[1, 7] = strange
        found = native.linear(x, [], (kind, 128), weight, None)
        assert torch.equal(found[::2], clean[::2])
        assert not bool(found[1].isfinite().any())


def gated(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Token by token, slot by slot."""
    out = torch.zeros_like(x)
    for token, (experts, shares) in enumerate(zip(index.tolist(), weights, strict=True)):
        for expert, share in zip(experts, shares, strict=True):
            if 0 <= expert < len(gate_up):
                gate, up = (gate_up[expert] @ x[token]).chunk(2)
                out[token] += share * (down[expert] @ (F.silu(gate) * up))
    return out


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize(
    "formats",
    [
        (CodebookFormat(3, 64), CodebookFormat(4, 32)),
        (CodebookFormat(2, 64), CodebookFormat(8, 32)),
        (TrellisFormat(4, 64), CodebookFormat(3, 32)),
        (TrellisFormat(2, 128), TrellisFormat(3, 32)),
    ],
    ids=lambda pair: "-".join(fmt.id for fmt in pair),
)
def test_experts(native: Native, tokens: int, formats: tuple[GroupedFormat, GroupedFormat]) -> None:
    experts, hidden, inner, k = 6, 192, 96, 3
    first, gate_up = packed(formats[0], experts, 2 * inner, hidden)
    second, down = packed(formats[1], experts, hidden, inner)
    x, weights = numbers(tokens, hidden), numbers(tokens, k, seed=2).softmax(-1)
    index = torch.stack(
        [torch.randperm(experts, generator=torch.Generator().manual_seed(t))[:k] for t in range(tokens)]
    )
    index[0, 0], index[-1, -1] = -1, experts  # another card's, and none
    expected = gated(x, index, weights, gate_up, down)
    exact = native.experts(x, index, weights, first, second, "float32")
    torch.testing.assert_close(exact, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    found = native.experts(x, index, weights, first, second, "int8")
    assert float((found - expected).norm() / expected.norm()) < 2 * INT8_ERROR
    grouped = native.grouped_linear(x, index, first)
    for token, slot in itertools.product(range(tokens), range(k)):
        expert = int(index[token, slot])
        known = gate_up[expert] @ x[token] if 0 <= expert < experts else torch.zeros(2 * inner)
        torch.testing.assert_close(grouped[token, slot], known, rtol=1e-4, atol=1e-4 * hidden**0.5)


def test_no_tokens_give_no_rows(native: Native) -> None:
    weight, _ = packed(CodebookFormat(4, 128), 16, 256)
    assert native.linear(torch.zeros(0, 256), [], ("int8", 128), weight, None).shape == (0, 16)
    assert native.grouped_linear(torch.zeros(0, 256), torch.zeros(0, 2, dtype=torch.int64), Arranged(weight.fmt, (1, 16, 256), tuple(t[None] for t in weight.tensors))).shape == (0, 2, 16)  # fmt: skip


def test_any_number_of_threads_gives_the_same(native: Native) -> None:
    """From several threads of Python at once, too."""
    weight, _ = packed(CodebookFormat(3, 128), 700, 512)
    x, before = numbers(11, 512), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(native.linear(x, [], ("int8", 128), weight, None))
            workers = [
                threading.Thread(target=lambda: found.append(native.linear(x, [], ("int8", 128), weight, None)))
                for _ in range(4)
            ]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
    finally:
        torch.set_num_threads(before)
    assert len(found) == 15
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_child_of_fork_has_threads_of_its_own(native: Native) -> None:
    weight, _ = packed(CodebookFormat(4, 128), 600, 256)
    x, before = numbers(9, 256), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        expected = native.linear(x, [], ("int8", 128), weight, None)
        child = os.fork()
        if child == 0:
            same = torch.equal(native.linear(x, [], ("int8", 128), weight, None), expected)
            os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert torch.equal(native.linear(x, [], ("int8", 128), weight, None), expected)
    finally:
        torch.set_num_threads(before)


def test_refusals_say_why(native: Native) -> None:
    fmt = CodebookFormat(4, 128)
    weight, _ = packed(fmt, 16, 256)
    parts = weight.parts
    assert native.refusal(fmt, parts) is None
    assert "runs on CPUs" in (native.refusal(fmt, {s: p.to("meta") for s, p in parts.items()}) or "")
    assert "one piece" in (native.refusal(fmt, {s: p[:, ::2] for s, p in parts.items()}) or "")
    short = Arranged(fmt, (16, 256), tuple(part[:8] for part in weight.tensors))
    with pytest.raises(UnsupportedError, match=r"part of shape \[8, 128\]; expected \[16, 128\]"):
        native.linear(numbers(1, 256), [], ("int8", 128), short, None)
