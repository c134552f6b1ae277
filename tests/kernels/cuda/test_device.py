"""Which devices the kernels refuse, and why: no GPU is needed to ask."""

from __future__ import annotations

import pytest
import torch

from kappaquant.kernels.cuda import device, nvrtc

CUDA = torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """A card of some compute capability in a machine with a CUDA build of torch and a compiler."""

    def of(capability: tuple[int, int], build: str | None = "12.8") -> None:
        device.refusal.cache_clear()
        monkeypatch.setattr(torch.version, "cuda", build)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some Card")
        monkeypatch.setattr(nvrtc, "unavailable", lambda: None)

    yield of
    device.refusal.cache_clear()


def test_another_device() -> None:
    assert device.refusal(torch.device("cpu")) == "needs an NVIDIA GPU, got a tensor on cpu"


def test_cards(card) -> None:  # type: ignore[no-untyped-def]
    card((7, 5))
    assert device.refusal(CUDA) == "needs compute capability 8.0, Some Card has 7.5"
    card((8, 0))
    assert device.refusal(CUDA) is None
    assert not device.has_clusters(CUDA)
    card((9, 0))
    assert device.refusal(CUDA) is None
    assert device.has_clusters(CUDA)


def test_a_torch_that_has_no_cuda(card) -> None:  # type: ignore[no-untyped-def]
    card((9, 0), build=None)
    assert device.refusal(CUDA) == "needs a CUDA build of torch"


def test_no_compiler(card, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    card((9, 0))
    monkeypatch.setattr(nvrtc, "unavailable", lambda: "NVRTC is not installed")
    assert device.refusal(CUDA) == "NVRTC is not installed"
