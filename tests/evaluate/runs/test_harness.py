"""Tasks of ``kappaquant evaluate`` through lm-eval: a published protocol, the model's own evaluation, runs cut off, tasks by name."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import BESIDE
from tiny_models import character_tokenizer
from typer.testing import CliRunner

import kappaquant
from kappaquant.cli import app
from kappaquant.errors import FormatError, SourceError, UnsupportedError
from kappaquant.evaluate.documents.evaluation import Evaluation
from kappaquant.evaluate.runs import against
from kappaquant.evaluate.runs.against import Options, evaluate_against
from kappaquant.evaluate.runs.harness import prepare
from kappaquant.evaluate.runs.pair import content_digest
from kappaquant.evaluate.runs.questions import TaskSpec, parse_task, read_task

GSM8K = BESIDE / "data"


@pytest.mark.skipif(not (GSM8K / "gsm8k_test.jsonl").exists(), reason="needs the files of gsm8k")
def test_the_published_protocol_on_the_real_files() -> None:
    spec = parse_task(
        f"gsm8k-200={GSM8K / 'gsm8k_test.jsonl'}", Path(), shots_from=GSM8K / "gsm8k_train_first200.jsonl"
    )
    from transformers import AutoTokenizer

    from reference.evaluate import MODEL

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    found = prepare(spec, tokenizer, None)
    assert (found.questions, found.shots, found.max_tokens) == (200, 5, 1024)
    prompt = found.tasks["gsm8k-200"].instances[0].args[0]
    assert prompt.count("Question: ") == 6
    assert prompt.startswith("Question: Natalia sold clips to 48 of her friends")
    assert prompt.endswith("make every day at the farmers' market?\nAnswer:")
    with pytest.raises(UnsupportedError, match=r"takes up to \d{4} tokens, the model reads 1500; give fewer"):
        prepare(spec, tokenizer, 1500)


# Both models, asked through lm-eval

# exact products: with int8 inputs a batch of another size may tip a token that was nearly another
HOW = Options(window=64, tokens=300, dtype="float32", activations="float32", noise_floor=False)
ASKED = 12


@pytest.fixture(scope="module")
def spec(pair: Any) -> TaskSpec:
    return parse_task("arithmetic_stories", pair.source.folder, questions=ASKED, batch_size=4)


@pytest.fixture(scope="module")
def whole(pair: Any, spec: TaskSpec) -> Evaluation:
    return run(pair, spec, pair.path.parent / "whole")


def run(pair: Any, spec: TaskSpec, logits: Path, progress: Any = lambda *_: None) -> Evaluation:
    return evaluate_against(pair, pair.source.folder / "evaluation.txt", logits, HOW, progress, [spec])


@pytest.mark.slow
def test_a_task_says_what_the_models_own_evaluation_says(pair: Any, spec: TaskSpec, whole: Evaluation) -> None:
    from reference.evaluate import answers
    from reference.text import Problem, extract_answer, format_prompt

    (task,) = whole.tasks
    assert (task.questions, task.shots, task.max_tokens, task.batch_size) == (ASKED, 0, 72, 4)
    assert [file.name for file in task.data] == ["arithmetic_stories.jsonl"]
    assert (task.checkpoint_sha256, task.source_sha256) == (
        content_digest(pair.checkpoint),
        content_digest(pair.source),
    )
    assert {"lm_eval", "torch", "transformers", "kappaquant", "device", "original_device"} <= task.versions.keys()
    assert [s.metric for s in task.scores] == ["exact_match, strict-match", "exact_match, flexible-extract"]
    strict = task.scores[0]
    asked, _ = read_task(spec)
    problems = [Problem(format_prompt(q["question"]), "", int(q["answer"].split("#### ")[1])) for q in asked]
    model, tokenizer = kappaquant.load(pair.path, dtype=torch.float32, activations="float32")
    own = "".join(
        str(int(extract_answer(text) == p.answer))
        for text, p in zip(answers(model, tokenizer, problems), problems, strict=True)
    )
    assert strict.checkpoint_outcomes == own
    assert strict.source_outcomes == "1" * ASKED
    assert "0" in own


@pytest.mark.slow
def test_an_interrupted_task_goes_on_where_it_was(
    pair: Any, spec: TaskSpec, whole: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int]] = []

    def cut_off(stage: str, done: int, total: int) -> None:
        seen.append((stage, done))
        if seen.count((stage, done)) == 1 and done == 4 and "stories" in stage:
            raise KeyboardInterrupt

    logits = Path(shutil.copytree(pair.path.parent / "whole", tmp_path / "parts"))
    shutil.rmtree(logits / "tasks")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(pair, spec, logits, cut_off)
    assert run(pair, spec, logits, cut_off).tasks == whole.tasks
    for stage in ("arithmetic_stories, original", "arithmetic_stories, checkpoint"):
        assert [done for s, done in seen if s == stage] == [0, 1, 2, 3, 4, *range(4, ASKED + 1)]

    monkeypatch.setattr(against, "load_original", lambda *_: pytest.fail("nothing is left to ask"))
    monkeypatch.setattr(against, "load_checkpoint", lambda *_: pytest.fail("nothing is left to ask"))
    assert run(pair, spec, logits).tasks == whole.tasks
    (samples, *_) = (logits / "tasks").rglob("samples.jsonl")
    first = json.loads(samples.read_text().splitlines()[0])
    assert first["answers"][0][0].strip()
    samples.write_text(samples.read_text().partition("\n")[2])
    with pytest.raises(FormatError, match=rf"samples\.jsonl: has 11 answers to {ASKED} questions; delete it"):
        run(pair, spec, logits)


@pytest.mark.slow
def test_the_command_keeps_tasks_measured_before(pair: Any, whole: Evaluation, tmp_path: Path) -> None:
    report = tmp_path / "evaluation.json"
    whole.save(report)
    command = ["evaluate", str(pair.path), "--against", str(pair.source.folder), "--window", "64", "--tokens", "300", "--dtype",
               "float32", "--no-noise-floor", "--device", "cpu", "-o", str(report), "--logits", str(pair.path.parent / "whole")]  # fmt: skip
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert [row.scores[0].checkpoint_outcomes for row in Evaluation.load(report).tasks] == [
        row.scores[0].checkpoint_outcomes for row in whole.tasks
    ]
    assert "arithmetic_stories, exact_match, strict-match" in done.stdout
    assert "McNemar's exact test" in done.stdout
    stale = dataclasses.replace(whole, tasks=(dataclasses.replace(whole.tasks[0], checkpoint_sha256="f" * 64),))
    stale.save(report)
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert Evaluation.load(report).tasks == ()
    assert "task arithmetic_stories: was measured of another checkpoint (ffffffffffff…)" in done.stderr
    report.write_text("{")
    with pytest.raises(FormatError, match="not JSON"):
        CliRunner().invoke(app, command, catch_exceptions=False)


# What lm-eval is not asked


def test_other_tasks_and_tokenizers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spec: TaskSpec) -> None:
    tokenizer = character_tokenizer()
    with pytest.raises(UnsupportedError, match="names no eos_token"):
        prepare(spec, tokenizer, None)
    tokenizer.eos_token = "~"
    with pytest.raises(UnsupportedError, match="no chat template; leave --chat-template out"):
        prepare(dataclasses.replace(spec, chat_template=True), tokenizer, None)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(UnsupportedError, match=r"tasks need lm-eval .*kappaquant\[eval\]"):
        prepare(spec, tokenizer, None)


def test_tasks_of_lm_eval_by_name(pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of several choices in lm-eval's own form, found by its name."""
    import lm_eval.tasks
    from transformers import AutoTokenizer

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    own = partial(lm_eval.tasks.TaskManager, include_defaults=False, include_path=str(tmp_path / "tasks"))
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", own)  # without the 10,000 files that come with lm-eval
    (tmp_path / "data.json").write_text(
        "".join(json.dumps({"sum": f"{a}+{a}=", "right": a % 2}) + "\n" for a in range(5))
    )
    config = {
        "task": "parity", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.json")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{sum}}", "doc_to_choice": ["even", "odd"],
        "doc_to_target": "right", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip
    lacking = {**config, "task": "lacking", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "absent.json")}}}
    drawn = {**config, "task": "drawn", "output_type": "generate_until", "metric_list": [{"metric": "exact_match"}],
             "generation_kwargs": {"do_sample": True, "until": ["."]}}  # fmt: skip
    (tmp_path / "tasks").mkdir()
    for made in (config, lacking, drawn):
        (tmp_path / "tasks" / f"{made['task']}.yaml").write_text(json.dumps(made))

    (task,) = run(pair, TaskSpec("parity", questions=4), pair.path.parent / "whole").tasks
    assert (task.task, task.data, task.questions, task.shots, task.max_tokens) == ("parity", (), 4, 0, None)
    assert [found.metric for found in task.scores] == ["acc", "acc_norm"]
    assert all(len(found.checkpoint_outcomes) == len(found.source_outcomes) == 4 for found in task.scores)
    tokenizer = AutoTokenizer.from_pretrained(pair.tokenizer)
    for name, error, message in (
        ("no_such_task", UnsupportedError, r"lm-eval .* has none of that name"),
        ("lacking", SourceError, r"task lacking: its data cannot be had"),
        ("drawn", UnsupportedError, r"task drawn: draws answers at random"),
    ):
        with pytest.raises(error, match=message):
            prepare(TaskSpec(name), tokenizer, None)
