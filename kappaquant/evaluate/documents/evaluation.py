"""``evaluation.json``: what was measured of one checkpoint against its original, written and read back with every value checked."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kappaquant.errors import FormatError
from kappaquant.evaluate.documents.checked import read_as
from kappaquant.evaluate.documents.report import rounded
from kappaquant.files.documents import write_whole

FORMAT_VERSION = 1
Interval = tuple[float, float]


@dataclass(frozen=True)
class Measured:
    """A value and its 95 % interval; None where a single sequence allows none."""

    value: float
    interval_95: Interval | None


@dataclass(frozen=True)
class CheckpointFacts:
    """The checkpoint that was measured.

    Attributes:
        format: "kappaquant" or "tq3_native".
        bytes: of its weight files; bits_per_weight: 8 * bytes of its tensors / weights.
        manifest_sha256: of kappaquant.json; None for tq3_native, which has none.
        predicted_kld: mean KL divergence (nats) that its plan predicted, by evidence; None where it predicted none.
    """

    path: str
    format: str
    bytes: int
    bits_per_weight: float
    manifest_sha256: str | None
    predicted_kld: float | None = None


@dataclass(frozen=True)
class SourceFacts:
    """The original it was measured against.

    Attributes:
        path: folder or Hub id; revision: commit on the Hub, None for a folder.
        bytes: of its weight files.
        config_sha256: of config.json; headers_sha256: of the headers of its shards, by name.
        samples_sha256: of the first bytes of every tensor, which tell a fine-tuned model from its base.
        stored_as: how its weights are stored, such as "fp8, blocks of 128x128"; None where they are plain.
    """

    path: str
    revision: str | None
    bytes: int
    config_sha256: str
    headers_sha256: str
    samples_sha256: str
    stored_as: str | None = None


@dataclass(frozen=True)
class TextFacts:
    """The text: name and hash of the file, and how many of its tokens were predicted in how many sequences."""

    name: str
    sha256: str
    sequences: int
    tokens: int


@dataclass(frozen=True)
class Settings:
    """How it was measured.

    Attributes:
        window: tokens of a sequence; dtype: of the unpacked weights and activations, "float32" or "auto" (as published).
        top_k: probabilities of the original kept for each token; exact: they were all there are, so that the divergence is
            no lower bound.
        resamples, seed: of the bootstrap.
        activations: of the checkpoint's packed weights on NVIDIA GPUs, "int8" or "bf16"; elsewhere without effect.
        bos: what was asked for, "auto", "always" or "never"; begin: the tokens that every sequence began with, therefore. None in
            reports of versions that left both to the tokenizer, whose first sequence alone began with BOS.
    """

    window: int
    dtype: str
    device: str
    top_k: int
    exact: bool
    resamples: int
    seed: int
    activations: str = "int8"
    bos: str | None = None
    begin: tuple[str, ...] | None = None


@dataclass(frozen=True)
class PositionBin:
    """Mean divergence of the tokens at places ``first`` to ``last`` of their sequences, counted from 1."""

    first: int
    last: int
    mean: float
    tokens: int


@dataclass(frozen=True)
class DivergenceReport:
    """KL(original || checkpoint) of the next token, in nats.

    Attributes:
        mean, median, p99, maximum: over tokens; interval_95: of the mean.
        top1_agreement: share of tokens for which both think the same next token likeliest.
        by_position: bins of growing width.
    """

    mean: float
    interval_95: Interval | None
    median: float
    p99: float
    maximum: float
    top1_agreement: float
    top1_interval_95: Interval | None
    by_position: tuple[PositionBin, ...]


@dataclass(frozen=True)
class PerplexityReport:
    """Perplexity of both on the same tokens."""

    checkpoint: Measured
    source: Measured


@dataclass(frozen=True)
class FamilyDivergence:
    """Mean divergence of the original with one tensor family as the checkpoint has it; bits: per weight of the family."""

    family: str
    mean: float
    interval_95: Interval | None
    bits: float


@dataclass(frozen=True)
class DataFile:
    """A file that questions or shots came from."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Score:
    """Both models on the same questions, by one metric.

    Attributes:
        metric: as lm-eval calls it, with its way of extraction, such as "exact_match, strict-match".
        checkpoint, source: shares of right answers, with Wilson's intervals.
        difference: of the shares, checkpoint minus source, with Tango's interval for pairs.
        only_checkpoint, only_source: questions that one alone got right.
        p_value: two-sided, of McNemar's exact test; significant: it is below 0.05.
        checkpoint_outcomes, source_outcomes: a digit for each question in order, 1 where it was answered right.
    """

    metric: str
    checkpoint: Measured
    source: Measured
    difference: Measured
    only_checkpoint: int
    only_source: int
    p_value: float
    significant: bool
    checkpoint_outcomes: str
    source_outcomes: str


