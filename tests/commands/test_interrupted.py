"""Ctrl-C while a model writes: it stops between two tokens, without a traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_models import character_tokenizer, save_tiny

import kappaquant


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_generate_stops(tmp_path: Path) -> None:
    source = save_tiny("qwen3_5_moe_text", tmp_path / "source", dtype=torch.bfloat16)
    character_tokenizer().save_pretrained(source)
    for name in ("config.json", "generation_config.json"):  # nothing ends a text before it is interrupted
        described = json.loads((source / name).read_text())
        (source / name).write_text(json.dumps(described | {"eos_token_id": None}))
    opened = kappaquant.open_source(source)
    kappaquant.quantize(opened, tmp_path / "out", kappaquant.make_plan(opened.tensors, opened.config, bits=4))
    command = [
        sys.executable, "-m", "kappaquant.cli", "generate", str(tmp_path / "out"), "ab", "--max-new-tokens", "100000",
        "--temperature", "1", "--seed", "1",
    ]  # fmt: skip
    default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's jobs in the background ignore it
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=default)
    assert process.stdout is not None
    try:
        assert process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert time.monotonic() - begin < 20
    assert b"Traceback" not in said
