"""A checkpoint against its original over a text: the report, made of what each model said of every sequence."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor

from kappaquant.checkpoints import contents
from kappaquant.checkpoints.checkpoint import Checkpoint
from kappaquant.errors import UnsupportedError
from kappaquant.evaluate.documents.evaluation import (
    DivergenceReport,
    Evaluation,
    FamilyDivergence,
    PerplexityReport,
    Settings,
    SourceFacts,
    TextFacts,
)
from kappaquant.evaluate.measures.batches import BOS, Bos, by_length
from kappaquant.evaluate.measures.bootstrap import Bootstrap
from kappaquant.evaluate.measures.logits import Tensors, diverge, keep_top
from kappaquant.evaluate.runs.asked import CHECKPOINT, ORIGINAL, Asked
from kappaquant.evaluate.runs.families import packed_families, replaced
from kappaquant.evaluate.runs.kept import Kept
from kappaquant.evaluate.runs.pair import Pair, checkpoint_facts, content_digest, file_digest, source_facts
from kappaquant.evaluate.runs.passes import Passes, Progress, free, load_checkpoint, load_original, read_sequences
from kappaquant.evaluate.runs.questions import TaskSpec
from kappaquant.kernels.base import check_activations
from kappaquant.models.skeleton import load_config
from kappaquant.version import __version__

TEXT_NAME = "evaluation.txt"  # a model's own held-out text, beside its weights
_BATCH_TOKENS = 4096
_LOGITS_BYTES = 1 << 29  # of a batch, in float32; a single sequence may need more


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        window: tokens of a sequence, what it begins with included; tokens: of the text at most, None for all.
        bos: what every sequence begins with: "auto", "always" or "never", as for ``windows``.
        top_k: probabilities of the original kept for each token.
        dtype: "float32", or "auto" for that of each config.json.
        device: of both models.
        activations: as for ``kappaquant.load``.
        noise_floor: also measure the original against itself in other batches.
        by_layer: also measure every tensor family alone.
        resamples, seed: of the bootstrap.

    Raises:
        UnsupportedError: a value is out of range.
    """

    window: int = 512
    tokens: int | None = None
    top_k: int = 256
    dtype: str = "auto"
    device: str = "cpu"
    activations: str = "int8"
    noise_floor: bool = True
    by_layer: bool = False
    resamples: int = 2000
    seed: int = 0
    bos: Bos = "auto"

    def __post_init__(self) -> None:
        if self.bos not in BOS:
            raise UnsupportedError(f"bos {self.bos!r}: must be one of {', '.join(BOS)}")
        for name, least in (("window", 2), ("tokens", 2), ("top_k", 1), ("resamples", 100)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UnsupportedError(f"{name} = {value}: must be at least {least}")
        if self.dtype not in ("float32", "auto"):
            raise UnsupportedError(f"dtype {self.dtype!r}: must be float32 or auto")
        check_activations(self.activations)


def evaluate_against(
    pair: Pair,
    text: Path,
    logits: Path,
    options: Options | None = None,
    progress: Progress = lambda *_: None,
    tasks: Sequence[TaskSpec] = (),
) -> Evaluation:
    """Measure a checkpoint against its original; what a run before did is taken from disk.

    Args:
        text: plain text, UTF-8, read as one piece and cut into windows.
        logits: folder where the original's predictions and what was measured are kept; another checkpoint of the same
            original, measured with the same text and options, needs the original no more.
        progress: called as progress(stage, tokens or answers done, of how many).
        tasks: questions that both models answer, each while it is loaded anyway.

    Raises:
        UnsupportedError: the text is too short, the window too long for the model, a family cannot stand alone, or a task
            cannot be asked; the last as ``harness.prepare``.
        SourceError: the text cannot be read.
        FormatError: the folder belongs to another original, text or other options.
    """
    options = options or Options()
    if options.by_layer and not isinstance(pair.checkpoint, Checkpoint):
        raise UnsupportedError(f"{pair.path}: is not quantized; --by-layer needs a quantized checkpoint")
    sequences, begin = read_sequences(pair, text, options.window, options.tokens, options.bos)
    vocabulary = int(load_config(pair.source.folder).get_text_config().vocab_size)
    settings = Settings(
        options.window, options.dtype, options.device, min(options.top_k, vocabulary), options.top_k >= vocabulary,
        options.resamples, options.seed, options.activations, options.bos, begin,
    )  # fmt: skip
    source = source_facts(pair.source)
    words = TextFacts(text.name, file_digest(text), len(sequences), sum(len(s) - 1 for s in sequences))
    folders = _Folders(pair, logits, sequences, source, words, settings, options)
    asked = Asked(pair, tasks, logits, settings.dtype, settings.activations, _environment(options.device))
    limit = min(_BATCH_TOKENS, _LOGITS_BYTES // (4 * vocabulary))
    _measure(pair, folders, asked, options, Passes(sequences, list(by_length(sequences, limit)), progress))

    count = len(sequences)
    draws = Bootstrap(count, options.resamples, options.seed)

    def divergence(kept: Kept) -> DivergenceReport:
        return draws.divergence(kept.column("kld", count), kept.column("agreed", count))

    families = []
    for family, (names, kept) in folders.families.items():
        mean = draws.mean(kept.column("kld", count))
        bits = contents.total(_quantized(pair), names).bits_per_weight
        families.append(FamilyDivergence(family, mean.value, mean.interval_95, bits))
    return Evaluation(
        kappaquant=__version__,
        environment={**_environment(options.device), "original_device": folders.original.notes["device"]},
        checkpoint=checkpoint_facts(pair.checkpoint),
        source=source,
        text=words,
        settings=settings,
        divergence=divergence(folders.checkpoint),
        noise_floor=divergence(folders.noise_floor) if folders.noise_floor else None,
        perplexity=PerplexityReport(
            draws.perplexity(folders.checkpoint.column("loss", count)),
            draws.perplexity(folders.original.column("loss", count)),
        ),
        families=tuple(families) if options.by_layer else None,
        tasks=asked.reports(),
    )


class _Folders:
    """Where what is computed is kept, each folder bound to what decides its content; only those that are wanted."""

    def __init__(
        self,
        pair: Pair,
        root: Path,
        sequences: list[list[int]],
        source: SourceFacts,
        text: TextFacts,
        settings: Settings,
        options: Options,
    ) -> None:
        about: dict[str, str | int | None] = {
            "the source's config.json": source.config_sha256,
            "the source's headers": source.headers_sha256,
            "samples of the source's weights": source.samples_sha256,
            "text": text.sha256,
            "window": settings.window,
            "tokens": text.tokens,
            "token ids": hashlib.sha256(json.dumps(sequences).encode()).hexdigest(),
            "top_k": settings.top_k,
            "dtype": settings.dtype,
        }
        if settings.begin:  # a folder of before has windows without it, and does not say so
            about["every window begins with"] = " ".join(settings.begin)
        notes = {"source": source.path, "text": text.name, "device": device_name(settings.device)}

        def keep(*parts: str, **more: str) -> Kept:
            return Kept(root.joinpath(*parts), {**about, **more}, notes)

        mine = content_digest(pair.checkpoint)
        own = f"checkpoint-{mine[:16]}-{settings.activations}"
        bound = {"checkpoint": mine, "activations": settings.activations}
        packed = packed_families(_quantized(pair)) if options.by_layer else {}
        self.original = keep("original")
        self.noise_floor = keep("noise-floor") if options.noise_floor else None
        self.checkpoint = keep(own, **bound)
        self.families = {
            family: (names, keep(own, f"family-{i:02}", **bound, family=family))
            for i, (family, names) in enumerate(packed.items())
        }


def _measure(pair: Pair, folders: _Folders, asked: Asked, options: Options, passes: Passes) -> None:
    """Compute what the folders lack: first all that needs the original, then what needs the checkpoint."""

    def remember(_: int, logits: Tensor, predicted: Tensor) -> Tensors:
        return keep_top(logits, predicted, options.top_k)

    def compare(index: int, logits: Tensor, predicted: Tensor) -> Tensors:
        return diverge(folders.original.read(index), logits, predicted)

    count = len(passes.sequences)
    wanted = [folders.original, folders.noise_floor, *(kept for _, kept in folders.families.values())]
    if any(kept and kept.lacks(count) for kept in wanted) or asked.lacks(ORIGINAL):
        model = load_original(pair, options.dtype, options.device)
        asked.run(ORIGINAL, model, passes.progress)
        passes.run(model, folders.original, remember, "original")
        if folders.noise_floor:
            passes.run(model, folders.noise_floor, compare, "noise floor", passes.other_batches)
        for family, (names, kept) in folders.families.items():
            if kept.lacks(count):
                with replaced(model, _quantized(pair), pair.source, names):
                    passes.run(model, kept, compare, family)
        del model
        free()
    if folders.checkpoint.lacks(count) or asked.lacks(CHECKPOINT):
        model = load_checkpoint(pair, options.dtype, options.device, options.activations)
        passes.run(model, folders.checkpoint, compare, "checkpoint")
        asked.run(CHECKPOINT, model, passes.progress)
        del model
        free()


def _quantized(pair: Pair) -> Checkpoint:
    assert isinstance(pair.checkpoint, Checkpoint)  # by_layer is refused for others
    return pair.checkpoint


def _environment(device: str) -> dict[str, str]:
    return {
        "kappaquant": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device_name(device),
        "machine": platform.machine(),
    }


def device_name(device: str) -> str:
    """What a device is called: a GPU's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device
