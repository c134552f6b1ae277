"""How fast a loaded model reads and writes: tokens per second, time to the first token, memory, kernels per step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from kappaquant.errors import UnsupportedError
from kappaquant.runtime.decoding import decoder_of
from kappaquant.runtime.original import original_model
from kappaquant.runtime.prompts import device_of
from kappaquant.runtime.sampling import Sampler, Sampling
from kappaquant.sources.open import open_source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WARM_UP = 4  # steps
_DIGITS = {"decode_tokens_per_s": 1, "step_ms": 3, "prefill_tokens_per_s": 1, "first_token_ms": 1, "peak_gib": 3}
_SLOW = 5.0  # seconds: such a prompt is read once on a CPU; others again, without what the first sets up and compiles
_ENOUGH = 1.0  # seconds of prompts, if that takes more than four; a host that is busy for a moment shows in few
_MOST_PROMPTS = 13


@dataclass(frozen=True)
class Row:
    """One batch size at one context, medians.

    Attributes:
        batch: rows at once.
        context: tokens of the prompt in each row.
        decode_tokens_per_s: of all rows together, greedy, the token on the device.
        step_ms: one step, its draw included.
        prefill_tokens_per_s: of all rows together.
        first_token_ms: the prompt, and the first token drawn.
        peak_gib: memory at most; on the CPU that of the process since its start.
        kernels_per_step: None without a graph.
        graph: whether steps replay a captured graph.
    """

    batch: int
    context: int
    decode_tokens_per_s: float
    step_ms: float
    prefill_tokens_per_s: float
    first_token_ms: float
    peak_gib: float
    kernels_per_step: int | None
    graph: bool

    def to_json(self) -> dict[str, Any]:
        """Plain values, rounded to what a measurement is worth."""
        return {key: round(value, _DIGITS[key]) if key in _DIGITS else value for key, value in vars(self).items()}


def measure(
    model: PreTrainedModel, cases: Iterable[tuple[int, int]], *, steps: int = 32, graph: bool | None = None
) -> Iterator[Row]:
    """Measure (batch, context) by (batch, context), on random tokens.

    Args:
        steps: decoded and timed, each row after its prompt.
        graph: as for ``decoder_of``.

    Raises:
        UnsupportedError: a number is below 1.
    """
    for batch, context in cases:
        if min(batch, context, steps) < 1:
            raise UnsupportedError(f"batch {batch}, context {context}, steps {steps}: must each be at least 1")
        yield _case(model, batch, context, steps, graph)


def load_original(location: str, device: str) -> PreTrainedModel:
    """A model as published, in bfloat16: a folder or a Hub id."""
    return original_model(open_source(location), torch.bfloat16).to(device)  # type: ignore[arg-type]


def read_bandwidth(device: str) -> float:
    """Bytes per second at which a device sums up memory that no cache holds, the fastest of a few times.

    Sums 4 GiB on a GPU, less where less is free, and 512 MiB on a CPU, with as many threads as PyTorch uses.
    """
    on_gpu = device.startswith("cuda")
    nbytes = min(1 << 32, torch.cuda.mem_get_info(device)[0] // 2) if on_gpu else 1 << 29
    data = torch.ones(nbytes // 4, dtype=torch.int32 if on_gpu else torch.float32, device=device)
    times = []
    for _ in range(6):
        begin = _mark(on_gpu)
        data.sum(dtype=data.dtype)
        times.append(_between(begin, _mark(on_gpu)))
    return data.nbytes / min(times[1:])


def _case(model: PreTrainedModel, batch: int, context: int, steps: int, graph: bool | None) -> Row:
    device = device_of(model)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    decoder = decoder_of(model, batch, context + WARM_UP + steps + 1, graph=graph)
    sampler = Sampler(Sampling(), device)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(vocabulary, (batch, context), generator=torch.Generator().manual_seed(0)).to(device)

    decoder.prefill(ids[:, :WARM_UP])  # compiles and captures
    prompts: list[float] = []
    while len(prompts) < 4 or (sum(prompts) < _ENOUGH and len(prompts) < _MOST_PROMPTS):
        begin = _mark(on_gpu)
        token = sampler(decoder.prefill(ids))
        prompts.append(_between(begin, _mark(on_gpu)))
        if not on_gpu and prompts[0] >= _SLOW:
            break
    marks = [_mark(on_gpu)]
    for _ in range(WARM_UP + steps):
        token = sampler(decoder.step(token))
        marks.append(_mark(on_gpu))
    each = [_between(a, b) for a, b in pairwise(marks)][WARM_UP:]
    prompt, step = statistics.median(prompts[1:] or prompts), statistics.median(each)
    return Row(
        batch=batch, context=context, decode_tokens_per_s=batch / step, step_ms=step * 1e3,
        prefill_tokens_per_s=batch * context / prompt, first_token_ms=prompt * 1e3,
        peak_gib=peak_bytes(device) / 2**30, kernels_per_step=decoder.kernels_per_step, graph=decoder.graphed,
    )  # fmt: skip


def peak_bytes(device: torch.device) -> int:
    """Allocated at most: on a GPU since the statistics were reset, on the CPU by the process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


Mark = torch.cuda.Event | float


def _mark(on_gpu: bool) -> Mark:
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(begin: Mark, end: Mark) -> float:
    """Seconds; waits for the GPU to reach the later mark."""
    if isinstance(begin, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    assert isinstance(end, float)
    return end - begin
