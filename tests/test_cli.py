"""The command line end to end on a tiny model: what it prints, writes and exits with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Command, run
from tiny_models import save_tiny

COMMANDS = (
    "scan",
    "plan",
    "write",
    "quantize",
    "inspect",
    "verify",
    "dequantize",
    "generate",
    "chat",
    "bench",
    "evaluate",
    "compare",
    "card",
    "push",
    "convert",
    "serve",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen3_moe", tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="module")
def quantized(model: Path) -> Path:
    output = model.parent / "quantized"
    done = run("quantize", model, output, "--policy", "uniform", "--bits", 4)
    assert done.returncode == 0, done.stderr
    return output


def test_help_names_every_command_without_importing_what_takes_long() -> None:
    code = (
        "import sys; sys.argv = ['kappaquant', '--help']\n"
        "from kappaquant.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(bool({'torch', 'numpy', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert all(command in done.stdout for command in COMMANDS)
    assert done.stdout.strip().endswith("False")


def test_scan_plan_quantize_by_files(command: Command, model: Path, tmp_path: Path) -> None:
    profile, plan, picture = tmp_path / "profile.json", tmp_path / "plan.json", tmp_path / "kappa.png"
    scanned = command("scan", model, "-o", profile, "--plot", picture)
    assert scanned.returncode == 0, scanned.stderr
    assert "attention q/k/v/o" in scanned.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    planned = command(
        "plan", model, "--policy", "kurtosis", "--profile", profile, "--set", "*.o_proj.weight=5", "-o", plan
    )
    assert planned.returncode == 0, planned.stderr
    promised = int(planned.stdout.split("weight files: ")[1].split(" bytes")[0].replace(",", ""))
    done = command("quantize", model, tmp_path / "out", "--plan", plan)
    assert done.returncode == 0, done.stderr
    assert sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")) == promised
    shown = json.loads(command("inspect", tmp_path / "out", "--json").stdout)
    assert shown["tensors"]["model.layers.0.self_attn.o_proj.weight"]["bits"] == 5


def test_inspect_verify_and_dequantize(command: Command, quantized: Path, tmp_path: Path) -> None:
    assert "routed down_proj" in command("inspect", quantized).stdout
    verified = command("verify", quantized)
    assert verified.returncode == 0
    assert "all hashes match" in verified.stdout
    assert command("dequantize", quantized, tmp_path / "plain").returncode == 0
    assert (tmp_path / "plain" / "config.json").exists()


def test_verify_exits_1_and_names_the_tampered_tensor(command: Command, quantized: Path, tmp_path: Path) -> None:
    import shutil

    from kappaquant import open_checkpoint

    copy = shutil.copytree(quantized, tmp_path / "copy")
    name = "model.layers.0.self_attn.q_proj.weight"
    path, stored = open_checkpoint(copy).entry(name).parts[".tq_packed"]
    with path.open("rb+") as file:
        file.seek(stored.offset)
        byte = file.read(1)
        file.seek(stored.offset)
        file.write(bytes([byte[0] ^ 1]))
    done = command("verify", copy)
    assert done.returncode == 1
    assert f"{name}.tq_packed" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "{model}", "--policy", "uniform", "--bits", "9"), "bits = 9"),
        (("plan", "{model}", "--group-size", "96"), "group size 96"),
        (("plan", "{model}", "--set", "*.nothing=4"), "*.nothing"),
        (("plan", "{model}", "--policy", "kurtosis"), "profile"),
        (("plan", "{model}", "--thresholds", "4,x", "--policy", "kurtosis"), "--thresholds"),
        (("quantize", "{model}", "{model}"), "which is read"),
        (("quantize", "{model}", "{model}/out"), "which is read"),
        (("quantize", "{model}", "{tmp}/out", "--effort", "most"), "fast, best, calibrated"),
        (("quantize", "{model}", "{tmp}/out", "--effort", "calibrated"), "has no tokenizer (tokenizer.json"),
        (
            ("quantize", "{model}", "{tmp}/out", "--effort", "fast", "--calibration", "x"),
            "leave it out beside --calibration",
        ),
        (("quantize", "{model}", "{tmp}/out", "--calibration-tokens", "9"), "of no effect without --calibration"),
        (
            ("quantize", "{model}", "{tmp}/out", "--effort", "calibrated", "--calibration-tokens", "1"),
            "--calibration-tokens 1: must be 2 or more",
        ),
        (("quantize", "{model}", "{tmp}/out", "--calibration", "{tmp}/no.txt"), "no.txt: no such file"),
        (("quantize", "{model}", "{tmp}/out", "--format", "gguf"), "kappaquant, tq3_native"),
        (("quantize", "{model}", "{tmp}/out", "--jobs", "0"), "at least 1"),
        (("plan", "{model}", "--profile", "{tmp}/absent.json"), "the recipe policy reads no profile"),
        (("plan", "{model}", "--policy", "kurtosis", "--profile", "{tmp}/absent.json"), "absent.json: no such file"),
        (("plan", "{model}", "-o", "{tmp}/absent/plan.json"), "is no folder; create it first"),
        (("scan", "{tmp}/absent"), "no such folder"),
        (("scan", "{model}", "-o", "{tmp}/absent/profile.json"), "is no folder; create it first"),
        (("scan", "{model}", "--plot", "{tmp}"), "is a folder; name a file"),
        (
            ("plan", "{model}", "--bits", "4", "--thresholds", "1"),
            "no policy has all of these options: --bits of uniform, --thresholds of kurtosis",
        ),
        (("plan", "{model}", "--policy", "recipe", "--bits", "4"), "the recipe policy has no such option"),
        (("inspect", "{model}"), "not quantized"),
        (("inspect", "{model}", "--tp", "0"), "--tp 0: must be 1 or more"),
        (("inspect", "{model}", "--expert-parallel"), "give --tp too"),
        (("generate", "{model}", "hello", "--device", "tpu"), "device 'tpu': can not be used here"),
        (("generate", "{model}", "hello", "--temperature", "-1"), "temperature = -1.0"),
        (("generate", "{model}", "hello", "--top-p", "0"), "top_p = 0.0"),
        (("chat", "{model}", "--min-p", "2"), "min_p = 2.0"),
        (("generate", "{model}", "hello", "--activations", "fp8"), "activations 'fp8': must be one of int8, bf16"),
    ],
)
def test_bad_input_exits_2_with_one_line(
    command: Command, model: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = command(*(a.format(model=model, tmp=tmp_path) for a in arguments))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir())


def test_a_process_ends_with_2_and_one_line(model: Path) -> None:
    done = run("inspect", model)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "not quantized" in line


def test_generate_needs_a_tokenizer(command: Command, quantized: Path) -> None:
    done = command("generate", quantized, "hello", "--max-new-tokens", 4, "--device", "cpu")
    assert done.returncode == 2
    assert "tokenizer" in done.stderr


def test_generate_streams_text_until_a_stop_string(command: Command, quantized: Path, tmp_path: Path) -> None:
    import shutil

    from tiny_models import character_tokenizer

    copy = shutil.copytree(quantized, tmp_path / "copy")
    character_tokenizer().save_pretrained(copy)
    options = (
        "--max-new-tokens",
        24,
        "--temperature",
        1,
        "--top-k",
        40,
        "--top-p",
        0.99,
        "--seed",
        5,
        "--device",
        "cpu",
    )
    whole, again = command("generate", copy, "hello", *options), run("generate", copy, "hello", *options)
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout == again.stdout
    text = whole.stdout.removesuffix("\n")
    assert len(text) > 8
    stopped = command("generate", copy, "hello", *options, "--stop", text[3:5], "--stop", "no such text")
    assert stopped.stdout == text[: text.index(text[3:5])] + "\n"
