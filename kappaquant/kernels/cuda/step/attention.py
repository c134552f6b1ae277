"""Attention of one new token per sequence over a static cache, in one kernel: norms, rotary embedding, cache, gate.

The truth is transformers' torch form: query and key norms over a head, rotary embedding of the first dimensions of a head,
softmax attention over slots ``start`` to ``position``, times sigmoid(gate). Scores and sums are float32; probabilities are
rounded to 16 bits before they meet the values, as eager attention rounds them.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kappaquant.errors import UnsupportedError
from kappaquant.kernels.cuda import device as gpu
from kappaquant.kernels.cuda import nvrtc
from kappaquant.kernels.cuda.arguments import KINDS, address

NAME = "attention"
HEAD_DIMS = (32, 64, 128, 256)
_CHUNK, _HEADS = 64, 8  # slots and query heads of a block: attention.cu
_COUNTERS = 16384
_CLUSTER = 8


class _Attention(ctypes.Structure):
    _fields_ = (
        ("q", ctypes.c_void_p), ("k", ctypes.c_void_p), ("v", ctypes.c_void_p), ("q_gain", ctypes.c_void_p),
        ("k_gain", ctypes.c_void_p), ("cos", ctypes.c_void_p), ("sin", ctypes.c_void_p), ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p), ("position", ctypes.c_void_p), ("start", ctypes.c_void_p), ("out", ctypes.c_void_p),
        ("sums", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("q_stride", ctypes.c_longlong),
        ("k_stride", ctypes.c_longlong), ("v_stride", ctypes.c_longlong), ("rotary_stride", ctypes.c_longlong),
        ("query_heads", ctypes.c_int), ("kv_heads", ctypes.c_int), ("slots", ctypes.c_int), ("rotary", ctypes.c_int),
        ("gated", ctypes.c_int), ("norm", ctypes.c_int), ("start_long", ctypes.c_int), ("epsilon", ctypes.c_float),
        ("scaling", ctypes.c_float),
    )  # fmt: skip


nvrtc.declare("step/attention.cu", _Attention)


def refusal(
    dtype: torch.dtype, device: torch.device, batch: int, query_heads: int, kv_heads: int, head_dim: int, rotary: int
) -> str | None:
    """Why attention of these sizes can not take this step, or None; ``rotary`` dimensions of a head are rotated."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"activations and cache must be float16 or bfloat16, got {dtype}"
    if head_dim not in HEAD_DIMS:
        return f"head dimensions are {', '.join(map(str, HEAD_DIMS))}, got {head_dim}"
    if kv_heads < 1 or query_heads % kv_heads:
        return f"{query_heads} query heads are no multiple of {kv_heads} key-value heads"
    if rotary % 2 or not 0 <= rotary <= head_dim:
        return f"an even number of up to {head_dim} dimensions can be rotated, got {rotary}"
    if batch * query_heads * _CLUSTER > _COUNTERS:
        return f"{batch} sequences of {query_heads} query heads are more than {_COUNTERS // _CLUSTER}"
    return gpu.refusal(device)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    position: Tensor,
    scaling: float,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    one_plus_norm: bool = True,
    eps: float = 1e-6,
    gated: bool = True,
    start: Tensor | None = None,
) -> Tensor:
    """[B, query_heads * D]; the token's key and value are written at ``position`` of both caches.

    Query heads of a key-value head share its reads, eight at a time. The launch covers the cache's capacity and its blocks
    leave where ``position`` ends. Launches on one device share counters: those that may overlap must wait for each other.

    Args:
        q: [B, query_heads * D], or [B, query_heads * 2 * D] if ``gated``: per head its query, then its gate.
        k, v: [B, kv_heads * D]. Like q, columns of a wider tensor will do.
        cos, sin: [B, rotary] or [1, rotary] for all, rotary dimensions of a head at its front; rotary may be 0.
        key_cache, value_cache: [B, kv_heads, L, D], contiguous.
        position: int64, one element on the device, below L: what lies there is not checked.
        scaling: of scores.
        q_norm, k_norm: [D] of RMS norms over a head, both or none; ``one_plus_norm`` for those that multiply by 1 + weight.
        start: int32 or int64 [B], slots before which are padding, at most ``position``.

    Raises:
        UnsupportedError: see ``refusal``, or a tensor's shape, dtype, strides or device do not fit the others.
    """
    batch, kv_heads, slots, dim = key_cache.shape
    kind, device = q.dtype, q.device
    query_heads = q.shape[1] // (dim * (2 if gated else 1))
    rotary = cos.shape[-1]
    reason = refusal(kind, device, batch, query_heads, kv_heads, dim, rotary)
    rows = {"q": (q, query_heads * dim * (2 if gated else 1)), "k": (k, kv_heads * dim), "v": (v, kv_heads * dim)}
    for name, (tensor, width) in rows.items():
        aligned = tensor.stride(0) % 8 == 0 and tensor.data_ptr() % 16 == 0
        if tensor.shape != (batch, width) or tensor.stride(1) != 1 or not aligned or _place(tensor) != (kind, device):
            reason = (
                reason or f"{name} must be {kind} [{batch}, {width}], rows aligned to 16 bytes, got {_told(tensor)}"
            )
    for name, tensor in {"cos": cos, "sin": sin}.items():
        if (
            tensor.shape not in ((batch, rotary), (1, rotary))
            or not tensor.is_contiguous()
            or _place(tensor) != (kind, device)
        ):
            reason = reason or f"{name} must be contiguous {kind} [{batch} or 1, {rotary}], got {_told(tensor)}"
    if cos.shape != sin.shape:
        reason = reason or f"cos is {list(cos.shape)} and sin {list(sin.shape)}"
    for name, tensor in {"key_cache": key_cache, "value_cache": value_cache}.items():
        if tensor.shape != key_cache.shape or not tensor.is_contiguous() or _place(tensor) != (kind, device):
            reason = reason or f"{name} must be contiguous {kind} {list(key_cache.shape)}, got {_told(tensor)}"
    if (q_norm is None) != (k_norm is None):
        reason = reason or "q_norm and k_norm come together"
    for name, norm in {"q_norm": q_norm, "k_norm": k_norm}.items():
        if norm is not None and (norm.shape != (dim,) or not norm.is_contiguous() or _place(norm) != (kind, device)):
            reason = reason or f"{name} must be {kind} [{dim}], got {_told(norm)}"
    if position.dtype != torch.int64 or position.numel() != 1 or position.device != device:
        reason = reason or f"position must be one int64 on {device}, got {_told(position)}"
    if start is not None and (
        start.shape != (batch,) or start.dtype not in (torch.int32, torch.int64) or start.device != device
    ):
        reason = reason or f"start must be int32 or int64 [{batch}] on {device}, got {_told(start)}"
    if reason:
        raise UnsupportedError(f"{NAME}: {reason}")
    out = torch.empty(batch, query_heads * dim, dtype=kind, device=device)
    if not batch:
        return out
    cluster = _CLUSTER if gpu.has_clusters(device) else 1
    clusters = -(-slots // (_CHUNK * cluster))
    per_kv = query_heads // kv_heads
    heads = kv_heads * -(-per_kv // _HEADS)
    sums = torch.empty(batch * heads * clusters * _HEADS * (dim + 2) if clusters > 1 else 0, device=device)
    scales = sums[batch * heads * clusters * _HEADS * dim :] if clusters > 1 else sums
    run = nvrtc.kernel("step/attention.cu", f"attention{cluster}<{KINDS[kind]}, {dim}>", device.index)
    run(
        (clusters * cluster, heads, batch), 128,
        _Attention(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), address(q_norm), address(k_norm), cos.data_ptr(), sin.data_ptr(),
            key_cache.data_ptr(), value_cache.data_ptr(), position.data_ptr(), address(start), out.data_ptr(),
            sums.data_ptr(), scales.data_ptr(), q.stride(0), k.stride(0), v.stride(0),
            rotary if cos.shape[0] == batch else 0, query_heads, kv_heads, slots, rotary, gated,
            2 if one_plus_norm else 1, start is not None and start.dtype == torch.int64, eps, scaling,
        ),
        early=True,
    )  # fmt: skip
    return out


def _place(tensor: Tensor) -> tuple[torch.dtype, torch.device]:
    return tensor.dtype, tensor.device


def _told(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
