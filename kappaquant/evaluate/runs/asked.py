"""Tasks asked of a checkpoint and its original: whose answers are kept where, and the report of both."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kappaquant.checkpoints.checkpoint import Checkpoint
from kappaquant.evaluate.documents.evaluation import TaskReport
from kappaquant.evaluate.measures.scores import score
from kappaquant.evaluate.runs.harness import Prepared, Progress, answer, answered, lm_eval_version, outcomes, prepare
from kappaquant.evaluate.runs.kept import Kept
from kappaquant.evaluate.runs.pair import Pair, content_digest
from kappaquant.evaluate.runs.questions import TaskSpec
from kappaquant.models.skeleton import load_config
from kappaquant.models.tokenizer import read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHECKPOINT, ORIGINAL = "checkpoint", "original"


class Asked:
    """The tasks of a run: prompts built, folders bound, nothing answered yet.

    Args:
        root: folder of what is kept.
        environment: versions and device of this run, by name, recorded with what it answers.

    Raises:
        UnsupportedError, SourceError: as ``harness.prepare``.
    """

    def __init__(
        self,
        pair: Pair,
        specs: Sequence[TaskSpec],
        root: Path,
        dtype: str,
        activations: str,
        environment: Mapping[str, str],
    ) -> None:
        self.dtype, self.activations = dtype, activations
        self.prepared: list[Prepared] = []
        self._folders: dict[str, list[Kept]] = {CHECKPOINT: [], ORIGINAL: []}
        if not specs:
            return
        self.tokenizer = read_tokenizer(pair.tokenizer)
        positions = getattr(load_config(pair.source.folder).get_text_config(), "max_position_embeddings", None)
        self.prepared = [prepare(spec, self.tokenizer, positions) for spec in specs]
        packed = {"activations": activations} if isinstance(pair.checkpoint, Checkpoint) else {}
        self.checkpoint_sha256, self.source_sha256 = content_digest(pair.checkpoint), content_digest(pair.source)
        notes = {**environment, "lm_eval": lm_eval_version(), "source": pair.source.label}
        for task in self.prepared:
            for who, content, more in (
                (CHECKPOINT, self.checkpoint_sha256, packed),
                (ORIGINAL, self.source_sha256, {}),
            ):
                about: dict[str, Any] = {
                    "model": content, "task": task.spec.name, "prompts": task.prompts_sha256, "max_tokens": task.max_tokens,
                    "batch_size": task.spec.batch_size, "dtype": dtype, "lm_eval": lm_eval_version(), **more,
                }  # fmt: skip
                key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
                folder = root / "tasks" / f"{re.sub(r'[^A-Za-z0-9_.-]', '-', task.spec.name)}-{key}"
                self._folders[who].append(Kept(folder, about, {**notes, "text": task.spec.name}))

    def lacks(self, who: str) -> bool:
        """Whether a model has anything left to answer."""
        return not all(map(answered, self._folders[who]))

    def run(self, who: str, model: PreTrainedModel, progress: Progress) -> None:
        """Let a model answer what it has not answered yet."""
        for task, kept in zip(self.prepared, self._folders[who], strict=True):
            if not answered(kept):
                answer(task, kept, model, self.tokenizer, progress, f"{task.spec.name}, {who}")

    def reports(self) -> tuple[TaskReport, ...]:
        """Both models side by side, after both have run."""
        rows = []
        for task, own, other in zip(self.prepared, self._folders[CHECKPOINT], self._folders[ORIGINAL], strict=True):
            ours, theirs = outcomes(own, task.questions), outcomes(other, task.questions)
            versions = {k: v for k, v in own.notes.items() if k not in ("source", "text")}
            versions["original_device"] = other.notes["device"]
            rows.append(
                TaskReport(
                    task.spec.name,
                    task.data,
                    task.prompts_sha256,
                    task.questions,
                    task.shots,
                    task.max_tokens,
                    task.spec.chat_template,
                    task.spec.batch_size,
                    self.dtype,
                    self.activations,
                    self.checkpoint_sha256,
                    self.source_sha256,
                    versions,
                    tuple(score(metric, ours[metric], theirs[metric]) for metric in ours),
                )
            )
        return tuple(rows)