@dataclass(frozen=True)
class TaskReport:
    """A task, answered greedily by checkpoint and original.

    Attributes:
        task: name; data: files of questions, then shots; none for lm-eval's own data.
        prompts_sha256: of all prompts in order.
        max_tokens: of an answer; None where answers are chosen, not written.
        checkpoint_sha256, source_sha256: content of the models, by which a later report knows what it may carry over.
        dtype, activations: as in ``Settings``; batch_size: prompts that ran together.
        versions: of kappaquant, lm_eval, torch and transformers, and the devices.
    """

    task: str
    data: tuple[DataFile, ...]
    prompts_sha256: str
    questions: int
    shots: int
    max_tokens: int | None
    chat_template: bool
    batch_size: int
    dtype: str
    activations: str
    checkpoint_sha256: str
    source_sha256: str
    versions: dict[str, Any]
    scores: tuple[Score, ...]


@dataclass(frozen=True)
class Throughput:
    """How fast one of the two models read and wrote, on random tokens, alone in its own process.

    Attributes:
        model: "checkpoint", or "original" in bfloat16; batch: sequences at once; context: tokens of the prompt in each.
        decode_tokens_per_s, prefill_tokens_per_s: of all sequences together; first_token_ms: prompt and first token.
        peak_gib: memory at most; on a CPU that of the process, Python and PyTorch (about 0.5) included.
        token_bytes: bytes of weights that decoding one token reads; bandwidth_gb_per_s: at which the device was seen to read.
        roofline_share: decode speed of one sequence as a share of bandwidth / token_bytes; None for more sequences, which
            share what they read in ways that depend on routing.
        device, activations, checkpoint_sha256, source_sha256, versions: as in ``TaskReport``.
    """

    model: str
    batch: int
    context: int
    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    first_token_ms: float
    peak_gib: float
    token_bytes: int
    bandwidth_gb_per_s: float
    roofline_share: float | None
    device: str
    activations: str
    checkpoint_sha256: str
    source_sha256: str
    versions: dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """The whole report; ``Evaluation.load(path)`` reads it, ``save`` writes it.

    Attributes:
        kappaquant: version that measured; environment: versions, device and machine, by name.
        noise_floor: the original against itself in other batches; None if it was not measured.
        families: None unless measured; tasks, throughput: measured in this run or carried over from an earlier report of the
            same two models.
    """

    kappaquant: str
    environment: dict[str, Any]
    checkpoint: CheckpointFacts
    source: SourceFacts
    text: TextFacts
    settings: Settings
    divergence: DivergenceReport
    noise_floor: DivergenceReport | None
    perplexity: PerplexityReport
    families: tuple[FamilyDivergence, ...] | None = None
    tasks: tuple[TaskReport, ...] = ()
    throughput: tuple[Throughput, ...] = ()
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """Indented JSON; measured values in six digits."""
        values = {"format_version": self.format_version, **asdict(self)}
        return json.dumps(rounded(values), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the report, or leave what was there.

        Raises:
            OutputError: the file cannot be written.
        """
        write_whole(Path(path), self.to_json().encode())

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Read a report back.

        Raises:
            FormatError: no such file, not JSON, another format_version, or a value that is missing or of another kind.
        """
        path = Path(path)
        if path.exists() and not path.is_file():
            raise FormatError(f"{path}: is a folder, a pipe or a device; kappaquant evaluate writes a file")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FormatError(f"{path}: no such file; kappaquant evaluate writes one") from None
        except OSError as problem:
            raise FormatError(f"{path}: cannot be read ({problem.strerror})") from None
        except (ValueError, RecursionError) as problem:
            raise FormatError(f"{path}: not JSON ({problem})") from None
        version = content.get("format_version") if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise FormatError(
                f"{path}: format_version {version!r}; this kappaquant reads evaluations of version {FORMAT_VERSION}, "
                "written by kappaquant evaluate"
            )
        found: Evaluation = read_as(content, cls, str(path))
        return found
