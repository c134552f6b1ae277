"""Which server is chosen, and the process that is started; servers themselves are started in test_vllm_serve."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from builders import quantize
from tiny_models import save_tiny
from typer.testing import CliRunner

from kappaquant.checkpoints.tq3_native import TQ3_NATIVE
from kappaquant.cli import app
from kappaquant.engines import serve
from kappaquant.errors import FormatError, UnsupportedError

SERVING = ("fastapi", "uvicorn", "openai", "accelerate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("serve")
    return quantize(save_tiny("llama", root / "source"), root / "v1").path


@pytest.fixture(scope="module")
def legacy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("legacy")
    return quantize(save_tiny("llama", root / "source"), root / "legacy", container=TQ3_NATIVE).path


def install(monkeypatch: pytest.MonkeyPatch, *names: str, platform: str = "linux") -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: name if name in names else None)
    monkeypatch.setattr(serve.sys, "platform", platform)


@pytest.mark.parametrize(
    ("installed", "platform", "engine", "why"),
    [
        (("vllm", "mlx_lm", *SERVING), "linux", "vllm", ("the first that can run it here",)),
        (("vllm", "mlx_lm", *SERVING), "darwin", "vllm", ("the first that can run it here",)),
        (
            ("mlx_lm", *SERVING),
            "linux",
            "transformers",
            (
                "the first that can run it here",
                "not vllm: vLLM is not installed",
                "not mlx: MLX is for Macs; --mlx tries it all the same",
            ),
        ),
        (("mlx_lm",), "darwin", "mlx", ("the first that can run it here", "not vllm: vLLM is not installed")),
    ],
)
def test_the_choice_and_its_reason(
    installed: tuple[str, ...], platform: str, engine: str, why: tuple[str, ...], folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    install(monkeypatch, *installed, platform=platform)
    chosen = serve.choose(folder)
    assert (chosen.engine, chosen.why) == (engine, why)
    assert chosen.command[0] == sys.executable


def test_the_same_options_for_each(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "vllm", "mlx_lm", *SERVING)
    asked = {"host": "127.0.0.2", "port": 8123, "context": 512}
    vllm = serve.choose(folder, "vllm", **asked, options=["--tensor-parallel-size", "2"])
    assert vllm.why == ("asked for",)
    expected = f"serve {folder} --host 127.0.0.2 --port 8123 --max-model-len 512 --tensor-parallel-size 2"
    assert " ".join(vllm.command).endswith(expected)
    transformers = serve.choose(folder, "transformers", **asked)
    assert " ".join(transformers.command).endswith(f"serve {folder} --host 127.0.0.2 --port 8123")
    mlx = serve.choose(folder, "mlx", **asked)
    assert mlx.command[-3:] == (str(folder), "127.0.0.2", "8123")
    for server in (transformers, mlx):
        assert any("--context is not passed on" in reason for reason in server.why)
    assert "127.0.0.1" in serve.choose(folder).command


def test_tq3_native_goes_to_mlx_or_is_told_to_convert(legacy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "vllm", *SERVING)
    with pytest.raises(UnsupportedError, match=r"no server can run it here: vllm \(.*kappaquant convert"):
        serve.choose(legacy)
    with pytest.raises(UnsupportedError, match="vllm cannot serve it: it does not read tq3_native"):
        serve.choose(legacy, "vllm")
    install(monkeypatch, "vllm", "mlx_lm", platform="darwin")
    assert serve.choose(legacy).engine == "mlx"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "sglang"}, "engine 'sglang': must be one of vllm, mlx, transformers"),
        ({"engine": "vllm"}, "vllm cannot serve it: vLLM is not installed"),
        ({"port": 0}, "port 0: must be from 1 to 65535"),
        ({"context": 0}, "context 0: must be at least one token"),
        ({"engine": "mlx", "options": ["--x"]}, "--x: the MLX server takes no further options here"),
        ({"engine": "transformers"}, "fastapi, uvicorn, openai, accelerate not installed: pip install 'transformers"),
    ],
)
def test_what_is_refused(options: dict, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "mlx_lm")
    with pytest.raises(UnsupportedError) as caught:
        serve.choose(folder, **options)
    assert message in str(caught.value)


def test_a_broken_checkpoint_is_met_before_a_server_starts(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such folder"):
        serve.choose(tmp_path / "none")


def test_the_command_becomes_the_server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, ...]] = []
    install(monkeypatch, "vllm")
    monkeypatch.setattr("os.execv", lambda program, arguments: started.append(arguments))
    done = CliRunner().invoke(app, ["serve", str(folder), "--port", "8124", "--", "--tensor-parallel-size", "2"])
    assert done.exit_code == 0, done.output
    assert "vllm: the first that can run it here" in done.output
    assert "http://127.0.0.1:8124" in done.output
    assert started[0][-2:] == ("--tensor-parallel-size", "2")
