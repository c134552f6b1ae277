"""Kernels of kappaquant/kernels/cuda on a CPU: the same sources, compiled by g++ with what only GPUs have restated (cuda_on_host.h).

``kernels`` takes the place of ``nvrtc.kernel``, so that tests run launches as they are, on tensors of a CPU. It knows nothing of clusters of
blocks, nor of what runs beside what: tests with a GPU do.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from importlib import resources
from pathlib import Path

import pytest

_SOURCES = resources.files("kappaquant.kernels.cuda")
_SUPPORT = Path(__file__).parent
# an assembler statement by what occurs in it -> what a CPU does
_CALLS = {
    "lop3": "out = host_logic(TABLE & 0xff, a, b, c);",
    "prmt": "out = host_permute(a, b, selector);",
    "fma.rn.f16x2": "out = host_high_half(selectors);",
    "mma.sync": "host_mma(d, a0, a1, a2, a3, b0, b1);",
    "mad.wide": "at = base + (unsigned long long)i * bytes;",
    "cvt.f32.f16": "out = host_from_half(v);",
    "cvt.rn.f16x2.f32": "both = host_half(a) | (u32)host_half(b) << 16;",
    "cvt.rn.bf16x2.f32": "both = host_bfloat(a) | (u32)host_bfloat(b) << 16;",
    "cvt.rn.f16.f32": "bits = host_half(v);",
    "cvt.rn.bf16.f32": "bits = host_bfloat(v);",
    'asm("" ': "",
    "fence.mbarrier_init": "",
    "mul.f16x2": "out = host_products(pair, norm);",
}
SHARED_BYTES = 256 << 10
_STATEMENT = re.compile(r'asm(?: volatile)?\((?:"[^"]*"|[^;"])*\);')
needs_host_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def source(name: str) -> str:
    """A kernel's file or header as g++ takes it."""
    if name in ("launch.cuh", "wgmma.cuh"):
        return "#pragma once\n"

    def call(found: re.Match[str]) -> str:
        (known,) = {text for key, text in _CALLS.items() if key in found[0]}
        return known

    text = _STATEMENT.sub(call, _SOURCES.joinpath(name).read_text())
    memory = r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];"
    text = re.sub(memory, r"\1* \2 = reinterpret_cast<\1*>(host_shared);", text)
    return text.replace("__shared__", "static")


def library(folder: Path, text: str, includes: tuple[str, ...]) -> ctypes.CDLL:
    """C++ that includes cuda_on_host.h and some of the kernels' files."""
    for name in includes:
        (folder / name).write_text(source(name))
    (folder / "host.cpp").write_text(f'#include "cuda_on_host.h"\n{text}')
    made = folder / "host.so"
    options = [
        "-std=c++17",
        "-O1",
        "-ffp-contract=off",
        "-D__CUDA_ARCH__=900",
        "-w",
        "-fPIC",
        "-shared",
        f"-I{folder}",
        f"-I{_SUPPORT}",
    ]
    subprocess.run(["g++", *options, folder / "host.cpp", "-o", made], check=True)
    return ctypes.CDLL(str(made))


HEADERS = ("numbers.cuh", "launch.cuh", "trellis.cuh", "decode.cuh")
_MORE = ("product.cuh", "wgmma.cuh", "gemm.cuh", "experts.cuh", "groups.cuh", "trellis_rings.cuh", "trellis_search.cuh")


# of a kernel, by its name
_PARAMETERS = {
    "linear": "Linear", "rotate": "Rotate", "gate_up": "GateUp", "down": "Down", "sort_experts": "Sort", "combine": "Combine",
    "gemm": "Gemm", "int8_gemm": "Gemm", "encode": "Encode", "decoded": "Decoded", "feedback": "Feedback",
    "trellis_encode": "TrellisEncode", "trellis_norms": "TrellisNorms", "trellis_feedback": "TrellisFeedback",
}  # fmt: skip


def kernels(folder: Path) -> Callable[..., Callable[..., None]]:
    """In place of ``nvrtc.kernel``, for the kernels of ``_PARAMETERS``."""

    @cache
    def built(file: str, instance: str) -> Callable[..., None]:
        inside = folder / re.sub(r"\W+", "_", instance)
        inside.mkdir(exist_ok=True)
        parameters = _PARAMETERS[instance.partition("<")[0]]
        text = f'#include "{file}"\nextern "C" void run(const unsigned* grid, int threads, const {parameters}* p) {{\n'
        text += f"    launch(grid, threads, [&] {{ {instance}(*p); }});\n}}\n"
        run = library(inside, text, (*HEADERS, *_MORE, file)).run

        def start(grid: tuple[int, int, int], threads: int, block: ctypes.Structure, early: bool = False) -> None:
            run((ctypes.c_uint * 3)(*grid), threads, ctypes.byref(block))

        return start

    def kernel(file: str, instance: str, device: int | None, shared_bytes: int = 0) -> Callable[..., None]:
        assert shared_bytes <= SHARED_BYTES
        return built(file, instance)

    return kernel
