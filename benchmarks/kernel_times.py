"""Where a GPU's time goes: kernels by what they are for, summed over what runs."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_running: profile | None = None

# what a kernel is for, by its name; the first that matches
PURPOSES = (
    ("routed experts", r"\bgate_up<|\bdown<|sort_experts|\bcombine<|\bgemm<.*true|moe|grouped|expert"),
    ("rotation", r"\brotate<"),
    ("packed products", r"\blinear<|\bgemm<|int8_gemm|\bdecoded?<"),
    ("routing", r"topk|topk_softmax|\broute<|gating"),
    ("GatedDeltaNet", r"gdn|delta|causal_conv|conv1d|l2norm|chunk_|recompute_w_u|merge_.*inverse|solve_tril|fused_recurrent|layer_norm_fwd"),
    ("attention", r"flash|attention|attend|reshape_and_cache|paged|rotary|splitkv|prepare_varlen"),
    ("sampling", r"softmax_warp|argmax|argMax|sample|ArgMax"),
    ("plain products", r"gemm|gemv|cutlass|cublas|nvjet|splitKreduce|dense<|scaled_mm|wgmma"),
    ("norms and other small ones", r"."),
)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """What a GPU did.

    Attributes:
        kernels: name -> (microseconds, launches). A kernel that starts while the one before ends counts in both.
        busy: microseconds in which at least one ran.
    """

    kernels: dict[str, tuple[float, int]]
    busy: float

    @classmethod
    def of(cls, text: str) -> Work:
        """Of what ``end`` says."""
        return cls(**json.loads(text))


def begin(_: Any = None) -> None:
    """Record what this process does on the GPU; takes and ignores a worker of vLLM's, which runs it by ``collective_rpc``."""
    global _running
    torch.cuda.synchronize()
    _running = profile(activities=[ProfilerActivity.CUDA])
    _running.__enter__()


def end(_: Any = None) -> str:
    """What was done since ``begin``: a ``Work`` as JSON, to pass between processes."""
    assert _running is not None
    torch.cuda.synchronize()
    _running.__exit__(None, None, None)
    found: dict[str, tuple[float, int]] = {}
    spans = []
    for event in _running.events() or ():
        if event.device_type == DeviceType.CUDA:
            time, count = found.get(event.name, (0.0, 0))
            found[event.name] = time + event.time_range.elapsed_us(), count + 1
            spans.append((event.time_range.start, event.time_range.end))
    busy = until = 0.0
    for start, stop in sorted(spans):
        busy += max(0.0, stop - max(start, until))
        until = max(until, stop)
    return json.dumps(asdict(Work(found, busy)))


def per_step(few: Work, many: Work, steps: int) -> list[dict[str, Any]]:
    """What ``steps`` more steps cost, a row for each kernel, the longest first: what both runs did besides cancels out."""
    rows: list[dict[str, Any]] = []
    for name, (time, count) in many.kernels.items():
        before = few.kernels.get(name, (0.0, 0))
        rows.append(
            {
                "kernel": _shortened(name),
                "purpose": purpose(name),
                "us": round((time - before[0]) / steps, 2),
                "launches": round((count - before[1]) / steps, 2),
            }
        )
    return sorted((row for row in rows if row["launches"] > 0), key=lambda row: -row["us"])


def by_purpose(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Purpose -> microseconds and launches of a step."""
    found: dict[str, dict[str, float]] = defaultdict(lambda: {"us": 0.0, "launches": 0.0})
    for row in rows:
        for key in ("us", "launches"):
            found[row["purpose"]][key] = round(found[row["purpose"]][key] + row[key], 2)
    return dict(sorted(found.items(), key=lambda item: -item[1]["us"]))


def purpose(kernel: str) -> str:
    """What a kernel of this name is for."""
    return next(what for what, pattern in PURPOSES if re.search(pattern, kernel))


def _shortened(name: str) -> str:
    return name if len(name) <= 120 else name[:117] + "..."
