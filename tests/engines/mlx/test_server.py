"""mlx_lm's own server with a codebook checkpoint behind it, over loopback."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlx_models import quantize, save, tokenizer_to

from kappaquant.errors import FormatError, UnsupportedError

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from mlx_lm import server as mlx_server  # noqa: E402

from kappaquant.engines.mlx import load, serve  # noqa: E402
from kappaquant.engines.mlx.server import server_options  # noqa: E402

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
NO_TORCH = "import sys; sys.modules['torch'] = None\n"
START = "from kappaquant.engines.mlx import serve; serve(sys.argv[1], port=int(sys.argv[2]), max_tokens=9)"


def post(url: str, **body: Any) -> tuple[int, Any]:
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as problem:
        return problem.code, json.load(problem)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("server")
    folder = quantize(save("qwen3_5_moe", root / "source"), root / "tiny-codebook")
    tokenizer_to(folder, TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    """A server in a process of its own, which has no torch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", NO_TORCH + START, str(folder), str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, process.stdout and process.stdout.read()
                time.sleep(0.1)
        else:
            pytest.fail("the server did not come up within a minute")
        yield address
    finally:
        process.terminate()
        process.communicate(timeout=30)


def test_a_chat_completion_is_what_mlx_lm_generates(url: str, folder: Path) -> None:
    question = "How many?"
    model, tokenizer = load(folder)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    expected = mlx_lm.generate(model, tokenizer, prompt, max_tokens=9)
    for name in ("default_model", "tiny-codebook", str(folder)):
        status, answer = post(url, model=name, messages=[{"role": "user", "content": question}], temperature=0)
        assert (status, answer["choices"][0]["message"]["content"]) == (200, expected)
        assert answer["usage"]["completion_tokens"] == 9
    assert len(set(expected)) > 1


@pytest.mark.parametrize(
    ("asked", "named"), [({"model": "some/other"}, "some/other"), ({"adapters": "an/adapter"}, "adapters"),
                         ({"draft_model": "a/draft"}, "draft")]
)  # fmt: skip
def test_no_other_model_is_loaded_because_a_request_names_it(url: str, asked: dict[str, str], named: str) -> None:
    status, answer = post(url, messages=[{"role": "user", "content": "x"}], **asked)
    assert status == 404
    assert named in answer["error"]


def test_options_are_all_that_mlx_lm_s_server_reads() -> None:
    """With its own defaults: what its parser would make of an empty command line."""
    source = Path(mlx_server.__file__).read_text()
    ours = vars(server_options("folder"))
    assert set(re.findall(r"cli_args\.(\w+)", source)) <= ours.keys()
    found = re.findall(r'add_argument\(\s*"--([\w-]+)",(.*?)\n    \)', source, re.DOTALL)
    assert len(found) > 20
    for flag, rest in found:
        default = re.search(r"\n\s*default=([^,\n]+),", rest)
        name = flag.replace("-", "_")
        if name in ours and name != "model" and default and default[1] not in ("DEFAULT_QUANTIZED_KV_START", '"{}"'):
            assert repr(ours[name]).replace("'", '"') == default[1], flag


def test_what_is_refused_before_anything_listens(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"\['colour', 'trust_remote_code'\]; known are .*max_tokens"):
        serve(folder, trust_remote_code=True, colour="red")
    with pytest.raises(FormatError, match="no such folder"):
        serve(tmp_path / "nothing")
