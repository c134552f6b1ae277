"""Under ``kappaquant.engines.mlx.load``: codes against the codec, modules against dense weights, memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from published import Published, each_folder, each_set

from kappaquant.errors import FormatError
from kappaquant.formats import codec
from kappaquant.formats.codebook import BITS, CodebookFormat, GroupedFormat
from kappaquant.formats.registry import formats
from kappaquant.formats.signs import GROUP_SIZES
from kappaquant.formats.trellis import TrellisFormat

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from kappaquant.engines.mlx import arrays, codes, layers, load  # noqa: E402


def stored(fmt: GroupedFormat, *shape: int) -> tuple[torch.Tensor, torch.Tensor, Any, Any, Any]:
    """Codes of a weight of this shape: packed and norms in torch, packed, norms and codebook in MLX. Any bytes are codes."""
    generator = torch.Generator().manual_seed(fmt.bits)
    packed = torch.randint(0, 256, fmt.packed_shape(shape), generator=generator).byte()
    norms = torch.randn(fmt.norms_shape(shape), generator=generator).to(codec.NORMS_TORCH[fmt.norms])
    return packed, norms, mx.array(packed.numpy()), mx.array(norms.numpy()), mx.array(fmt.codebook)


def assert_same(found: Any, expected: torch.Tensor) -> None:
    """To the bit on a CPU, where MLX's transform sums in the codec's order; its order on a GPU is another."""
    tolerance = 0.0 if mx.default_device() == mx.cpu else 2e-6 * float(expected.abs().max())
    assert found.shape == tuple(expected.shape)
    assert np.abs(np.array(found) - expected.numpy()).max() <= tolerance


# --- codes ---


@pytest.mark.parametrize("fmt", formats(), ids=lambda fmt: fmt.id)
def test_codes_are_those_of_the_codec(fmt: GroupedFormat) -> None:
    others = fmt, fmt.variant(tuple(value * 1.25 for value in fmt.codebook), "F32")
    for own in others:
        for shape in ((5, 3 * fmt.group_size), (3, 7, 200), (1, 1)):
            packed, norms, *arguments = stored(own, *shape)
            assert np.array_equal(np.array(codes.indices(arguments[0], own)), codec.indices(packed, own).numpy())
            rotated, weight = codes.decode_rotated(*arguments, own), codes.decode(*arguments, own, shape[-1])
            assert np.array_equal(np.array(rotated), codec.decode_rotated(packed, norms, own).numpy())
            assert_same(weight, codec.decode(packed, norms, own, shape[-1]))


@pytest.mark.parametrize("bits", BITS)
def test_codes_of_a_byte_each_are_packed_as_the_codec_packs_them(bits: int) -> None:
    loose = torch.randint(0, 2**bits, (7, 96), generator=torch.Generator().manual_seed(bits)).byte()
    assert np.array_equal(arrays.pack(loose.numpy(), bits), codec.pack(loose, bits).numpy())


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_rotations_are_those_of_the_codec(group_size: int) -> None:
    x = torch.randn(2, 3, 200, generator=torch.Generator().manual_seed(0))
    rotated = codec.rotate(x, group_size)
    assert_same(codes.rotate(mx.array(x.numpy()), group_size), rotated)
    assert_same(codes.unrotate(mx.array(rotated.numpy()), group_size), codec.unrotate(rotated, group_size))


@each_set
def test_published_files_without_a_config_say_what_to_give(published: Published) -> None:
    with pytest.raises(FormatError, match=r"has no config\.json; copy the original"):
        load(published.root / published.folders()[0])


@each_folder()
def test_published_files_are_read_and_decoded(published: Published, folder: str) -> None:
    checkpoint = published.open(folder)
    quantized = [name for name in checkpoint.keys() if checkpoint.format_of(name)]
    assert quantized
    for name in quantized:
        entry, weight = checkpoint.entry(name), checkpoint.dequantize(name)  # tests/checkpoints proves its bits
        assert entry.fmt is not None
        packed, norms = (mx.array(part) for part in arrays.read_codes(entry, entry.fmt))
        assert_same(codes.decode(packed, norms, mx.array(entry.fmt.codebook), entry.fmt, weight.shape[-1]), weight)


# --- modules ---


@pytest.mark.parametrize("fmt", [CodebookFormat(3, 64), TrellisFormat(3, 64)], ids=lambda fmt: fmt.id)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_a_linear_layer_decodes_in_tiles(dtype: Any, fmt: GroupedFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, norms, *held, _ = stored(fmt, 50, 200)
    layer = layers.PackedLinear(fmt, 200, *held)
    x = mx.random.normal((2, 5, 200), key=mx.random.key(0)).astype(dtype)
    whole = layer(x)
    assert whole.dtype == dtype
    weight = codec.decode(packed, norms, fmt, 200).numpy()
    exact = np.array(x.astype(mx.float32)) @ weight.T
    assert (
        np.abs(np.array(whole.astype(mx.float32)) - exact).max() < (1e-5 if dtype == mx.float32 else 0.02) * exact.max()
    )
    monkeypatch.setattr(layers, "DECODED_BYTES", 7 * 256 * 4)  # 8 tiles, the last a single row
    assert np.allclose(np.array(layer(x).astype(mx.float32)), np.array(whole.astype(mx.float32)), atol=1e-5)


def switch(experts: int, out: int, width: int) -> tuple[Any, np.ndarray]:
    """Experts of 2 and 5 bits, of trellis codes and kept ones, and the dense weights they stand for."""
    weights, blocks = np.empty((experts, out, width), np.float32), []
    for which, fmt in enumerate((CodebookFormat(2, 64), CodebookFormat(5, 32), TrellisFormat(3, 64), None)):
        mine = list(range(which, experts, 4))
        if fmt is None:
            weights[mine] = np.random.default_rng(0).normal(size=(len(mine), out, width))
            blocks.append((mine, layers.KeptExperts(mx.array(weights[mine]))))
            continue
        packed, norms, *held, _ = stored(fmt, len(mine), out, width)
        weights[mine] = codec.decode(packed, norms, fmt, width).numpy()
        blocks.append((mine, layers.PackedExperts(fmt, width, *held)))
    return layers.PackedSwitchLinear(blocks), weights


@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 1, 7), (3, 1, 2), (2, 13, 3), (80,)], ids=str)
@pytest.mark.parametrize("per_slot", [False, True])
def test_routed_experts_of_several_formats(shape: tuple[int, ...], per_slot: bool) -> None:
    layer, weights = switch(7, 24, 96)
    rng = np.random.default_rng(1)
    indices = (
        np.argsort(rng.random((*shape[:-1], 7)))[..., : shape[-1]]
        if len(shape) > 1
        else np.sort(rng.integers(0, 7, 80))
    )
    lead = shape if per_slot or len(shape) == 1 else (*shape[:-1], 1)
    x = rng.normal(size=(*lead, 1, 96)).astype(np.float32)
    expected = x @ weights[indices].swapaxes(-1, -2)
    actual = np.array(layer(mx.array(x), mx.array(indices.astype(np.uint32)), sorted_indices=len(shape) == 1))
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("fmt", [CodebookFormat(3, 32), TrellisFormat(4, 32)], ids=lambda fmt: fmt.id)
@pytest.mark.parametrize("at_once", [1 << 30, 1000], ids=["gathered", "one by one"])
def test_one_token_s_experts(at_once: int, fmt: GroupedFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, norms, *held, _ = stored(fmt, 6, 24, 96)
    layer = layers.PackedSwitchLinear([(range(6), layers.PackedExperts(fmt, 96, *held))])
    monkeypatch.setattr(layers, "DECODED_BYTES", at_once)
    weights = codec.decode(packed, norms, fmt, 96).numpy()
    for lead in ((1, 1, 1), (1, 1, 3)):
        x = np.random.default_rng(0).normal(size=(*lead, 1, 96)).astype(np.float32)
        indices = np.array([[[4, 0, 5]]], np.uint32)
        expected = x @ weights[indices].swapaxes(-1, -2)
        assert np.abs(np.array(layer(mx.array(x), mx.array(indices))) - expected).max() < 1e-5 * np.abs(expected).max()


def test_memory_of_a_long_prompt_is_bounded() -> None:
    """2048 tokens, 4 experts each: packed matrices gathered per slot would take 403 MB, decoded ones 4.3 GB."""
    experts, out, width, tokens, top = 16, 512, 256, 2048, 4
    fmt = TrellisFormat(3, 128)  # decoding it takes more arrays than a codebook's codes
    _, _, packed, norms, _ = stored(fmt, experts, out, width)
    layer = layers.PackedSwitchLinear([(range(experts), layers.PackedExperts(fmt, width, packed, norms))])
    rng = np.random.default_rng(0)
    indices = mx.array(np.sort(rng.integers(0, experts, tokens * top)).astype(np.uint32))
    x = mx.random.normal((tokens * top, 1, width))
    mx.eval(x, indices, layer.parameters())
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    y = layer(x, indices, sorted_indices=True)
    mx.eval(y)
    took = mx.get_peak_memory() - before
    assert took > y.nbytes  # the counter counts
    assert took < 3 * (x.nbytes + y.nbytes)
