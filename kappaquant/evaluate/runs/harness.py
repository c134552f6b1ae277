"""Tasks of lm-evaluation-harness on a loaded model, through its own HFLM: prepared before, answered in batches that are kept."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kappaquant.errors import FormatError, SourceError, UnsupportedError
from kappaquant.evaluate.documents.evaluation import DataFile
from kappaquant.evaluate.runs.kept import Kept
from kappaquant.evaluate.runs.pair import file_digest
from kappaquant.evaluate.runs.questions import TaskSpec, read_task
from kappaquant.files.documents import write_whole
from kappaquant.models.tokenizer import templated

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Outcomes = dict[str, str]  # metric -> one digit for each question, 1 where the answer was right
Progress = Callable[[str, int, int], None]
_RIGHT_OR_WRONG = ("exact_match", "acc", "acc_norm")  # metrics that are 0 or 1 for each question
_SEED = 1234  # of lm-eval's own command, for tasks that draw their shots
_SAMPLES = "samples.jsonl"


@dataclass(frozen=True)
class Prepared:
    """A task whose prompts are known and fit the model.

    Attributes:
        tasks: lm-eval's, several for a group.
        data: files of questions and shots; empty for lm-eval's own data.
        prompts_sha256: of all prompts in order, with what may follow them.
        questions, requests: how many; shots, max_tokens: as they will be, max_tokens None where nothing is generated.
    """

    spec: TaskSpec
    tasks: Mapping[str, Any]
    data: tuple[DataFile, ...]
    prompts_sha256: str
    questions: int
    requests: int
    shots: int
    max_tokens: int | None
    longest: int


def prepare(spec: TaskSpec, tokenizer: PreTrainedTokenizerBase, positions: int | None) -> Prepared:
    """Build a task's prompts without a model.

    Args:
        positions: tokens the model reads at most, None if unknown.

    Raises:
        UnsupportedError: lm-eval is missing or has no such task; it draws at random, runs code or is not right or wrong by
            question; a prompt with its answer is longer than ``positions``; or the tokenizer lacks what it needs.
        SourceError: the data cannot be read.
    """
    _import_lm_eval(spec)
    if tokenizer.eos_token_id is None:
        raise UnsupportedError(f"{tokenizer.name_or_path}: its tokenizer names no eos_token, at which answers end")
    if spec.chat_template and not tokenizer.chat_template:
        raise UnsupportedError(
            f"{tokenizer.name_or_path}: its tokenizer has no chat template; leave --chat-template out"
        )
    tasks = _from_files(spec) if spec.file else _by_name(spec)
    requests: list[Any] = []
    for name, task in tasks.items():
        _check(name, task)
        task.set_fewshot_seed(_SEED)
        task.build_all_requests(limit=spec.questions, **_template(spec, tokenizer))
        requests += task.instances
    tokens = {_max_tokens(task) for task in tasks.values()}
    shots = {int(task.config.num_fewshot or 0) for task in tasks.values()}
    if len(tokens) > 1 or len(shots) > 1:
        raise UnsupportedError(
            f"task {spec.name}: its parts differ in shots {sorted(shots)} or tokens; give --shots and --max-tokens"
        )
    most = max(_length(tokenizer, request) for request in requests)
    if positions is not None and most > positions:
        raise UnsupportedError(
            f"task {spec.name}: a prompt with its answer takes up to {most} tokens, the model reads {positions}; "
            "give fewer --shots or --max-tokens"
        )
    data = tuple(DataFile(path.name, file_digest(path)) for path in (spec.file, spec.shots_from) if path)
    questions = sum(len({request.doc_id for request in task.instances}) for task in tasks.values())
    return Prepared(
        spec, tasks, data, _digest([request.args for request in requests]), questions, len(requests), shots.pop(),
        tokens.pop(), most,
    )  # fmt: skip


def answer(
    prepared: Prepared,
    kept: Kept,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress,
    stage: str,
) -> None:
    """Let lm-eval ask a model, and keep every answer as soon as its batch is done; a run that was cut off goes on there.

    Raises:
        UnsupportedError: lm-eval builds other prompts than it did before, or a metric is neither 0 nor 1.
    """
    from lm_eval.api.model import CacheHook, CachingLM
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    done = 0

    class Quiet(HFLM):
        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().generate_until(requests, disable_tqdm=True)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

    class Counting(CacheHook):
        """Keeps every answer as lm-eval's own hook does, and says so."""

        def add_partial(self, attr: str, req: Any, res: Any) -> None:
            super().add_partial(attr, req, res)
            nonlocal done
            done += 1
            progress(stage, done, prepared.requests)

    spec = prepared.spec
    lm = Quiet(
        pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=spec.batch_size, max_length=prepared.longest
    )
    cached = CachingLM(lm, str(kept.folder / "answers.sqlite"))
    done = len(cached.dbdict)
    lm.set_cache_hook(Counting(cached))
    progress(stage, done, prepared.requests)
    for task in prepared.tasks.values():
        task.set_fewshot_seed(_SEED)  # evaluate builds the prompts again: they must be the same for both models
    try:
        found = evaluate(
            lm=cached, task_dict={"tasks": dict(prepared.tasks), "groups": {}}, limit=spec.questions, bootstrap_iters=0,
            apply_chat_template=spec.chat_template, fewshot_as_multiturn=spec.chat_template,
        )  # fmt: skip
    finally:
        cached.dbdict.close()
    asked = [request.args for task in prepared.tasks.values() for request in task.instances]
    if _digest(asked) != prepared.prompts_sha256:
        raise UnsupportedError(
            f"task {spec.name}: lm-eval made other prompts of it the second time, so that two models cannot be compared on them"
        )
    samples = [line for name in prepared.tasks for line in _lines(name, found["samples"][name])]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in samples)
    write_whole(kept.folder / _SAMPLES, text.encode())


