"""Processes that share a layer: everyone's part reaches the leader, whose errors, deaths and ends are theirs, and theirs its own."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from kappaquant.errors import PlanError, WorkerError
from kappaquant.quantizing.calibration import cards
from kappaquant.quantizing.calibration.cards import Cards, devices, followed


def share(cards: Cards, device: str, numbers: int) -> list[list[int]]:
    """Two layers of numbers, each dealt out."""
    found = []
    for layer in range(2):
        mine = [number for number in range(numbers) if cards.mine(number)]
        found += cards.gather([100 * layer + number for number in mine])
        cards.meet()
    return found


def follow(cards: Cards, device: str, numbers: int) -> None:
    share(cards, device, numbers)


def refuse(cards: Cards, device: str) -> None:
    raise PlanError(f"{device}: no")


def die(cards: Cards, device: str) -> None:
    os._exit(1)


def wait_for_the_leader(cards: Cards, device: str, path: Path) -> None:
    try:
        cards.meet()
    except EOFError:
        path.write_text("the leader is gone")
        raise


def test_every_part_is_done_once_and_reaches_the_leader() -> None:
    with followed(follow, ["cpu", "cpu", "cpu"], 7) as leader:
        assert share(leader, "cpu", 7) == [[0, 3, 6], [1, 4], [2, 5], [100, 103, 106], [101, 104], [102, 105]]


def test_alone() -> None:
    with followed(follow, ["cpu"], 7) as leader:
        assert share(leader, "cpu", 3) == [[0, 1, 2], [100, 101, 102]]


def test_what_a_follower_refuses_the_leader_raises() -> None:
    with followed(refuse, ["cpu", "a device"]) as leader, pytest.raises(PlanError, match="a device: no"):
        leader.gather([])


def test_a_follower_that_is_killed() -> None:
    with (
        followed(die, ["cpu", "cpu"]) as leader,
        pytest.raises(
            WorkerError, match="the process of GPU 1 was killed, perhaps for want of memory; run again to resume"
        ),
    ):
        leader.gather([])


def test_a_follower_ends_with_its_leader(tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt), followed(wait_for_the_leader, ["cpu", "cpu"], tmp_path / "said"):
        raise KeyboardInterrupt
    assert (tmp_path / "said").read_text() == "the leader is gone"
    assert time.monotonic() - begin < cards._PATIENCE


@pytest.mark.parametrize(("asked", "found"), [("cuda", ["cuda:0", "cuda:1"]), ("cuda:1", ["cuda:1"]), ("cpu", ["cpu"])])
def test_which_gpus(asked: str, found: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices(asked) == found
