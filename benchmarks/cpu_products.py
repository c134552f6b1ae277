"""Products of one large matrix on a CPU, by bits and tokens, beside torch's own in bfloat16: weights are read from memory each time."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from benchmarks.cpu_turns import in_turns
from kappaquant.formats.codebook import BITS, PACKED_SUFFIX, CodebookFormat, GroupedFormat
from kappaquant.formats.trellis import TRELLIS_BITS, TrellisFormat
from kappaquant.kernels import dispatch
from kappaquant.kernels.base import ACTIVATIONS, Arranged, Kernel

SHAPE = (28672, 4096)
GROUP = 128
FORMATS: dict[str, GroupedFormat] = {f"{bits} bits": CodebookFormat(bits, GROUP) for bits in BITS if bits != 7}
FORMATS |= {f"trellis {bits}": TrellisFormat(bits, GROUP) for bits in TRELLIS_BITS}
TOKENS = (1, 8, 64, 512)
PLAIN = "bf16 (torch)"
ENOUGH, MOST = 0.2, 16  # seconds of calls in a turn, and calls
TIMES_THE_CACHE = 4  # bytes of weights together
UNKNOWN_CACHE = 64 << 20

Row = dict[str, Any]
Calls = Sequence[Callable[[], Any]]


def rows(rounds: int, shape: tuple[int, int] = SHAPE, tokens: Sequence[int] = TOKENS) -> Iterator[Row]:
    """A row for each format and number of tokens; inputs are prepared anew for each product, as for one that stands alone."""
    weights = {name: _weights(fmt, shape) for name, fmt in FORMATS.items()}
    plain = [torch.randn(shape, dtype=torch.bfloat16) for _ in range(_copies(2 * shape[0] * shape[1]))]
    for count in tokens:
        x = torch.randn(count, shape[1], dtype=torch.bfloat16)
        things: dict[str, Calls] = {
            name: [partial(_product, kernel, weight, x) for weight in held] for name, (kernel, held) in weights.items()
        }
        things[PLAIN] = [partial(torch.nn.functional.linear, x, weight) for weight in plain]
        found = in_turns({name: cycle(calls) for name, calls in things.items()}, _timed, rounds)
        for name, times in found.items():
            nbytes = FORMATS[name].nbytes(shape) if name in FORMATS else plain[0].nbytes
            yield {
                "part": "products", "what": name, "kernel": weights[name][0].name if name in FORMATS else "torch", "rows": shape[0],
                "inputs": shape[1], "tokens": count, **times.to_json(), "weight_bytes": nbytes,
                "gb_per_s": round(nbytes / times.median / 1e9, 2), "times_faster_than": {PLAIN: round(times.ratio(found[PLAIN]), 3)},
            }  # fmt: skip


def last_cache() -> int:
    """Bytes of the largest cache of one processor, where the system says."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    found = [
        int(match[1]) << {"K": 10, "M": 20}[match[2]] for size in sizes if (match := re.fullmatch(r"(\d+)([KM])", size))
    ]
    return max(found, default=UNKNOWN_CACHE)


def _copies(nbytes: int) -> int:
    return max(2, -(-TIMES_THE_CACHE * last_cache() // nbytes))


def _weights(fmt: GroupedFormat, shape: tuple[int, int]) -> tuple[Kernel, list[Arranged]]:
    """The kernel that serves this format here, and copies that no cache holds: any bytes are codes, and as fast to read as encoded ones."""
    made = []
    for _ in range(_copies(fmt.nbytes(shape))):
        parts = {}
        for suffix, (_, size) in fmt.parts(shape).items():
            codes = torch.randint(0, 256, size, dtype=torch.uint8)
            parts[suffix] = codes if suffix == PACKED_SUFFIX else (torch.rand(size) / 8).half()
        kernel, _ = dispatch.choose(fmt, parts, ("linear",))
        made.append(Arranged(fmt, shape, tuple(kernel.arrange(fmt, parts).values())))
    return kernel, made


def _product(kernel: Kernel, weight: Arranged, x: torch.Tensor) -> torch.Tensor:
    kind = kernel.input_kind(weight.fmt, x.shape[0], weight.shape[0], ACTIVATIONS[0], x.device)
    prepared = [] if kind is None else kernel.prepare(x, weight.fmt, kind)
    return kernel.linear(x, prepared, kind, weight, None)


def _timed(calls: Iterator[Callable[[], Any]]) -> list[float]:
    took: list[float] = []
    while len(took) < MOST and sum(took) < ENOUGH:
        call = next(calls)
        begin = time.perf_counter()
        call()
        took.append(time.perf_counter() - begin)
    return took
