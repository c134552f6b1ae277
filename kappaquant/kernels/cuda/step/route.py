"""The router of a mixture of experts in one kernel: logits, softmax, top-k, and other small products of the same input.

The truth is torch: ``F.linear`` rounds the logits to 16 bits, softmax in float32, ``torch.topk``, and where asked for the
chosen probabilities are divided by their sum. Among equal logits the lowest expert is taken first; torch.topk promises no
order.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from kappaquant.errors import UnsupportedError
from kappaquant.kernels.cuda import nvrtc
from kappaquant.kernels.cuda.arguments import KINDS
from kappaquant.kernels.cuda.step import dense

NAME = "route"
MOST_EXPERTS, MOST_CHOSEN, _MOST_TOKENS = 1024, 64, 128
_WARPS = 16  # of route.cu


class _Route(ctypes.Structure):
    _fields_ = (
        ("parts", dense.Rows * dense.MOST_WEIGHTS), ("inputs", dense.Tokens), ("count", ctypes.c_int),
        ("experts", ctypes.c_int), ("top_k", ctypes.c_int), ("normalize", ctypes.c_int), ("index", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
    )  # fmt: skip


nvrtc.declare("step/route.cu", dense.Rows, dense.Tokens, _Route)


def refusal(x: Tensor, weight: Tensor, top_k: int, others: Sequence[Tensor] = ()) -> str | None:
    """Why this can not be routed, or None."""
    reason = dense.refusal(x, [weight, *others])
    if reason:
        return reason
    if weight.shape[0] > MOST_EXPERTS:
        return f"up to {MOST_EXPERTS} experts, got {weight.shape[0]}"
    if not 1 <= top_k <= min(MOST_CHOSEN, weight.shape[0]):
        return f"top_k must be 1 to {min(MOST_CHOSEN, weight.shape[0])}, got {top_k}"
    if x.shape[0] > _MOST_TOKENS:
        return f"up to {_MOST_TOKENS} tokens, got {x.shape[0]}"
    return None


def route(
    x: Tensor,
    weight: Tensor,
    top_k: int,
    normalize: bool = True,
    others: Sequence[Tensor] = (),
    *,
    early: bool = False,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(experts int64 [M, top_k], their weights [M, top_k] in the dtype of x, [x times each of ``others``]).

    Launches on one device share what they wait on: those that may overlap must wait for each other.

    Args:
        x: float16 or bfloat16 [M, hidden].
        weight: [E, hidden].
        normalize: divide the chosen probabilities by their sum.
        others: up to three weights [n, hidden], as the gate of a shared expert.
        early: start while earlier kernels run; none of them may still be writing the weights.

    Raises:
        UnsupportedError: see ``refusal``.
    """
    reason = refusal(x, weight, top_k, others)
    if reason:
        raise UnsupportedError(f"{NAME}: {reason}")
    tokens, experts = x.shape[0], weight.shape[0]
    index = torch.empty(tokens, top_k, dtype=torch.int64, device=x.device)
    chosen = torch.empty(tokens, top_k, dtype=x.dtype, device=x.device)
    out = [torch.empty(tokens, w.shape[0], dtype=x.dtype, device=x.device) for w in others]
    if not tokens:
        return index, chosen, out
    parameters = _Route(
        inputs=dense.Tokens(x.data_ptr(), x.stride(0), *x.shape), count=1 + len(out), experts=experts, top_k=top_k,
        normalize=normalize, index=index.data_ptr(), weights=chosen.data_ptr(),
    )  # fmt: skip
    blocks = dense.place(parameters.parts, [weight, *others], (), [weight, *out], 8)
    each = 1 << max(0, -(-experts // 32) - 1).bit_length()
    instance = f"route<{KINDS[x.dtype]}, {each}, {str(tokens > 8).lower()}>"
    run = nvrtc.kernel("step/route.cu", instance, x.device.index)
    run((blocks, -(-tokens // 16), 1), 32 * _WARPS, parameters, early)
    return index, chosen, out
