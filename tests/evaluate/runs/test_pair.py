"""A checkpoint and its original: refused by name if they are no pair, read with the tokenizer of either."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evaluations import evaluation

from kappaquant import Options, make_plan, open_checkpoint, open_source, quantize
from kappaquant.errors import UnsupportedError
from kappaquant.evaluate.documents.markdown import markdown
from kappaquant.evaluate.runs.pair import checkpoint_facts, open_pair


def _set(folder: Path, name: str, key: str, value: Any) -> None:
    path = folder / name
    content = json.loads(path.read_text())
    content[key] = value
    path.write_text(json.dumps(content))


def _other_merges(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["<other>"] = content["model"]["vocab"].pop("<unk>")
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: _set(f, "config.json", "vocab_size", 97), "vocab_size is 96, that of .* is 97"),
        (lambda f: _set(f, "config.json", "model_type", "qwen3"), "model_type is 'qwen3_moe', that of .* 'qwen3'"),
        (lambda f: _set(f, "config.json", "num_hidden_layers", 3), "num_hidden_layers is 2"),
        (_other_merges, "tokenizer.json: differs from .*tokenizer.json; with another tokenizer"),
    ],
)
def test_a_wrong_pair_is_refused_by_name(
    checkpoint: Path, source: Path, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    other = shutil.copytree(source, tmp_path / "other")
    change(other)
    with pytest.raises(UnsupportedError, match=message):
        open_pair(checkpoint, other)


def test_tokenizers_of_one_side(checkpoint: Path, source: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(source, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    pair = open_pair(checkpoint, bare)
    assert pair.tokenizer == checkpoint
    assert f"{bare} has no tokenizer files" in pair.notices[0]
    with pytest.raises(UnsupportedError, match=r"neither it nor .* has tokenizer.json"):
        open_pair(bare, bare)
    _set(bare, "config.json", "dtype", "float32")
    reformatted = shutil.copytree(source, tmp_path / "reformatted")
    _set(reformatted, "tokenizer.json", "truncation", {"max_length": 5})  # says nothing of the tokens
    assert open_pair(checkpoint, reformatted).tokenizer == reformatted


def test_what_its_plan_predicted_is_known_of_a_checkpoint(source: Path, tmp_path: Path) -> None:
    opened = open_source(source)
    plan = make_plan(opened.tensors, opened.config, "uniform", bits=3, group_size=32)
    told = replace(plan, inputs={**plan.inputs, "predicted_kld": 0.125})
    for name, made, predicted in (("without", plan, None), ("with", told, 0.125)):
        folder = quantize(opened, tmp_path / name, made, Options(device="cpu", jobs=1))
        facts = checkpoint_facts(open_checkpoint(folder))
        assert facts.predicted_kld == predicted
        shown = markdown(replace(evaluation(), checkpoint=facts))
        (line,) = [line.split() for line in shown.splitlines() if "predicted by its plan" in line] or [None]
        assert line is None if predicted is None else "0.125" in line
