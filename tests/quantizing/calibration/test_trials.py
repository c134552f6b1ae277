"""Matrices in all formats: what comes back, what outputs lose, and the rows of tensors that lie one after another."""

from __future__ import annotations

import pytest
import torch

from kappaquant.errors import PlanError
from kappaquant.formats import codec
from kappaquant.formats.codebook import BITS, CodebookFormat
from kappaquant.formats.trellis import TrellisFormat
from kappaquant.kernels import dispatch
from kappaquant.kernels.cpu.library import absence
from kappaquant.quantizing.calibration.stacks import Stack, round_stack
from kappaquant.quantizing.calibration.trials import Piece, Trial, errors_of, kinds_by_kernels, tried


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHT, X = draw(2, 6, 80, seed=0), draw(2, 200, 80, seed=1)
GRAM = X.mT @ X


def piece(drawn: torch.Tensor | None, own: torch.Tensor | None, **trial: object) -> Piece:
    return Piece(WEIGHT, drawn, own, ["a", "b"], Trial(group_size=32, **trial))  # type: ignore[arg-type]


def test_errors_are_of_what_the_matrices_give_for_their_inputs() -> None:
    found = tried(piece(None, GRAM, bits=4))
    outputs = (X @ WEIGHT.mT).square().sum(1).flatten()
    torch.testing.assert_close(found.energies.float(), outputs, rtol=1e-4, atol=1e-2)
    assert list(found.errors) == [f"tq{bits}g32" for bits in BITS]
    for bits in BITS:
        fmt = CodebookFormat(bits, 32)
        back = fmt.decode(codec.encode(WEIGHT, fmt, "best").parts, 80)
        lost = (X @ (WEIGHT - back).mT).square().sum(1).flatten()
        torch.testing.assert_close(found.errors[fmt.id].float(), lost, rtol=1e-3, atol=1e-2)
        if bits == 4:
            assert torch.equal(found.decoded, back.flatten(0, 1))


def test_with_moments_to_round_for_the_codes_are_those_of_calibrated_rounding() -> None:
    found, fmt = tried(piece(GRAM, GRAM, bits=3)), CodebookFormat(3, 32)
    parts = round_stack(Stack(WEIGHT, GRAM, fmt, ["a", "b"])).parts
    assert torch.equal(found.decoded, fmt.decode(parts, 80).flatten(0, 1))


def test_without_inputs_errors_are_of_weights() -> None:
    found = tried(piece(None, None))
    assert found.energies.sum().item() == pytest.approx(WEIGHT.square().sum().item(), rel=1e-6)


def test_rows_go_to_their_tensors() -> None:
    found = tried(piece(None, None))
    first, second = errors_of([found], [4, 8])
    assert first.energy == pytest.approx(WEIGHT.flatten(0, 1)[:4].square().sum().item(), rel=1e-5)
    assert second.energy == pytest.approx(WEIGHT.flatten(0, 1)[4:].square().sum().item(), rel=1e-5)
    assert first.errors["tq3g32"] == pytest.approx(
        (found.errors["tq3g32"][:4].sum() / found.energies[:4].sum()).item(), rel=1e-5
    )
    (whole,) = errors_of([found, found], [24])
    assert whole.energy == pytest.approx(2 * (first.energy + second.energy), rel=1e-5)


def test_the_process_keeps_its_threads() -> None:
    before = torch.get_num_threads()
    tried(piece(GRAM, GRAM))
    assert torch.get_num_threads() == before


def test_parts_are_tried_in_the_kind_that_is_asked_for() -> None:
    fmt = TrellisFormat(2, 32)
    assert [Trial(2, kinds=("k", "t"), kind=kind).format(96) for kind in "tk"] == [fmt, CodebookFormat(2, 32)]
    found = tried(piece(None, GRAM, bits=2, kinds=("t",), kind="t"))
    assert list(found.errors) == ["t2g32", "t3g32", "t4g32"]
    assert torch.equal(found.decoded, fmt.decode(codec.encode(WEIGHT, fmt, "best").parts, 80).flatten(0, 1))
    calibrated = tried(piece(GRAM, GRAM, bits=2, kinds=("t",), kind="t"))
    parts = round_stack(Stack(WEIGHT, GRAM, fmt, ["a", "b"])).parts
    assert torch.equal(calibrated.decoded, fmt.decode(parts, 80).flatten(0, 1))


def test_trellis_codes_are_measured_by_default_where_a_kernel_rounds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kinds_by_kernels("cpu") == (("k",) if absence() else ("k", "t"))
    assert kinds_by_kernels("meta") == ("k",)
    monkeypatch.setattr(dispatch, "_TRELLIS_FEEDBACKS", ())
    assert kinds_by_kernels("cpu") == ("k",)


@pytest.mark.parametrize(
    ("bits", "kinds", "kind", "message"),
    [
        (9, ("k",), "k", "bits = 9: parts are tried in codebooks, which have 2, 3, 4, 5, 6, 7, 8 bits"),
        (5, ("k", "t"), "t", "bits = 5: parts are tried in trellis codes, which have 2, 3, 4 bits"),
        (3, ("x",), "k", "formats 'x': must be letters"),
        (3, ("t",), "k", "formats t: parts are tried in 'k', which is none of these"),
    ],
)
def test_what_cannot_be_tried_is_refused(bits: int, kinds: tuple[str, ...], kind: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Trial(bits, kinds=kinds, kind=kind)


def test_trellis_codes_are_measured_where_that_is_asked_for() -> None:
    found = tried(piece(None, GRAM, kinds=("k", "t")))
    assert list(found.errors)[-3:] == ["t2g32", "t3g32", "t4g32"]
    for bits in (2, 3, 4):
        assert found.errors[f"t{bits}g32"].sum() < found.errors[f"tq{bits}g32"].sum()
