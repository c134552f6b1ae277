"""A checkpoint measured against its original: what live models say, resumed where it was cut off, never on others' predictions."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import character_tokenizer
from tiny_pair import EXACT, TEXT, measure, quantized

import kappaquant
from kappaquant import evaluate
from kappaquant.errors import FormatError, UnsupportedError
from kappaquant.evaluate.documents.compare import compare
from kappaquant.evaluate.documents.markdown import markdown
from kappaquant.evaluate.runs import against
from kappaquant.evaluate.runs.pair import open_pair
from kappaquant.evaluate.runs.passes import load_original
from kappaquant.exports.plain import dequantize


def test_the_report_says_what_the_live_comparison_says(checkpoint: Path, source: Path, logits: Path) -> None:
    found = measure(checkpoint, source, logits)
    pair = open_pair(checkpoint, source)
    original = load_original(pair, "float32", "cpu")
    variant, _ = kappaquant.load(checkpoint, dtype=torch.float32, activations="float32")
    live = evaluate.kl_divergence(variant, original, evaluate.windows(character_tokenizer(), [TEXT], 40))
    assert found.divergence.mean == pytest.approx(live.mean, rel=1e-4)
    assert found.divergence.median == pytest.approx(live.median, rel=1e-3)
    assert found.divergence.p99 == pytest.approx(live.p99, rel=1e-4)
    assert found.divergence.maximum == pytest.approx(live.maximum, rel=1e-4)
    assert found.divergence.top1_agreement == pytest.approx(live.same_top)
    assert found.perplexity.checkpoint.value == pytest.approx(live.perplexity.value, rel=1e-5)
    assert found.perplexity.source.value == pytest.approx(live.original_perplexity.value, rel=1e-5)
    assert (found.text.tokens, found.text.sequences) == (live.perplexity.tokens, 8)
    assert found.settings.exact
    low, high = found.divergence.interval_95 or (1, 0)
    assert low < found.divergence.mean < high
    assert found.noise_floor is not None
    assert found.noise_floor.maximum < 1e-5 < found.divergence.mean
    assert found.checkpoint.bytes == (checkpoint / "model.safetensors").stat().st_size
    assert found.source.bytes == (source / "model.safetensors").stat().st_size


def test_a_model_against_itself(source: Path, logits: Path) -> None:
    found = measure(source, source, logits, dataclasses.replace(EXACT, noise_floor=False))
    assert (found.divergence.mean, found.divergence.maximum, found.divergence.top1_agreement) == (0, 0, 1)
    assert found.perplexity.checkpoint == found.perplexity.source
    assert (found.checkpoint.format, found.checkpoint.bits_per_weight) == ("safetensors", 32)
    assert found.noise_floor is None
    with pytest.raises(UnsupportedError, match="--by-layer needs a quantized checkpoint"):
        measure(source, source, logits, dataclasses.replace(EXACT, by_layer=True))


def test_dequantized_weights_lie_as_far_as_packed_ones(
    checkpoint: Path, source: Path, logits: Path, tmp_path: Path
) -> None:
    plain = dequantize(kappaquant.open_checkpoint(checkpoint), tmp_path / "plain", "F32")
    packed, unpacked = measure(checkpoint, source, logits), measure(plain, source, logits)
    assert packed.divergence.mean > 0.01
    assert unpacked.divergence.mean == pytest.approx(packed.divergence.mean, abs=1e-4)
    assert unpacked.divergence.maximum == pytest.approx(packed.divergence.maximum, abs=1e-4)


@pytest.mark.slow
def test_an_interrupted_run_goes_on(
    checkpoint: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dataclasses.replace(EXACT, by_layer=True)
    monkeypatch.setattr(against, "_BATCH_TOKENS", 80)
    whole = measure(checkpoint, source, tmp_path / "whole", options)
    seen: list[tuple[str, int]] = []

    def cut_off(stage: str, done: int, total: int) -> None:
        seen.append((stage, done))
        if len(seen) in (4, 10, 20, 40):
            raise KeyboardInterrupt

    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            measure(checkpoint, source, tmp_path / "parts", options, progress=cut_off)
    resumed = measure(checkpoint, source, tmp_path / "parts", options, progress=cut_off)
    assert dataclasses.replace(resumed, environment={}) == dataclasses.replace(whole, environment={})
    assert [done for stage, done in seen if stage == "original"][:6] == [0, 19, 58, 97, 58, 97]
    assert not list((tmp_path / "parts").rglob("*.partial"))

    def never(*_: Any) -> None:
        raise AssertionError("nothing is left to compute")

    monkeypatch.setattr(against, "load_original", never)
    other = quantized(source, tmp_path / "q4", 4)
    assert measure(other, source, tmp_path / "parts").divergence.mean < resumed.divergence.mean
    monkeypatch.setattr(against, "load_checkpoint", never)
    measure(checkpoint, source, tmp_path / "parts", options)


def test_predictions_of_something_else_are_refused(
    checkpoint: Path, source: Path, logits: Path, tmp_path: Path
) -> None:
    measure(checkpoint, source, logits)
    for change, name in (({"window": 30}, "window 40"), ({"tokens": 90}, "tokens 292"), ({"top_k": 9}, "top_k 96")):
        with pytest.raises(FormatError, match=f"original: was computed of .*tiny on evaluation.txt with {name}"):
            measure(checkpoint, source, logits, dataclasses.replace(EXACT, **change))  # type: ignore[arg-type]
    tuned = shutil.copytree(source, tmp_path / "tuned")
    _change_one_byte(tuned / "model.safetensors")
    with pytest.raises(FormatError, match="samples of the source's weights"):
        measure(checkpoint, tuned, logits)


@pytest.fixture
def trained_with_bos(source: Path, tmp_path: Path) -> Path:
    """The original with a tokenizer that puts a token before every text."""
    folder = shutil.copytree(source, tmp_path / "begun")
    character_tokenizer("~", adds=True).save_pretrained(folder)
    return folder


def test_every_window_begins_as_the_tokenizer_begins_a_text(trained_with_bos: Path, tmp_path: Path) -> None:
    options = dataclasses.replace(EXACT, noise_floor=False, tokens=100)
    found = measure(trained_with_bos, trained_with_bos, tmp_path / "auto", options)
    assert (found.settings.bos, found.settings.begin) == ("auto", ("~",))
    assert (found.text.sequences, found.text.tokens) == (3, 100)  # each window has room for 39 of the text's
    assert "each begun with ~" in markdown(found)
    never = measure(trained_with_bos, trained_with_bos, tmp_path / "never", dataclasses.replace(options, bos="never"))
    assert (never.settings.begin, never.text.tokens) == ((), 97)
    assert "each begun with its own first token" in markdown(never)
    assert never.perplexity.source != found.perplexity.source
    always = measure(trained_with_bos, trained_with_bos, tmp_path / "auto", dataclasses.replace(options, bos="always"))
    assert always.perplexity == found.perplexity, "the same sequences are measured once"
    assert compare({"auto": found, "always": always}).rows
    with pytest.raises(UnsupportedError, match=r"^never: text\.tokens is"):
        compare({"auto": found, "never": never})


def test_a_run_is_not_resumed_with_other_beginnings(trained_with_bos: Path, tmp_path: Path) -> None:
    options = dataclasses.replace(EXACT, noise_floor=False, tokens=100)
    measure(trained_with_bos, trained_with_bos, tmp_path / "logits", options)
    with pytest.raises(FormatError, match="give another folder with --logits"):
        measure(trained_with_bos, trained_with_bos, tmp_path / "logits", dataclasses.replace(options, bos="never"))
    measure(trained_with_bos, trained_with_bos, tmp_path / "other", dataclasses.replace(options, bos="never"))
    with pytest.raises(FormatError, match="with tokens 97"):
        measure(trained_with_bos, trained_with_bos, tmp_path / "other", options)


def _change_one_byte(path: Path) -> None:
    with path.open("rb+") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little") + 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