def answered(kept: Kept) -> bool:
    """Whether every question was."""
    return (kept.folder / _SAMPLES).exists()


def outcomes(kept: Kept, questions: int) -> Outcomes:
    """Which answers were right, after ``answer``.

    Raises:
        FormatError: the file that says so is broken.
    """
    path = kept.folder / _SAMPLES
    try:
        right = [json.loads(line)["right"] for line in path.read_text(encoding="utf-8").splitlines()]
        found = {metric: "".join(str(int(of_one[metric])) for of_one in right) for metric in right[0]}
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        raise FormatError(f"{path}: cannot be read; delete it and run again") from None
    if len(right) != questions:
        raise FormatError(f"{path}: has {len(right)} answers to {questions} questions; delete it and run again")
    return found


def lm_eval_version() -> str:
    return version("lm_eval")


def _import_lm_eval(spec: TaskSpec) -> None:
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as problem:
        raise UnsupportedError(
            f"task {spec.name}: tasks need lm-eval ({problem.name} is missing); pip install 'kappaquant[eval]'"
        ) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are of choices made here on purpose


def _from_files(spec: TaskSpec) -> dict[str, Any]:
    """lm-eval's gsm8k with its prompts and both extractions, over other data; the first shots for every question."""
    import lm_eval.tasks
    import yaml
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    asked, shown = read_task(spec)
    splits = {"test": Dataset.from_list(asked), **({"train": Dataset.from_list(shown)} if shown else {})}
    config = yaml.safe_load((Path(lm_eval.tasks.__file__).parent / "gsm8k" / "gsm8k.yaml").read_text(encoding="utf-8"))
    train = "train" if shown else None
    config |= {
        "task": spec.name, "custom_dataset": lambda **_: splits, "training_split": train, "fewshot_split": train,
        "num_fewshot": spec.shots, "fewshot_config": {"sampler": "first_n"},
        "generation_kwargs": {**config["generation_kwargs"], "max_gen_toks": spec.max_tokens},
    }  # fmt: skip
    return {spec.name: ConfigurableTask(config=config)}


