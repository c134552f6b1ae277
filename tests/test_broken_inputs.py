"""Every command over inputs that are broken in every way we know: it ends with 2 and one line, whatever it meets, and no traceback."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run, run_here
from safetensors.torch import load_file, save_file
from tiny_checkpoints import quantize
from tiny_models import character_tokenizer, save_tiny

import kappaquant

WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
Break = Callable[[Path], None]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with all that belongs to one, its checkpoint, and what commands take beside them."""
    root = tmp_path_factory.mktemp("good")
    source = save_tiny("llama", root / "source", dtype=torch.bfloat16)
    tokenizer = character_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(source)
    quantize(source, root / "checkpoint")
    opened = kappaquant.open_source(source)
    kappaquant.make_plan(opened.tensors, opened.config, "uniform").save(root / "plan.json")
    assert run_here("scan", source, "-o", root / "profile.json", "--bits", "").returncode == 0
    assert run_here("calibrate", source, "-o", root / "evidence.json", "--data-free").returncode == 0
    (root / "text.txt").write_text("one and two and three " * 20)
    return root


def wrote(name: str, content: str | bytes) -> Break:
    return lambda folder: (
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content) and None
    )


def without(name: str) -> Break:
    return lambda folder: (folder / name).unlink()


def set_in(name: str, *path: str, to: Any) -> Break:
    """A value of a JSON file replaced, or taken out where ``to`` is ``...``."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        place = content
        for key in path[:-1]:
            place = place[key]
        if to is ...:
            del place[path[-1]]
        else:
            place[path[-1]] = to
        (folder / name).write_text(json.dumps(content))

    return change


def cut(name: str, keep: float) -> Break:
    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(keep * len(data))])

    return change


def header(text: bytes, length: int | None = None) -> Break:
    return wrote(WEIGHTS, struct.pack("<Q", len(text) if length is None else length) + text)


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Break:
    def apply(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file(state, folder / WEIGHTS, {"format": "pt"})

    return apply


def instead(name: str, make: Callable[[Path], Any]) -> Break:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return change


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("no folder")


def a_pipe(folder: Path) -> None:
    shutil.rmtree(folder)
    os.mkfifo(folder)


def pickles(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def an_adapter(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_config.json").write_text("{}")


def index(weight_map: Any) -> Break:
    return wrote(INDEX, json.dumps({"metadata": {}, "weight_map": weight_map}))


Q = "model.layers.0.self_attn.q_proj.weight"
BOTH: dict[str, Break] = {
    "no folder": shutil.rmtree,
    "empty folder": empty,
    "a file instead of a folder": a_file,
    "a pipe instead of a folder": a_pipe,
    "no config.json": without(CONFIG),
    "config.json is empty": wrote(CONFIG, ""),
    "config.json is no JSON": wrote(CONFIG, "{model_type: llama}"),
    "config.json is a list": wrote(CONFIG, "[1, 2]"),
    "config.json is binary": wrote(CONFIG, b"\xff\xfe\x00\x80"),
    "config.json is deep": wrote(CONFIG, "[" * 100_000),
    "config.json is a folder": instead(CONFIG, Path.mkdir),
    "config.json is a link to nothing": instead(CONFIG, lambda path: path.symlink_to("nowhere")),
    "no weights": without(WEIGHTS),
    "weights are empty": wrote(WEIGHTS, b""),
    "weights are text": wrote(WEIGHTS, "weights" * 100),
    "weights cut in the header": cut(WEIGHTS, 0.0005),
    "weights cut in a tensor": cut(WEIGHTS, 0.7),
    "header is no JSON": header(b"{nonsense"),
    "header is a list": header(b"[]"),
    "header is longer than the file": header(b"{}", 1 << 40),
    "header with an unknown dtype": header(b'{"a":{"dtype":"Q9","shape":[1],"data_offsets":[0,1]}}'),
    "header with a negative shape": header(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}'),
    "header with offsets that are words": header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":["0","4"]}}'),
    "weights are a folder": instead(WEIGHTS, Path.mkdir),
    "weights are a pipe": instead(WEIGHTS, os.mkfifo),
    "index is no JSON": wrote(INDEX, "{"),
    "index is a list": wrote(INDEX, "[]"),
    "index without a map": wrote(INDEX, "{}"),
    "index of a missing shard": index({Q: "model-00001-of-00002.safetensors"}),
    "index of another folder": index({Q: "../source/model.safetensors"}),
    "index with numbers": index({Q: 7}),
    "index whose map is a list": index([Q]),
}
SOURCES: dict[str, Break] = {
    "weights with NaN": tensors(lambda s: s[Q].fill_(float("nan"))),
    "config without model_type": set_in(CONFIG, "model_type", to=...),
    "model_type is a number": set_in(CONFIG, "model_type", to=7),
    "model_type is a list": set_in(CONFIG, "model_type", to=["llama"]),
    "architectures is a number": set_in(CONFIG, "architectures", to=7),
    "architectures of numbers": set_in(CONFIG, "architectures", to=[7, None]),
    "hidden_size is a word": set_in(CONFIG, "hidden_size", to="wide"),
    "hidden_size is another": set_in(CONFIG, "hidden_size", to=64),
    "heads are none": set_in(CONFIG, "num_attention_heads", to=0),
    "layers are negative": set_in(CONFIG, "num_hidden_layers", to=-1),
    "text_config is a word": set_in(CONFIG, "text_config", to="text"),
    "tie_word_embeddings is a word": set_in(CONFIG, "tie_word_embeddings", to="perhaps"),
    "quantization_config is a word": set_in(CONFIG, "quantization_config", to="some"),
    "dtype is unknown": set_in(CONFIG, "dtype", to="float7"),
    "tensors are missing": tensors(lambda s: [s.pop(name) for name in list(s) if ".1." in name]),
    "a tensor too many": tensors(lambda s: s.update(stray=torch.zeros(3))),
    "a tensor of another shape": tensors(lambda s: s.update({Q: torch.zeros(64, 128, dtype=torch.bfloat16)})),
    "no tokenizer": without("tokenizer.json"),
    "tokenizer is no JSON": wrote("tokenizer.json", "{"),
    "tokenizer of nothing": wrote("tokenizer.json", "{}"),
    "tokenizer_config is a list": wrote("tokenizer_config.json", "[]"),
    "only pickles": pickles,
    "an adapter": an_adapter,
}
MANIFEST = "kappaquant.json"
CHECKPOINTS: dict[str, Break] = {
    "no manifest": without(MANIFEST),
    "manifest is no JSON": wrote(MANIFEST, "{"),
    "manifest is a list": wrote(MANIFEST, "[]"),
    "manifest of nothing": wrote(MANIFEST, "{}"),
    "manifest without tensors": set_in(MANIFEST, "tensors", to=...),
    "manifest whose tensors are a list": set_in(MANIFEST, "tensors", to=[1]),
    "manifest with a shape of words": set_in(MANIFEST, "tensors", Q, "shape", to=["a", "b"]),
    "manifest of another version": set_in(MANIFEST, "format_version", to=99),
    "manifest without hashes": set_in(MANIFEST, "sha256", to=...),
    "manifest whose plan is a word": set_in(MANIFEST, "plan", to="plan"),
    "map of a format nobody knows": set_in(CONFIG, "quantization_config", "tensors", Q, to="tq3g77"),
    "map of numbers": set_in(CONFIG, "quantization_config", "tensors", Q, to=3),
    "map is a list": set_in(CONFIG, "quantization_config", "tensors", to=[]),
    "codebooks of words": set_in(CONFIG, "quantization_config", "codebooks", to={"tq3g64": ["a"]}),
    "codebooks are a list": set_in(CONFIG, "quantization_config", "codebooks", to=[]),
    "another quant_method": set_in(CONFIG, "quantization_config", "quant_method", to="gptq"),
    "quant_method is a list": set_in(CONFIG, "quantization_config", "quant_method", to=[]),
    "quantization_config is a word": set_in(CONFIG, "quantization_config", to="some"),
    "hidden_size is a word": set_in(CONFIG, "hidden_size", to="wide"),
    "heads are none": set_in(CONFIG, "num_attention_heads", to=0),
    "model_type is unknown": set_in(CONFIG, "model_type", to="nonsense"),
    "architectures is a number": set_in(CONFIG, "architectures", to=7),
    "norms are missing": tensors(lambda s: s.pop(f"{Q}.tq_norms")),
    "codes of another shape": tensors(lambda s: s.update({f"{Q}.tq_packed": s[f"{Q}.tq_packed"][:-1].clone()})),
    "no tokenizer": without("tokenizer.json"),
    "tokenizer is no JSON": wrote("tokenizer.json", "{"),
    "chat template is broken": wrote("chat_template.jinja", "{% for m in %}"),
    "chat template raises": wrote("chat_template.jinja", "{{ raise_exception('no') }}{{ 1/0 }}"),
    "chat template reads what is not there": wrote("chat_template.jinja", "{{ messages[7].content.x }}"),
    "generation_config is no JSON": wrote("generation_config.json", "{"),
    "generation_config of words": wrote("generation_config.json", '{"eos_token_id": "two"}'),
    "evaluation is no JSON": wrote("evaluation.json", "{"),
    "evaluation of another version": wrote("evaluation.json", '{"format_version": 7}'),
    "evaluation of nothing": wrote("evaluation.json", '{"format_version": 1}'),
}  # fmt: skip
ON_SOURCES = {
    "scan": "scan {x} --bits 3", "plan": "plan {x} --bits 3", "quantize": "quantize {x} -o {out} --bits 3 --effort fast --jobs 1",
    "export": "export {x} -o {out} --bits 4", "calibrate": "calibrate {x} -o {file} --data-free", "write": "write {x} -o {file}l --tokens 2",
    "evaluate": "evaluate {checkpoint} --against {x} --text {text} --window 16 --tokens 20",
    "bench": "bench {checkpoint} --against {x} --context 4 --steps 1",
}  # fmt: skip
ON_CHECKPOINTS = {
    "inspect": "inspect {x}", "verify": "verify {x}", "dequantize": "dequantize {x} -o {out}", "export": "export {x} -o {out}",
    "generate": "generate {x} two --max-new-tokens 2", "chat": "chat {x} --max-new-tokens 2",
    "bench": "bench {x} --context 4 --steps 1", "evaluate": "evaluate {x} --against {source} --text {text} --window 16 --tokens 20",
    "compare": "compare {x}", "card": "card {x} -o {file}", "push": "push {x} someone/name", "convert": "convert {x} -o {out}",
    "serve": "serve {x} --engine transformers", "write": "write {x} -o {file}l --tokens 2",
}  # fmt: skip
LOADING = ("generate", "chat")
# which commands must not pass over a fault; the others may have no eye for it
MUST = (
    dict.fromkeys(BOTH, ("scan", "plan", "quantize", "export", "calibrate"))
    | {
        "weights with NaN": ("quantize",),
        "hidden_size is a word": ("export", "write"),
        "hidden_size is another": ("export", "write"),
        "heads are none": ("export", "write"),
        "layers are negative": ("export", "write"),
        "tensors are missing": ("export", "write", "bench"),
        "a tensor too many": ("export", "write", "bench"),
        "a tensor of another shape": ("export", "write"),
        "no tokenizer": ("write",),
        "tokenizer is no JSON": ("write",),
        "only pickles": ("plan", "quantize"),
        "an adapter": ("plan", "quantize"),
    },
    dict.fromkeys(BOTH, ("inspect", "verify", "dequantize", "generate"))
    | {
        "manifest is no JSON": ("inspect", "generate"), "manifest of nothing": ("inspect",), "map of numbers": ("inspect", "generate"),
        "map of a format nobody knows": ("inspect", "generate"), "norms are missing": ("verify", "generate"), "codes of another shape": ("generate",),
        "hidden_size is a word": LOADING, "heads are none": LOADING, "model_type is unknown": LOADING, "no tokenizer": LOADING,
        "tokenizer is no JSON": LOADING, "chat template is broken": ("chat",), "chat template raises": ("chat",),
        "chat template reads what is not there": ("chat",), "generation_config is no JSON": LOADING, "generation_config of words": LOADING,
        "evaluation is no JSON": ("compare", "card", "push"), "evaluation of nothing": ("compare", "card", "push"),
    },
)  # fmt: skip


def said(command: str, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> str:
    """What a command says, which is one line that begins as our errors do, and the last; nothing where it does not complain."""
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n\n"))
    monkeypatch.setattr(os, "execv", lambda *arguments: None)  # a server would begin here
    words = [word.format(**places) for word in command.split()]
    done = run_here(*words)
    both = done.stdout + done.stderr
    assert "Traceback" not in both
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    if words[0] == "verify" and done.returncode == 1:
        assert all(line.startswith("FAILED ") for line in lines), both
        return lines[0]
    assert done.returncode == 2, both
    assert [line.startswith("error: ") for line in lines].count(True) == 1, both
    assert lines[-1].startswith("error: "), both
    assert not places["out"].exists(), "an output that is half there"
    return lines[-1]


def faults(kind: int, own: dict[str, Break]) -> list[Any]:
    return [pytest.param(change, MUST[kind].get(fault, ()), id=fault) for fault, change in {**BOTH, **own}.items()]


def check(
    kind: str,
    change: Break,
    commands: dict[str, str],
    must: tuple[str, ...],
    good: Path,
    tmp_path: Path,
    patch: pytest.MonkeyPatch,
) -> None:
    broken = shutil.copytree(good / kind, tmp_path / "broken")
    change(broken)
    places = {name: good / name for name in ("source", "checkpoint")} | {"text": good / "text.txt", "x": broken}
    places |= {"out": tmp_path / "out", "file": tmp_path / "file.json"}
    for name, command in commands.items():
        found = said(command, places, patch)
        assert found or name not in must, f"{name} passes over it"
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        for made in tmp_path.glob("file.json*"):
            made.unlink()


@pytest.mark.parametrize(("change", "must"), faults(0, SOURCES))
def test_models(
    change: Break, must: tuple[str, ...], good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = {name: line for name, line in ON_SOURCES.items() if name in must or name in ("scan", "plan", "quantize")}
    check("source", change, commands, must, good, tmp_path, monkeypatch)


@pytest.mark.parametrize(("change", "must"), faults(1, CHECKPOINTS))
def test_checkpoints(
    change: Break, must: tuple[str, ...], good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = {
        name: line
        for name, line in ON_CHECKPOINTS.items()
        if name in must or name in ("inspect", "verify", "card", "convert")
    }
    check("checkpoint", change, commands, must, good, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "change"),
    [("source", c) for c in (BOTH | SOURCES).values()] + [("checkpoint", c) for c in (BOTH | CHECKPOINTS).values()],
)
def test_every_command(kind: str, change: Break, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(kind, change, ON_SOURCES if kind == "source" else ON_CHECKPOINTS, (), good, tmp_path, monkeypatch)


# what is read beside a model: the command, the file it takes, and how that is broken
PLAN, EVIDENCE, PROFILE = (
    "quantize {source} -o {out} --plan {x}",
    "plan {source} --evidence {x} --size 1MB",
    "plan {source} --policy kurtosis --profile {x}",
)
TEXT, REPORT = "evaluate {checkpoint} --against {source} --text {x} --window 16", "compare {x}"
CALIBRATION = "quantize {source} -o {out} --calibration {x} --jobs 1"
DOCUMENTS: list[tuple[str, str, Break]] = [
    *(
        (command, file, wrote(file, content))
        for command, file in ((PLAN, "plan.json"), (EVIDENCE, "evidence.json"), (PROFILE, "profile.json"), (REPORT, "report.json"))
        for content in ("", "{", "[]", "7", "null", "{}", b"\xff\x00", "[" * 100_000)
    ),
    *((command, file, instead(file, make)) for command, file in ((PLAN, "plan.json"), (EVIDENCE, "evidence.json"), (TEXT, "text.txt")) for make in (Path.mkdir, lambda path: None)),
    (PLAN, "plan.json", set_in("plan.json", "tensors", to=[])),
    (PLAN, "plan.json", set_in("plan.json", "tensors", Q, to=7)),
    (PLAN, "plan.json", set_in("plan.json", "tensors", Q, to={"format": "tq9g64", "why": ""})),
    (PLAN, "plan.json", set_in("plan.json", "tensors", Q, to={"format": 7, "why": ""})),
    (PLAN, "plan.json", set_in("plan.json", "tensors", Q, to=...)),
    (PLAN, "plan.json", set_in("plan.json", "tensors", "stray", to={"format": "kept", "why": ""})),
    (PLAN, "plan.json", set_in("plan.json", "group_size", to="many")),
    (PLAN, "plan.json", set_in("plan.json", "plan_version", to=99)),
    (PLAN, "plan.json", set_in("plan.json", "plan_version", to="two")),
    (PROFILE, "profile.json", set_in("profile.json", "tensors", to=[])),
    (PROFILE, "profile.json", set_in("profile.json", "tensors", Q, to=...)),
    (PROFILE, "profile.json", set_in("profile.json", "tensors", Q, to={})),
    (PROFILE, "profile.json", set_in("profile.json", "tensors", Q, "kurtosis", to="high")),
    (EVIDENCE, "evidence.json", set_in("evidence.json", "evidence_version", to=99)),
    (EVIDENCE, "evidence.json", set_in("evidence.json", "units", to={})),
    (EVIDENCE, "evidence.json", set_in("evidence.json", "units", to=[7])),
    (EVIDENCE, "evidence.json", set_in("evidence.json", "tensors", Q, to=7)),
    (EVIDENCE, "evidence.json", set_in("evidence.json", "sha256", to="0" * 64)),
    (TEXT, "text.txt", wrote("text.txt", "")),
    (TEXT, "text.txt", wrote("text.txt", "x")),
    (TEXT, "text.txt", wrote("text.txt", b"\xff\xfe\x00\x01")),
    *((CALIBRATION, name, wrote(name, content)) for name in ("text.txt", "text.jsonl") for content in ("", "\n\n", b"\xff\x00\xfe")),
    *((CALIBRATION, "text.jsonl", wrote("text.jsonl", content)) for content in ("{", "[]", "7", "{}", '{"text": 7}', '{"messages": [7]}', '{"messages": [{"role": "user"}]}')),
]  # fmt: skip
OPTIONS = [
    *(f"plan {{source}} --evidence {{evidence}} --size {size}" for size in ("18", "-1GB", "0GB", "GB", "1QB", "nan", "1e400GB", "9999GB", "1B")),
    *(f"plan {{source}} --evidence {{evidence}} --bits-per-weight {bits}" for bits in ("-1", "0", "nan", "inf", "99")),
    "plan {source} --evidence {evidence} --fit 24 --context 9", "plan {source} --evidence {evidence} --fit 24GiB --context -9",
    "plan {source} --evidence {evidence} --active -1GB", "plan {source} --evidence {evidence} --size 1MB --bits-per-weight 4",
    *(f"plan {{source}} --set {text}" for text in ("x", "=4", "*=", "*=99", "*=-1", "*=tq9g9", "*=q4", "nothing=4")),
    *(f"plan {{source}} {option}" for option in ("--group-size 7", "--group-size -128", "--bits 1", "--bits x", "--recipe none", "--policy none", "--target none")),
    "plan {source} --policy kurtosis --profile {profile} --thresholds 3,1,2", "plan {source} --policy kurtosis --profile {profile} --ladder 3",
    "plan {source} -o {root}/no/plan.json", "scan {source} -o {root}/no/p.json", "calibrate {source} -o {root}/no/e.json --data-free",
    "quantize {source} -o {root}/no/out/deep --bits 3", "quantize {source} -o {text} --bits 3", "quantize {source} -o {checkpoint} --bits 3",
    "quantize {source} --bits 3", "quantize {source} {root}/a -o {root}/b --bits 3", "quantize {source} -o {out} --format none --bits 3",
    "quantize {source} -o {out} --bits 3 --jobs -1", "quantize {source} -o {out} --bits 3 --effort none", "quantize {source} -o {out} --bits 3 --device none",
    "scan {source} --bits 1,99", "scan {source} --bits x", "scan {source} --group-size 7", "scan {source} --plot {root}/no/p.png",
    "dequantize {checkpoint} -o {out} --dtype F7", "dequantize {checkpoint} -o {text}", "dequantize {checkpoint} -o {root}/no/out/deep",
    "export {source} -o {out} --to none", "export {source} -o {out} --set *=4:x", "convert {checkpoint} -o {out} --norms none",
    *(f"generate {{checkpoint}} two {option}" for option in ("--max-new-tokens 0", "--max-new-tokens -1", "--temperature nan", "--temperature 1 --top-k -1", "--device mps", "--device cuda:9", "--device meta", "--device none", "--activations none", "--stop ''".replace("''", "{empty}"))),
    *(f"evaluate {{checkpoint}} --against {{source}} --text {{text}} {option}" for option in ("--window 1", "--window 9999", "--tokens 1", "--top-k 0", "--dtype none", "--bos none", "--bos always", "--device mps", "--task none", "--task gsm8k={text}", "--throughput --context 0", "-o {root}/no/e.json", "--markdown {root}")),
    "evaluate {checkpoint} --against {checkpoint} --text {text}", "evaluate {source} --against {root} --text {text}",
    "bench {checkpoint} --context 0", "bench {checkpoint} --batch -1", "bench {checkpoint} --steps 0", "bench {checkpoint} -o {root}/no/b.json",
    "inspect {checkpoint} --tp -1", "inspect {checkpoint} --plot {root}/no/p.png", "compare {checkpoint}", "card {checkpoint} --report {text}",
    "push {checkpoint} name", "serve {checkpoint} --engine none", "serve {checkpoint} --port -1", "serve {checkpoint} --context 0",
    "write {source} -o {root}/out.txt", "write {source} -o {root}/no/out.jsonl", "write {source} -o {root}/out.jsonl --tokens 1",
]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "file", "change"), DOCUMENTS, ids=[f"{file}-{i}" for i, (_, file, _) in enumerate(DOCUMENTS)]
)
def test_what_is_read_beside_a_model(
    command: str, file: str, change: Break, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (good / file).exists():
        shutil.copy(good / file, tmp_path / file)
    change(tmp_path)
    places = {name: good / name for name in ("source", "checkpoint")} | {"x": tmp_path / file, "out": tmp_path / "out"}
    assert said(command, places, monkeypatch)


@pytest.mark.parametrize("command", OPTIONS)
def test_options(command: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "--device mps" in command and torch.backends.mps.is_available():
        pytest.skip("there is one")
    places = {name: good / name for name in ("source", "checkpoint")} | {"text": good / "text.txt", "root": tmp_path}
    places |= {name: good / f"{name}.json" for name in ("evidence", "profile")} | {"out": tmp_path / "out", "empty": ""}  # type: ignore[dict-item]
    assert said(command, places, monkeypatch)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ["config.json is no JSON", "weights are a pipe"])
def test_a_process_of_its_own(fault: str, good: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(good / "source", tmp_path / "broken")
    BOTH[fault](broken)
    done = run("quantize", broken, "-o", tmp_path / "out", "--bits", "3")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
