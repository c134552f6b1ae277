"""Products with codebooks and trellis codes against bf16 and int4 on one GPU: microseconds, TB/s and share of the card's read ceiling.

Products are timed alone; the input's rotation is a time of its own, and `with input` their sum. Which kernel runs is what
`kappaquant.kernels.cuda.tiled` chooses for that batch. Peers run in the same process: bf16 through cuBLAS, torch's int4 (tinygemm),
transformers' grouped_mm for experts, and GemLite and bitsandbytes where they are installed.

python -m benchmarks.gpu_kernels
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import gpu_peers as peers
from benchmarks.environment import environment, save
from benchmarks.gpu_peers import DEVICE, GROUP, activations, copies, matmul_ceiling, read_ceiling, replay
from kappaquant.formats.codebook import GroupedFormat
from kappaquant.formats.kinds import KINDS, kind_and_bits
from kappaquant.kernels.base import Arranged
from kappaquant.kernels.cuda import decoded, tensor_cores, tiled
from kappaquant.kernels.cuda.tiled import Tiled

LARGE, SMALL, SQUARE = (28672, 4096), (8192, 2048), (4096, 4096)
BATCHES = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
EXPERTS, TOP_K, HIDDEN, INNER = 256, 8, 2048, 512
EXPERT_TOKENS = (1, 8, 64, 2048)
EXPERT_FORMATS = (("k3", "k4"), ("t3", "t4"))  # of gate_up and down
ALL = [f"{letter}{bits}" for letter, kind in KINDS.items() for bits in kind.bits]
USUAL = ("k3", "k4", "t3", "t4")

Peer = Callable[[int, int, int], float]
PEERS: dict[str, tuple[Peer, float]] = {
    "bf16 (cuBLAS)": (peers.bf16, 16.0),
    "int4 (tinygemm)": (peers.tinygemm, 4.25),
    "int4 (GemLite)": (peers.gemlite, 4.25),
    "nf4 (bitsandbytes)": (peers.nf4, 4.5),
}


def named(name: str) -> GroupedFormat:
    """The format of a name such as "t3"."""
    letter, bits = kind_and_bits(name, "format") or ("", 0)
    return KINDS[letter].make(bits, GROUP)


def random_weight(name: str, *shape: int) -> tensor_cores.Weight:
    """Any bytes are codes: random ones are as fast as encoded weights."""
    fmt = named(name)
    packed = torch.randint(0, 256, fmt.packed_shape(shape), dtype=torch.uint8, device=DEVICE)
    norms = (torch.rand(fmt.norms_shape(shape), device=DEVICE) / 8).half()
    return tensor_cores.Weight.of(packed, norms, fmt, shape[-1])


def product(name: str, n: int, k: int, m: int, half: bool) -> float:
    """Microseconds of a product whose input is rotated."""
    fmt, shape = named(name), (n, k)
    weights = [random_weight(name, *shape) for _ in range(copies(fmt.nbytes(shape)))]
    x = activations(m, k)
    if tiled.decodes_first(m, x.device):
        return replay([partial(decoded.linear, x, w) for w in weights])
    kernel, kind = Tiled(), input_kind(fmt, m, n, half)
    prepared = kernel.prepare(x, fmt, kind)
    calls = [
        partial(kernel.linear, x, prepared, kind, Arranged(fmt, shape, (w.tiled.codes, w.tiled.norms)), None)
        for w in weights
    ]
    return replay(calls)


def input_kind(fmt: GroupedFormat, m: int, n: int, half: bool) -> Hashable:
    """What becomes of m tokens for a weight of n rows."""
    kind = Tiled().input_kind(fmt, m, n, "bf16" if half else "int8", torch.device(DEVICE))
    assert isinstance(kind, tiled.InputKind)
    assert kind.half == half
    return kind


def rotation(n: int, k: int, m: int, half: bool) -> float:
    """Microseconds of an input's rotation, the same for every format; none where a weight is decoded first."""
    x, fmt = activations(m, k), named("k3")
    if tiled.decodes_first(m, x.device):
        return 0.0
    return replay([partial(Tiled().prepare, x, fmt, input_kind(fmt, m, n, half))] * 20)


