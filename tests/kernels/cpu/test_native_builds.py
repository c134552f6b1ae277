"""The native core where Python does not run it: built for ARM and emulated, and built with sanitizers, each against the codec."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kappaquant.formats import codec
from kappaquant.formats.codebook import BITS, CodebookFormat
from kappaquant.formats.signs import GROUP_SIZES, signs

pytestmark = pytest.mark.slow

DRIVER = Path(__file__).parents[2] / "support" / "native_driver.cpp"
CORE = Path(codec.__file__).parents[1] / "kernels" / "cpu"
EXPERTS, K, INNER = 3, 2, 40


class Build(NamedTuple):
    """A compiler with its options, and what runs its programs."""

    compiler: str
    options: tuple[str, ...]
    run: tuple[str, ...]


BUILDS = {
    "neon": Build("aarch64-linux-gnu-g++", ("-O2",), ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu")),
    "sanitizers": Build("g++", ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"), ()),
}


@pytest.fixture(scope="module", params=BUILDS)
def command(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What runs the driver."""
    build = BUILDS[request.param]
    for needed in (build.compiler, *build.run[:1]):
        if not shutil.which(needed):
            pytest.skip(f"{needed} is not installed")
    program = tmp_path_factory.mktemp(request.param) / "driver"
    sources = [str(path) for path in (DRIVER, *CORE.glob("*.cpp"))]
    options = ["-std=c++17", "-Wno-psabi", "-pthread", f"-I{CORE}", *build.options]
    subprocess.run([build.compiler, *options, *sources, "-o", str(program)], check=True)
    return [*build.run, str(program)]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(fmt: CodebookFormat, weight: Tensor) -> tuple[bytes, Tensor]:
    """A weight [experts, rows, in] as the driver reads it, and as the codec does."""
    parts = codec.encode(weight, fmt, "fast").parts
    experts, rows, inputs = weight.shape
    sizes = struct.pack("<6q", experts, rows, inputs, fmt.groups(inputs), fmt.bits, fmt.group_size)
    floats = [*fmt.codebook, *(sign for half in signs(fmt.group_size) for sign in half)]
    packed, norms = (part.numpy().tobytes() for part in parts.values())
    return sizes + packed + norms + struct.pack(f"<{len(floats)}f", *floats), fmt.decode(parts, inputs)


@pytest.mark.parametrize("fmt", [CodebookFormat(b, g) for b in BITS for g in GROUP_SIZES], ids=lambda fmt: fmt.id)
def test_products(command: list[str], fmt: CodebookFormat) -> None:
    inputs, tokens = 2 * fmt.group_size - 9, 2 if fmt.bits % 2 else 11
    one, gate_up = stored(fmt, numbers(EXPERTS, 2 * INNER, inputs))
    other, down = stored(CodebookFormat(4, 32), numbers(EXPERTS, inputs, INNER, seed=1))
    x, bias = numbers(tokens, inputs, seed=2), numbers(2 * INNER, seed=3)
    index = torch.randint(-1, EXPERTS + 1, (tokens, K), generator=torch.Generator().manual_seed(4))
    shares = numbers(tokens, K, seed=5).softmax(-1)
    given = (
        one + other + struct.pack("<2q", tokens, K) + b"".join(t.numpy().tobytes() for t in (x, bias, index, shares))
    )
    ran = subprocess.run(command, input=given, capture_output=True)
    assert ran.returncode == 0, ran.stderr.decode()
    found = torch.frombuffer(bytearray(ran.stdout), dtype=torch.float32)
    grouped, block = torch.zeros(tokens, K, 2 * INNER), torch.zeros(tokens, inputs)
    for token in range(tokens):
        for slot, expert in enumerate(index[token].tolist()):
            if 0 <= expert < EXPERTS:
                grouped[token, slot] = gate_up[expert] @ x[token]
                gate, up = grouped[token, slot].chunk(2)
                block[token] += shares[token, slot] * (down[expert] @ (torch.nn.functional.silu(gate) * up))
    expected = [x @ gate_up[0].T + bias, grouped, block]
    made = found.split([part.numel() for part in expected] * 2)
    for number, part in enumerate(made):
        truth = expected[number % 3].flatten()
        error = float((part - truth).norm() / truth.norm())
        assert error < (0.03 if number < 3 else 2e-6 * inputs**0.5), number
