"""Sources on the Hub, against a stub of its endpoints on this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from builders import digests, quantize, tensors, write_source
from encoded_sources import KINDS, encoded
from huggingface_hub import constants, hf_api
from safetensors.torch import load_file, save_file

import kappaquant
from kappaquant.checkpoints.open import open_weights
from kappaquant.quantizing.calibration.text import Calibration
from kappaquant.sources.hub import HubSource
from kappaquant.sources.location import local_file

REPO, COMMIT = "owner/tiny", "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves one repository at one commit, and remembers what was asked of it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.sent: dict[str, int] = {}
        self.revisions: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *arguments: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:4] == ["api", "models", *REPO.split("/")]:
            revision = parts[5] if len(parts) > 5 else "main"
            if revision not in ("main", COMMIT):
                return self._fail("RevisionNotFound")
            if parts[4:5] == ["tree"]:
                return self._json([{"type": "file", "oid": "0", "size": (self.server.folder / f).stat().st_size, "path": f}
                                   for f in self._files()])  # fmt: skip
            siblings = [{"rfilename": f, "size": (self.server.folder / f).stat().st_size} for f in self._files()]
            return self._json({"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": siblings, "tags": []})
        if "/".join(parts[:2]) == REPO and parts[2:3] == ["resolve"]:
            self.server.revisions.add(parts[3])
            return self._file("/".join(parts[4:]))
        return self._fail("RepoNotFound")

    def _files(self) -> list[str]:
        return sorted(str(p.relative_to(self.server.folder)) for p in self.server.folder.rglob("*") if p.is_file())

    def _fail(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _json(self, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def _file(self, name: str) -> None:
        path = self.server.folder / name
        if not path.is_file():
            return self._fail("EntryNotFound")
        data, status = path.read_bytes(), 200
        size = len(data)
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if "Range" in self.headers:
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            data, status = data[int(first) : int(last) + 1 if last else None], 206
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(data) - 1}/{size}"
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.server.sent[name] = self.server.sent.get(name, 0) + len(data)
            self.wfile.write(data)


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], Hub]]:
    """What serves a folder as the repository, until the test ends."""
    running = []

    def start(folder: Path) -> Hub:
        server = Hub(folder)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        running.append((server, thread))
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        return server

    yield start
    for server, thread in running:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def hub(tmp_path: Path, serve: Callable[[Path], Hub]) -> Hub:
    large = {"model.layers.5.self_attn.q_proj.weight": torch.ones(1024, 512, dtype=torch.bfloat16)}
    return serve(write_source(tmp_path / "tiny", tensors() | large, shards=3))


def test_a_plan_fetches_headers_only(hub: Hub) -> None:
    source = kappaquant.open_source(REPO, stream=True)
    local = kappaquant.open_source(hub.folder)
    assert source.tensors == local.tensors
    assert source.revision == COMMIT
    assert kappaquant.make_plan(source.tensors, source.config).bits("lm_head.weight") == 16
    assert max((hub.folder / shard).stat().st_size for shard in source.shards) > 1_000_000
    for shard in source.shards:  # the client asks for 100 kB to find a header; the rest is never sent
        assert hub.sent[shard] <= 100_001
    assert hub.revisions == {COMMIT}


def test_stream_keeps_one_shard_on_disk(hub: Hub, tmp_path: Path) -> None:
    source = kappaquant.open_source(REPO, stream=True)
    plan = kappaquant.make_plan(source.tensors, source.config)
    most = 0

    def watch(stage: str, done: int, total: int) -> None:
        nonlocal most
        most = max(most, len(list(Path(source.scratch.name).glob("*.safetensors"))))  # type: ignore[attr-defined]

    out = kappaquant.quantize(source, tmp_path / "out", plan, progress=watch)
    assert most == 1
    assert not list(Path(source.scratch.name).glob("*.safetensors"))  # type: ignore[attr-defined]
    streamed, local = digests(out), digests(quantize(hub.folder, tmp_path / "local").path)
    manifests = [json.loads((tmp_path / d / "kappaquant.json").read_text()) for d in ("out", "local")]
    assert manifests[0].pop("source") == {"model": REPO, "revision": COMMIT}
    assert manifests[1].pop("source") == {"model": "tiny", "revision": None}
    assert manifests[0] == manifests[1]
    del streamed["kappaquant.json"], local["kappaquant.json"]
    assert streamed == local


def test_stream_lets_go_of_shards_whose_layers_are_rounded(tmp_path: Path, serve: Callable[[Path], Hub]) -> None:
    """Every shard is fetched once and left behind by the layers; the bytes are those of a local folder."""
    folder = tiny_models.save_tiny("llama", tmp_path / "tiny")
    split_by_layer(folder)
    hub = serve(folder)
    windows = torch.randint(3, 90, (4, 32), generator=torch.Generator().manual_seed(0))
    calibration = Calibration(windows, {"file": "text.txt", "tokens": 128, "window": 32, "tokens_sha256": "a"})
    source = kappaquant.open_source(REPO, stream=True)
    plan = kappaquant.make_plan(source.tensors, source.config, "uniform", bits=3, group_size=32)
    seen: list[set[str]] = []

    def watch(stage: str, done: int, total: int) -> None:
        seen.append({path.name for path in Path(source.scratch.name).glob("*.safetensors")})  # type: ignore[attr-defined]

    out = kappaquant.quantize(source, tmp_path / "out", plan, progress=watch, calibration=calibration)
    first, second, rest = sorted(source.shards)
    assert {first, rest} in seen  # the embedding is in the last, which waits for the end
    assert {second, rest} in seen
    assert not any({first, second} <= shards for shards in seen)
    for shard in source.shards:  # once, and once when the repository was opened, for its header and as much as 100 kB
        size = (folder / shard).stat().st_size
        assert hub.sent[shard] <= 2 * size
    local = kappaquant.open_source(folder)
    other = kappaquant.quantize(local, tmp_path / "local", plan, calibration=calibration)
    streamed, expected = digests(out), digests(other)
    del streamed["kappaquant.json"], expected["kappaquant.json"]
    assert streamed == expected


def split_by_layer(folder: Path) -> None:
    """The one shard of a model as three: its two layers, and what is in none."""
    state = load_file(folder / "model.safetensors")
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        number = 3 if ".layers." not in name else 1 + int(name.split(".layers.")[1].split(".")[0])
        shards.setdefault(f"model-{number:05}-of-00003.safetensors", {})[name] = tensor
    for file, tensors_of in shards.items():
        save_file(tensors_of, folder / file, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    weight_map = {name: file for file, tensors_of in shards.items() for name in tensors_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_stream_of_weights_whose_scales_are_in_other_shards(tmp_path: Path, serve: Callable[[Path], Hub]) -> None:
    """A shard stays until the weights that its scales are of are read too; nothing is fetched twice."""
    kind = KINDS["fp8 blocks"]
    stored, _ = encoded({n: t for n, t in tensors().items() if t.numel()}, kind, lambda name: "_proj" in name)
    folder = write_source(tmp_path / "tiny", stored, 4, {"model_type": "llama", "quantization_config": kind.config})
    hub = serve(folder)
    source = kappaquant.open_source(REPO, stream=True)
    assert source.stored_as == kind.label
    before = dict(hub.sent)
    plan = kappaquant.make_plan(source.tensors, source.config, "uniform", bits=3)
    out = kappaquant.quantize(source, tmp_path / "out", plan)
    assert {shard: hub.sent[shard] - before[shard] for shard in source.headers} == {
        shard: (folder / shard).stat().st_size for shard in source.headers
    }
    assert not list(Path(source.scratch.name).glob("*.safetensors"))  # type: ignore[attr-defined]
    local = kappaquant.open_source(folder)
    streamed, expected = digests(out), digests(kappaquant.quantize(local, tmp_path / "local", plan))
    del streamed["kappaquant.json"], expected["kappaquant.json"]
    assert streamed == expected


def test_a_checkpoint_is_fetched_whole_and_its_evaluation_alone(tmp_path: Path, serve: Callable[[Path], Hub]) -> None:
    folder = quantize(write_source(tmp_path / "source"), tmp_path / "packed").path
    (folder / "evaluation.json").write_text("{}")
    hub = serve(folder)
    assert local_file(f"{REPO}@main", "evaluation.json").read_text() == "{}"
    assert set(hub.sent) == {"evaluation.json"}
    assert type(open_weights(REPO, stream=True)) is kappaquant.Checkpoint
    opened = kappaquant.open_checkpoint(f"{REPO}@main")
    assert (opened.name, opened.revision) == (REPO, COMMIT)
    assert list(opened.verify()) == []
    with pytest.raises(kappaquant.FormatError, match="owner/absent: no such folder here, and from the Hub"):
        kappaquant.open_checkpoint("owner/absent")


def test_a_source_is_told_from_a_checkpoint_by_its_config(hub: Hub) -> None:
    opened = open_weights(REPO, "main", stream=True)
    assert isinstance(opened, HubSource)
    assert opened.revision == COMMIT
    assert not any(size > 100_001 for name, size in hub.sent.items() if name.endswith(".safetensors"))


def test_without_stream_the_snapshot_is_used(hub: Hub, tmp_path: Path) -> None:
    (hub.folder / "pytorch_model.bin").write_bytes(b"never fetched")
    source = kappaquant.open_source(REPO, "main")
    assert source.revision == COMMIT
    out = kappaquant.quantize(source, tmp_path / "out", kappaquant.make_plan(source.tensors, source.config))
    assert list(kappaquant.open_checkpoint(out).verify()) == []
    assert "pytorch_model.bin" not in hub.sent
    assert (out / "extra" / "LICENSE").exists()


@pytest.mark.parametrize("stream", [True, False])
def test_what_is_not_there(hub: Hub, stream: bool) -> None:
    with pytest.raises(kappaquant.SourceError, match="owner/absent: no such folder here, and from the Hub"):
        kappaquant.open_source("owner/absent", stream=stream)
    with pytest.raises(kappaquant.SourceError, match=f"{REPO}: .*Hub"):
        kappaquant.open_source(REPO, "no-such-branch", stream=stream)


def test_a_missing_shard_is_found_before_any_download(hub: Hub) -> None:
    (hub.folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(kappaquant.SourceError, match=r"owner/tiny/model-00002-of-00003\.safetensors: named by"):
        kappaquant.open_source(REPO, stream=True)


@pytest.mark.parametrize("location", ["no/such/folder", "absent", "a/../b", "owner/name/"])
def test_neither_folder_nor_hub_id(location: str) -> None:
    with pytest.raises(kappaquant.SourceError, match="no such folder, and not a Hub id"):
        kappaquant.open_source(location)