def experts(tokens: int) -> tuple[list[float], float]:
    """(ours in each of ``EXPERT_FORMATS``, grouped_mm in bf16), microseconds of a block of routed experts, its input's rotation included."""
    plain = [
        torch.randn(EXPERTS, *shape, dtype=torch.bfloat16, device=DEVICE) / 32
        for shape in ((2 * INNER, HIDDEN), (HIDDEN, INNER))
    ]
    x = activations(tokens, HIDDEN)
    routes = [torch.rand(tokens, EXPERTS, device=DEVICE).topk(TOP_K).indices for _ in range(8)]
    weights = torch.rand(tokens, TOP_K, dtype=torch.bfloat16, device=DEVICE)

    shapes = ((EXPERTS, 2 * INNER, HIDDEN), (EXPERTS, HIDDEN, INNER))

    def ours(made: list[tuple[tensor_cores.Weight, tensor_cores.Weight]], i: int) -> torch.Tensor:
        gate_up, down = made[i % 2]
        first, second = (
            Arranged(w.fmt, shape, (w.tiled.codes, w.tiled.norms))
            for w, shape in zip((gate_up, down), shapes, strict=True)
        )
        return Tiled().experts(x, routes[i], weights, first, second, "int8")

    mine = []
    for first, second in EXPERT_FORMATS:
        made = [(random_weight(first, *shapes[0]), random_weight(second, *shapes[1])) for _ in range(2)]
        mine.append(replay([partial(ours, made, i) for i in range(8)]))
    return mine, replay([partial(peers.grouped_mm, plain[0], plain[1], x, route, weights) for route in routes])


def rows(ceiling: float, others: Mapping[str, tuple[Peer, float]]) -> Iterator[dict[str, Any]]:
    """Every product that is compared, in the order of the table."""

    def row(what: str, shape: tuple[int, int], m: int, bits: float, us: float) -> dict[str, Any]:
        rate = shape[0] * shape[1] * bits / 8 / us / 1e6
        return {
            "what": what, "rows": shape[0], "inputs": shape[1], "batch": m, "us": round(us, 2),
            "tb_per_s": round(rate, 3), "of_ceiling": round(rate / ceiling, 3),
        }  # fmt: skip

    for shape in (LARGE, SMALL, SQUARE):
        for m in BATCHES if shape == LARGE else (1,):
            for name, (peer, bits) in others.items():
                if m > 128 and name != "bf16 (cuBLAS)":
                    continue  # far behind by then
                try:
                    us = peer(*shape, m)
                except Exception as problem:  # a peer may fail in any way of its own
                    if (shape, m) == (LARGE, 1):
                        print(f"{name}: left out: {type(problem).__name__}: {problem}", file=sys.stderr)
                    continue
                yield row(name, shape, m, bits, us)
            for half in (False, True) if not tiled.needs_half("int8", 3, m, shape[0]) else (True,):
                turn = rotation(*shape, m, half)
                for name in ALL if (m, shape) == (1, LARGE) else USUAL:
                    fmt = named(name)
                    if half or fmt.bits in tensor_cores.INT8_BITS:
                        us = product(name, *shape, m, half)
                        beside = {"rotation_us": round(turn, 2), "with_input_us": round(us + turn, 2)}
                        yield row(label(name, half), shape, m, fmt.bits + 16 / GROUP, us) | beside
            torch.cuda.empty_cache()


def label(name: str, half: bool) -> str:
    """What a row is called."""
    width = f"{name[1:]} bits" if name[0] == "k" else f"trellis {name[1:]}"
    return f"{width}, {'float16' if half else 'int8'}"


def blocks() -> list[dict[str, Any]]:
    """Blocks of routed experts, 256 of them, 8 a token, 2048 / 512."""
    found = []
    for tokens in EXPERT_TOKENS:
        (us, trellis), bf16 = experts(tokens)
        found.append(
            {
                "tokens": tokens,
                "us": round(us, 2),
                "trellis_us": round(trellis, 2),
                "grouped_mm_bf16_us": round(bf16, 2),
            }
        )
        torch.cuda.empty_cache()
    return found


