"""A command that is given something broken, and what it may say."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import torch
from command_line import run_here
from tiny_checkpoints import quantize
from tiny_models import character_tokenizer, save_tiny

import kappaquant


def good_places(root: Path) -> Path:
    """A model with all that belongs to one, its checkpoint, and what commands take beside them."""
    source = save_tiny("llama", root / "source", dtype=torch.bfloat16)
    tokenizer = character_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(source)
    quantize(source, root / "checkpoint")
    opened = kappaquant.open_source(source)
    kappaquant.make_plan(opened.tensors, opened.config, "uniform").save(root / "plan.json")
    assert run_here("scan", source, "-o", root / "profile.json", "--bits", "").returncode == 0
    assert run_here("calibrate", source, "-o", root / "evidence.json", "--data-free").returncode == 0
    (root / "text.txt").write_text("one and two and three " * 20)
    return root


def said(command: str, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> str:
    """What a command says, which is one line that begins as our errors do, and the last; nothing where it does not complain."""
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n\n"))
    monkeypatch.setattr(os, "execv", lambda *arguments: None)  # a server would begin here
    words = [word.format(**places) for word in command.split()]
    done = run_here(*words)
    both = done.stdout + done.stderr
    assert "Traceback" not in both
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    if words[0] == "verify" and done.returncode == 1:
        assert all(line.startswith("FAILED ") for line in lines), both
        return lines[0]
    assert done.returncode == 2, both
    assert [line.startswith("error: ") for line in lines].count(True) == 1, both
    assert lines[-1].startswith("error: "), both
    assert not places["out"].exists(), "an output that is half there"
    return lines[-1]
