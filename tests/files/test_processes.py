"""Work in several processes: a failure waits for what still runs, and a lost worker is named as such."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kappaquant.errors import NonFiniteError, PlanError, UnsupportedError, WorkerError
from kappaquant.files import processes as workers_module
from kappaquant.files.processes import ItemError, choose_device, choose_jobs, each, in_order, pool


def write_late_or_fail(path: Path) -> str:
    if path.name == "fails":
        while not (path.parent / "started").exists():
            time.sleep(0.005)
        raise NonFiniteError("bad")
    (path.parent / "started").touch()
    time.sleep(0.5)
    path.write_text("late")
    return path.name


def kill_yourself(number: int) -> int:
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_after_a_failure_nothing_writes_any_more(tmp_path: Path) -> None:
    items = [tmp_path / "slow", tmp_path / "fails", *(tmp_path / f"later{i}" for i in range(20))]
    with pool(2) as workers:
        with pytest.raises(ItemError) as failure:
            list(each(write_late_or_fail, items, workers))
        assert failure.value.item == tmp_path / "fails"
        written = sorted(os.listdir(tmp_path))
        assert "slow" in written
        time.sleep(1.2)
        assert sorted(os.listdir(tmp_path)) == written
    assert len(written) < 10, "what had not begun was cancelled"


def test_a_killed_worker_is_a_typed_error() -> None:
    with pool(2) as workers, pytest.raises(WorkerError, match="fewer --jobs"):
        list(each(kill_yourself, range(4), workers))


SCRIPT = """
import sys
from pathlib import Path
import kappaquant
Path(sys.argv[2]).mkdir()  # would fail a second time
source = kappaquant.open_source(sys.argv[1])
plan = kappaquant.make_plan(source.tensors, source.config, bits=4)
kappaquant.quantize(source, Path(sys.argv[2]) / "out", plan, kappaquant.Options(jobs=2))
"""


@pytest.mark.parametrize("read", ["from a file", "from stdin"])
def test_workers_do_not_run_the_script_that_has_no_guard_again(read: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-" if read == "from stdin" else tmp_path / "script.py", source, tmp_path / "made"]
    done = subprocess.run(command, input=SCRIPT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "made" / "out" / "kappaquant.json").is_file()


def doubled(x: torch.Tensor) -> torch.Tensor:
    if x.isnan():
        raise NonFiniteError("x: holds NaN")
    assert not x.is_shared()
    time.sleep(0.2 if x == 0 else 0)  # the first is the last that is done
    return 2 * x


@pytest.mark.parametrize("jobs", [1, 2])
def test_results_in_the_items_order_of_which_few_are_made_ahead(jobs: int) -> None:
    made: list[int] = []

    def items() -> Iterator[torch.Tensor]:
        for number in range(6):
            made.append(number)
            yield torch.tensor(float(number))

    with pool(jobs) as workers:
        for number, found in enumerate(in_order(doubled, items(), workers, 3)):
            assert float(found) == 2 * number
            assert not found.is_shared()  # a container's shared memory may be small
            assert len(made) <= number + 3
        assert made == [*range(6)]
        with pytest.raises(NonFiniteError, match="x: holds NaN"):
            list(in_order(doubled, [torch.tensor(1.0), torch.tensor(torch.nan)], workers, 3))


def test_a_killed_worker_ends_results_in_order() -> None:
    with pool(2) as workers, pytest.raises(WorkerError, match="run again with fewer --jobs"):
        list(in_order(os._exit, [1], workers, 3))


@pytest.mark.parametrize("jobs", [0, -1])
def test_fewer_jobs_than_one(jobs: int) -> None:
    with pytest.raises(PlanError, match=f"jobs = {jobs}: must be at least 1"):
        choose_jobs(jobs, 10**12)


def test_small_work_starts_no_processes() -> None:
    assert choose_jobs(None, 1000) == 1
    assert 1 <= choose_jobs(None, 10**12) <= 8
    assert choose_jobs(3, 1000) == 3


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "meta", ""])
def test_a_device_that_is_not_there(device: str) -> None:
    with pytest.raises(UnsupportedError, match=f"device '{device}'.*cpu, cuda"):
        choose_device(device)


def test_workers_are_prepared_only_where_they_will_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[bool] = []
    monkeypatch.setattr(workers_module, "_serve", lambda: started.append(True))
    monkeypatch.setattr(workers_module.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    with (tmp_path / "model.safetensors").open("wb") as shard:
        shard.truncate(255_000_000)
    for source, jobs, expected in (
        (tmp_path, None, 0),
        (tmp_path, 2, 1),
        ("someone/model", 1, 0),
        ("someone/model", None, 1),
    ):
        started.clear()
        workers_module.warm_up(source, jobs)
        assert len(started) == expected, (source, jobs)
    with (tmp_path / "model-2.safetensors").open("wb") as shard:
        shard.truncate(255_000_000)
    started.clear()
    workers_module.warm_up(tmp_path, None)
    assert started