def aims(found: list[dict[str, Any]], of_experts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the kernels are built to reach: (row, reached, bound)."""

    def us(what: str, shape: tuple[int, int], m: int) -> float:
        return next(r["us"] for r in found if (r["what"], (r["rows"], r["inputs"]), r["batch"]) == (what, shape, m))

    def share(bits: int) -> float:
        return max(
            r["of_ceiling"]
            for r in found
            if r["what"].startswith(f"{bits} bits") and (r["rows"], r["batch"]) == (LARGE[0], 1)
        )

    def ratio(bits: int, m: int) -> float:
        kind = "float16" if tiled.needs_half("int8", bits, m, LARGE[0]) else "int8"
        return us(f"{bits} bits, {kind}", LARGE, m) / us("bf16 (cuBLAS)", LARGE, m)

    def beside(bits: int, m: int) -> float:
        half = tiled.needs_half("int8", bits, m, LARGE[0])
        return us(label(f"t{bits}", half), LARGE, m) / us(label(f"k{bits}", half), LARGE, m)

    three, four = "3 bits, int8", "4 bits, int8"
    block = {row["tokens"]: row for row in of_experts}
    made: list[tuple[str, float, str, float]] = [
        ("3 bits 28672x4096 batch 1, us", us(three, LARGE, 1), "<=", 15.5),
        ("the same, times faster than tinygemm int4", us("int4 (tinygemm)", LARGE, 1) / us(three, LARGE, 1), ">=", 2.1),
        ("3 bits 8192x2048 batch 1, us", us(three, SMALL, 1), "<=", 5.2),
        ("3 bits 4096x4096 batch 1, us", us(three, SQUARE, 1), "<=", 5.2),
        ("4 bits 28672x4096 batch 1, us", us(four, LARGE, 1), "<=", 20.0),
        *((f"{b} bits 28672x4096 batch 1, share of the read ceiling", share(b), ">=", 0.6) for b in (2, 5, 6, 8)),
        ("3 bits 28672x4096 batch 8, us", us(three, LARGE, 8), "<=", 28.0),
        *(
            (f"{bits} bits 28672x4096 batch {m}, of bf16's time", ratio(bits, m), "<=", most)
            for m, most in ((16, 0.8), (32, 0.8), (64, 0.8), (128, 0.8), (512, 1.1), (1024, 1.1), (4096, 1.1))
            for bits in (3, 4)
        ),
        *(
            (f"trellis {bits} 28672x4096 batch 1, us", us(f"trellis {bits}, int8", LARGE, 1), "<=", most)
            for bits, most in ((2, 15.0), (3, 18.0), (4, 23.0))
        ),
        *(
            (f"trellis {bits} 28672x4096 batch {m}, of the codebook's time", beside(bits, m), "<=", 1.25)
            for m in BATCHES[1:]
            for bits in (3, 4)
        ),
        *(
            (f"experts in trellis codes, {m} tokens, of the codebooks' time", block[m]["trellis_us"] / block[m]["us"], "<=", 1.25)
            for m in EXPERT_TOKENS
        ),
        ("experts, 1 token, us", block[1]["us"], "<=", 20.0),
        *(
            (f"experts, {m} tokens, times faster than grouped_mm bf16", block[m]["grouped_mm_bf16_us"] / block[m]["us"], ">=", least)
            for m, least in ((8, 2.0), (64, 1.5), (2048, 1.0))
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
    others = {name: peer for name, peer in PEERS.items() if name not in parser.parse_args().without}
    if not torch.cuda.is_available():
        sys.exit("needs an NVIDIA GPU")
    console, about = Console(width=130), environment(DEVICE)
    ceiling = statistics.median(read_ceiling() for _ in range(3))
    result: dict[str, Any] = {
        "environment": about, "read_ceiling_tb_per_s": round(ceiling, 3),
        "matmul_ceiling_tflops": round(matmul_ceiling(), 1), "experts": blocks(), "rows": [],
    }  # fmt: skip
    found, of_experts = result["rows"], result["experts"]
    for measured in rows(ceiling, others):
        found.append(measured)
        save("gpu_kernels", result)  # a run that is cut off keeps what it has
    table = Table("what", "rows x inputs", "batch", "us", "TB/s", "of ceiling", "rotation us", "with input us")
    for r in found:
        table.add_row(
            r["what"], f"{r['rows']} x {r['inputs']}", str(r["batch"]), f"{r['us']}", f"{r['tb_per_s']}", f"{r['of_ceiling']:.0%}",
            str(r.get("rotation_us", "")), str(r.get("with_input_us", "")),
        )  # fmt: skip
    console.print(table)
    beside = Table("experts: tokens", "us", "trellis us", "grouped_mm bf16 us")
    for r in of_experts:
        beside.add_row(str(r["tokens"]), f"{r['us']}", f"{r['trellis_us']}", f"{r['grouped_mm_bf16_us']}")
    console.print(beside)
    reached = aims(found, of_experts)
    for aim in reached:
        console.print(
            f"{'met   ' if aim['met'] else 'missed'} {aim['what']}: {aim['reached']} ({aim['aim']})", highlight=False
        )
    console.print(f"written: {save('gpu_kernels', result | {'aims': reached})}")


if __name__ == "__main__":
    main()
