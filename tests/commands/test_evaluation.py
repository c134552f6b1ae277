"""``kappaquant evaluate``: statistics with known answers, pairs refused by name, passes resumed, the report read back."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, character_tokenizer, save_tiny
from torch.distributions import Categorical, kl_divergence
from typer.testing import CliRunner

import kappaquant
from kappaquant import evaluate
from kappaquant.cli import app
from kappaquant.errors import FormatError, OutputError, SourceError, UnsupportedError
from kappaquant.evaluate.documents.evaluation import Evaluation, Measured
from kappaquant.evaluate.documents.markdown import markdown
from kappaquant.evaluate.measures.bootstrap import Bootstrap, by_position
from kappaquant.evaluate.measures.intervals import clustered_mean
from kappaquant.evaluate.measures.logits import diverge, keep_top
from kappaquant.evaluate.runs import against
from kappaquant.evaluate.runs.against import Options, evaluate_against
from kappaquant.evaluate.runs.families import packed_families, replaced
from kappaquant.evaluate.runs.kept import Kept
from kappaquant.evaluate.runs.pair import open_pair
from kappaquant.evaluate.runs.passes import Passes, load_original
from kappaquant.exports.plain import dequantize

TEXT = "".join(chr(33 + (i * i + i // 7) % 90) for i in range(300))
EXACT = Options(window=40, dtype="float32", top_k=VOCABULARY)


def quantized(source: Path, output: Path, bits: int = 3) -> Path:
    opened = kappaquant.open_source(source)
    return kappaquant.quantize(
        opened, output, kappaquant.make_plan(opened.tensors, opened.config, "uniform", bits=bits)
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny("qwen3_moe", tmp_path_factory.mktemp("pair") / "tiny")
    character_tokenizer().save_pretrained(folder)
    (folder / "evaluation.txt").write_text(TEXT, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def checkpoint(source: Path) -> Path:
    return quantized(source, source.parent / "q3")


@pytest.fixture(scope="module")
def logits(source: Path) -> Path:
    """Predictions of the original that several tests share."""
    return source.parent / "logits"


def measure(checkpoint: Path, source: Path, logits: Path, options: Options = EXACT, **more: Any) -> Evaluation:
    return evaluate_against(open_pair(checkpoint, source), source / "evaluation.txt", logits, options, **more)


def test_bootstrap_comes_to_the_analytic_standard_error() -> None:
    rng = np.random.default_rng(3)
    values = [rng.normal(rng.normal(5), 2, rng.integers(20, 60)) for _ in range(400)]
    found = Bootstrap(400, 4000).mean(values)
    mean, error = clustered_mean([v.sum() for v in values], [len(v) for v in values])
    assert found.value == pytest.approx(mean)
    assert found.interval_95 is not None
    low, high = found.interval_95
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.06)
    assert (high + low) / 2 == pytest.approx(mean, abs=0.1 * error)
    naive = 1.96 * np.concatenate(values).std() / math.sqrt(sum(map(len, values)))
    assert (high - low) / 2 > 2 * naive  # tokens of a sequence resemble each other


def test_bootstrap_of_independent_tokens() -> None:
    values = list(np.random.default_rng(0).exponential(1, (900, 16)))
    found = Bootstrap(900, 4000).mean(values)
    assert found.interval_95 is not None
    half = (found.interval_95[1] - found.interval_95[0]) / 2
    assert half == pytest.approx(1.96 / math.sqrt(900 * 16), rel=0.08)


def test_bootstrap_is_repeatable_and_needs_two_sequences() -> None:
    values = [np.array([1.0, 2.0]), np.array([4.0])]
    assert Bootstrap(2, 200, 1).mean(values) == Bootstrap(2, 200, 1).mean(values)
    assert Bootstrap(1).mean(values[:1]) == Measured(1.5, None)
    perplexity = Bootstrap(2, 200).perplexity(values)
    assert perplexity.value == pytest.approx(math.exp(7 / 3))
    assert perplexity.interval_95 == pytest.approx((math.exp(1.5), math.exp(4)))


def test_positions_cover_every_token_once() -> None:
    klds = [np.arange(1, n + 1, dtype=float) for n in (1, 50, 255, 255)]
    bins = by_position(klds)
    assert [bins[0].first, bins[-1].last, len(bins)] == [1, 255, 8]
    assert all(one.last + 1 == after.first for one, after in pairwise(bins))
    assert [b.tokens for b in bins[:2]] == [4, 6]
    assert bins[0].mean == 1
    assert sum(b.mean * b.tokens for b in bins) == pytest.approx(sum(k.sum() for k in klds))
    assert [(b.first, b.last) for b in by_position([np.ones(1)])] == [(1, 1)]


def test_divergence_against_torch_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    here, there = (torch.randn(9, 200, generator=generator) * scale for scale in (1.0, 6.0))
    predicted = torch.randint(200, (9,), generator=generator)
    exact = kl_divergence(Categorical(logits=there.double()), Categorical(logits=here.double()))
    found = diverge(keep_top(there, predicted, 200), here, predicted)
    assert found["kld"].double().numpy() == pytest.approx(exact.numpy(), rel=1e-5)
    assert found["loss"].numpy() == pytest.approx(-Categorical(logits=here).log_prob(predicted).numpy(), rel=1e-5)
    assert found["agreed"].tolist() == (here.argmax(-1) == there.argmax(-1)).byte().tolist()
    assert diverge(keep_top(there, predicted, 1000), here, predicted)["kld"].equal(found["kld"])


def test_a_top_k_is_a_lower_bound_and_one_outcome_more() -> None:
    generator = torch.Generator().manual_seed(1)
    here, there = (torch.randn(9, 200, generator=generator) * 3 for _ in range(2))
    predicted, before = torch.zeros(9, dtype=torch.int64), torch.zeros(9)
    for k in (1, 10, 100, 199, 200):
        top = keep_top(there, predicted, k)
        kld = diverge(top, here, predicted)["kld"]
        assert bool((kld >= before - 1e-5).all())
        before = kld
        merged = []
        for logits in (there, here):
            p, ids = logits.double().softmax(-1), top["ids"].long()
            rest = p.scatter(-1, ids, 0).sum(-1, keepdim=True)
            merged.append(Categorical(probs=torch.cat([p.gather(-1, ids), rest], -1)))
        assert kld.double().numpy() == pytest.approx(kl_divergence(*merged).numpy(), rel=1e-4)


def test_a_certain_model_loses_no_digits_in_the_rest() -> None:
    there, here = torch.tensor([[60.0, 0, 0, 0]]), torch.tensor([[60.0, 1, 1, 1]])
    predicted = torch.tensor([0])
    top = keep_top(there, predicted, 1)
    assert top["log_rest"].item() == pytest.approx(math.log(3) - 60, rel=1e-6)
    assert diverge(top, there, predicted)["kld"].item() == 0
    assert abs(diverge(top, here, predicted)["kld"].item()) < 1e-12


def test_logits_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="NaN or infinity"):
        keep_top(torch.tensor([[1.0, math.nan]]), torch.tensor([0]), 2)
    top = keep_top(torch.tensor([[1.0, 2.0]]), torch.tensor([0]), 2)
    with pytest.raises(UnsupportedError, match="KL divergence is infinite"):
        diverge(top, torch.tensor([[-math.inf, 1.0]]), torch.tensor([1]))
    never = torch.tensor([[1.0, 2.0, -math.inf]])  # impossible for both: no difference
    assert diverge(keep_top(never, torch.tensor([0]), 3), never, torch.tensor([0]))["kld"].item() == 0
    assert diverge(keep_top(never, torch.tensor([0]), 2), never, torch.tensor([0]))["kld"].item() == 0


def test_the_report_says_what_the_live_comparison_says(checkpoint: Path, source: Path, logits: Path) -> None:
    found = measure(checkpoint, source, logits)
    pair = open_pair(checkpoint, source)
    original = load_original(pair, "float32", "cpu")
    variant, _ = kappaquant.load(checkpoint, dtype=torch.float32)
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


@pytest.mark.parametrize("experts", ["split", "fused"])
@pytest.mark.parametrize("architecture", ["qwen3_moe", "qwen3_5_moe_text"])
def test_families_alone_and_together(architecture: str, experts: Any, tmp_path: Path) -> None:
    folder = save_tiny(architecture, tmp_path / "source", experts=experts)
    character_tokenizer().save_pretrained(folder)
    (folder / "evaluation.txt").write_text(TEXT[:80], encoding="utf-8")
    packed = quantized(folder, tmp_path / "q3")
    found = measure(packed, folder, tmp_path / "logits", dataclasses.replace(EXACT, by_layer=True))
    families = packed_families(kappaquant.open_checkpoint(packed))
    assert found.families is not None
    assert [f.family for f in found.families] == list(families)
    assert all(f.mean > 1e-5 for f in found.families)
    assert all(3.1 < f.bits < 4.5 for f in found.families)  # rows of 192 are padded to 256

    pair = open_pair(packed, folder)
    model = load_original(pair, "float32", "cpu")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = [name for of_one in families.values() for name in of_one]
    sequences = evaluate.windows(character_tokenizer(), [TEXT[:80]], 40)
    with replaced(model, kappaquant.open_checkpoint(packed), pair.source, names):
        together = evaluate.kl_divergence(model, load_original(pair, "float32", "cpu"), sequences)
    assert together.mean == pytest.approx(found.divergence.mean, rel=1e-3)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_a_family_that_cannot_stand_alone_is_named(checkpoint: Path, source: Path) -> None:
    pair = open_pair(checkpoint, source)
    name = "model.layers.0.self_attn.q_proj.weight"
    del pair.source.tensors[name]
    model = load_original(pair, "float32", "cpu")
    with (
        pytest.raises(UnsupportedError, match=f"{name}: cannot be put into a Qwen3MoeForCausalLM alone"),
        replaced(model, kappaquant.open_checkpoint(checkpoint), pair.source, [name]),
    ):
        pass


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


def _change_one_byte(path: Path) -> None:
    with path.open("rb+") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little") + 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))


def test_broken_predictions_are_named(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "kept", {"text": "a"}, {})
    kept.write(3, {"loss": torch.arange(4.0)})
    assert kept.read(3)["loss"].tolist() == [0, 1, 2, 3]
    assert kept.has(3)
    assert kept.lacks(4)
    path = tmp_path / "kept" / "000003.npz"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(FormatError, match=r"000003.npz: cannot be read .*delete it"):
        kept.read(3)
    (tmp_path / "kept" / "about.json").write_text("{}")
    with pytest.raises(FormatError, match=r"about.json: cannot be read; delete"):
        Kept(tmp_path / "kept", {"text": "a"}, {})
    with pytest.raises(OutputError, match="cannot be made"):
        Kept(path / "below", {}, {})


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


def test_other_batches_are_others() -> None:
    sequences = [[1, 2], [1, 2, 3], [1, 2, 3]]
    assert Passes(sequences, [[0, 1], [2]], print).other_batches == [[0], [1], [2]]
    assert Passes(sequences, [[0], [1], [2]], print).other_batches == [[0, 1], [2, 0]]
    assert Passes(sequences[:1], [[0]], print).other_batches == [[0, 0]]


@pytest.fixture(scope="module")
def report(checkpoint: Path, source: Path, logits: Path) -> Evaluation:
    return measure(checkpoint, source, logits, dataclasses.replace(EXACT, by_layer=True))


def test_the_report_is_written_and_read_back(report: Evaluation, tmp_path: Path) -> None:
    report.save(tmp_path / "evaluation.json")
    loaded = Evaluation.load(tmp_path / "evaluation.json")
    assert loaded.to_json() == report.to_json()
    assert loaded.divergence.mean == pytest.approx(report.divergence.mean, rel=1e-5)
    assert loaded.checkpoint == dataclasses.replace(
        report.checkpoint, bits_per_weight=loaded.checkpoint.bits_per_weight
    )
    assert [p.name for p in tmp_path.iterdir()] == ["evaluation.json"]
    with pytest.raises(OutputError, match="cannot be written"):
        report.save(tmp_path / "absent" / "evaluation.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format_version=2), "format_version 2; this kappaquant reads evaluations of version 1"),
        (lambda c: c["divergence"].pop("mean"), "has no divergence.mean"),
        (lambda c: c["divergence"].update(mean="0.1"), "divergence.mean is '0.1'; expected a finite number"),
        (lambda c: c["divergence"].update(interval_95=[1]), r"divergence.interval_95 is \[1\]; expected a list of 2"),
        (lambda c: c["divergence"].update(median=float("nan")), "divergence.median is nan"),
        (lambda c: c["text"].update(tokens=True), "text.tokens is True; expected a whole number"),
        (lambda c: c["divergence"]["by_position"][1].update(first=None), r"by_position\[1\].first is None"),
        (lambda c: c.update(families={}), "families is {}; expected a list"),
        (lambda c: c.update(source=None), "source is None; expected an object"),
        (lambda c: c.update(more=1), "more is not known; allowed there: kappaquant, "),
    ],
)
def test_a_broken_report_is_named(
    report: Evaluation, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    content = json.loads(report.to_json())
    change(content)
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(content))
    with pytest.raises(FormatError, match=f"evaluation.json: .*{message}"):
        Evaluation.load(path)


def test_files_that_are_no_report(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such file; kappaquant evaluate writes one"):
        Evaluation.load(tmp_path / "absent.json")
    for text, message in (("{", "not JSON"), ("[]", "format_version None")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(FormatError, match=message):
            Evaluation.load(tmp_path / "bad.json")


def test_markdown_tables_are_whole(report: Evaluation) -> None:
    text = markdown(report)
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) == 3
    for lines in blocks:
        assert {line.count("|") for line in lines} == {lines[0].count("|")}
    assert "KL divergence, mean (nats)" in text
    assert "original, against itself" in text
    plain = dataclasses.replace(report, settings=dataclasses.replace(report.settings, exact=False, top_k=9))
    assert "KL divergence of the top 9 and the rest" in markdown(plain)


def test_the_command(checkpoint: Path, source: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "q3")
    arguments = [
        "evaluate",
        str(copy),
        "--against",
        str(source),
        "--window",
        "40",
        "--markdown",
        str(tmp_path / "t.md"),
    ]
    done = CliRunner().invoke(app, [*arguments, "--device", "cpu"], catch_exceptions=False)
    assert done.exit_code == 0
    assert done.stdout == (tmp_path / "t.md").read_text()
    assert "against" in done.stdout
    assert (tmp_path / "tiny.logits" / "original" / "about.json").exists()
    assert "kept in" in done.stderr
    assert (copy / "evaluation.txt").exists()
    plain = dequantize(kappaquant.open_checkpoint(copy), tmp_path / "plain")
    assert not (plain / "evaluation.json").exists()  # which speaks of the packed weights
    (plain / "evaluation.json").touch()
    assert not (quantized(plain, tmp_path / "q3-again") / "evaluation.json").exists()
    again = CliRunner().invoke(app, [*arguments, "--json", "-o", str(tmp_path / "e.json")], catch_exceptions=False)
    assert json.loads(again.stdout)["settings"]["exact"]
    assert (tmp_path / "e.json").read_text() == (copy / "evaluation.json").read_text() == again.stdout


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--window", "1"], UnsupportedError, "window = 1: must be at least 2"),
        (["--window", "200"], UnsupportedError, "window = 200: .* reads at most 128 tokens"),
        (["--tokens", "0"], UnsupportedError, "tokens = 0"),
        (["--dtype", "int8"], UnsupportedError, "dtype 'int8': must be float32 or auto"),
        (["--activations", "fp4"], UnsupportedError, "activations 'fp4'"),
        (["--text", "{tmp}/absent.txt"], SourceError, "absent.txt: cannot be read"),
        (["--text", "{tmp}/latin.txt"], SourceError, "latin.txt: is not UTF-8 at byte 2"),
        (["--text", "{tmp}/empty.txt"], UnsupportedError, "empty.txt: has fewer than 2 tokens"),
        (["-o", "{tmp}/absent/e.json"], OutputError, "absent/e.json: its folder does not exist"),
        (["--markdown", "{tmp}/absent/e.md"], OutputError, "absent/e.md: its folder does not exist"),
        (["--against", "{tmp}/bare"], UnsupportedError, "bare: has no evaluation.txt; give --text FILE"),
    ],
)
def test_bad_options_are_named_before_a_model_is_loaded(
    checkpoint: Path,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    error: Any,
    message: str,
) -> None:
    (tmp_path / "latin.txt").write_bytes(b"ab\xe9")
    (tmp_path / "empty.txt").touch()
    shutil.copytree(source, tmp_path / "bare", ignore=shutil.ignore_patterns("evaluation.txt"))
    monkeypatch.setattr(against, "load_original", lambda *_: pytest.fail("a model was loaded"))
    given = ["--window", "40", *(option.format(tmp=tmp_path) for option in options)]
    command = ["evaluate", str(checkpoint), "--against", str(source), *given, "--logits", str(tmp_path / "logits")]
    with pytest.raises(error, match=message):
        CliRunner().invoke(app, command, catch_exceptions=False)


def test_the_reference_models_text_is_what_its_script_makes() -> None:
    from reference.held_out import PATH, held_out_text

    assert PATH.read_text(encoding="utf-8") == held_out_text()
    assert PATH.stat().st_size < 60_000
