"""Tasks of ``kappaquant evaluate``: paired statistics with known answers, questions refused by line, lm-eval's own task on tiny models."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluations import evaluation, task_report, throughput_row
from paths import BESIDE
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import binomtest, bootstrap, norm
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint
from tiny_models import character_tokenizer
from typer.testing import CliRunner

import kappaquant
from kappaquant.cli import app
from kappaquant.errors import FormatError, SourceError, UnsupportedError
from kappaquant.evaluate.documents.evaluation import Evaluation
from kappaquant.evaluate.measures.bootstrap import Bootstrap
from kappaquant.evaluate.measures.intervals import paired_difference, sign_test, wilson
from kappaquant.evaluate.measures.scores import carry_over, score
from kappaquant.evaluate.measures.throughput import cases, measure
from kappaquant.evaluate.runs import against
from kappaquant.evaluate.runs.against import Options, evaluate_against
from kappaquant.evaluate.runs.harness import prepare
from kappaquant.evaluate.runs.pair import content_digest, open_pair
from kappaquant.evaluate.runs.questions import TaskSpec, parse_task, read_questions, read_task
from kappaquant.planning.sizes import active_shares

GSM8K = BESIDE / "data"
TABLES = [(0, 0, 10), (1, 0, 10), (4, 0, 200), (8, 3, 60), (3, 8, 60), (31, 0, 60), (12, 9, 1319), (10, 0, 10)]


@pytest.mark.parametrize(("first", "second", "n"), TABLES)
def test_mcnemar_against_scipy_and_statsmodels(first: int, second: int, n: int) -> None:
    known = mcnemar([[n - first - second, first], [second, 0]], exact=True).pvalue if first + second else 1.0
    assert sign_test(first, second) == pytest.approx(known, rel=1e-9)
    if first + second:
        assert sign_test(first, second) == pytest.approx(binomtest(first, first + second).pvalue, rel=1e-9)


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (10, 10), (179, 200), (1, 3)])
def test_wilson_against_statsmodels(hits: int, n: int) -> None:
    assert wilson(hits, n) == pytest.approx(proportion_confint(hits, n, method="wilson"), abs=1e-12)


def _score_by_search(first: int, second: int, n: int, difference: float) -> float:
    """Tango's statistic with the likeliest nuisance parameter found by scipy's search instead of its closed form."""
    same = n - first - second

    def unlikely(p: float) -> float:
        parts = ((second, p), (first, p + difference), (same, 1 - 2 * p - difference))
        return -sum(count * np.log(max(share, 1e-300)) for count, share in parts if count)

    low, high = max(0.0, -difference), (1 - difference) / 2
    p = minimize_scalar(unlikely, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    return (first - second - n * difference) / np.sqrt(n * (2 * p + difference - difference**2))


@pytest.mark.parametrize(("first", "second", "n"), [(8, 3, 60), (3, 8, 60), (4, 1, 200), (12, 9, 1319), (25, 7, 90)])
def test_the_interval_of_a_difference_against_a_search(first: int, second: int, n: int) -> None:
    z, middle = norm.ppf(0.975), (first - second) / n
    low = brentq(lambda d: _score_by_search(first, second, n, d) - z, -0.9, middle)
    high = brentq(lambda d: _score_by_search(first, second, n, d) + z, middle, 0.9)
    assert paired_difference(first, second, n) == pytest.approx((low, high), abs=1e-5)


def test_the_interval_leaves_out_zero_where_mcnemar_without_correction_is_significant() -> None:
    for first in range(14):
        for second in range(14):
            low, high = paired_difference(first, second, 40)
            assert low <= (first - second) / 40 <= high
            assert (-high, -low) == pytest.approx(paired_difference(second, first, 40), abs=1e-9)
            if first + second:
                known = mcnemar([[1, first], [second, 1]], exact=False, correction=False).pvalue
                assert (known < 0.05) == (not low <= 0 <= high)
    assert paired_difference(0, 0, 60) == pytest.approx((-0.0602, 0.0602), abs=1e-4)  # z² / (n + z²)
    ratio = norm.ppf(0.975) ** 2 / 6  # all apart: (n - nd)² / (n (1 - d²)) = z², solved by hand
    assert paired_difference(6, 0, 6) == pytest.approx(((1 - ratio) / (1 + ratio), 1), abs=1e-6)
    with pytest.raises(ValueError, match="of 3 pairs"):
        paired_difference(2, 2, 3)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for first, second, _ in rng.multinomial(80, [0.12, 0.05, 0.83], size=2000):
        low, high = paired_difference(int(first), int(second), 80)
        held += low <= 0.07 <= high
    assert 0.93 < held / 2000 < 0.97


def test_bootstrap_against_scipy() -> None:
    rng = np.random.default_rng(1)
    values = [rng.exponential(rng.uniform(0.5, 2), rng.integers(10, 40)) for _ in range(60)]
    sums, counts = np.array([v.sum() for v in values]), np.array([len(v) for v in values])
    known = bootstrap(
        (sums, counts), lambda s, c, axis: s.sum(axis) / c.sum(axis), paired=True, vectorized=True, method="percentile",
        n_resamples=20_000, rng=np.random.default_rng(2),
    ).confidence_interval  # fmt: skip
    found = Bootstrap(60, 20_000).mean(values)
    assert found.interval_95 == pytest.approx((known.low, known.high), abs=0.03 * (known.high - known.low))


def test_scores() -> None:
    found = score("acc", "1100", "1011")
    assert (found.checkpoint.value, found.source.value, found.difference.value) == (0.5, 0.75, -0.25)
    assert (found.only_checkpoint, found.only_source, found.p_value, found.significant) == (1, 2, 1.0, False)
    assert score("acc", "1" * 6, "0" * 6).significant  # p = 1/32
    assert not score("acc", "1" * 5, "0" * 5).significant  # p = 1/16
    with pytest.raises(ValueError, match="zip"):
        score("acc", "11", "1")


def test_rows_are_carried_over_for_the_same_models_only() -> None:
    old = evaluation(
        tasks=(task_report("gsm8k"), task_report("stories"), task_report("other", checkpoint_sha256="b" * 64)),
        throughput=(throughput_row(), throughput_row(context=9, source_sha256="b" * 64)),
    )
    new = task_report("stories", checkpoint="0000")
    found, dropped = carry_over(evaluation(tasks=(new,)), old, "1" * 64, "2" * 64)
    assert found.tasks == (new, old.tasks[0])
    assert found.throughput == old.throughput[:1]
    assert [notice.partition(":")[0] for notice in dropped] == [
        "task other",
        "throughput of the checkpoint, batch 1, context 9",
    ]
    assert "another checkpoint (bbbbbbbbbbbb…)" in dropped[0]
    assert "another original" in dropped[1]


# Questions and presets


def line(question: str = "How many?", answer: str = "1+1=2. #### 2") -> str:
    return json.dumps({"question": question, "answer": answer}) + "\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no questions"),
        (b"\xff", "is not UTF-8 at byte 0"),
        (line().encode() + b"{", r"q\.jsonl:2: is not JSON"),
        (b"[]\n", r"q\.jsonl:1: expected an object"),
        (b'{"question": "a"}\n', r"q\.jsonl:1: expected an object with the strings"),
        (line(answer="two").encode(), r"q\.jsonl:1: its answer has no '#### '"),
    ],
)
def test_broken_questions_are_named_by_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=message):
        read_questions(path)


def test_questions_and_shots(tmp_path: Path) -> None:
    asked, shown = tmp_path / "q.jsonl", tmp_path / "s.jsonl"
    asked.write_text("".join(line(f"q{i}") for i in range(4)))
    shown.write_text(line("s0") + line("s1") + line("q1"))
    with pytest.raises(SourceError, match="cannot be read"):
        read_questions(tmp_path / "absent.jsonl")
    found, shots = read_task(TaskSpec("gsm8k", asked, shown, questions=3, shots=2))
    assert [q["question"] for q in found] == ["q0", "q1", "q2"]
    assert [q["question"] for q in shots] == ["s0", "s1"]
    with pytest.raises(SourceError, match="has 4 questions, asked for are 5"):
        read_task(TaskSpec("gsm8k", asked, questions=5))
    with pytest.raises(UnsupportedError, match=r"s\.jsonl: shows the answer to a question of .*'q1'"):
        read_task(TaskSpec("gsm8k", asked, shown, shots=3))


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ("gsm8k-200", {}, "give --task gsm8k-200=FILE"),
        ("other=q.jsonl", {}, "task 'other': a file of questions is for gsm8k"),
        ("gsm8k=q.jsonl", {}, "its 5 shots need worked examples"),
        (
            "gsm8k-200=q.jsonl",
            {"shots": 3},
            "is a published protocol of 200 questions, 5 shots and at most 1024 tokens",
        ),
        ("gsm8k=q.jsonl", {"shots": 0, "questions": 0}, "questions = 0, must be at least 1"),
        ("acc", {"batch_size": 0}, "batch_size = 0"),
    ],
)
def test_tasks_that_cannot_be(text: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        parse_task(text, Path(), **more)


def test_presets() -> None:
    published = parse_task("gsm8k-200=q.jsonl", Path(), shots_from=Path("s.jsonl"))
    assert (published.questions, published.shots, published.max_tokens) == (200, 5, 1024)
    assert parse_task("arithmetic_stories", Path("model")).file == Path("model/arithmetic_stories.jsonl")
    assert parse_task("gsm8k=q", Path(), shots=0, shots_from=Path("s")).shots_from is None


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


def test_the_reference_models_questions_are_what_its_script_makes() -> None:
    from reference.held_out import QUESTIONS, held_out_questions

    assert QUESTIONS.read_text(encoding="utf-8") == held_out_questions()
    assert len(read_questions(QUESTIONS)) == 300


# Both models, asked through lm-eval

HOW = Options(window=64, tokens=300, dtype="float32", noise_floor=False)
ASKED = 12


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The reference model and two bits of it, which is where its arithmetic goes wrong."""
    from reference.evaluate import MODEL

    source = kappaquant.open_source(MODEL)
    plan = kappaquant.make_plan(source.tensors, source.config, "uniform", bits=2)
    from kappaquant.quantizing.quantize import Options as How

    return open_pair(
        kappaquant.quantize(source, tmp_path_factory.mktemp("pair") / "u2", plan, How("fast", jobs=1)), MODEL
    )


