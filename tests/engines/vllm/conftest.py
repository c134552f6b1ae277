"""A quantized checkpoint for layers of vLLM, and the process group that they want; nothing here imports vLLM by itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


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
