"""How fast a checkpoint reads and writes, and its original in bfloat16 on the same device, each alone in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context

import torch
import transformers

from kappaquant.checkpoints.checkpoint import Checkpoint
from kappaquant.engines.transformers.load import load
from kappaquant.errors import UnsupportedError, WorkerError
from kappaquant.evaluate.documents.evaluation import Throughput
from kappaquant.evaluate.runs.pair import Pair, content_digest
from kappaquant.files.processes import Workers
from kappaquant.files.safetensors import TensorInfo
from kappaquant.models.skeleton import load_config
from kappaquant.planning.sizes import active_shares
from kappaquant.runtime.bench import WARM_UP, Row, load_original, read_bandwidth
from kappaquant.runtime.bench import measure as measure_model
from kappaquant.sources.source import Source
from kappaquant.version import __version__

STEPS = 32  # decoded and timed after each prompt
_CONTEXTS = (32, 1024)
_BF16 = 2  # bytes

Case = tuple[int, int]  # (batch, context)


def cases(pair: Pair, contexts: Sequence[int] | None = None) -> list[Case]:
    """What is measured: one sequence at each context; by default 32 and 1,024 tokens, as far as the model reads.

    Raises:
        UnsupportedError: a context is below 1, or leaves no room for the tokens that are timed.
    """
    positions = getattr(load_config(pair.source.folder).get_text_config(), "max_position_embeddings", None)
    room = None if positions is None else positions - WARM_UP - STEPS - 1
    for context in contexts or ():
        if context < 1 or (room is not None and context > room):
            raise UnsupportedError(
                f"context = {context}: must be 1 to {room if room is not None else 'any'}, for {STEPS} tokens follow"
            )
    fitting = [context for context in _CONTEXTS if room is None or context <= room]
    return [(1, context) for context in contexts or fitting]


def measure(
    pair: Pair, cases: Sequence[Case], device: str, activations: str, progress: Callable[[str, int, int], None]
) -> tuple[Throughput, ...]:
    """Rows of the checkpoint, then of the original; a plain folder in the checkpoint's place is measured in bfloat16.

    Raises:
        WorkerError: the process that measured was ended from outside.
    """
    bandwidth = read_bandwidth(device)
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    packed = isinstance(pair.checkpoint, Checkpoint)
    jobs = [
        ("checkpoint", _Job(str(pair.path), packed, tuple(cases), device, activations), token_bytes(pair.checkpoint)),
        ("original", _Job(str(pair.source.folder), False, tuple(cases), device, activations), token_bytes(pair.source)),
    ]
    digests = content_digest(pair.checkpoint), content_digest(pair.source)
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    versions = {
        "kappaquant": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    found = []
    progress("throughput", 0, len(jobs))
    for done, (model, job, nbytes) in enumerate(jobs, 1):
        for row in _alone(job):
            share = row.decode_tokens_per_s * nbytes / bandwidth if row.batch == 1 else None
            found.append(
                Throughput(
                    model, row.batch, row.context, row.decode_tokens_per_s, row.prefill_tokens_per_s, row.first_token_ms,
                    row.peak_gib, nbytes, bandwidth / 1e9, share, name, activations, *digests, versions,
                )
            )  # fmt: skip
        progress("throughput", done, len(jobs))
    return tuple(found)


def token_bytes(model: Checkpoint | Source) -> int:
    """Bytes of weights that decoding one token reads: routed experts by top-k, one row of the embedding; no cache.

    Of plain folders as bfloat16, in which they are measured.
    """
    tensors: dict[str, TensorInfo]
    if isinstance(model, Source):
        tensors = dict(model.tensors)
        nbytes = {name: _BF16 * info.numel for name, info in tensors.items()}
    else:
        tensors = {name: model.entry(name).info for name in model.keys()}
        nbytes = {name: model.nbytes(name) for name in tensors}
    shares = active_shares(tensors, model.config)
    return round(sum(nbytes[name] * share for name, share in shares.items()))


@dataclass(frozen=True)
class _Job:
    folder: str
    packed: bool
    cases: tuple[Case, ...]
    device: str
    activations: str


def _alone(job: _Job) -> list[Row]:
    """In a new process: nothing of another model is in its memory, and its peak is its own."""
    with Workers(1, mp_context=get_context("spawn")) as process:
        try:
            return process.submit(_rows, job).result()
        except BrokenProcessPool:
            raise WorkerError(
                f"{job.folder}: the process that measured its throughput was killed, perhaps for want of memory; "
                "leave --throughput out, or give shorter contexts"
            ) from None


def _rows(job: _Job) -> list[Row]:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if job.packed:
        model, _ = load(job.folder, device=job.device, activations=job.activations)
    else:
        model = load_original(job.folder, job.device)
    return list(measure_model(model, job.cases, steps=STEPS))
