"""A quantized checkpoint for layers of vLLM, and the process group that they want; nothing here imports vLLM by itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# tests on CPUs compare with dequantized weights; engines are processes of their own, which read it when they start
if not torch.cuda.is_available():
    os.environ.setdefault("KAPPAQUANT_ACTIVATIONS", "float32")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vllm_layers import quantized

    return quantized(tmp_path_factory.mktemp("strict"))


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    from vllm_layers import one_process

    with one_process():
        yield


@pytest.fixture
def config(folder: Path) -> Any:
    from vllm_layers import config_of

    return config_of(folder)
