"""Timing on a GPU, and the products that codebook kernels are compared with, each as its own library runs it.

A time is the median of replays of a CUDA graph that goes through several copies of its weight, together four times the L2
cache or more, so that each copy is read from memory. Replays are counted once the card has been at it for a while: large
products bring it to its power limit, and it is faster in the first milliseconds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 128
DEVICE = "cuda"
WARM_SECONDS = 0.25


def replay(calls: Sequence[Callable[[], Any]], repeats: int = 30) -> float:
    """Median microseconds of one call, from a graph of all of them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # what the calls read is written there
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()

    def milliseconds(replays: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    milliseconds(max(1, round(1e3 * WARM_SECONDS / milliseconds(1))))
    return statistics.median(milliseconds(1) for _ in range(repeats)) * 1e3 / len(calls)


def copies(nbytes: int) -> int:
    """Copies of a weight that the L2 cache can not hold."""
    cache: int = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    return max(2, -(-4 * cache // nbytes))


def read_ceiling() -> float:
    """TB/s of summing 4 GB, the fastest plain read."""
    data = torch.ones(1 << 30, dtype=torch.int32, device=DEVICE)
    return data.nbytes / replay([partial(data.sum, dtype=torch.int32)] * 3) / 1e6


def matmul_ceiling() -> float:
    """TFLOP/s of cuBLAS on 8192 x 8192 x 8192 in bf16."""
    a, b = activations(8192, 8192), activations(8192, 8192)
    return 2 * 8192**3 / replay([partial(torch.mm, a, b)] * 3) / 1e6


def activations(m: int, k: int) -> torch.Tensor:
    return torch.randn(m, k, dtype=torch.bfloat16, device=DEVICE)


def bf16(n: int, k: int, m: int) -> float:
    weights = [torch.randn(n, k, dtype=torch.bfloat16, device=DEVICE) for _ in range(copies(2 * n * k))]
    x = activations(m, k)
    return replay([partial(torch.nn.functional.linear, x, w) for w in weights])


def tinygemm(n: int, k: int, m: int) -> float:
    """torch's int4 product in groups of 128."""
    weights = []
    for _ in range(copies(n * k // 2)):
        raw = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=DEVICE)
        scales = torch.rand(k // GROUP, n, 2, dtype=torch.bfloat16, device=DEVICE)
        weights.append((torch.ops.aten._convert_weight_to_int4pack(raw, 8), scales))
    x = activations(m, k)
    return replay([partial(torch.ops.aten._weight_int4pack_mm, x, w, GROUP, s) for w, s in weights])


def gemlite(n: int, k: int, m: int) -> float:
    from gemlite.helper import A16W4_HQQ_INT  # type: ignore[import-not-found,unused-ignore]

    layers = []
    for _ in range(copies(n * k // 2)):
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=DEVICE)
        scales = torch.rand(n * k // GROUP, 1, dtype=torch.bfloat16, device=DEVICE)
        zeros = torch.full_like(scales, 8)
        layers.append(A16W4_HQQ_INT(device=DEVICE, dtype=torch.bfloat16).from_weights(codes, scales, zeros))
    x = activations(m, k)
    return replay([partial(layer, x) for layer in layers])


def nf4(n: int, k: int, m: int) -> float:
    from bitsandbytes import functional, matmul_4bit  # type: ignore[import-not-found,unused-ignore]

    packed = [
        functional.quantize_4bit(torch.randn(n, k, dtype=torch.bfloat16, device=DEVICE), quant_type="nf4")
        for _ in range(copies(n * k // 2))
    ]
    x = activations(m, k)
    return replay([partial(matmul_4bit, x, w.t(), state) for w, state in packed])


def grouped_mm(gate_up: Tensor, down: Tensor, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """Routed experts in bf16 as transformers' grouped_mm computes them: sorted by expert, two grouped products, put back.

    Shapes: gate_up [E, 2 * inner, hidden], down [E, hidden, inner], x [tokens, hidden], experts and weights [tokens, top_k].
    """
    tokens, top_k = experts.shape
    slots = experts.flatten()
    order = slots.argsort()
    counts = torch.zeros(gate_up.shape[0], dtype=torch.int32, device=x.device)
    counts.scatter_add_(0, slots, torch.ones_like(slots, dtype=torch.int32))
    ends = counts.cumsum(0, dtype=torch.int32)
    gate, up = torch._grouped_mm(x[order // top_k], gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
    out = torch._grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends) * weights.flatten()[order, None]
    return torch.empty_like(out).index_copy_(0, order, out).view(tokens, top_k, -1).sum(1)
