"""A new export target, NumPy files, from this file alone: it is in ``export --to``, resumable and atomic through the one writer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import EXPERTS, Q, tensors, write_source
from typer.testing import CliRunner

import kappaquant
from kappaquant import cli
from kappaquant.checkpoints.writer import Progress, Writer
from kappaquant.errors import RegistrationError
from kappaquant.exports import targets
from kappaquant.exports.weights import Weights
from kappaquant.files.documents import digest
from kappaquant.planning.plan import Plan


class Arrays(targets.Target):
    """One .npz of every packed tensor, as it decodes."""

    name = "arrays"
    help = "one file of NumPy arrays"
    options = ("dtype",)

    def write(
        self, weights: Weights, output: Path, plan: Plan, options: Mapping[str, Any], progress: Progress
    ) -> dict[str, Any]:
        dtype = np.dtype(options.get("dtype", "F32").lower().replace("f", "float"))
        identity = digest(weights.identity(), plan.record(), str(dtype))
        with Writer[None](
            output, identity, inside=weights.folder, stage="export", total=len(weights.tensors), progress=progress
        ) as writer:
            if not writer.finished:
                found = {}
                for shard in sorted(set(weights.shard_of.values())):
                    for name, entry in weights.read_entries(shard).items():
                        if plan.format_of(name):
                            found[name] = entry.read().float().numpy().astype(dtype)
                    weights.release(shard)
                np.savez(writer.folder / "arrays.npz", **found)
                writer.finish({"about.json": {"model": weights.name}}, {})
            writer.name()
        size = (output / "arrays.npz").stat().st_size
        count = sum(weights.tensors[n].numel for n in weights.tensors if plan.format_of(n))
        return {"bytes": size, "bits_per_weight": 8 * size / count}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    targets.register(Arrays())
    yield
    targets.unregister("arrays")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source", shards=2)


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(cli.build(), [str(argument) for argument in arguments])
    return done.exit_code, done.output + (str(done.exception) if done.exception else "")


def test_a_source_and_a_checkpoint_alike(source: Path, tmp_path: Path) -> None:
    code, text = run("export", source, "--to", "arrays", "-o", tmp_path / "arrays", "--policy", "uniform")
    assert code == 0, text
    with np.load(tmp_path / "arrays" / "arrays.npz") as found:
        assert np.array_equal(found[Q], tensors()[Q].float().numpy())
        assert found[EXPERTS].shape == tuple(tensors()[EXPERTS].shape)
    run("quantize", source, "-o", tmp_path / "out", "--policy", "uniform", "--bits", 4)
    code, text = run("export", tmp_path / "out", "--to", "arrays", "-o", tmp_path / "again", "--dtype", "F16")
    assert code == 0, text
    checkpoint = kappaquant.open_checkpoint(tmp_path / "out")
    with np.load(tmp_path / "again" / "arrays.npz") as found:
        assert np.array_equal(found[Q], checkpoint.dequantize(Q).numpy().astype(np.float16))
    assert (tmp_path / "again" / "about.json").read_text() == '{\n "model": "out"\n}\n'


def test_what_is_refused(source: Path, tmp_path: Path) -> None:
    code, text = run("export", source, "--to", "arrays", "-o", tmp_path / "out", "--no-rotate")
    assert code == 1
    assert "option 'rotate': the arrays export has no such option; it has dtype" in text
    code, text = run("export", source, "--to", "gguf", "-o", tmp_path / "out")
    assert "--to 'gguf': must be one of mlx, arrays" in text
    code, text = run("export", source, "--to", "arrays", "-o", source / "out")
    assert f"lies in {source}, which is read" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
    with pytest.raises(RegistrationError, match="export target 'mlx' is taken by Mlx"):
        targets.register(type("Other", (Arrays,), {"name": "mlx"})())
