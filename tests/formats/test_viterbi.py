"""The trellis encoder against searches of everything there is, its own decoder, and bounds on the error."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from other_trellises import OTHERS

from kappaquant.errors import NonFiniteError
from kappaquant.formats import codec, viterbi
from kappaquant.formats.base import EFFORTS, Effort
from kappaquant.formats.codebook import CodebookFormat
from kappaquant.formats.trellis import TRELLIS, TRELLIS_BITS, TRELLIS_FORMATS, TrellisFormat

ANY_FORMAT = st.sampled_from(list(TRELLIS_FORMATS.values()))
BOUNDS = {2: (0.0865, 0.0815), 3: (0.0240, 0.0230), 4: (0.0066, 0.0060)}  # of relative MSE in groups of 128: fast, best


def weights(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@given(fmt=ANY_FORMAT, groups=st.integers(1, 3), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_pack_is_the_inverse_of_unpack(fmt: TrellisFormat, groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (fmt.bytes_per_group, groups), generator=generator, dtype=torch.uint8)
    assert torch.equal(fmt.pack_block(fmt.unpack_block(packed)), packed)


@pytest.mark.parametrize("kind", OTHERS)
def test_paths_of_other_trellises_are_packed_by_their_inverse(kind: type[TrellisFormat]) -> None:
    fmt = kind(3, 64)
    packed = torch.randint(0, 256, (24, 50), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert torch.equal(fmt.pack_block(fmt.unpack_block(packed)), packed)
    x = weights(64, 50) / 8
    codes = viterbi.closest(x, torch.tensor(fmt.codebook), fmt.code)
    assert torch.equal(fmt.unpack_block(fmt.pack_block(codes)), codes)


@given(
    fmt=ANY_FORMAT,
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=2),
    width=st.integers(1, 400),
    dtype=st.sampled_from((torch.bfloat16, torch.float16, torch.float32)),
    effort=st.sampled_from(EFFORTS),
    scale=st.sampled_from([1e-3, 1.0, 300.0]),
)
@settings(max_examples=25, deadline=None)
def test_decode_of_encode(
    fmt: TrellisFormat, shape: list[int], width: int, dtype: torch.dtype, effort: Effort, scale: float
) -> None:
    weight = (weights(*shape, width, seed=width) * scale).to(dtype)
    encoded = fmt.encode(weight, effort)
    decoded = fmt.decode(encoded.parts, width)
    assert decoded.shape == weight.shape
    error = float((decoded.double() - weight.double()).square().sum())
    energy = float(weight.double().square().sum())
    assert encoded.energy == pytest.approx(energy, rel=1e-5)
    assert error <= encoded.squared_error * (1 + 1e-3) + 1e-9 * energy
    if width % fmt.group_size == 0:
        assert error == pytest.approx(encoded.squared_error, rel=1e-3, abs=1e-9 * energy)


@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_error_on_gaussian_weights(bits: int) -> None:
    weight, fmt = weights(64, 1024), TrellisFormat(bits, 128)
    fast, best = (fmt.encode(weight, effort).relative_mse for effort in EFFORTS)
    assert best < fast < BOUNDS[bits][0]
    assert best < BOUNDS[bits][1]
    assert best < 0.72 * CodebookFormat(bits, 128).encode(weight).relative_mse


def every_path(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Least squared error [M] of targets [size, M] over all 2**size rings."""
    size = len(x)
    paths = torch.tensor(list(itertools.product((0, 1), repeat=size)), dtype=torch.uint8).t()
    subset = viterbi.subsets(paths).long()  # [size, paths]
    squares = (x[:, None] - levels.view(1, -1, 1)).square().view(size, -1, 4, x.shape[1]).amin(1)  # [size, 4, M]
    return torch.stack([squares[t][subset[t]] for t in range(size)]).sum(0).amin(0)


def from_every_state(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Least squared error [M] by one search from each state, which is exact."""
    squares, _ = viterbi.subset_levels(x, levels)
    least = torch.full(x.shape[1:], math.inf)
    for state in range(TRELLIS.states):
        start = torch.full(x.shape[1:], state)
        least = torch.minimum(least, viterbi.walk(viterbi.held(start), squares)[state])
    return least


def lost(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    codes = viterbi.closest(x, levels)
    assert torch.equal(viterbi.unpack_block(viterbi.pack_block(codes, 3), 3), codes)
    return (x - levels[codes.int()]).square().sum(0)


def test_a_search_from_every_state_is_exact() -> None:
    levels = torch.tensor(TrellisFormat(3, 32).codebook) * math.sqrt(32)
    x = weights(12, 20)
    torch.testing.assert_close(from_every_state(x, levels), every_path(x, levels))


@pytest.mark.parametrize(("size", "more"), [(32, 0.1), (64, 0.015), (128, 0.002), (256, 0.0005)])
def test_it_is_nearly_exact(size: int, more: float) -> None:
    levels = torch.tensor(TrellisFormat(3, size).codebook) * math.sqrt(size)
    x = weights(size, 150)
    found, least = lost(x, levels), from_every_state(x, levels)
    assert bool((found >= least * (1 - 1e-5)).all())
    assert found.sum() < (1 + more) * least.sum()


@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_the_nearest_of_each_subset_also_on_thresholds(bits: int) -> None:
    levels = torch.tensor(TrellisFormat(bits, 64).codebook)
    x = torch.cat([levels, (levels[4:] + levels[:-4]) / 2, weights(500) / 8])[None]
    squares, indices = viterbi.subset_levels(x, levels)
    for subset in range(4):
        mine = levels[subset::4]
        expected = (x[0][:, None] > (mine[1:] + mine[:-1]) / 2).sum(1)
        assert torch.equal(indices[0, subset].long(), 4 * expected + subset)
        assert torch.equal(squares[0, subset], (x[0] - mine[expected]).square())


def test_codes_do_not_depend_on_what_is_searched_together(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, fmt = torch.cat([weights(37, 128), torch.zeros(3, 128)]), TrellisFormat(3, 64)
    whole = fmt.encode(weight)
    monkeypatch.setitem(viterbi._RINGS, "cpu", 7)
    parts = fmt.encode(weight).parts
    assert all(torch.equal(parts[suffix], part) for suffix, part in whole.parts.items())
    assert bool((fmt.decode(parts, 128)[-3:] == 0).all())


def test_what_no_norm_holds_is_refused() -> None:
    with pytest.raises(NonFiniteError, match="w: holds nan"):
        TrellisFormat(3, 32).encode(torch.full((1, 32), math.nan), name="w")
    with pytest.raises(NonFiniteError, match="w: a group's norm is"):
        TrellisFormat(3, 32).encode(torch.full((1, 32), 5e4), name="w")


def test_the_rotation_is_that_of_codebook_formats() -> None:
    x = weights(2, 300)
    assert torch.equal(TrellisFormat(3, 128).rotate(x), codec.rotate(x, 128))
