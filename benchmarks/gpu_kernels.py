"""Codebook products against bf16 and int4 on one GPU: microseconds, TB/s and share of the card's read ceiling.

Every product is replayed from a CUDA graph that goes through several copies of its weight, together twice the L2 cache or
more, so that each is read from memory; a row is the median of the replays. Products are timed alone; the input's rotation
is a row of its own, and `with input` their sum. Peers run in the same process: bf16 through cuBLAS, torch's int4
(tinygemm), and GemLite and bitsandbytes where they are installed.

python -m benchmarks.gpu_kernels
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.environment import environment, save
from kappaquant.format import BITS, Format
from kappaquant.kernels import inputs, tensor_cores

LARGE, SMALL, SQUARE = (28672, 4096), (8192, 2048), (4096, 4096)
BATCHES = (1, 8, 16, 64, 128)
GROUP = 128
DEVICE = "cuda"


def replay(calls: Sequence[Callable[[], Any]], repeats: int = 30) -> float:
    """Median microseconds of one call, from a graph of all of them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def copies(nbytes: int) -> int:
    """Copies of a weight that the L2 cache can not hold."""
    cache: int = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    return max(2, -(-4 * cache // nbytes))


def read_ceiling() -> float:
    """TB/s of summing 4 GB, the fastest plain read."""
    data = torch.ones(1 << 30, dtype=torch.int32, device=DEVICE)
    return data.nbytes / replay([partial(data.sum, dtype=torch.int32)] * 3) / 1e6


def activations(m: int, k: int) -> torch.Tensor:
    return torch.randn(m, k, dtype=torch.bfloat16, device=DEVICE)


def codebook(bits: int, n: int, k: int, m: int, half: bool) -> tuple[float, float]:
    """(product, rotation of its input), microseconds. Any bytes are codes: random ones are as fast as encoded weights."""
    fmt = Format(bits, GROUP)
    weights = []
    for _ in range(copies(fmt.nbytes((n, k)))):
        packed = torch.randint(0, 256, fmt.packed_shape((n, k)), dtype=torch.uint8, device=DEVICE)
        norms = torch.rand(fmt.norms_shape((n, k)), device=DEVICE).half()
        weights.append(tensor_cores.Weight.of(packed, norms, fmt, k, fmt.codebook))
    x = activations(m, k)
    rotated, _ = inputs.rotate(x, fmt, half)
    calls = [partial(tensor_cores.linear, rotated, [w], torch.bfloat16) for w in weights]
    return replay(calls), replay([partial(inputs.rotate, x, fmt, half)] * 20)


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


PEERS = {
    "bf16 (cuBLAS)": (bf16, 16.0),
    "int4 (tinygemm)": (tinygemm, 4.25),
    "int4 (GemLite)": (gemlite, 4.25),
    "nf4 (bitsandbytes)": (nf4, 4.5),
}


def rows(ceiling: float, peers: Mapping[str, tuple[Callable[[int, int, int], float], float]]) -> list[dict[str, Any]]:
    """Every product that is compared, in the order of the table."""
    found = []

    def add(what: str, shape: tuple[int, int], m: int, bits: float, us: float, rotation: float | None = None) -> None:
        rate = shape[0] * shape[1] * bits / 8 / us / 1e6
        row = {
            "what": what, "rows": shape[0], "inputs": shape[1], "batch": m, "us": round(us, 2),
            "tb_per_s": round(rate, 3), "of_ceiling": round(rate / ceiling, 3),
        }  # fmt: skip
        found.append(
            row
            | (
                {}
                if rotation is None
                else {"rotation_us": round(rotation, 2), "with_input_us": round(us + rotation, 2)}
            )
        )

    for shape in (LARGE, SMALL, SQUARE):
        for m in BATCHES if shape == LARGE else (1,):
            for name, (peer, bits) in peers.items():
                try:
                    us = peer(*shape, m)
                except Exception as problem:  # a peer may fail in any way of its own
                    if (shape, m) == (LARGE, 1):
                        print(f"{name}: left out: {type(problem).__name__}: {problem}", file=sys.stderr)
                    continue
                add(name, shape, m, bits, us)
            for half in (False, True):
                for width in BITS if m == 1 and shape == LARGE else (3, 4):
                    if half or width in tensor_cores.INT8_BITS:
                        kind = "float16" if half else "int8"
                        add(f"{width} bits, {kind}", shape, m, width + 16 / GROUP, *codebook(width, *shape, m, half))
            torch.cuda.empty_cache()
    return found


def aims(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the kernels are built to reach: (row, reached, bound)."""

    def us(what: str, shape: tuple[int, int], m: int) -> float:
        return next(r["us"] for r in found if (r["what"], (r["rows"], r["inputs"]), r["batch"]) == (what, shape, m))

    def share(bits: int) -> float:
        return max(
            r["of_ceiling"]
            for r in found
            if r["what"].startswith(f"{bits} bits") and (r["rows"], r["batch"]) == (LARGE[0], 1)
        )

    three, four, other = "3 bits, int8", "4 bits, int8", "bf16 (cuBLAS)"
    made: list[tuple[str, float, str, float]] = [
        ("3 bits 28672x4096 batch 1, us", us(three, LARGE, 1), "<=", 15.5),
        ("the same, times faster than tinygemm int4", us("int4 (tinygemm)", LARGE, 1) / us(three, LARGE, 1), ">=", 2.1),
        ("3 bits 8192x2048 batch 1, us", us(three, SMALL, 1), "<=", 5.2),
        ("3 bits 4096x4096 batch 1, us", us(three, SQUARE, 1), "<=", 5.2),
        ("4 bits 28672x4096 batch 1, us", us(four, LARGE, 1), "<=", 20.0),
        *((f"{b} bits 28672x4096 batch 1, share of the read ceiling", share(b), ">=", 0.6) for b in (2, 5, 6, 8)),
        ("3 bits 28672x4096 batch 8, us", us(three, LARGE, 8), "<=", 28.0),
        *(
            (f"{w[0]} bits 28672x4096 batch {m}, of bf16's time", us(w, LARGE, m) / us(other, LARGE, m), "<=", 0.8)
            for w in (three, four) for m in (16, 64, 128)
        ),
    ]  # fmt: skip
    return [
        {
            "what": what,
            "reached": round(value, 3),
            "aim": f"{sign} {bound:g}",
            "met": value <= bound if sign == "<=" else value >= bound,
        }
        for what, value, sign, bound in made
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without", action="append", default=[], choices=PEERS, help="leave a peer out")
    peers = {name: peer for name, peer in PEERS.items() if name not in parser.parse_args().without}
    if not torch.cuda.is_available():
        sys.exit("needs an NVIDIA GPU")
    console, about, ceiling = Console(width=130), environment(DEVICE), read_ceiling()
    found = rows(ceiling, peers)
    table = Table("what", "rows x inputs", "batch", "us", "TB/s", "of ceiling", "rotation us", "with input us")
    for r in found:
        table.add_row(
            r["what"], f"{r['rows']} x {r['inputs']}", str(r["batch"]), f"{r['us']}", f"{r['tb_per_s']}", f"{r['of_ceiling']:.0%}",
            str(r.get("rotation_us", "")), str(r.get("with_input_us", "")),
        )  # fmt: skip
    console.print(table)
    reached = aims(found)
    for aim in reached:
        console.print(
            f"{'met   ' if aim['met'] else 'missed'} {aim['what']}: {aim['reached']} ({aim['aim']})", highlight=False
        )
    result = {"environment": about, "read_ceiling_tb_per_s": round(ceiling, 3), "rows": found, "aims": reached}
    console.print(f"written: {save('gpu_kernels', result)}")


if __name__ == "__main__":
    main()
