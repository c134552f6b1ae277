"""Files changed at random places: what is wrong is a typed error of one line, never a crash of another kind."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import CONFIG, EXPERTS, Q, quantize, write_source

import kappaquant
from kappaquant.checkpoints.manifest import config_digest

ODD = (
    None, True, 0, -1, 7, 2**70, 1.5, float("nan"), float("inf"), "", "x", "tq3g128", "tq9g128", "../x", "U8", "F16",
    [], [1], [[]], ["x"], [-1, 4], [0], {}, {"a": 1},
)  # fmt: skip
SMALL = {
    Q: torch.ones(4, 128, dtype=torch.bfloat16),
    EXPERTS: torch.ones(2, 4, 128, dtype=torch.bfloat16),
    "model.norm.weight": torch.ones(4),
}


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def changed(value: Any, source: random.Random) -> Any:
    """A copy with one place replaced by something odd, removed, or doubled under another name."""
    result = copy.deepcopy(value)
    container, key = source.choice(places(result))
    action = source.random()
    if action < 0.7:
        container[key] = copy.deepcopy(source.choice(ODD))
    elif action < 0.9:
        del container[key]
    elif isinstance(container, dict):
        container[f"{key}x"] = copy.deepcopy(container[key])
    else:
        container.append(copy.deepcopy(container[key]))
    return result


def survives(use: Callable[[], object], what: str) -> bool:
    """Whether ``use`` worked; a KappaquantError of one line is the only way it may not."""
    try:
        use()
    except kappaquant.KappaquantError as problem:
        message = str(problem)
    except Exception as problem:
        raise AssertionError(f"{what} -> {type(problem).__name__}: {problem}") from problem
    else:
        return True
    assert message.strip(), what
    assert "\n" not in message, what
    return False


def read_header(path: Path) -> tuple[Any, bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_header(path: Path, header: Any, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def use_source(folder: Path) -> None:
    source = kappaquant.open_source(folder)
    kappaquant.make_plan(source.tensors, source.config)
    for name in source.tensors:
        source.read(name)


def use_checkpoint(folder: Path, source: Path | None = None) -> None:
    checkpoint = kappaquant.open_checkpoint(folder, source=source)
    list(checkpoint.verify())
    for name in checkpoint.keys():
        checkpoint.dequantize(name)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {**CONFIG, "text_config": {"num_experts_per_tok": 2, "tie_word_embeddings": False}}
    return write_source(tmp_path_factory.mktemp("fuzz") / "source", SMALL, shards=2, config=config)


@pytest.fixture(scope="module")
def checkpoint(source: Path) -> Path:
    return quantize(source, source.parent / "v1").path


@pytest.fixture(scope="module")
def legacy(source: Path) -> Path:
    opened = kappaquant.open_source(source)
    plan = kappaquant.make_plan(opened.tensors, opened.config, overrides=[(Q, 4)])
    return kappaquant.quantize(opened, source.parent / "old", plan, kappaquant.Options(container="tq3_native"))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("seed", range(3))
def test_documents_of_a_source(source: Path, file: str, seed: int, tmp_path: Path) -> None:
    folder = shutil.copytree(source, tmp_path / "copy")
    good = json.loads((folder / file).read_text())
    for number in range(60):
        bad = changed(good, random.Random(f"{seed}/{number}"))
        (folder / file).write_text(json.dumps(bad))
        survives(lambda: use_source(folder), f"{file}: {bad}")


@pytest.mark.parametrize("which", ["source", "checkpoint", "legacy"])
def test_headers(which: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = shutil.copytree(request.getfixturevalue(which), tmp_path / "copy")
    path = folder / "model-00001-of-00002.safetensors"
    header, data = read_header(path)
    original, worked = request.getfixturevalue("source"), 0

    def use() -> None:
        use_source(folder) if which == "source" else use_checkpoint(folder, original)

    for number in range(150):
        bad = changed(header, random.Random(number))
        write_header(path, bad, data)
        worked += survives(use, f"header: {bad}")
    assert worked < 30  # only the free __metadata__ may say anything


def test_bytes_of_a_header(source: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(source, tmp_path / "copy")
    path = folder / "model-00001-of-00002.safetensors"
    good = path.read_bytes()
    moments = random.Random(0)
    for _ in range(300):
        bad = bytearray(good)
        at = moments.randrange(8 + int.from_bytes(good[:8], "little"))
        bad[at] = moments.randrange(256)
        path.write_bytes(bad)
        survives(lambda: use_source(folder), f"byte {at} = {bad[at]}")


@pytest.mark.parametrize("seed", range(3))
def test_documents_of_a_checkpoint(checkpoint: Path, seed: int, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    documents = {
        file: json.loads((folder / file).read_text())
        for file in ("config.json", "kappaquant.json", "model.safetensors.index.json")
    }
    for number in range(150):
        moments = random.Random(f"{seed}/{number}")
        file = moments.choice(sorted(documents))
        bad = {**documents, file: changed(documents[file], moments)}
        quantization = bad["config.json"].get("quantization_config")
        if file == "config.json" and quantization is not None:  # as if whoever changed it had vouched for it again
            bad["kappaquant.json"] = {
                **bad["kappaquant.json"],
                "quantization_config_sha256": config_digest(quantization),
            }
        for name, content in bad.items():
            (folder / name).write_text(json.dumps(content))
        survives(lambda: use_checkpoint(folder), f"{file}: {bad[file]}")


@pytest.mark.parametrize("file", ["tq_config.json", "config.json", "model.safetensors.index.json"])
def test_documents_of_a_published_checkpoint(legacy: Path, source: Path, file: str, tmp_path: Path) -> None:
    folder = shutil.copytree(legacy, tmp_path / "copy")
    good = json.loads((folder / file).read_text())
    for number in range(120):
        bad = changed(good, random.Random(number))
        (folder / file).write_text(json.dumps(bad))
        survives(lambda: use_checkpoint(folder, source), f"{file}: {bad}")


def test_a_plan_file(source: Path, tmp_path: Path) -> None:
    opened = kappaquant.open_source(source)
    good = json.loads(kappaquant.make_plan(opened.tensors, opened.config).to_json())
    path = tmp_path / "plan.json"
    for number in range(200):
        bad = changed(good, random.Random(number))
        path.write_text(json.dumps(bad))
        survives(lambda: kappaquant.Plan.load(path).check(opened.tensors, opened.config), f"plan: {bad}")


def test_a_profile(source: Path, tmp_path: Path) -> None:
    opened = kappaquant.open_source(source)
    good = json.loads(kappaquant.scan(opened, bits=[3]).to_json())
    path = tmp_path / "profile.json"
    for number in range(200):
        bad = changed(good, random.Random(number))
        path.write_text(json.dumps(bad))

        def use() -> None:
            profile = kappaquant.Profile.load(path).kurtosis()
            kappaquant.make_plan(opened.tensors, opened.config, "kurtosis", profile=profile)

        survives(use, f"profile: {bad}")
