"""Compilation: parameter blocks of launches and of kernels have one size, or nothing is compiled."""

from __future__ import annotations

import ctypes
import inspect
import pkgutil
from importlib import import_module

import pytest
from nvrtc_here import needs_compiler

from kappaquant.errors import UnsupportedError
from kappaquant.kernels import cuda
from kappaquant.kernels.cuda import nvrtc

MODULES = [import_module(found.name) for found in pkgutil.walk_packages(cuda.__path__, f"{cuda.__name__}.")]
INSTANCES = {
    "encode.cu": "encode<64, 0>",
    "decoded.cu": "decoded<3, 128>",
    "experts.cu": "down<4, 0, 128, false>",
    "feedback.cu": "feedback<3, 128, true>",
    "gemm.cu": "gemm<3, 0, 0, 0, 128, false, 64, 2, 1, 4, 1>",
    "int8_gemm.cu": "int8_gemm<3, 0, 0, 0, 128, false, 64, 1, 1, 4, 2>",
    "linear.cu": "linear<3, 0, 0, 0, 128, false, 1, 1, 4, 16, 0, false>",
    "rotate.cu": "rotate<128, 2, false, 0, false>",
    "sort_experts.cu": "sort_experts<1>",
    "trellis_encode.cu": "trellis_encode<32, 2, 0>",
    "step/attention.cu": "attention<128, 4, 2>",
    "step/deltanet.cu": "",
    "step/dense.cu": "",
    "step/route.cu": "",
    "trellis_feedback.cu": "trellis_feedback<3, 128, 24, 8>",
    "trellis_norms.cu": "trellis_norms<128, 3>",
}


def test_every_parameter_block_is_declared() -> None:
    declared = {struct for structs in nvrtc._STRUCTS.values() for struct in structs}
    for module in MODULES:
        for name, value in inspect.getmembers(module, inspect.isclass):
            if issubclass(value, ctypes.Structure) and value.__module__ == module.__name__:
                assert value in declared, f"{module.__name__}.{name}"
    assert nvrtc._STRUCTS.keys() == INSTANCES.keys()
    sources = {path.name for path in nvrtc._FOLDER.rglob("*.cu")}  # type: ignore[attr-defined]
    assert {file.rpartition("/")[2] for file in nvrtc._STRUCTS} == sources


@needs_compiler
@pytest.mark.parametrize("file", INSTANCES)
def test_a_block_of_another_size_does_not_compile(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for struct in nvrtc._STRUCTS[file]:
        longer = type(
            struct.__name__, (ctypes.Structure,), {"_fields_": (*struct._fields_, ("more", ctypes.c_longlong))}
        )
        monkeypatch.setitem(nvrtc._STRUCTS, file, (longer,))
        with pytest.raises(
            UnsupportedError, match=rf"{file}: {struct.__name__.lstrip('_')} is not what its launches pass"
        ):
            nvrtc.compiled(file, INSTANCES[file] or "0", "sm_90a")
