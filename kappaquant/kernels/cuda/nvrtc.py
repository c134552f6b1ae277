"""CUDA C++ compiled when first used: no compiler on the user's machine but NVRTC, which comes with CUDA builds of torch.

Kernels are templates; each instance is compiled when a process first needs it.
"""

from __future__ import annotations

import ctypes
import threading
from functools import cache
from importlib import resources
from typing import Any

import torch

from kappaquant.errors import UnsupportedError
from kappaquant.kernels.cuda import cubins

_FOLDER = resources.files("kappaquant.kernels.cuda")
_HEADERS = (
    "numbers.cuh",
    "groups.cuh",
    "trellis_rings.cuh",
    "launch.cuh",
    "experts.cuh",
    "trellis.cuh",
    "decode.cuh",
    "product.cuh",
    "wgmma.cuh",
    "gemm.cuh",
    "trellis_search.cuh",
    "step/step.cuh",
    "step/dense.cuh",
)
_EXACT = (b"--fmad=false",)  # codes are the codec's only where each product is rounded by itself
_OPTIONS = dict.fromkeys(("encode.cu", "trellis_encode.cu", "trellis_norms.cu"), _EXACT)
_STRUCTS: dict[str, tuple[type[ctypes.Structure], ...]] = {}
_LOCK = threading.Lock()


def declare(file: str, *structs: type[ctypes.Structure]) -> None:
    """Say which parameter blocks a .cu file takes: a kernel whose struct of that name (without our leading underscore) has another
    size than the one here does not compile."""
    _STRUCTS[file] = structs


@cache
def unavailable() -> str | None:
    """Why kernels can not be compiled here, or None."""
    try:
        from cuda.bindings import nvrtc

        _check(nvrtc.nvrtcVersion())
    except ImportError as problem:
        return f"cuda-bindings is not installed ({problem}); install kappaquant[gpu]"
    except RuntimeError as problem:  # the library is looked for at the first call
        return f"NVRTC can not be loaded ({problem}); install cuda-bindings of the CUDA version of torch, {torch.version.cuda}"
    return None


class Kernel:
    """One compiled instance of a kernel template, bound to the device it was compiled for."""

    def __init__(self, cubin: bytes, name: bytes, device: int, shared_bytes: int) -> None:
        from cuda.bindings import driver

        self._device = device
        self._cubin = cubin  # the driver reads it lazily
        module = _check(driver.cuModuleLoadData(cubin))
        self._function = _check(driver.cuModuleGetFunction(module, name))
        self._shared = shared_bytes
        if shared_bytes > 48 << 10:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _check(driver.cuFuncSetAttribute(self._function, attribute, shared_bytes))
        self._driver = driver
        self._overlaps = torch.cuda.get_device_capability(device) >= (9, 0)

    def __call__(
        self, grid: tuple[int, int, int], threads: int, parameters: ctypes.Structure, early: bool = False
    ) -> None:
        """Launch on torch's current stream of the device; the parameters are copied before this returns.

        Args:
            early: the kernel may start while earlier ones run, for it waits for them itself (launch.cuh).
        """
        if torch.cuda.current_device() != self._device:  # asked first, for a change costs more than the launch
            with torch.cuda.device(self._device):
                return self(grid, threads, parameters, early)
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
        config = self._driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = self._shared
        config.hStream = torch._C._cuda_getCurrentRawStream(self._device)  # current_stream() makes an object each time
        if early and self._overlaps:
            config.attrs, config.numAttrs = [_early()], 1
        _check(self._driver.cuLaunchKernelEx(config, self._function, ctypes.addressof(arguments), 0))


@cache
def _early() -> Any:
    from cuda.bindings import driver

    attribute, value = driver.CUlaunchAttribute(), driver.CUlaunchAttributeValue()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    value.programmaticStreamSerializationAllowed = 1
    attribute.value = value
    return attribute


@cache
def kernel(file: str, instance: str, device: int, shared_bytes: int = 0) -> Kernel:
    """The instance such as ``decoded<3, 128>`` of a template in ``cuda/<file>``, for that CUDA device.

    Raises:
        UnsupportedError: the compiler refused it; holds its log.
    """
    major, minor = torch.cuda.get_device_capability(device)
    with _LOCK, torch.cuda.device(device):
        arch = architecture(major, minor)
        code, name = cubins.kept(_inputs(file, instance, arch), lambda: compiled(file, instance, arch))
        return Kernel(code, name, device, shared_bytes)


def _inputs(file: str, instance: str, arch: str) -> list[str]:
    """All that machine code depends on."""
    from cuda.bindings import nvrtc

    compiler = str(_check(nvrtc.nvrtcVersion()))
    return [compiler, arch, instance, str(_OPTIONS.get(file, ())), _source(file), *map(_read, _HEADERS)]


def architecture(major: int, minor: int) -> str:
    """The compiler's name of a compute capability; Hopper's with the instructions that only Hopper has."""
    return "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"


def compiled(file: str, instance: str, arch: str) -> tuple[bytes, bytes]:
    """(machine code, mangled name), in 0.1 to 0.5 s; needs no GPU."""
    from cuda.bindings import nvrtc

    source, headers = _source(file), [_read(header) for header in _HEADERS]
    program = _check(
        nvrtc.nvrtcCreateProgram(
            source.encode(),
            file.encode(),
            len(headers),
            [h.encode() for h in headers],
            [h.rpartition("/")[2].encode() for h in _HEADERS],
        )
    )
    try:
        _check(nvrtc.nvrtcAddNameExpression(program, instance.encode()))
        options = [f"--gpu-architecture={arch}".encode(), b"--std=c++17", b"--device-as-default-execution-space"]
        options += _OPTIONS.get(file, ())
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program))
            _check(nvrtc.nvrtcGetProgramLog(program, log))
            raise UnsupportedError(
                f"{file}: {instance} does not compile for {arch}:\n{log.decode(errors='replace').rstrip(chr(0))}"
            )
        name = bytes(_check(nvrtc.nvrtcGetLoweredName(program, instance.encode())))
        cubin = b" " * _check(nvrtc.nvrtcGetCUBINSize(program))
        _check(nvrtc.nvrtcGetCUBIN(program, cubin))
    finally:
        _check(nvrtc.nvrtcDestroyProgram(program))
    return cubin, name


def _source(file: str) -> str:
    """A file, and the sizes that its parameter blocks must have."""
    checks = [
        f'static_assert(sizeof({name}) == {ctypes.sizeof(struct)}, "{file}: {name} is not what its launches pass");'
        for struct in _STRUCTS.get(file, ())
        for name in [struct.__name__.lstrip("_")]
    ]
    return "\n".join([_read(file), *checks, ""])


@cache
def _read(file: str) -> str:
    return (_FOLDER / file).read_text()


def _check(result: tuple[Any, ...]) -> Any:
    """The value of a call of the CUDA bindings. Raises RuntimeError, with the call's own name for the error."""
    status, *values = result
    if int(status) != 0:
        raise RuntimeError(f"CUDA: {status.name} ({int(status)})")
    return values[0] if len(values) == 1 else tuple(values)
