"""Text that a model wrote: which model that was, whatever it is packed in, and files that say so."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from safetensors.torch import load_file, save_file

import kappaquant
from kappaquant.errors import FormatError, OutputError, PlanError, UnsupportedError
from kappaquant.quantizing.calibration.text import calibration, calibration_of_texts, read
from kappaquant.quantizing.calibration.written import header_of, model_of, read_header, save, seeds, seeds_digest

TEXTS = ["Mara walks to the mill.", "She counts 12 sacks there, and\u2028 one more."]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> kappaquant.sources.source.Source:
    folder = tmp_path_factory.mktemp("source") / "tiny"
    return kappaquant.open_source(tiny_models.save_tiny("llama", folder))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_models.character_tokenizer()


def quantized(source: Any, output: Path, **options: Any) -> kappaquant.Checkpoint:
    plan = kappaquant.make_plan(source.tensors, source.config, "uniform", bits=4, group_size=32)
    made = kappaquant.quantize(source, output, plan, kappaquant.Options(effort="fast", **options))
    return kappaquant.open_checkpoint(made, source=source.folder)


def test_seeds_are_many_different_and_of_every_kind() -> None:
    found = seeds()
    assert len({json.dumps(seed) for seed in found}) == len(found) > 300
    assert all(set(seed) in ({"kind", "text"}, {"kind", "messages"}) for seed in found)
    assert {"en", "zh", "de", "fr", "es", "ru", "ja", "ar", "hi", "pt", "code", "math", "structure", "dialogue"} <= {
        seed["kind"] for seed in found
    }
    assert all(messages[-1]["role"] == "user" for seed in found if (messages := seed.get("messages")))
    assert len(seeds_digest()) == 64


def test_a_checkpoint_is_the_model_it_was_made_from(source: Any, tmp_path: Path) -> None:
    original, packed = model_of(source), model_of(quantized(source, tmp_path / "out"))
    assert packed == replace(original, quantized="kappaquant")
    assert original.model == "tiny"
    original.check(packed, "text.jsonl")


@pytest.mark.parametrize("change", ["config", "headers", "vector"])
def test_another_model_is_told_from_it(source: Any, tmp_path: Path, change: str) -> None:
    folder = Path(shutil.copytree(source.folder, tmp_path / "other"))
    path = folder / "model.safetensors"
    state = load_file(path)
    match change:
        case "config":
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
        case "headers":
            save_file({name: tensor.bfloat16() for name, tensor in state.items()}, path)
        case "vector":  # as a fine-tuned model has it
            state["model.norm.weight"][5] += 0.01
            save_file(state, path)
    original, other = model_of(source), model_of(kappaquant.open_source(folder))
    with pytest.raises(PlanError, match=r"a\.jsonl: calibration text of another model or revision: written by other"):
        original.check(other, "a.jsonl")


def test_revisions_count_where_both_are_known(source: Any) -> None:
    original = model_of(source)
    pinned = replace(original, revision="1" * 40)
    pinned.check(original, "a.jsonl")
    original.check(pinned, "a.jsonl")
    with pytest.raises(
        PlanError, match=f"written by tiny .revision {'2' * 40}.*to be quantized is tiny .revision {'1' * 40}"
    ):
        pinned.check(replace(original, revision="2" * 40), "a.jsonl")


def test_checkpoints_that_do_not_say_what_they_were(source: Any, tmp_path: Path) -> None:
    plan = kappaquant.make_plan(source.tensors, source.config, "uniform", bits=4, group_size=128)
    native = kappaquant.quantize(source, tmp_path / "native", plan, kappaquant.Options(container="tq3_native"))
    with pytest.raises(UnsupportedError, match="tq3_native does not tell which model it was made from"):
        model_of(kappaquant.open_checkpoint(native, source=source.folder))
    opened = quantized(source, tmp_path / "out")
    manifest = json.loads((opened.path / "kappaquant.json").read_text())
    (opened.path / "kappaquant.json").write_text(json.dumps(manifest | {"source": 3}))
    with pytest.raises(FormatError, match="its source is 3"):
        model_of(opened)


def test_a_file_says_who_wrote_it(source: Any, tokenizer: Any, tmp_path: Path) -> None:
    path, header = tmp_path / "text.jsonl", header_of(source, 60)
    save(path, header, TEXTS)
    assert read(path, tokenizer) == (TEXTS, header)
    made = calibration(path, tokenizer, 60)
    assert made.record["file"] == "text.jsonl"
    assert made.record["written_by"] == asdict(model_of(source))
    assert made.record["seeds_sha256"] == seeds_digest()
    same = calibration_of_texts(TEXTS, header, tokenizer, 60)
    assert same.record == {key: value for key, value in made.record.items() if key != "file"}
    assert same.windows.equal(made.windows)
    (tmp_path / "plain.jsonl").write_text('{"text": "Mara walks to the mill."}\n')
    assert "written_by" not in calibration(tmp_path / "plain.jsonl", tokenizer).record


def test_a_file_is_written_whole_or_not_at_all(source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, header = tmp_path / "text.jsonl", header_of(source)
    save(path, header, TEXTS)
    before = path.read_bytes()
    with pytest.raises(OutputError, match="cannot be written"):
        save(tmp_path / "no" / "text.jsonl", header, TEXTS)
    monkeypatch.setattr(Path, "replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save(path, header, ["something else"])
    assert path.read_bytes() == before


def test_headers_that_are_none_or_of_another_kind(source: Any) -> None:
    good = asdict(header_of(source))
    assert read_header("not json", "a.jsonl") is None
    assert read_header('{"text": "written_by"}', "a.jsonl") is None
    for bad in (
        {"written_by": "me"},
        {**good, "tokens": None, "more": 1},
        {**good, "seeds_sha256": 7},
        {**good, "rules": {}},
    ):
        with pytest.raises(PlanError, match=r"a\.jsonl:1: says that a model wrote the text, but not which"):
            read_header(json.dumps(bad), "a.jsonl")


def test_quantize_refuses_what_another_model_wrote(source: Any, tokenizer: Any, tmp_path: Path) -> None:
    header = header_of(source)
    other = replace(header, written_by=replace(header.written_by, model="other", sha256="0" * 64))
    save(tmp_path / "text.jsonl", other, TEXTS)
    plan = kappaquant.make_plan(source.tensors, source.config, "uniform", bits=4, group_size=32)
    text = calibration(tmp_path / "text.jsonl", tokenizer)
    with pytest.raises(
        PlanError, match=r"text\.jsonl: calibration text of another model.*written by other.*to be quantized is tiny"
    ):
        kappaquant.quantize(source, tmp_path / "out", plan, calibration=text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.jsonl"]
