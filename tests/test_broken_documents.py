"""Every command over documents, texts and options that are broken: it ends with 2 and one line, and leaves nothing behind."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from broken import Break, Q, instead, set_in, wrote
from ends_well import good_places, said

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


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return good_places(tmp_path_factory.mktemp("good"))


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
