"""The sections of a model card, as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.filesize import decimal

from kappaquant.checkpoints import contents
from kappaquant.checkpoints.checkpoint import Checkpoint
from kappaquant.checkpoints.side_files import MANIFEST_NAME
from kappaquant.evaluate.documents.evaluation import Evaluation, TaskReport
from kappaquant.evaluate.documents.markdown import table, tables
from kappaquant.evaluate.runs.questions import PRESETS
from kappaquant.formats.trellis import TrellisFormat
from kappaquant.planning.sizes import Total

_CREDITS = """## Credits

* HIGGS (Malinovskii et al., "Pushing the Limits of Large Language Model Quantization via the Linearity Theorem", NAACL 2025): the
  method for weights, a Hadamard rotation and Gaussian-optimal grids, of which codebooks are the scalar case.
* TurboQuant (Zandieh et al., "TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate", ICLR 2026): random rotation
  and scalar codebooks for vectors and KV caches."""
_TRELLIS_CREDITS = """
* Trellis coded quantization (Marcellin and Fischer, "Trellis Coded Quantization of Memoryless and Gauss-Markov Sources", IEEE
  Transactions on Communications, 1990), and QTIP (Tseng et al., "QTIP: Quantization with Trellises and Incoherence Processing",
  NeurIPS 2024), which brought it to rotated weights: the formats `t2`, `t3` and `t4`."""


@dataclass(frozen=True)
class Facts:
    """What the sections are written from.

    Attributes:
        base: Hub id of the original, None where only a local folder is known; repo: Hub id of this checkpoint.
    """

    checkpoint: Checkpoint
    manifest: Mapping[str, Any]
    evaluation: Evaluation | None
    base: str | None
    repo: str | None

    @property
    def name(self) -> str:
        return self.repo.rpartition("/")[2] if self.repo else self.checkpoint.path.resolve().name

    @property
    def revision(self) -> str | None:
        return self.manifest["source"]["revision"]

    @property
    def original(self) -> str:
        """How commands name the original."""
        return self.base or f"path/to/{self.manifest['source']['model']}"


def head(facts: Facts) -> str:
    """Title, and in one sentence what of and how large."""
    total = contents.total(facts.checkpoint, facts.checkpoint.keys())
    of = (
        f"[{facts.base}](https://huggingface.co/{facts.base})"
        if facts.base
        else f"`{facts.manifest['source']['model']}`"
    )
    at = f" at revision `{facts.revision}`" if facts.revision else ""
    if stored_as := facts.manifest["source"].get("stored_as"):
        at += f" (weights stored as {stored_as}, read as bf16)"
    return (
        f"# {facts.name}\n\n{of}{at}, quantized by kappaquant {facts.manifest['kappaquant_version']} to "
        f"{total.bits_per_weight:.2f} bits per weight: {decimal(total.output_bytes)} of weights instead of {decimal(total.source_bytes)}."
    )


def recipe(facts: Facts) -> str:
    """The plan in a sentence, and formats and bytes of every family."""
    checkpoint, plan = facts.checkpoint, facts.manifest["plan"]
    inputs = "".join(
        f", {key} {_plain(value)}" for key, value in plan["inputs"].items() if value not in (False, None, [], {})
    )
    rows = [
        [
            family,
            ", ".join(contents.formats(checkpoint, names)),
            *_sizes(contents.total(checkpoint, names)),
        ]
        for family, names in contents.families(checkpoint).items()
    ]
    rows.append(["all", "", *_sizes(contents.total(checkpoint, checkpoint.keys()))])
    size = plan["group_size"]
    groups = "groups that fit each input axis" if size == "auto" else f"groups of {size} weights"
    return (
        f"## Recipe\n\nPolicy {plan['policy']}{inputs}; {groups}, each with a float16 norm; effort "
        f"{facts.manifest['effort']}. Bits per weight count norms and padding.\n\n"
        + table(["family", "formats", "tensors", "weights", "size", "bits per weight"], rows)
    )


def measured(facts: Facts) -> str:
    """The evaluation as tables, or that there is none."""
    found = facts.evaluation
    if found is None:
        return "## Measured\n\nNothing yet: this checkpoint has not been evaluated against its original."
    text, settings = found.text, found.settings
    bound = (
        ""
        if settings.exact
        else f" Divergences take all but the original's {settings.top_k} likeliest tokens as one, and so are lower bounds."
    )
    parts = [
        f"## Measured\n\nAgainst the original on `{text.name}` (SHA-256 `{text.sha256}`): {text.tokens:,} predicted tokens in "
        f"{text.sequences:,} sequences of at most {settings.window}; dtype {settings.dtype}.{bound} In brackets 95 % intervals, bootstrapped over "
        "sequences.",
        tables(found),
    ]
    if found.tasks:
        files = {f"`{file.name}` (SHA-256 `{file.sha256}`)": None for task in found.tasks for file in task.data}
        limits = {f"{task.task}: {_protocol(task)}": None for task in found.tasks}
        parts.append(
            f"Tasks are answered greedily through lm-evaluation-harness ({'; '.join(limits)}). Shares have Wilson's, differences Tango's "
            f"intervals of 95 %.{' Questions and shots: ' + ', '.join(files) + '.' if files else ''}"
        )
    if found.throughput:
        parts.append(
            "Speed is that of random tokens, one model at a time, the original in bfloat16; the roofline is the time in which the device, at "
            "the speed it was seen to read, reads the weights of one token."
        )
    versions = ", ".join(f"{key} {_plain(value)}" for key, value in found.environment.items())
    parts.append(f"Measured with kappaquant {found.kappaquant}: {versions}.")
    return "\n\n".join(parts)


def usage(facts: Facts) -> str:
    """Python lines that load it with transformers, in the class that config.json names."""
    cls = next(iter(facts.checkpoint.config.get("architectures") or ()), "AutoModelForCausalLM")
    where = facts.repo or f"path/to/{facts.name}"
    return (
        f"## Use\n\nWith kappaquant {facts.manifest['kappaquant_version']} or newer installed:\n\n```python\n"
        f"import kappaquant  # teaches transformers the format\nfrom transformers import AutoTokenizer, {cls}\n\n"
        f'model = {cls}.from_pretrained("{where}", dtype="auto")\ntokenizer = AutoTokenizer.from_pretrained("{where}")\n```\n\n'
        "Weights stay packed in memory. `kappaquant generate` and `kappaquant chat` take a downloaded folder."
    )


def reproduction(facts: Facts) -> str:
    """The commands that make the same bytes again."""
    pinned = f" --revision {facts.revision}" if facts.revision else ""
    extract = f"""python -c 'import json; print(json.dumps(json.load(open("{MANIFEST_NAME}"))["plan"]))' > plan.json"""
    text = facts.manifest.get("calibration")
    effort = f" --effort {facts.manifest['effort']}"
    if text:
        effort += f" --calibration path/to/{text['file']}" if "file" in text else ""
        effort += f" --calibration-tokens {text['tokens']}"
    lines = [
        extract,
        f"kappaquant quantize {facts.original} -o {facts.name} --plan plan.json{effort}{pinned}",
    ]
    if found := facts.evaluation:
        s, first = found.settings, 1 - len(found.settings.begin or ())  # the first of a sequence is not predicted
        tokens = found.text.tokens + first * found.text.sequences
        lines.append(
            f"kappaquant evaluate {facts.name} --against {facts.original}{pinned} --text path/to/{found.text.name} "
            f"--tokens {tokens} --window {s.window} --top-k {s.top_k} --dtype {s.dtype} --activations {s.activations}"
            + (f" --bos {s.bos}" if s.bos else "")
        )
        lines += [f"{lines[-1]} {_task_options(task)}" for task in found.tasks]
    same = ""
    if text:
        whose = "the text that the model writes itself there" if "written_by" in text else "the same text"
        same = f", calibrated on the same machine with {whose} (tokens' SHA-256 `{text['tokens_sha256']}`)"
    return (
        f"## Make it again\n\nThe plan, bits and reason of every tensor, is in `{MANIFEST_NAME}`; the same source and plan give the same bytes{same}.\n\n"
        "```\n" + "\n".join(lines) + "\n```"
    )


def credit(facts: Facts) -> str:
    """Whose methods its formats are."""
    found = (facts.checkpoint.format_of(name) for name in facts.checkpoint.keys())
    trellis = any(fmt is not None and isinstance(fmt.rowwise, TrellisFormat) for fmt in found)
    return _CREDITS + (_TRELLIS_CREDITS if trellis else "")


def _protocol(task: TaskReport) -> str:
    """How a task was asked, in words."""
    said = [f"{task.questions:,} questions", f"{task.shots} shots"]
    said += [f"at most {task.max_tokens:,} tokens"] if task.max_tokens else []
    said += ["chat template"] if task.chat_template else []
    versions = task.versions
    said.append(
        f"lm-eval {versions['lm_eval']}, kappaquant {versions['kappaquant']}, {versions['device']}, original on {versions['original_device']}"
    )
    return ", ".join(said)


def _task_options(task: TaskReport) -> str:
    """The options of ``kappaquant evaluate`` that ask a task in the same way."""
    files = [f"path/to/{file.name}" for file in task.data]
    said = f"--task {task.task}" + (f"={files[0]}" if files else "") + "".join(f" --shots-from {f}" for f in files[1:])
    if not (task.task in PRESETS and PRESETS[task.task].published):
        said += f" --questions {task.questions} --shots {task.shots}"
        said += f" --max-tokens {task.max_tokens}" if task.max_tokens else ""
    return said + f" --task-batch {task.batch_size}" + (" --chat-template" if task.chat_template else "")


def _sizes(total: Total) -> list[str]:
    return [f"{total.tensors}", f"{total.params:,}", decimal(total.output_bytes), f"{total.bits_per_weight:.3f}"]


def _plain(value: Any) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
