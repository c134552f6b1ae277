"""Uploads, against a stub of the Hub's endpoints on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from builders import quantize, write_source
from evaluations import evaluation
from huggingface_hub import constants, hf_api
from typer.testing import CliRunner

from kappaquant.checkpoints.open import open_checkpoint
from kappaquant.cli import app
from kappaquant.errors import PublishError
from kappaquant.evaluate.runs.pair import file_digest
from kappaquant.publishing.card import make_card, write_card
from kappaquant.publishing.push import push

REPO, COMMIT = "owner/small", "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """One account: repositories with branches of whole files, and a store of large objects.

    Attributes:
        branches: branch -> path -> content, of REPO; empty while it does not exist.
        objects: SHA-256 -> content; received: bytes of large objects sent.
        refuse: the next commit of large files is answered with 403.
        bad_metadata: cards are refused; inline: weights too come inside commits.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.branches: dict[str, dict[str, bytes]] = {}
        self.private = False
        self.objects: dict[str, bytes] = {}
        self.received = 0
        self.refuse = False
        self.bad_metadata = False
        self.inline = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *arguments: object) -> None:
        """Quiet."""

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_GET(self) -> None:
        hub, parts = self.server, self.path.split("?")[0].strip("/").split("/")
        if parts[:4] != ["api", "models", *REPO.split("/")] or not hub.branches:
            return self._fail(404, "RepoNotFound")
        branch = parts[5] if len(parts) > 5 else "main"
        if branch not in hub.branches:
            return self._fail(404, "RevisionNotFound")
        files = hub.branches[branch]
        if parts[4:5] == ["tree"]:
            return self._json([{"type": "file", "oid": "0", "size": len(c), "path": p} for p, c in files.items()])
        return self._json(
            {"id": REPO, "modelId": REPO, "sha": COMMIT, "private": hub.private, "siblings": [], "tags": []}
        )

    def do_PUT(self) -> None:
        content = self._body()
        assert hashlib.sha256(content).hexdigest() == self.path.split("/")[-1]
        self.server.objects[self.path.split("/")[-1]] = content
        self.server.received += len(content)
        self._json({})

    def do_POST(self) -> None:
        hub, path, body = self.server, self.path.split("?")[0], self._body()
        if path.endswith("/commit/" + path.split("/")[-1]):
            return self._commit(hub.branches[path.split("/")[-1]], [json.loads(line) for line in body.splitlines()])
        sent = json.loads(body or b"{}")
        if path == "/api/repos/create":
            assert (sent["organization"], sent["name"]) == tuple(REPO.split("/"))
            hub.branches["main"], hub.private = {}, sent.get("visibility") == "private" or bool(sent.get("private"))
            return self._json({"url": f"{hub.url}/{REPO}"})
        if "/branch/" in path:
            hub.branches[path.split("/")[-1]] = dict(hub.branches["main"])
            return self._json({})
        if path == "/api/validate-yaml":
            errors = [{"message": "license is not one"}] if hub.bad_metadata else []
            return self._json({"errors": errors, "warnings": []}, 400 if errors else 200)
        if "/preupload/" in path:
            large = {f["path"] for f in sent["files"] if f["path"].endswith(".safetensors") and not hub.inline}
            modes = {f["path"]: "lfs" if f["path"] in large else "regular" for f in sent["files"]}
            return self._json(
                {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]}
            )
        if path == f"/{REPO}.git/info/lfs/objects/batch":
            return self._json({"transfer": "basic", "objects": [self._object(o) for o in sent["objects"]]})
        return self._fail(404, "EntryNotFound")

    def _object(self, wanted: dict[str, Any]) -> dict[str, Any]:
        known = wanted["oid"] in self.server.objects
        href = f"{self.server.url}/objects/{wanted['oid']}"
        return wanted if known else {**wanted, "actions": {"upload": {"href": href}}}

    def _commit(self, files: dict[str, bytes], lines: list[dict[str, Any]]) -> None:
        if self.server.refuse and any(line["key"] == "lfsFile" for line in lines):
            self.server.refuse = False
            return self._fail(403, "Forbidden")
        for line in lines:
            match line:
                case {"key": "file", "value": {"path": path, "content": content}}:
                    files[path] = base64.b64decode(content)
                case {"key": "lfsFile", "value": {"path": path, "oid": oid}}:
                    files[path] = self.server.objects[oid]
                case {"key": "deletedFile", "value": {"path": path}}:
                    del files[path]
        self._json({"commitUrl": f"{self.server.url}/{REPO}/commit/{COMMIT}", "commitOid": COMMIT})

    def _fail(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _json(self, content: Any, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its protocol is no place for a stub
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", "hf_stub")
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with everything that a push asks for."""
    path = quantize(write_source(tmp_path / "tiny", shards=2), tmp_path / "out").path
    describe(path)
    return path


def describe(path: Path) -> None:
    report = path / "evaluation.json"
    evaluation(manifest=file_digest(path / "kappaquant.json")).save(report)
    write_card(make_card(open_checkpoint(path), report), path / "README.md")


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_new_repository_holds_the_folder(hub: Hub, folder: Path) -> None:
    wanted = content(folder)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "secret").write_text("not for others")
    (folder / "evaluation.json.partial").write_text("half")
    assert push(folder, REPO, private=True) == f"{hub.url}/{REPO}/commit/{COMMIT}"
    assert hub.branches == {"main": wanted}
    assert hub.private


def test_a_push_that_was_cut_off_sends_no_weights_twice(hub: Hub, folder: Path) -> None:
    hub.refuse = True
    with pytest.raises(PublishError, match=r"owner/small: from the Hub: .*403.*run again"):
        push(folder, REPO)
    sent = hub.received
    assert sent == sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    push(folder, REPO)
    assert hub.received == sent
    assert hub.branches["main"] == content(folder)


def test_a_branch_and_stale_weights(hub: Hub, folder: Path, tmp_path: Path) -> None:
    push(folder, REPO, revision="4bit")
    single = quantize(write_source(tmp_path / "other"), tmp_path / "single").path
    describe(single)
    push(single, REPO, revision="4bit")
    assert [f for f in hub.branches["4bit"] if "safetensors" in f] == ["model.safetensors"]
    assert hub.branches["main"] == {}


def test_by_the_clients_pipeline(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.inline = True  # so that nothing goes to Xet's own servers
    hub.branches["main"] = {"kappaquant.json": b"{}", "model.safetensors": b"stale", "notes.txt": b"kept"}
    push(folder, REPO)
    assert hub.branches["main"] == {**content(folder), "notes.txt": b"kept"}


def broken(folder: Path) -> None:
    path, stored = open_checkpoint(folder).entry("lm_head.weight").parts[""]
    with path.open("rb+") as file:
        file.seek(stored.offset)
        file.write(b"\x12\x34")


def unmeasured(folder: Path) -> None:
    (folder / "evaluation.json").unlink()
    write_card(make_card(open_checkpoint(folder)), folder / "README.md")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (broken, r"lm_head\.weight: its bytes in .* do not have the SHA-256 of the manifest"),
        (unmeasured, r"README\.md: has no evaluation"),
        (lambda folder: (folder / "README.md").unlink(), r"README\.md: no card of kappaquant's"),
        (lambda folder: (folder / "README.md").write_text("# Mine\n"), r"README\.md: no card of kappaquant's"),
        (lambda folder: evaluation(mean=0.5).save(folder / "evaluation.json"), r"made from another evaluation\.json"),
        (lambda folder: (folder / "model.safetensors.index.json").unlink(), "the checkpoint is incomplete"),
    ],
)
def test_what_is_refused_and_what_force_names(
    hub: Hub, folder: Path, caplog: pytest.LogCaptureFixture, spoil: Any, message: str
) -> None:
    spoil(folder)
    with pytest.raises(PublishError, match=f"not uploaded; --force overrides: .*{message}"):
        push(folder, REPO)
    assert hub.branches == {}
    with caplog.at_level(logging.WARNING, "kappaquant"):
        push(folder, REPO, force=True)
    assert [r for r in caplog.records if r.message.startswith("overridden by --force: ")]
    assert hub.branches["main"] == content(folder)


def test_a_card_of_another_checkpoint(hub: Hub, folder: Path, tmp_path: Path) -> None:
    other = quantize(tmp_path / "tiny", tmp_path / "other", "recipe").path
    (other / "README.md").write_bytes((folder / "README.md").read_bytes())
    with pytest.raises(PublishError, match="is of another checkpoint"):
        push(other, REPO)


def test_weights_of_others_are_not_replaced(hub: Hub, folder: Path) -> None:
    hub.branches["main"] = {"model.safetensors": b"theirs", "README.md": b"# Theirs"}
    with pytest.raises(
        PublishError, match=r"owner/small: holds weights that kappaquant did not write, .* such as model\."
    ):
        push(folder, REPO)
    assert hub.branches["main"]["model.safetensors"] == b"theirs"


def test_the_originals_repository_is_not_overwritten(hub: Hub, folder: Path) -> None:
    path = folder / "kappaquant.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "source": {"model": "Owner/Small", "revision": COMMIT}})
    )
    describe(folder)
    with pytest.raises(PublishError, match="owner/small: is the original's repository"):
        push(folder, REPO)


def test_private_never_means_public(hub: Hub, folder: Path) -> None:
    hub.branches["main"] = {}
    with pytest.raises(PublishError, match="owner/small: is public"):
        push(folder, REPO, private=True, force=True)
    assert hub.branches["main"] == {}


def test_what_the_hub_says_is_passed_on(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.bad_metadata = True
    with pytest.raises(PublishError, match=r"owner/small: from the Hub: .*license is not one"):
        push(folder, REPO)
    assert not [f for f in hub.branches["main"] if f.endswith(".safetensors")]
    for repo in ("small", "a/b/c", "owner/na me"):
        with pytest.raises(PublishError, match="owner/name"):
            push(folder, repo)
    with pytest.raises(PublishError, match="no such folder"):
        push(folder / "absent", REPO)


def test_the_command(hub: Hub, folder: Path) -> None:
    done = CliRunner().invoke(app, ["push", str(folder), REPO, "--revision", "small"], catch_exceptions=False)
    assert done.exit_code == 0
    assert done.stdout.strip() == f"{hub.url}/{REPO}/commit/{COMMIT}"
    assert hub.branches["small"] == content(folder)