@pytest.fixture(scope="module")
def spec(pair: Any) -> TaskSpec:
    return parse_task("arithmetic_stories", pair.source.folder, questions=ASKED, batch_size=4)


@pytest.fixture(scope="module")
def whole(pair: Any, spec: TaskSpec) -> Evaluation:
    return run(pair, spec, pair.path.parent / "whole")


def run(pair: Any, spec: TaskSpec, logits: Path, progress: Any = lambda *_: None) -> Evaluation:
    return evaluate_against(pair, pair.source.folder / "evaluation.txt", logits, HOW, progress, [spec])


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
    model, tokenizer = kappaquant.load(pair.path, dtype=torch.float32)
    own = "".join(
        str(int(extract_answer(text) == p.answer))
        for text, p in zip(answers(model, tokenizer, problems), problems, strict=True)
    )
    assert strict.checkpoint_outcomes == own
    assert strict.source_outcomes == "1" * ASKED
    assert "0" in own


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


def test_throughput_of_both_models(pair: Any) -> None:
    with pytest.raises(UnsupportedError, match="context = 4080: must be 1 to 4059, for 32 tokens follow"):
        cases(pair, [4080])
    assert cases(pair) == [(1, 32), (1, 1024)]
    ours, theirs = measure(pair, cases(pair, [8]), "cpu", "int8", lambda *_: None)
    assert (ours.model, theirs.model, ours.context) == ("checkpoint", "original", 8)
    assert theirs.token_bytes == 2 * sum(
        info.numel * share
        for info, share in zip(
            pair.source.tensors.values(), active_shares(pair.source.tensors, pair.source.config).values(), strict=True
        )
    )
    assert ours.token_bytes < theirs.token_bytes / 2
    for row in (ours, theirs):
        assert row.roofline_share == pytest.approx(
            row.decode_tokens_per_s * row.token_bytes / row.bandwidth_gb_per_s / 1e9
        )
        assert 0 < row.roofline_share < 1
        assert row.peak_gib > 0.1
        assert row.first_token_ms == pytest.approx(8 / row.prefill_tokens_per_s * 1e3)
    assert ours.bandwidth_gb_per_s == theirs.bandwidth_gb_per_s > 0.1
