"""The codec against what it is defined by: explicit matrices, bit loops, brute force, and bounds on the error."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kappaquant.errors import NonFiniteError, PlanError
from kappaquant.formats import codec
from kappaquant.formats.base import EFFORTS, Effort
from kappaquant.formats.codebook import BITS, FORMATS, CodebookFormat
from kappaquant.formats.search import Assignment, nearest
from kappaquant.formats.signs import GROUP_SIZES, signs

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ANY_FORMAT = st.sampled_from(sorted(FORMATS.values(), key=lambda f: f.id))


def weights(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def hadamard(size: int) -> torch.Tensor:
    """Sylvester's construction, orthonormal, float64."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return h / math.sqrt(size)


@pytest.mark.parametrize("group", GROUP_SIZES)
def test_rotation_is_the_hadamard_matrix_between_signs(group: int) -> None:
    s1, s2 = (torch.tensor(s, dtype=torch.float64) for s in signs(group))
    x = weights(5, 3 * group)
    expected = (x.double().view(5, 3, group) * s1) @ hadamard(group) * s2
    torch.testing.assert_close(codec.rotate(x, group).double(), expected.view(5, -1), atol=1e-5, rtol=0)
    torch.testing.assert_close(codec.unrotate(codec.rotate(x, group), group), x, atol=1e-5, rtol=0)


