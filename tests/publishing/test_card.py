"""The model card: its metadata, its tables, what it leaves unsaid, and that its commands and code do what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints
from builders import digests, quantize, write_source
from evaluations import evaluation, task_report, throughput_row
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from tiny_models import character_tokenizer, save_tiny
from typer.testing import CliRunner

from kappaquant import Checkpoint, open_checkpoint
from kappaquant.cli import app
from kappaquant.errors import FormatError, OutputError
from kappaquant.evaluate.runs.pair import file_digest
from kappaquant.exports.plain import dequantize
from kappaquant.publishing.card import make_card, read_stamp, write_card

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return quantize(write_source(tmp_path / "tiny"), tmp_path / "out", "recipe")


def from_the_hub(checkpoint: Checkpoint) -> None:
    """Let the manifest say that the original came from the Hub."""
    path = checkpoint.path / "kappaquant.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "source": {"model": "owner/original", "revision": COMMIT}}))


def measure(checkpoint: Checkpoint, **changes: Any) -> Path:
    report = checkpoint.path / "evaluation.json"
    evaluation(manifest=file_digest(checkpoint.path / "kappaquant.json"), **changes).save(report)
    return report


def metadata(text: str) -> dict[str, Any]:
    """Read by huggingface_hub, and the same after another round through it."""
    card = ModelCard(text)
    again = ModelCard(str(card))
    assert again.data.to_dict() == card.data.to_dict()
    found: dict[str, Any] = card.data.to_dict()
    return found


def tables(text: str) -> list[list[list[str]]]:
    """Cells of every table that a Markdown parser finds below the metadata."""
    found: list[list[list[str]]] = []
    tokens = MarkdownIt("commonmark").enable("table").parse(ModelCard(text).text)
    for token, after in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("th_open", "td_open"):
            assert after is not None
            found[-1][-1].append(after.content)
    return found


def code(text: str, language: str) -> str:
    fences = [token for token in MarkdownIt().parse(ModelCard(text).text) if token.type == "fence"]
    (found,) = [token.content for token in fences if token.info == language]
    return found


def test_a_calibrated_checkpoint_says_with_what(checkpoint: Checkpoint) -> None:
    path = checkpoint.path / "kappaquant.json"
    manifest = json.loads(path.read_text())
    manifest |= {"effort": "calibrated", "calibration": {"file": "some.txt", "tokens": 4096, "tokens_sha256": "ab"}}
    path.write_text(json.dumps(manifest))
    text = make_card(checkpoint, measure(checkpoint)).text
    assert "--effort calibrated --calibration path/to/some.txt --calibration-tokens 4096" in text
    assert "calibrated on the same machine with the same text (tokens' SHA-256 `ab`)" in text
    writer = {"model": "original", "revision": None, "sha256": "cd", "quantized": None}
    manifest["calibration"] = {"tokens": 2048, "tokens_sha256": "ab", "written_by": writer, "seeds_sha256": "ef"}
    path.write_text(json.dumps(manifest))
    text = make_card(checkpoint, measure(checkpoint)).text
    assert "--effort calibrated --calibration-tokens 2048" in text
    assert "with the text that the model writes itself there (tokens' SHA-256 `ab`)" in text
    del manifest["calibration"]["tokens"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(FormatError, match="its calibration lacks tokens, tokens_sha256, or the file or model"):
        make_card(checkpoint, measure(checkpoint))


def test_metadata_of_an_original_on_the_hub(checkpoint: Checkpoint) -> None:
    from_the_hub(checkpoint)
    (checkpoint.path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: some-terms\nlicense_link: LICENSE\nlanguage: [en, de]\ntags: [theirs]\n---\n# Original\n"
    )
    card = make_card(checkpoint, measure(checkpoint), quantized_by="someone", repo="someone/small")
    assert metadata(card.text) == {
        "base_model": "owner/original",
        "base_model_relation": "quantized",
        "language": ["en", "de"],
        "library_name": "kappaquant",
        "license": "other",
        "license_name": "some-terms",
        "license_link": "LICENSE",
        "tags": ["kappaquant", "quantized", "mixed-precision"],
        "quantized_by": "someone",
    }
    assert card.notices == ()
    assert f"[owner/original](https://huggingface.co/owner/original) at revision `{COMMIT}`" in card.text
    assert (
        f"kappaquant quantize owner/original -o small --plan plan.json --effort best --revision {COMMIT}" in card.text
    )
    assert (
        f"kappaquant evaluate small --against owner/original --revision {COMMIT} --text path/to/held-out.txt"
        in card.text
    )
    assert 'from_pretrained("someone/small"' in card.text


def test_what_is_not_known_is_left_out_and_said(checkpoint: Checkpoint) -> None:
    card = make_card(checkpoint)
    assert set(metadata(card.text)) == {"library_name", "tags"}
    assert [notice.partition(":")[0] for notice in card.notices] == ["no base_model", "no license", "no evaluation"]
    assert "has not been evaluated" in card.text
    assert len(tables(card.text)) == 1
    for word in ("perplexity", "nats", "kappaquant evaluate", "None", "vLLM", "MLX"):
        assert word not in card.text
    given = make_card(checkpoint, base_model="owner/original", source_license="mit")
    assert (metadata(given.text)["base_model"], metadata(given.text)["license"]) == ("owner/original", "mit")


def test_tables_hold_the_manifest_and_the_evaluation(checkpoint: Checkpoint) -> None:
    recipe, measured, positions, families = tables(make_card(checkpoint, measure(checkpoint)).text)
    assert all(len(row) == 6 for row in recipe)
    rows = {row[0]: row for row in recipe}
    assert rows["routed gate_proj / up_proj"][1] == "tq3g128"
    assert rows["lm_head"][1] == "kept"
    assert rows["all"][2] == str(len(checkpoint.keys()))
    values = {row[0]: row[1:] for row in measured}
    assert measured[1] == [
        "KL divergence of the top 256 and the rest, mean (nats)", "0.00123 (0.0011 to 0.0014)", "2.13e-05 (2e-05 to 2.3e-05)"
    ]  # fmt: skip
    assert values["same likeliest token"][0] == "98.77% (98.10% to 99.20%)"
    assert values["perplexity"] == ["1.7832 (1.7500 to 1.8200)", "1.7821 (1.7400 to 1.8100)"]
    assert positions[1] == ["1 to 512", "0.00123", "1,234"]
    assert families[1] == ["router", "16.000", "0.000321 (0.0003 to 0.00035)"]


def test_trellis_codes_are_credited_where_they_are(checkpoint: Checkpoint, tmp_path: Path) -> None:
    formats: dict[str, int | str] = {"*mlp.down_proj.weight": "t4g64"}
    folder = tiny_checkpoints.quantize(save_tiny("llama", tmp_path / "source"), tmp_path / "trellis", formats)
    assert "Trellis coded quantization (Marcellin" in make_card(open_checkpoint(folder)).text
    assert "rellis" not in make_card(checkpoint).text


def test_only_what_was_measured(checkpoint: Checkpoint) -> None:
    card = make_card(checkpoint, measure(checkpoint, interval=None, noise_floor=None, families=None))
    _, measured, _ = tables(card.text)
    assert measured[1][1:] == ["0.00123", ""]
    assert "other batches" not in card.text
    assert "family quantized" not in card.text
    for word in ("McNemar", "tok/s", "lm-evaluation-harness", "roofline", "--task"):
        assert word not in card.text


def test_tasks_and_throughput(checkpoint: Checkpoint) -> None:
    tasks = (
        task_report("gsm8k-200"),
        task_report("mmlu", "1" * 6, "0" * 6, data=(), max_tokens=None, chat_template=True),
    )
    timed = (throughput_row(), throughput_row(model="original", batch=8, roofline_share=None))
    text = make_card(checkpoint, measure(checkpoint, tasks=tasks, throughput=timed)).text
    *_, asked, speed = tables(text)
    assert asked[1] == [
        "gsm8k-200, exact_match, strict-match", "4", "5", "50.00% (15.00% to 85.00%)", "100.00% (51.01% to 100.00%)",
        "-50.00 points (-85.00 to +23.48)", "0.5",
    ]  # fmt: skip
    assert asked[2][-2:] == ["+100.00 points (+21.93 to +100.00)", "0.031"]
    assert "answered right 0 only by the checkpoint, 2 only by the original; the difference is not significant" in text
    assert "answered right 6 only by the checkpoint, 0 only by the original; the difference is significant" in text
    assert f"`asked.jsonl` (SHA-256 `{'8' * 64}`), `shown.jsonl`" in text
    assert "gsm8k-200: 4 questions, 5 shots, at most 1,024 tokens, lm-eval 0.4.13" in text
    assert "--task gsm8k-200=path/to/asked.jsonl --shots-from path/to/shown.jsonl --task-batch 16\n" in text
    assert "--task mmlu --questions 6 --shots 5 --task-batch 16 --chat-template" in text
    assert [row[-1] for row in speed] == ["of roofline", "0.2% of 10 GB/s", ""]
    assert speed[1][:5] == ["checkpoint, cpu", "32", "1", "12.5", "100"]


def test_an_evaluation_of_another_checkpoint_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    report = measure(checkpoint)
    other = quantize(tmp_path / "tiny", tmp_path / "other", "uniform")
    with pytest.raises(
        FormatError, match=r"evaluation\.json: measured measured, whose kappaquant\.json is not that of"
    ):
        make_card(other, report)


def test_a_readme_of_somebody_elses_stays(checkpoint: Checkpoint) -> None:
    path = checkpoint.path / "README.md"
    path.write_text("# Mine\n")
    card = make_card(checkpoint)
    with pytest.raises(OutputError, match=r"README\.md: .*--force"):
        write_card(card, path)
    assert path.read_text() == "# Mine\n"
    write_card(card, path, force=True)
    write_card(make_card(checkpoint, measure(checkpoint)), path)  # our own is replaced
    stamp = read_stamp(path)
    assert stamp
    assert not stamp.edited
    assert stamp.evaluation == file_digest(checkpoint.path / "evaluation.json")
    path.write_text(path.read_text().replace("## Recipe", "## The recipe"))
    with pytest.raises(OutputError, match="edited"):
        write_card(card, path)


def test_a_plain_copy_takes_no_card_along(checkpoint: Checkpoint, tmp_path: Path) -> None:
    write_card(make_card(checkpoint, measure(checkpoint)), checkpoint.path / "README.md")
    plain = dequantize(checkpoint, tmp_path / "plain")
    assert not (plain / "README.md").exists()
    assert not (plain / "evaluation.json").exists()
    (checkpoint.path / "README.md").write_text("# Of the original\n")
    assert (dequantize(checkpoint, tmp_path / "again") / "README.md").exists()


def test_the_licence_outlives_the_originals_card(checkpoint: Checkpoint) -> None:
    path = checkpoint.path / "README.md"
    path.write_text("---\nlicense: apache-2.0\n---\n")
    for _ in range(2):
        card = make_card(checkpoint)
        assert metadata(card.text)["license"] == "apache-2.0"
        write_card(card, path, force=True)


def test_metadata_that_is_none(checkpoint: Checkpoint) -> None:
    for broken in ("---\nlicense: [\n---\n", "---\n- a\n---\n"):
        (checkpoint.path / "README.md").write_text(broken)
        with pytest.raises(FormatError, match=r"README\.md: its metadata cannot be read"):
            make_card(checkpoint)


def test_a_manifest_that_lacks_its_source(checkpoint: Checkpoint) -> None:
    path = checkpoint.path / "kappaquant.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "source": "tiny"}))
    with pytest.raises(FormatError, match=r"kappaquant\.json: lacks what a card is made from"):
        make_card(checkpoint)


def test_tq3_native_has_no_manifest(tmp_path: Path) -> None:
    source = save_tiny("qwen3_moe", tmp_path / "tiny")
    with pytest.raises(FormatError, match=r"tq3_native checkpoint has no kappaquant\.json"):
        make_card(quantize(source, tmp_path / "out", container="tq3_native"))


@pytest.mark.slow
def test_its_code_loads_and_its_commands_make_the_same_bytes(tmp_path: Path) -> None:
    source = save_tiny("qwen3_moe", tmp_path / "tiny")
    character_tokenizer().save_pretrained(source)
    made = quantize(source, tmp_path / "out", "recipe")
    text = make_card(made).text
    loading = code(text, "python").replace("path/to/out", str(made.path))
    extract, *commands = code(text, "").replace("path/to/tiny", str(source)).splitlines()
    again = " ".join(commands).replace(" out ", f" {tmp_path}/again ")
    script = f"{loading}\nprint(type(model).__name__, len(tokenizer('hello')['input_ids']))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["Qwen3MoeForCausalLM", "5"], done.stderr
    shell = f"{extract} && {again}".replace("python -c", f"{sys.executable} -c")
    shell = shell.replace("kappaquant quantize", f"{sys.executable} -m kappaquant.cli quantize")
    subprocess.run(shell.replace("> plan.json", f"> {tmp_path}/plan.json").replace("--plan plan", f"--plan {tmp_path}/plan"),
                   shell=True, cwd=made.path, check=True, timeout=120)  # fmt: skip
    assert digests(made.path) == digests(tmp_path / "again")


def test_the_command(checkpoint: Checkpoint, tmp_path: Path) -> None:
    measure(checkpoint)
    done = CliRunner().invoke(app, ["card", str(checkpoint.path), "--quantized-by", "me"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "note: no license" in done.stderr
    text = (checkpoint.path / "README.md").read_text()
    assert metadata(text)["quantized_by"] == "me"
    assert "0.00123 (0.0011 to 0.0014)" in text
    assert list(open_checkpoint(checkpoint.path).verify()) == []
    CliRunner().invoke(app, ["card", str(checkpoint.path), "-o", str(tmp_path / "c.md")], catch_exceptions=False)
    assert metadata((tmp_path / "c.md").read_text())
