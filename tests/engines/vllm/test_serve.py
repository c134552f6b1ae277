"""``kappaquant serve`` under load: the reference model answers 16 clients at once as it answers transformers alone."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm sets up an environment with it")

from vllm_engine import environment

import kappaquant
from reference.evaluate import MAX_NEW_TOKENS, MODEL, answers
from reference.text import Problem, extract_answer, problems

CLIENTS, PROBLEMS = 16, 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = kappaquant.open_source(MODEL)
    plan = kappaquant.make_plan(source.tensors, source.config, "recipe", recipe="apex2")
    return kappaquant.quantize(source, tmp_path_factory.mktemp("reference") / "apex2", plan)


def post(port: int, path: str, **body: Any) -> dict[str, Any]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


@contextmanager
def server(folder: Path, log: Path, *options: str) -> Iterator[int]:
    """A server on a free port of 127.0.0.1, ended by its process id; yields the port once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "kappaquant.cli", "serve", str(folder), "--port", str(port), *options]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment(VLLM_ENABLE_V1_MULTIPROCESSING="1")
        )
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                assert process.poll() is None, log.read_text()[-6000:]
                assert time.monotonic() < deadline, log.read_text()[-6000:]
                time.sleep(1)
        yield port
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def correct(asked: list[Problem], texts: list[str]) -> float:
    return sum(extract_answer(text) == p.answer for text, p in zip(texts, asked, strict=True)) / len(asked)


def test_sixteen_clients_get_the_answers_that_transformers_gives(folder: Path, tmp_path: Path) -> None:
    asked = problems(0, PROBLEMS)
    model, tokenizer = kappaquant.load(folder)
    expected = correct(asked, answers(model, tokenizer, asked))
    log = tmp_path / "log"
    with server(folder, log, "--context", "256", "--", "--max-num-seqs", str(CLIENTS)) as port:

        def ask(problem: Problem) -> str:
            body = {"prompt": problem.prompt, "max_tokens": MAX_NEW_TOKENS, "temperature": 0}
            (choice,) = post(port, "/v1/completions", model=str(folder), **body)["choices"]
            assert choice["finish_reason"] == "stop", choice
            return choice["text"]

        with ThreadPoolExecutor(CLIENTS) as clients:
            texts = list(clients.map(ask, asked))
        chat = post(
            port, "/v1/chat/completions", model=str(folder), messages=[{"role": "user", "content": "Hi"}], max_tokens=4
        )
    assert len(texts) == PROBLEMS
    assert abs(correct(asked, texts) - expected) <= 0.01
    assert expected > 0.95
    assert chat["choices"][0]["message"]["content"]
    assert "vllm: the first that can run it here" in log.read_text()


def test_transformers_serves_the_same_checkpoint(folder: Path, tmp_path: Path) -> None:
    (problem,) = problems(1, 1)
    with server(folder, tmp_path / "log", "--engine", "transformers") as port:
        body = {"messages": [{"role": "user", "content": problem.prompt.split("\n")[0].removeprefix("Question: ")}]}
        made = post(port, "/v1/chat/completions", model=str(folder), max_tokens=MAX_NEW_TOKENS, **body)
    assert extract_answer(made["choices"][0]["message"]["content"]) == problem.answer