def _by_name(spec: TaskSpec) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    if spec.name not in manager.task_index:
        raise UnsupportedError(
            f"task {spec.name!r}: lm-eval {lm_eval_version()} has none of that name; lm-eval ls tasks lists them"
        )
    try:
        tasks: dict[str, Any] = manager.load([spec.name])["tasks"]
    except Exception as problem:  # whatever datasets, huggingface_hub or the task's own code raise
        reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise SourceError(f"task {spec.name}: its data cannot be had ({reason}); it comes from the Hub") from problem
    for task in tasks.values():
        if spec.shots is not None:
            task.set_config("num_fewshot", spec.shots)
        if spec.max_tokens is not None and task.OUTPUT_TYPE == "generate_until":
            task.set_config("generation_kwargs", {"max_gen_toks": spec.max_tokens}, update=True)
    return tasks


def _check(name: str, task: Any) -> None:
    if task.OUTPUT_TYPE not in ("generate_until", "multiple_choice", "loglikelihood"):
        raise UnsupportedError(
            f"task {name}: {task.OUTPUT_TYPE} is no question with an answer; evaluate --text reads texts"
        )
    if not set(task.aggregation()) & set(_RIGHT_OR_WRONG):
        raise UnsupportedError(
            f"task {name}: measures {', '.join(task.aggregation())}; compared are {', '.join(_RIGHT_OR_WRONG)}"
        )
    if (getattr(task.config, "generation_kwargs", None) or {}).get("do_sample"):
        raise UnsupportedError(f"task {name}: draws answers at random; only greedy ones can be compared in pairs")
    if getattr(task, "UNSAFE_CODE", False):
        raise UnsupportedError(f"task {name}: runs code that a model wrote, which is not done here")


def _max_tokens(task: Any) -> int | None:
    """Tokens of an answer at most; set where lm-eval leaves it to its default."""
    if task.OUTPUT_TYPE != "generate_until":
        return None
    given: dict[str, Any] = task.config.generation_kwargs
    return int(given.get("max_gen_toks", 256))  # HFLM's default


def _template(spec: TaskSpec, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What building prompts with a chat template takes; as HFLM.apply_chat_template does it."""
    if not spec.chat_template:
        return {}

    def apply(history: list[dict[str, str]], add_generation_prompt: bool = True) -> Any:
        return templated(
            tokenizer, history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip

    return {"apply_chat_template": True, "fewshot_as_multiturn": True, "chat_template": apply, "tokenizer_name": "own"}


def _length(tokenizer: PreTrainedTokenizerBase, request: Any) -> int:
    prompt, following = request.args
    if isinstance(following, str):
        return len(tokenizer(prompt + following)["input_ids"])
    return len(tokenizer(prompt)["input_ids"]) + int(following.get("max_gen_toks", 256))


def _lines(task: str, samples: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The samples of a task by question: what was answered, what was extracted, and which metrics call it right."""
    lines: dict[int, dict[str, Any]] = {}
    for sample in samples:
        line = lines.setdefault(
            sample["doc_id"],
            {"task": task, "question": sample["doc_id"], "prompt_sha256": sample["prompt_hash"], "target": str(sample["target"]),
             "answers": sample["resps"], "extracted": {}, "right": {}},
        )  # fmt: skip
        line["extracted"][sample["filter"]] = sample["filtered_resps"]
        for metric in _RIGHT_OR_WRONG:
            if metric in sample:
                if sample[metric] not in (0, 1):
                    raise UnsupportedError(f"task {task}: {metric} of a question is {sample[metric]}, expected 0 or 1")
                name = metric if sample["filter"] == "none" else f"{metric}, {sample['filter']}"
                line["right"][name] = int(sample[metric])
    return [lines[question] for question in sorted(lines)]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
