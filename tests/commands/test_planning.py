"""Plans by evidence and size on the command line: three commands to a checkpoint, budgets in every form, evidence of other models."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run_here
from measured import evidence_of, with_trellis
from tiny_models import save_tiny

import kappaquant
from kappaquant.commands.planning import Limits
from kappaquant.commands.planning import evidence_of as read_evidence
from kappaquant.errors import BudgetError, PlanError
from kappaquant.planning.policies.sensitivity import Sensitivity
from kappaquant.planning.sensitivity import Sensitivities
from kappaquant.quantizing.calibration import trials
from kappaquant.quantizing.calibration.written import model_of
from kappaquant.sources.source import Source

GIB = 2**30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen3_moe", tmp_path_factory.mktemp("planning") / "model")


@pytest.fixture(scope="module")
def evidence(model: Path) -> Path:
    """A file of evidence, as if measured of the model."""
    source = kappaquant.open_source(model)
    path = model.parent / "evidence.json"
    known = evidence_of(source.tensors, source.config, sha256=model_of(source).sha256, model=source.name)
    known.save(path)
    return path


def planned(*arguments: object) -> dict[str, Any]:
    done = run_here("plan", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def refused(*arguments: object) -> str:
    """What a command that ends with 2 says, in one line."""
    done = run_here(*arguments)
    assert done.returncode == 2, done.stdout
    (line,) = done.stderr.splitlines()
    return line


def test_from_evidence_over_a_plan_to_a_checkpoint_of_that_size(model: Path, evidence: Path, tmp_path: Path) -> None:
    shown = run_here("plan", model, "--evidence", evidence, "--size", "0.25MB", "-o", tmp_path / "plan.json")
    assert shown.returncode == 0, shown.stderr
    made = kappaquant.Plan.load(tmp_path / "plan.json")
    assert made.policy == "sensitivity"
    assert (
        f"predicted: {made.inputs['predicted_kld']:.4g} nats from the original; no plan in these bytes" in shown.stdout
    )
    assert "of 250,000 bytes (250.00 KB, 244.14 KiB)" in shown.stdout
    done = run_here("quantize", model, "-o", tmp_path / "out", "--plan", tmp_path / "plan.json")
    assert done.returncode == 0, done.stderr
    taken = sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert 0.97 * 250_000 < taken <= 250_000
    assert f"weight files: {taken:,} bytes" in shown.stdout
    again = run_here("quantize", model, "-o", tmp_path / "at-once", "--evidence", evidence, "--size", "0.25MB")
    assert again.returncode == 0, again.stderr
    same = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "out", tmp_path / "at-once")]
    assert same[0] == same[1]


def test_a_prediction_of_calibrated_rounding_is_no_prediction_without(
    model: Path, evidence: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calibrated = tmp_path / "evidence.json"
    calibrated.write_text(evidence.read_text().replace('"effort": "best"', '"effort": "calibrated"'))
    for path, warns in ((evidence, False), (calibrated, True)):
        done = run_here("quantize", model, "-o", tmp_path / f"out-{warns}", "--evidence", path, "--size", "0.25MB")
        assert done.returncode == 0, done.stderr
        assert ("nats are predicted of calibrated rounding; without --effort calibrated" in caplog.text) is warns


def test_formats_are_those_of_the_evidence_and_what_lacks_is_said(model: Path, evidence: Path, tmp_path: Path) -> None:
    both = tmp_path / "both.json"
    with_trellis(Sensitivities.load(evidence), lambda _: 0.7).save(both)
    by = "--size", "300KB", "-o", tmp_path / "plan.json"

    def said(*options: object) -> tuple[tuple[str, ...], str]:
        done = run_here("plan", model, *by, *options)
        assert done.returncode == 0, done.stderr
        lines = [line for line in done.stdout.splitlines() if line.startswith("formats:")]
        return kappaquant.Plan.load(tmp_path / "plan.json").kinds, "\n".join(lines)

    line = "formats: codebooks (k) and trellis codes (t), all that the evidence has; --formats takes fewer"
    assert said("--evidence", both) == (("k", "t"), line)
    line = "formats: codebooks (k) alone: the evidence has no trellis codes (t); calibrate --formats k,t measures all"
    assert said("--evidence", evidence) == (("k",), line)
    assert said("--evidence", both, "--formats", "k") == (("k",), "")
    assert said("--evidence", both, "--policy", "kurtosis") == (("k",), "")


def test_a_container_without_trellis_codes_is_planned_for_without_them(
    model: Path, evidence: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = tmp_path / "both.json"
    known = evidence_of(
        kappaquant.open_source(model).tensors, kappaquant.open_source(model).config, group_size=128, bits=(2, 3, 4),
        sha256=Sensitivities.load(evidence).sha256,
    )  # fmt: skip
    with_trellis(known, lambda _: 0.7).save(both)
    by = "quantize", model, "--evidence", both, "--size", "280KB", "--set", "*embed*=16", "--group-size", 128
    done = run_here(*by, "-o", tmp_path / "native", "--format", "tq3_native", "--effort", "fast")
    assert done.returncode == 0, done.stderr
    assert "formats: codebooks (k) alone: tq3_native holds no trellis codes (t)\n" in done.stdout
    done = run_here(*by, "-o", tmp_path / "own", "--effort", "fast")
    assert done.returncode == 0, done.stderr
    assert "formats: codebooks (k) and trellis codes (t), all" in done.stdout
    said = refused(*by, "-o", tmp_path / "none", "--format", "tq3_native", "--formats", "t")
    assert "is no format of tq3_native; plan with --formats k, or write the kappaquant container" in said
    monkeypatch.setattr(Sensitivity, "kinds", lambda policy, known: ("t",))  # of evidence by --formats t
    said = refused(*by, "-o", tmp_path / "none", "--format", "tq3_native")
    assert (
        "tq3_native holds codebooks (k), the evidence has trellis codes (t) alone: calibrate --formats k, or write another --format"
        in said
    )


def test_trellis_codes_that_torch_has_to_search_for_are_warned_of(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trials, "kinds_by_kernels", lambda device: ("k",))
    for formats, warns in (("k", False), ("k,t", True)):
        by = "--bits", 4, "--formats", formats, "--effort", "fast", "--device", "cpu", "--set", "*.1.*=16"
        done = run_here("quantize", model, "-o", tmp_path / formats, *by)
        assert done.returncode == 0, done.stderr
        assert ("trellis codes, which no kernel rounds on cpu: torch takes tens of times" in caplog.text) is warns


def test_budgets_in_every_form(model: Path, evidence: Path) -> None:
    by = "--evidence", evidence
    weights = sum(info.numel for info in kappaquant.open_source(model).tensors.values())
    assert planned(model, *by, "--size", "250KB")["inputs"]["size"] == 250_000
    assert planned(model, *by, "--bits-per-weight", 5.5)["inputs"]["size"] == int(weights * 5.5 / 8)
    both = planned(model, *by, "--size", "250KB", "--active", "150KB")["inputs"]
    assert (both["size"], both["active"]) == (250_000, 150_000)
    assert planned(model, *by, "--active", "150KB")["inputs"].get("size") is None
    config = kappaquant.open_source(model).config
    cache = 1000 * 2 * 2 * 2 * 2 * config["head_dim"]
    memory = GIB + cache + 250_000
    assert planned(model, *by, "--fit", f"{memory / 1000:.3f}KB", "--context", 1000)["inputs"]["size"] == 250_000
    done = run_here("plan", model, *by, "--fit", f"{memory / 1000:.3f}KB", "--context", 1000)
    assert (
        "keys and values of 1,000 tokens take 512.00 KB, 500.00 KiB, 1.07 GB, 1.00 GiB are held in reserve"
        in done.stdout
    )


def test_kurtosis_of_evidence_with_a_size(model: Path, evidence: Path) -> None:
    inputs = planned(model, "--evidence", evidence, "--policy", "kurtosis", "--size", "300KB")["inputs"]
    assert inputs["factor"] > 0
    assert inputs["size"] == 300_000


def test_what_fusing_costs_is_said(model: Path, evidence: Path) -> None:
    done = run_here("plan", model, "--evidence", evidence, "--size", "250KB", "--fuse-legal", "--target", "vllm")
    assert done.returncode == 0, done.stderr
    assert "--fuse-legal changed" in done.stdout
    assert "cards that can share it" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--size", "250000"), "--size '250000': write a number and a unit"),
        (("--size", "250kilo"), "the units are B, KB, MB, GB and TB of 1000, and KiB, MiB, GiB and TiB of 1024"),
        (("--active", "2"), "--active '2': write a number and a unit"),
        (("--fit", "2", "--context", "5"), "--fit '2': write a number and a unit"),
        (
            ("--size", "250KB", "--bits-per-weight", "3"),
            "--size and --bits-per-weight both say a size; give one of them",
        ),
        (("--fit", "24GiB"), "--fit: is of no effect without --context, such as --fit 24GiB --context 32768"),
        (("--context", "5"), "--context: is of no effect without --fit"),
        (("--bits-per-weight", "nan"), "bits per weight = nan"),
        ((), "the sensitivity policy needs a budget of bytes; give one, such as --size 18GB"),
        (("--size", "1KB"), "size 1,000 (1.00 KB, 1000 bytes): below the smallest plan; the smallest takes "),
        (("--size", "1GB"), "above the largest plan; the smallest takes "),
        (("--fit", "24GiB", "--context", "5"), "are left for weights; size 24,"),
        (("--fit", "1.0001GiB", "--context", "5"), "below the smallest plan; the smallest takes "),
        (
            ("--fit", "2GiB", "--context", "99999999"),
            "are needed before any weights; take more memory or a shorter context",
        ),
        (("--fit", "24GiB", "--context", "0"), "context 0: must be 1 or more tokens"),
        (("--size", "250KB", "--set", "*experts.1.up_proj.weight=5"), "which breaks a tie"),
        (("--size", "180KB", "--set", "*=16"), "below the smallest plan"),
        (("--policy", "uniform"), "the uniform policy reads no evidence; take --policy kurtosis or sensitivity"),
        (("--policy", "kurtosis", "--active", "250KB"), "the kurtosis policy keeps to no active size"),
    ],
)
def test_bad_budgets_are_one_line(model: Path, evidence: Path, options: tuple[str, ...], message: str) -> None:
    assert message in refused("plan", model, "--evidence", evidence, *options)


def test_options_of_one_policy_say_which(model: Path) -> None:
    made = kappaquant.Plan.from_json(run_here("plan", model, "--bits", 5, "--json").stdout)
    assert (made.policy, made.inputs["bits"]) == ("uniform", 5)
    assert kappaquant.Plan.from_json(run_here("plan", model, "--json").stdout).policy == "recipe"
    assert "option 'bits'" in refused("plan", model, "--bits", 5, "--policy", "recipe")


def test_without_evidence(model: Path, tmp_path: Path) -> None:
    assert "the recipe policy keeps to no size" in refused("plan", model, "--size", "250KB")
    assert "needs evidence; run calibrate first" in refused("plan", model, "--size", "250KB", "--policy", "sensitivity")
    missing = tmp_path / "absent.json"
    assert "absent.json: no such file" in refused("plan", model, "--size", "250KB", "--evidence", missing)


def test_a_plan_file_takes_no_evidence(model: Path, evidence: Path, tmp_path: Path) -> None:
    run_here("plan", model, "-o", tmp_path / "plan.json")
    for option in (
        ("--evidence", evidence),
        ("--active", "1GB"),
        ("--fit", "1GB"),
        ("--context", 3),
        ("--bits-per-weight", 3),
    ):
        said = refused("quantize", model, "-o", tmp_path / "out", "--plan", tmp_path / "plan.json", *option)
        assert f"{option[0]} does not change the plan file" in said


def test_evidence_of_another_model_is_refused(model: Path, evidence: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    said = refused("plan", other, "--evidence", evidence, "--size", "250KB")
    assert "evidence.json: evidence of another model or revision: of model (revision unknown" in said
    assert "calibrate this very model" in said


@dataclass
class Streamed:
    """What is known of a source on the Hub whose shards come one at a time."""

    name: str = "owner/name"
    revision: str | None = "a" * 40
    folder: Path | None = None


@pytest.mark.parametrize(("revision", "fits"), [("a" * 40, True), (None, True), ("b" * 40, False)])
def test_of_a_source_that_streams_revisions_are_compared(
    evidence: Path, tmp_path: Path, revision: str | None, fits: bool, caplog: pytest.LogCaptureFixture
) -> None:
    known = replace(Sensitivities.load(evidence), revision=revision)
    known.save(tmp_path / "evidence.json")
    source: Any = Streamed()

    def read() -> Sensitivities | None:
        return read_evidence(tmp_path / "evidence.json", source, Sensitivity())

    if not fits:
        with pytest.raises(PlanError, match=r"another model or revision: of model .revision bbbb"):
            read()
        return
    assert read() == known
    assert ("whether owner/name (revision aaaa" in caplog.text) is (revision is None)


def test_a_container_that_takes_more_than_the_size_is_refused(tmp_path: Path) -> None:
    model = save_tiny("qwen3_moe", tmp_path / "model", dtype=torch.bfloat16)
    run_here("scan", model, "-o", tmp_path / "profile.json", "--bits", "")
    by = "--policy", "kurtosis", "--profile", tmp_path / "profile.json", "--ladder", "2,3,4", "--group-size", "128"
    least = (
        refused("plan", model, *by, "--size", "1KB").split("the smallest takes ")[1].split(" bytes")[0].replace(",", "")
    )
    size = f"{int(least) / 1000:.3f}KB"
    said = refused("quantize", model, "-o", tmp_path / "out", "--format", "tq3_native", *by, "--size", size)
    assert "--format tq3_native: the weight files take " in said
    assert not (tmp_path / "out").exists()


def test_limits_without_any(model: Path) -> None:
    source: Source = kappaquant.open_source(model)
    none = Limits()
    assert (none.bytes_of_files(source), none.bytes_for_a_token(), none.fitted(source)) == (None, None, None)
    with pytest.raises(BudgetError):
        Limits(fit="1KB", context=1).fitted(source)