@given(fmt=ANY_FORMAT, width=st.integers(1, 600), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_rotation_keeps_products_of_padded_vectors(fmt: CodebookFormat, width: int, seed: int) -> None:
    x, w = weights(2, width, seed=seed), weights(3, width, seed=seed + 1)
    product = codec.rotate(x, fmt.group_size) @ codec.rotate(w, fmt.group_size).T
    torch.testing.assert_close(product, x @ w.T, atol=1e-3, rtol=1e-4)


@given(fmt=ANY_FORMAT, groups=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_pack_is_a_dense_little_endian_bitstream(fmt: CodebookFormat, groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**fmt.bits, (2, groups * fmt.group_size), generator=generator, dtype=torch.uint8)
    packed = codec.pack(codes, fmt.bits)
    assert packed.shape == (2, groups * fmt.bytes_per_group)
    for row in range(2):
        for g in range(groups):
            mine = codes[row, g * fmt.group_size : (g + 1) * fmt.group_size].tolist()
            stream = sum(code << (i * fmt.bits) for i, code in enumerate(mine))
            stored = packed[row, g * fmt.bytes_per_group : (g + 1) * fmt.bytes_per_group]
            assert bytes(stored.tolist()) == stream.to_bytes(fmt.bytes_per_group, "little")
    assert torch.equal(codec.unpack(packed, fmt.bits), codes)


@given(
    fmt=ANY_FORMAT,
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=2),
    width=st.integers(1, 700),
    dtype=st.sampled_from(DTYPES),
    effort=st.sampled_from(EFFORTS),
    scale=st.sampled_from([1e-3, 1.0, 300.0]),
)
@settings(max_examples=120, deadline=None)
def test_decode_of_encode(
    fmt: CodebookFormat, shape: list[int], width: int, dtype: torch.dtype, effort: Effort, scale: float
) -> None:
    weight = (weights(*shape, width, seed=width) * scale).to(dtype)
    encoded = codec.encode(weight, fmt, effort)
    assert encoded.packed.shape == fmt.packed_shape(tuple(weight.shape))
    assert encoded.norms.shape == fmt.norms_shape(tuple(weight.shape))
    decoded = codec.decode(encoded.packed, encoded.norms, fmt, width)
    assert decoded.shape == weight.shape
    assert decoded.is_contiguous()
    energy = float(weight.double().square().sum())
    error = float((decoded.double() - weight.double()).square().sum())
    assert encoded.energy == pytest.approx(energy, rel=1e-5)
    assert error <= encoded.squared_error * (1 + 1e-3) + 1e-9 * energy
    if width % fmt.group_size == 0:
        assert error == pytest.approx(encoded.squared_error, rel=1e-3, abs=1e-9 * energy)


def brute_force(y: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    """Codes by comparison with every midpoint: a tie takes the lower index."""
    return (y[..., None] > (book[1:] + book[:-1]) / 2).sum(-1)


@pytest.mark.parametrize("group", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_nearest_centroid_is_exact_also_on_thresholds(bits: int, group: int) -> None:
    fmt = CodebookFormat(bits, group)
    book = torch.tensor(fmt.codebook)
    middles = (book[1:] + book[:-1]) / 2
    probes = torch.cat(
        [middles, book, -middles, torch.nextafter(middles, torch.tensor(9.0)), torch.nextafter(middles, torch.tensor(-9.0)),
         torch.tensor([0.0, -0.0, 1.0, -1.0, 1.4, -1.4, 1e-30, -1e-30]), weights(4096) / math.sqrt(group)]
    )  # fmt: skip
    assignment = Assignment(1, len(probes), probes.device)
    assignment.assign(probes[None], nearest(fmt.codebook, probes.device))
    codes = assignment.codes[0].long()
    assert torch.equal(codes, brute_force(probes, book))
    assert torch.equal(assignment.centroids[0], book[codes])


@pytest.mark.parametrize("bits", BITS)
def test_effort_fast_is_the_nearest_centroid_at_the_group_norm(bits: int) -> None:
    fmt = CodebookFormat(bits, 64)
    weight = weights(7, 128)
    codes = codec.unpack(codec.encode(weight, fmt, "fast").packed, fmt.bits).view(7, 2, 64)
    y = codec.rotate(weight, 64).view(7, 2, 64)
    unit = y / y.norm(dim=-1, keepdim=True)
    # the rotation of a unit vector differs from the unit of a rotation in the last bit
    assert (codes.long() != brute_force(unit, torch.tensor(fmt.codebook))).float().mean() < 0.005


@pytest.mark.parametrize(("bits", "bound"), [(3, 0.0320), (4, 0.0080), (5, 0.0020)])
def test_error_of_effort_best_on_gaussian_weights(bits: int, bound: float) -> None:
    weight, fmt = weights(512, 2048), CodebookFormat(bits, 128)
    best, fast = codec.encode(weight, fmt, "best"), codec.encode(weight, fmt, "fast")
    decoded = codec.decode(best.packed, best.norms, fmt, 2048)
    assert float((decoded - weight).square().sum() / weight.square().sum()) <= bound
    assert best.relative_mse < fast.relative_mse


def test_the_bytes_do_not_depend_on_how_rows_are_cut() -> None:
    weight, fmt = weights(100, 32 * 128), CodebookFormat(3, 128)
    whole = codec.encode(weight, fmt)
    for start, stop in ((0, 1), (1, 40), (40, 100)):
        part = codec.encode(weight[start:stop], fmt)
        assert torch.equal(part.packed, whole.packed[start:stop])
        assert torch.equal(part.norms, whole.norms[start:stop])


def test_a_view_is_encoded_like_its_copy() -> None:
    weight, fmt = weights(300, 64).T, CodebookFormat(4, 128)
    view, copy = codec.encode(weight, fmt), codec.encode(weight.contiguous(), fmt)
    assert torch.equal(view.packed, copy.packed)


@pytest.mark.parametrize("bits", BITS)
def test_zero_groups(bits: int) -> None:
    weight = torch.cat([torch.zeros(2, 128), weights(2, 128)], dim=1)
    fmt = CodebookFormat(bits, 128)
    encoded = codec.encode(weight, fmt)
    codes = codec.unpack(encoded.packed, fmt.bits)
    assert (codes[:, :128] == 2 ** (bits - 1) - 1).all()
    assert (encoded.norms[:, 0] == 0).all()
    assert (codec.decode(encoded.packed, encoded.norms, fmt, 256)[:, :128] == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_weights_are_refused_by_name(bad: float) -> None:
    weight = weights(4, 128)
    weight[2, 5] = bad
    with pytest.raises(NonFiniteError, match=r"layers\.7\.q_proj.*holds"):
        codec.encode(weight, CodebookFormat(3, 128), name="layers.7.q_proj")


def test_a_norm_beyond_float16_is_refused_and_float32_takes_it() -> None:
    weight = weights(2, 128) * 1e5
    with pytest.raises(NonFiniteError, match="65504"):
        codec.encode(weight, CodebookFormat(3, 128))
    encoded = codec.encode(weight, CodebookFormat(3, 128, norms="F32"))
    assert encoded.relative_mse < 0.05


def test_norms_below_float16_lose_the_weights_and_say_so() -> None:
    encoded = codec.encode(weights(2, 128) * 1e-10, CodebookFormat(3, 128))
    assert encoded.relative_mse == pytest.approx(1.0)


def test_errors_at_each_width_are_those_of_effort_fast() -> None:
    weight = weights(9, 300)
    errors = codec.squared_errors(weight, 128)
    for bits in BITS:
        assert errors[bits] == pytest.approx(
            codec.encode(weight, CodebookFormat(bits, 128), "fast").squared_error, rel=1e-6
        )


def test_an_unknown_effort_is_refused() -> None:
    with pytest.raises(PlanError, match="fast, best"):
        codec.encode(weights(1, 32), CodebookFormat(2, 32), "slow")  # type: ignore[arg-type]


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.id)
def test_codebooks_satisfy_both_conditions_of_lloyd_and_max(fmt: CodebookFormat) -> None:
    book = torch.tensor(fmt.codebook, dtype=torch.float64) * math.sqrt(fmt.group_size)
    assert len(book) == 2**fmt.bits
    torch.testing.assert_close(book, -book.flip(0))
    edges = torch.cat([torch.tensor([-9.0]), (book[1:] + book[:-1]) / 2, torch.tensor([9.0])]).double()
    density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
    mass = torch.special.ndtr(edges[1:]) - torch.special.ndtr(edges[:-1])
    torch.testing.assert_close(book, (density[:-1] - density[1:]) / mass, atol=2e-6, rtol=0)


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("size", [1e-45, 2.6e-23, 2.7e-23, 3.7e-23, 1e-22, 1e-20])
def test_weights_whose_squares_vanish_in_float32(size: float, effort: Effort) -> None:
    # aligned with the signs, so that one coordinate takes all of the rotated group
    weight = torch.tensor(signs(128)[0], dtype=torch.float32) * size
    weight[0] *= 1.05
    encoded = codec.encode(weight[None], CodebookFormat(3, 128), effort)
    assert (codec.decode(encoded.packed, encoded.norms, CodebookFormat(3, 128), 128) == 0).all()
    encoded = codec.encode(weight[None], CodebookFormat(3, 128, norms="F32"), effort)
    decoded = codec.decode(encoded.packed, encoded.norms, CodebookFormat(3, 128), 128)
    if size >= 1e-20:
        assert (
            float((decoded - weight).double().square().sum() / weight.double().square().sum()) < 0.7
        )  # one coordinate holds it all
    assert float(decoded.abs().max()) <= 20 * size
