"""What is rounded together: how much of it, and one thread on CPUs whatever the process has."""

from __future__ import annotations

import pytest
import torch

from kappaquant.errors import NonFiniteError
from kappaquant.formats.codebook import CodebookFormat
from kappaquant.quantizing.calibration.stacks import Stack, matrices_at_once, round_stack
from kappaquant.quantizing.rounding import feedback

FMT = CodebookFormat(3, 32)


def test_a_stack_fits_its_device_and_holds_at_least_one() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert matrices_at_once(1 << 20, 1 << 14, cpu) == 1
    assert matrices_at_once(64, 64, cpu) > 100
    flagship = matrices_at_once(1024, 2048, cuda)  # its experts
    assert 8 <= flagship <= 64
    assert flagship * (48 * 2048 * 2048 + 48 * 1024 * 2048) <= 4 << 30


@pytest.mark.parametrize("threads", [1, 2])
def test_one_thread_rounds_and_the_process_keeps_its_own(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = torch.get_num_threads(), []
    encode = feedback.encode

    def watch(*args: object) -> feedback.Rounded:
        seen.append(torch.get_num_threads())
        return encode(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(feedback, "encode", watch)
    torch.set_num_threads(threads)
    try:
        made = round_stack(Stack(torch.randn(2, 8, 64), torch.eye(64).repeat(2, 1, 1), FMT, ["a", "b"]))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert seen == [1]
    assert made.squared_errors.shape == (2, 8)
    with pytest.raises(NonFiniteError, match="b: the calibration text gives its inputs a mean square of 0"):
        round_stack(Stack(torch.randn(2, 8, 64), torch.stack([torch.eye(64), torch.zeros(64, 64)]), FMT, ["a", "b"]))
