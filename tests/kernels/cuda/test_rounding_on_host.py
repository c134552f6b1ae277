"""Encoders, calibrated rounding and decoding on a CPU, where kernels' sources run as they are (cuda_on_host.py): the codec's bytes and values."""

from __future__ import annotations

from collections.abc import Iterator

import cuda_on_host
import pytest
import torch
from gpu_products import NAMES, codes, named
from hard_weights import hard, numbers
from trellis_encoding import same_bytes
from trellis_rounding import MORE, SCALES, check_losses, problem

from kappaquant.formats import codec, trials
from kappaquant.formats.base import EFFORTS, Effort
from kappaquant.formats.codebook import CodebookFormat
from kappaquant.formats.signs import GROUP_SIZES
from kappaquant.formats.trellis import TRELLIS_BITS, TrellisFormat
from kappaquant.kernels import dispatch
from kappaquant.kernels.cuda import decoded, encoder, feedback, nvrtc, tiles, trellis_encoder, trellis_feedback
from kappaquant.kernels.cuda.tensor_cores import Weight
from kappaquant.quantizing.rounding import groups, rings

pytestmark = cuda_on_host.needs_host_compiler
TRELLISES = [
    pytest.param(TrellisFormat(bits, group), marks=() if group == usual else pytest.mark.slow, id=f"t{bits}g{group}")
    for bits, usual in zip(TRELLIS_BITS, (64, 128, 32), strict=True)
    for group in GROUP_SIZES
]


@pytest.fixture(scope="module", autouse=True)
def on_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nvrtc, "kernel", cuda_on_host.kernels(tmp_path_factory.mktemp("kernels")))
        for module in (encoder, feedback, trellis_encoder, trellis_feedback):
            patch.setattr(module, "refusal", lambda *_: None)
        patch.setattr(encoder.gpu, "multiprocessors", lambda _: 1)
        patch.setattr(trellis_feedback, "_room", lambda *_: (2, cuda_on_host.SHARED_BYTES))
        yield


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("fmt", TRELLISES)
def test_trellis_codes_are_the_codecs(fmt: TrellisFormat, effort: Effort) -> None:
    for weight in (hard(fmt).bfloat16(), numbers(5, 2 * fmt.group_size - 3)):
        assert same_bytes(trellis_encoder.encode(weight, fmt, effort), codec.encode(weight, fmt, effort))


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize(("bits", "group"), [(3, 128), (2, 32), (5, 64), (8, 256)])
def test_codes_are_the_codecs(bits: int, group: int, effort: Effort) -> None:
    fmt = CodebookFormat(bits, group)
    for weight in (hard(fmt).half(), numbers(5, 2 * group - 3)):
        assert same_bytes(encoder.encode(weight, fmt, effort), codec.encode(weight, fmt, effort))


@pytest.mark.parametrize("fmt", TRELLISES)
def test_norms_are_those_of_torch(fmt: TrellisFormat) -> None:
    block, _ = problem(fmt.group_size, 37)
    norms = trials.multiples(trellis_feedback.plain_norms(block, fmt), SCALES, fmt)
    assert torch.equal(norms, trials.tried_norms(block, SCALES, fmt))


@pytest.mark.parametrize("fmt", TRELLISES)
def test_rings_lose_what_torch_loses(fmt: TrellisFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem(fmt.group_size, 5)
    found = trellis_feedback.choose(*given, SCALES, fmt)
    monkeypatch.setattr(dispatch, "_TRELLIS_FEEDBACKS", ())
    check_losses(found, rings.choose(*given, SCALES, fmt), *given, fmt)


@pytest.mark.parametrize(("bits", "group"), [(3, 64), (4, 32), (8, 128)])
def test_codes_with_feedback_lose_what_torch_loses(bits: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt, given = CodebookFormat(bits, group), problem(group, 5)
    found = feedback.choose(*given, SCALES, fmt)
    monkeypatch.setattr(dispatch, "_FEEDBACKS", ())
    known = groups.choose(*given, SCALES, fmt)
    assert (found[0] == known[0]).float().mean() > 0.97
    torch.testing.assert_close(found[2].square().sum(), known[2].square().sum(), rtol=MORE, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_decoded_weights_are_the_codecs(name: str) -> None:
    for group in (GROUP_SIZES[NAMES.index(name) % 4],):
        fmt = named(name, group)
        packed, norms = codes(fmt, 70, 5 * group - 3)
        held = Weight(tiles.tile(packed, norms, fmt), fmt, 70, 5 * group - 3)
        expected = codec.decode(packed, norms, fmt, 5 * group - 3)
        assert float((decoded.decode(held).float() - expected).norm() / expected.norm()) < 3e-3
        assert torch.equal(decoded.decode(held, 32, 20), decoded.decode(held)[32:52])
