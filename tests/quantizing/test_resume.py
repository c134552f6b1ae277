"""Killed at any moment and started again, a run ends with the bytes of an uninterrupted one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from builders import Q, digests, tensors, write_source

import kappaquant
from kappaquant.checkpoints import writer
from kappaquant.files import tensors as stored_tensors
from kappaquant.files.unfinished import Partial
from kappaquant.quantizing import quantize as quantizer
from kappaquant.quantizing import slices

DRIVER = """
import sys
import time
import kappaquant
from kappaquant.checkpoints import writer
from kappaquant.files import tensors
from kappaquant.kernels import dispatch

encode = dispatch.encode

def slowly(*arguments, **options):
    time.sleep(0.01)  # else the native core is done before it can be killed
    return encode(*arguments, **options)

dispatch.encode = slowly
tensors.SLICE_ELEMENTS = 1 << 16
writer.COMMIT_SECONDS = float(sys.argv[4])
if __name__ == "__main__":
    source = kappaquant.open_source(sys.argv[1])
    plan = kappaquant.make_plan(source.tensors, source.config, "uniform")
    kappaquant.quantize(source, sys.argv[2], plan, kappaquant.Options(jobs=int(sys.argv[3])))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many units of work in three shards."""
    content = {
        f"model.layers.{i}.mlp.experts.down_proj": torch.randn(8, 512, 128).bfloat16() for i in range(10)
    } | tensors()
    return write_source(tmp_path_factory.mktemp("resume") / "source", content, shards=3)


@pytest.fixture(scope="module")
def driver(source: Path) -> Path:
    path = source.parent / "driver.py"
    path.write_text(DRIVER)
    return path


@pytest.fixture(scope="module")
def expected(source: Path, driver: Path) -> dict[str, str]:
    output = source.parent / "expected"
    subprocess.run([sys.executable, driver, source, output, "1", "2"], check=True, timeout=300)
    return digests(output)


def journal_lines(output: Path) -> int:
    journal = output.parent / f"{output.name}.partial" / "journal.jsonl"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


@pytest.mark.parametrize(("jobs", "kills"), [(1, 5), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_sigkill_at_any_moment(
    source: Path, driver: Path, expected: dict[str, str], tmp_path: Path, jobs: int, kills: int
) -> None:
    output = tmp_path / "out"
    moments = random.Random(jobs)
    command = [sys.executable, str(driver), str(source), str(output), str(jobs), "0.02"]
    killed_at = []
    for _ in range(kills):
        before = journal_lines(output)
        process = subprocess.Popen(command, stderr=subprocess.PIPE)
        wanted = before + moments.randint(1, 12)
        while process.poll() is None and journal_lines(output) < wanted:
            time.sleep(0.002)
        time.sleep(moments.random() * 0.05)
        workers = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGKILL)
        process.wait()
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert not alive, "workers outlived their parent"
        assert not output.exists()
        killed_at.append(journal_lines(output))
    assert killed_at == sorted(killed_at), "a run lost what an earlier one had finished"
    assert killed_at[-1] > killed_at[0] > 0
    subprocess.run(command, check=True, timeout=300)
    assert digests(output) == expected
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("step", ["hash", "documents", "rename", "cleanup"])
def test_interrupted_in_the_last_steps(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = kappaquant.open_source(write_source(tmp_path / "source", shards=2))
    plan = kappaquant.make_plan(source.tensors, source.config)
    expected = digests(kappaquant.quantize(source, tmp_path / "expected", plan))
    target, name = {
        "hash": (writer, "hash_stored"),
        "documents": (writer, "write_json"),
        "rename": (Path, "rename"),
        "cleanup": (Partial, "discard"),
    }[step]

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(target, name, killed)
    with pytest.raises(KeyboardInterrupt):
        kappaquant.quantize(source, tmp_path / "out", plan)
    monkeypatch.undo()
    assert (tmp_path / "out").exists() == (step == "cleanup")
    assert digests(kappaquant.quantize(source, tmp_path / "out", plan)) == expected
    assert not (tmp_path / "out.partial").exists()


def test_a_torn_journal_line_is_forgotten(tmp_path: Path) -> None:
    partial = Partial(tmp_path / "out", "f")
    partial.append([{"a": 1}])
    partial.close()
    with (tmp_path / "out.partial" / "journal.jsonl").open("ab") as file:
        file.write(b'{"b": 2')
    again = Partial(tmp_path / "out", "f")
    assert again.records == [{"fingerprint": "f"}, {"a": 1}]
    again.close()


def test_finished_work_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = kappaquant.open_source(write_source(tmp_path / "source", shards=2))
    plan = kappaquant.make_plan(source.tensors, source.config)
    real, done = slices.encode_slice, []

    def run_two_then_stop(unit: slices.Slice) -> slices.Sums:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(unit.tensor)
        return real(unit)

    monkeypatch.setattr(writer, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(quantizer, "encode_slice", run_two_then_stop)
    with pytest.raises(KeyboardInterrupt):
        kappaquant.quantize(source, tmp_path / "out", plan)
    repeated: list[str] = []
    monkeypatch.setattr(quantizer, "encode_slice", lambda unit: (repeated.append(unit.tensor), real(unit))[1])
    kappaquant.quantize(source, tmp_path / "out", plan)
    assert len(done) == 2
    assert not set(done) & set(repeated)


def test_left_overs_of_another_run_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = kappaquant.open_source(write_source(tmp_path / "source"))
    three, four = (kappaquant.make_plan(source.tensors, source.config, bits=b) for b in (3, 4))
    monkeypatch.setattr(writer, "hash_stored", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        kappaquant.quantize(source, tmp_path / "out", three)
    monkeypatch.undo()
    with pytest.raises(kappaquant.OutputError, match=r"out\.partial: left by a run with another source, plan"):
        kappaquant.quantize(source, tmp_path / "out", four)
    kappaquant.quantize(source, tmp_path / "out", three)


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    first = Partial(tmp_path / "out", "f")
    with pytest.raises(kappaquant.OutputError, match="another run is writing here"):
        Partial(tmp_path / "out", "f")
    first.discard()
    assert os.listdir(tmp_path) == []


@pytest.fixture
def spoilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> kappaquant.Source:
    """A source with NaN in several units of two tensors, one of which every plan keeps."""
    monkeypatch.setattr(stored_tensors, "SLICE_ELEMENTS", 4096)
    monkeypatch.setattr(writer, "COMMIT_SECONDS", 0.0)
    content = tensors()
    for element in (70, 5000, 20_000):
        content[Q].view(-1)[element] = float("nan")
    content["model.embed_tokens.weight"].view(-1)[9000] = float("inf")
    return kappaquant.open_source(write_source(tmp_path / "source", content, shards=2))


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_that_lets_nan_pass_resumes_to_the_same_bytes(
    jobs: int, spoilt: kappaquant.Source, tmp_path: Path
) -> None:
    plan = kappaquant.make_plan(spoilt.tensors, spoilt.config)
    options = kappaquant.Options(jobs=jobs, allow_nonfinite=True)
    expected = digests(
        kappaquant.quantize(spoilt, tmp_path / "whole", plan, kappaquant.Options(jobs=1, allow_nonfinite=True))
    )
    refused = pytest.raises(kappaquant.NonFiniteError)
    with refused:
        kappaquant.quantize(spoilt, tmp_path / "out", plan, kappaquant.Options(jobs=jobs))

    def stop(stage: str, count: int, total: int) -> None:
        if stage == "hash":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kappaquant.quantize(spoilt, tmp_path / "out", plan, options, stop)
    with refused:  # what one run let pass, a stricter one may not
        kappaquant.quantize(spoilt, tmp_path / "out", plan, kappaquant.Options(jobs=jobs))
    assert not (tmp_path / "out").exists()
    out = kappaquant.quantize(spoilt, tmp_path / "out", plan, options)
    assert digests(out) == expected
    checkpoint = kappaquant.open_checkpoint(out)
    assert checkpoint.bits(Q) == 16
    assert list(checkpoint.verify()) == []


@pytest.mark.parametrize("name", ["model.norm.weight", Q])
def test_what_one_run_let_pass_a_stricter_one_meets_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = tensors()
    if name == Q:
        content[Q] *= 1e7  # finite, but beyond the norms of float16
    else:
        content[name][3] = float("nan")
    source = kappaquant.open_source(write_source(tmp_path / "source", content))
    plan = kappaquant.make_plan(source.tensors, source.config)

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer, "hash_stored", killed)
        with pytest.raises(KeyboardInterrupt):
            kappaquant.quantize(source, tmp_path / "out", plan, kappaquant.Options(allow_nonfinite=True))
    with pytest.raises(kappaquant.NonFiniteError, match=name):
        kappaquant.quantize(source, tmp_path / "out", plan)
    kappaquant.quantize(source, tmp_path / "out", plan, kappaquant.Options(allow_nonfinite=True))
