"""MLX's affine format in torch: what MLX reads, and how near it comes; and the rotation that is folded into weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import kappaquant
from kappaquant.exports.mlx.rotation import rotate, rotate_columns
from kappaquant.formats import affine

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")

FORMATS = [(bits, group) for bits in affine.BITS for group in affine.GROUP_SIZES]


def gaussian(rows: int = 64, width: int = 512, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("bits", "group"), FORMATS)
@pytest.mark.parametrize("effort", affine.EFFORTS)
def test_mlx_decodes_what_is_packed(bits: int, group: int, effort: affine.Effort) -> None:
    weight = gaussian()
    made = affine.quantize(weight, bits, group, torch.float32, effort)
    packed = mx.array(made.packed.numpy().view(np.uint32))
    arrays = (mx.array(made.scales.numpy()), mx.array(made.biases.numpy()))
    by_mlx = np.array(mx.dequantize(packed, *arrays, group, bits))
    ours = affine.dequantize(made.packed, made.scales, made.biases, bits, group)
    assert np.abs(by_mlx - ours.numpy()).max() < 1e-6
    error = (ours - weight).double().square().sum().item()
    assert error == pytest.approx(made.squared_error, rel=1e-4)
    assert made.energy == pytest.approx(weight.double().square().sum().item(), rel=1e-5)


@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_fast_is_what_mlx_does(bits: int, group: int) -> None:
    weight = gaussian(seed=bits)
    packed, scales, biases = mx.quantize(mx.array(weight.numpy()), group, bits)
    made = affine.quantize(weight, bits, group, torch.float32, "fast")
    assert torch.allclose(made.scales, torch.from_numpy(np.array(scales)), rtol=1e-6)
    assert torch.allclose(made.biases, torch.from_numpy(np.array(biases)), rtol=1e-6)
    same = np.array(packed).view(np.uint8) == made.packed.numpy()
    assert same.mean() > 0.999  # apart from weights that lie between two codes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "bound"), [(2, 0.112), (3, 0.0325), (4, 0.0085)])
def test_error_on_gaussian_weights(bits: int, bound: float, dtype: torch.dtype) -> None:
    made = affine.quantize(gaussian(256, 2048), bits, 128, dtype)
    decoded = affine.dequantize(made.packed, made.scales, made.biases, bits, 128)
    assert (decoded - gaussian(256, 2048)).square().sum() / gaussian(256, 2048).square().sum() < bound


@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_searching_never_loses(bits: int, group: int) -> None:
    heavy = gaussian() ** 3
    best, fast = (affine.quantize(heavy, bits, group, torch.bfloat16, effort) for effort in ("best", "fast"))
    assert best.squared_error < fast.squared_error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_groups_without_spread(dtype: torch.dtype) -> None:
    weight = torch.zeros(5, 128)
    weight[1] = 0.5
    weight[2] = -0.25
    weight[3, 7] = 1e-3
    weight[4] = gaussian(1, 128)[0] * 1e-9
    made = affine.quantize(weight, 4, 64, dtype)
    decoded = affine.dequantize(made.packed, made.scales, made.biases, 4, 64)
    assert torch.equal(decoded[:3], weight[:3])
    assert bool(decoded.isfinite().all())
    assert (decoded - weight).abs().max() < 1e-4
    assert bool((made.scales != 0).all())


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = affine.quantize(gaussian(), 3, 64, torch.bfloat16)
    monkeypatch.setattr(affine, "BLOCK", 100)
    cut = affine.quantize(gaussian(), 3, 64, torch.bfloat16)
    for part in ("packed", "scales", "biases"):
        assert torch.equal(getattr(whole, part), getattr(cut, part))


def test_what_is_refused() -> None:
    with pytest.raises(kappaquant.PlanError, match=r"w: 7 bits in groups of 64; .* 2, 3, 4, 5, 6, 8 bits"):
        affine.quantize(gaussian(), 7, 64, torch.float16, name="w")
    with pytest.raises(kappaquant.PlanError, match="w: 100 inputs are no multiple of the group size 64"):
        affine.quantize(gaussian(2, 100), 4, 64, torch.float16, name="w")
    with pytest.raises(kappaquant.NonFiniteError, match=r"w: holds .* which scales in torch.float16 cannot express"):
        affine.quantize(gaussian() * 1e6, 4, 64, torch.float16, name="w")


@pytest.mark.parametrize("width", [64, 128, 192, 896, 2560, 7])
def test_the_rotation_is_orthogonal_and_spreads(width: int) -> None:
    matrix = rotate(torch.eye(width)).double()
    assert (matrix @ matrix.T - torch.eye(width)).abs().max() < 1e-6
    assert torch.equal(rotate_columns(torch.eye(width)), matrix.T.float())
    assert matrix.abs().max() * width**0.5 < 1.42  # no weight stays where it was
    x = gaussian(3, width)
    assert torch.allclose(rotate(x).double(), x.double() @ matrix, atol=1e-5)
