"""Under ``kappaquant.engines.mlx.load``: codes against the codec, modules against dense weights, memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from published import Published, each_folder, each_set

from kappaquant.errors import FormatError
from kappaquant.formats import codec
from kappaquant.formats.codebook import BITS, CodebookFormat
from kappaquant.formats.signs import GROUP_SIZES

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from kappaquant.engines.mlx import arrays, codes, layers, load  # noqa: E402


def encoded(fmt: CodebookFormat, *shape: int) -> tuple[codec.Encoded, Any, Any, Any]:
    """A random weight's codes as torch has them, and packed, norms and codebook in MLX."""
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(fmt.bits))
    done = codec.encode(weight, fmt, "fast")
    return done, mx.array(done.packed.numpy()), mx.array(done.norms.numpy()), mx.array(fmt.codebook)


# --- codes ---


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_codes_are_those_of_the_codec(bits: int, group_size: int) -> None:
    fmt = CodebookFormat(bits, group_size)
    for shape in ((5, 3 * group_size), (3, 7, 200), (1, 1)):
        done, packed, norms, codebook = encoded(fmt, *shape)
        expected = codec.unpack(done.packed, fmt.bits)
        assert np.array_equal(np.array(codes.unpack(packed, bits)), expected.numpy())
        assert np.array_equal(
            arrays.pack(expected.reshape(-1, group_size).numpy(), fmt).ravel(), done.packed.numpy().ravel()
        )
        weight = codec.decode(done.packed, done.norms, fmt, shape[-1]).numpy()
        decoded = np.array(codes.decode(packed, norms, codebook, fmt, shape[-1]))
        assert decoded.shape == weight.shape
        assert np.abs(decoded - weight).max() <= 1e-6 * np.abs(weight).max()
        rotated = np.array(codes.decode_rotated(packed, norms, codebook, fmt))
        assert (
            np.allclose(rotated, codec.rotate(torch.tensor(weight), group_size).numpy(), atol=1e-5)
            or shape[-1] % group_size
        )
    noise = torch.randint(0, 256, (11, 2 * fmt.bytes_per_group), generator=torch.Generator().manual_seed(bits)).byte()
    assert np.array_equal(np.array(codes.unpack(mx.array(noise.numpy()), bits)), codec.unpack(noise, fmt.bits).numpy())


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_rotations_are_those_of_the_codec(group_size: int) -> None:
    x = torch.randn(2, 3, 200, generator=torch.Generator().manual_seed(0))
    rotated = codec.rotate(x, group_size)
    assert np.allclose(np.array(codes.rotate(mx.array(x.numpy()), group_size)), rotated.numpy(), atol=2e-6)
    assert np.allclose(
        np.array(codes.unrotate(mx.array(rotated.numpy()), group_size)),
        codec.unrotate(rotated, group_size).numpy(),
        atol=2e-6,
    )


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
        entry, weight = checkpoint.entry(name), checkpoint.dequantize(name).numpy()  # tests/checkpoints proves its bits
        assert entry.fmt is not None
        packed, norms = (mx.array(part) for part in arrays.read_codes(entry, entry.fmt))
        decoded = np.array(codes.decode(packed, norms, mx.array(entry.fmt.codebook), entry.fmt, weight.shape[-1]))
        assert np.abs(decoded - weight).max() <= 2e-6 * np.abs(weight).max(), name


# --- modules ---


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_a_linear_layer_decodes_in_tiles(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = CodebookFormat(3, 64)
    done, packed, norms, _ = encoded(fmt, 50, 200)
    layer = layers.CodebookLinear(fmt, 200, packed, norms)
    x = mx.random.normal((2, 5, 200), key=mx.random.key(0)).astype(dtype)
    whole = layer(x)
    assert whole.dtype == dtype
    weight = codec.decode(done.packed, done.norms, fmt, 200).numpy()
    exact = np.array(x.astype(mx.float32)) @ weight.T
    assert (
        np.abs(np.array(whole.astype(mx.float32)) - exact).max() < (1e-5 if dtype == mx.float32 else 0.02) * exact.max()
    )
    monkeypatch.setattr(layers, "DECODED_BYTES", 7 * 256 * 4)  # 8 tiles, the last a single row
    assert np.allclose(np.array(layer(x).astype(mx.float32)), np.array(whole.astype(mx.float32)), atol=1e-5)


def switch(experts: int, out: int, width: int) -> tuple[Any, np.ndarray]:
    """Experts of 2 and 5 bits and kept ones, and the dense weights they stand for."""
    weights, blocks = np.empty((experts, out, width), np.float32), []
    for which, fmt in enumerate((CodebookFormat(2, 64), CodebookFormat(5, 32), None)):
        mine = list(range(which, experts, 3))
        if fmt is None:
            weights[mine] = np.random.default_rng(0).normal(size=(len(mine), out, width))
            blocks.append((mine, layers.KeptExperts(mx.array(weights[mine]))))
            continue
        done, packed, norms, _ = encoded(fmt, len(mine), out, width)
        weights[mine] = codec.decode(done.packed, done.norms, fmt, width).numpy()
        blocks.append((mine, layers.PackedExperts(fmt, width, packed, norms)))
    return layers.CodebookSwitchLinear(blocks), weights


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


@pytest.mark.parametrize("at_once", [1 << 30, 1000], ids=["gathered", "one by one"])
def test_one_token_s_experts(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = CodebookFormat(3, 32)
    done, packed, norms, _ = encoded(fmt, 6, 24, 96)
    layer = layers.CodebookSwitchLinear([(range(6), layers.PackedExperts(fmt, 96, packed, norms))])
    monkeypatch.setattr(layers, "DECODED_BYTES", at_once)
    weights = codec.decode(done.packed, done.norms, fmt, 96).numpy()
    for lead in ((1, 1, 1), (1, 1, 3)):
        x = np.random.default_rng(0).normal(size=(*lead, 1, 96)).astype(np.float32)
        indices = np.array([[[4, 0, 5]]], np.uint32)
        expected = x @ weights[indices].swapaxes(-1, -2)
        assert np.abs(np.array(layer(mx.array(x), mx.array(indices))) - expected).max() < 1e-5 * np.abs(expected).max()


def test_memory_of_a_long_prompt_is_bounded() -> None:
    """2048 tokens, 4 experts each: packed matrices gathered per slot would take 403 MB, decoded ones 4.3 GB."""
    experts, out, width, tokens, top = 16, 512, 256, 2048, 4
    fmt = CodebookFormat(3, 128)
    _, packed, norms, _ = encoded(fmt, experts, out, width)
    layer = layers.CodebookSwitchLinear([(range(experts), layers.PackedExperts(fmt, width, packed, norms))])
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
