"""One token of GatedDeltaNet in one kernel: convolution, delta rule, gated norm, both states in place.

The truth is transformers' torch form (``causal_conv1d_update``, ``torch_recurrent_gated_delta_rule``, ``RMSNormGated``);
values are rounded to the activations' dtype where it rounds them.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kappaquant.errors import UnsupportedError
from kappaquant.kernels.cuda import device as gpu
from kappaquant.kernels.cuda import nvrtc
from kappaquant.kernels.cuda.arguments import KINDS, address

NAME = "deltanet"
HEAD_DIMS = (32, 64, 128, 256)
TAPS = (2, 3, 4)
_COUNTERS = 8192  # of deltanet.cu


class _DeltaNet(ctypes.Structure):
    _fields_ = (
        ("qkv", ctypes.c_void_p), ("z", ctypes.c_void_p), ("a", ctypes.c_void_p), ("b", ctypes.c_void_p),
        ("conv_weight", ctypes.c_void_p), ("conv_bias", ctypes.c_void_p), ("conv_state", ctypes.c_void_p),
        ("state", ctypes.c_void_p), ("a_log", ctypes.c_void_p), ("dt_bias", ctypes.c_void_p), ("gain", ctypes.c_void_p),
        ("out", ctypes.c_void_p), ("qkv_stride", ctypes.c_longlong), ("z_stride", ctypes.c_longlong),
        ("a_stride", ctypes.c_longlong), ("b_stride", ctypes.c_longlong), ("key_heads", ctypes.c_int),
        ("value_heads", ctypes.c_int), ("a_log_kind", ctypes.c_int), ("dt_bias_kind", ctypes.c_int),
        ("gain_kind", ctypes.c_int), ("epsilon", ctypes.c_float),
    )  # fmt: skip


nvrtc.declare("step/deltanet.cu", _DeltaNet)


def refusal(
    dtype: torch.dtype, device: torch.device, batch: int, key_heads: int, value_heads: int, dk: int, dv: int, taps: int
) -> str | None:
    """Why a layer of these sizes can not take this step, or None.

    Args:
        dtype: of activations, convolution and its state.
        dk, dv: dimensions of a key head and a value head.
        taps: width of the convolution.
    """
    if dtype not in KINDS:
        return f"activations must be float32, float16 or bfloat16, got {dtype}"
    if dk not in HEAD_DIMS or dv not in HEAD_DIMS:
        return f"head dimensions are {', '.join(map(str, HEAD_DIMS))}, got {dk} (keys) and {dv} (values)"
    if taps not in TAPS:
        return f"convolutions are {', '.join(map(str, TAPS))} wide, got {taps}"
    if key_heads < 1 or value_heads % key_heads:
        return f"{value_heads} value heads are no multiple of {key_heads} key heads"
    if batch * key_heads > _COUNTERS:
        return f"{batch} sequences of {key_heads} key heads are more than {_COUNTERS}"
    return gpu.refusal(device)


def step(
    mixed_qkv: Tensor,
    z: Tensor,
    a: Tensor,
    b: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    conv_state: Tensor,
    recurrent_state: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    eps: float,
    slices: int | None = None,
    *,
    early: bool = False,
) -> Tensor:
    """The layer's output before its last projection, [B, value_heads * dv]; both states are advanced in place.

    Launches on one device share counters: those that may overlap must wait for each other.

    Args:
        mixed_qkv: [B, conv_dim]; z: [B, value_heads * dv]; a, b: [B, value_heads]. Columns of a wider tensor will do.
        conv_weight: [conv_dim, taps] or [conv_dim, 1, taps]; conv_bias: [conv_dim].
        conv_state: [B, conv_dim, taps], of the activations' dtype.
        recurrent_state: float32 [B, value_heads, dk, dv].
        a_log, dt_bias: [value_heads]; norm_weight: [dv]; in float32 or the activations' dtype.
        slices: blocks per value head, 1, 2 or 4; more than one needs compute capability 9.0. By default more only for the largest heads.

    Raises:
        UnsupportedError: see ``refusal``, or a tensor's shape, dtype, strides or device do not fit the others.
    """
    batch, value_heads, dk, dv = recurrent_state.shape
    conv_dim, taps = conv_state.shape[1:]
    key_heads = (conv_dim - value_heads * dv) // (2 * dk)
    kind, device = mixed_qkv.dtype, mixed_qkv.device
    reason = refusal(kind, device, batch, key_heads, value_heads, dk, dv, taps)
    if reason is None and conv_dim != 2 * key_heads * dk + value_heads * dv:
        reason = f"{conv_dim} channels are not keys, queries and values of {dk} and {value_heads} x {dv}"
    rows = {
        "mixed_qkv": (mixed_qkv, conv_dim),
        "z": (z, value_heads * dv),
        "a": (a, value_heads),
        "b": (b, value_heads),
    }
    for name, (tensor, width) in rows.items():
        if tensor.shape != (batch, width) or tensor.stride(1) != 1 or tensor.dtype != kind or tensor.device != device:
            reason = (
                reason or f"{name} must be {kind} [{batch}, {width}] with neighbouring columns, got {_told(tensor)}"
            )
    whole = {
        "conv_weight": (conv_weight, (conv_weight.numel() // taps, taps), (kind,)),
        "conv_bias": (conv_bias, (conv_dim,), (kind,)),
        "conv_state": (conv_state, (batch, conv_dim, taps), (kind,)),
        "recurrent_state": (recurrent_state, (batch, value_heads, dk, dv), (torch.float32,)),
        "a_log": (a_log, (value_heads,), (kind, torch.float32)),
        "dt_bias": (dt_bias, (value_heads,), (kind, torch.float32)),
        "norm_weight": (norm_weight, (dv,), (kind, torch.float32)),
    }
    for name, (part, shape, kinds) in whole.items():
        if part is None:
            continue
        fits = part.numel() == torch.Size(shape).numel() and part.shape[-1] == shape[-1] and part.is_contiguous()
        if not fits or part.dtype not in kinds or part.device != device:
            reason = reason or f"{name} must be contiguous {kinds[0]} {list(shape)}, got {_told(part)}"
    if conv_weight.shape[0] != conv_dim:
        reason = reason or f"conv_weight is of {conv_weight.shape[0]} channels, not {conv_dim}"
    if reason:
        raise UnsupportedError(f"{NAME}: {reason}")
    out = torch.empty(batch, value_heads * dv, dtype=kind, device=device)
    if not batch:
        return out
    if slices is None:
        slices = 1 if not gpu.has_clusters(device) else _slices(dk, dv)
    run = nvrtc.kernel("step/deltanet.cu", f"deltanet{slices}<{KINDS[kind]}, {dk}, {dv}, {taps}>", device.index)
    run(
        (value_heads * slices, batch, 1), _threads(dk, dv // slices),
        _DeltaNet(
            mixed_qkv.data_ptr(), z.data_ptr(), a.data_ptr(), b.data_ptr(), conv_weight.data_ptr(), address(conv_bias),
            conv_state.data_ptr(), recurrent_state.data_ptr(), a_log.data_ptr(), dt_bias.data_ptr(),
            norm_weight.data_ptr(), out.data_ptr(), mixed_qkv.stride(0), z.stride(0), a.stride(0), b.stride(0),
            key_heads, value_heads, KINDS[a_log.dtype], KINDS[dt_bias.dtype], KINDS[norm_weight.dtype], eps,
        ),
        early,
    )  # fmt: skip
    return out


def _slices(dk: int, dv: int) -> int:
    """Whole heads were measured to be as fast as divided ones at batch 1 and faster above, where a thread can hold its share."""
    return 4 if dk * dv > 1 << 15 else 1


def _threads(dk: int, columns: int) -> int:
    return max(32, min(512, dk * columns // 16))  # as threads_of in deltanet.cu


def _told(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
