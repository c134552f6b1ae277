"""A checkpoint to the Hub: checked first, then uploaded by huggingface_hub, which resumes what was cut off."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kappaquant.checkpoints.open import open_checkpoint
from kappaquant.checkpoints.side_files import EVALUATION_NAME, MANIFEST_NAME
from kappaquant.errors import FormatError, PublishError
from kappaquant.evaluate.runs.pair import file_digest
from kappaquant.files.documents import read_json
from kappaquant.publishing.card import CARD_NAME, read_stamp

logger = logging.getLogger("kappaquant")

_IGNORED = (".*", "*/.*", "*.partial")


def push(
    folder: str | Path, repo: str, *, private: bool = False, revision: str | None = None, force: bool = False
) -> str:
    """Upload a checkpoint folder, card included; returns the URL of the commit.

    Where huggingface_hub sends to, and with which token, are its own settings, and so is how much of a file is sent again
    when a call that was cut off is repeated. Weight files there that the folder has not are deleted: a stale
    model.safetensors would be loaded in place of shards.

    Args:
        repo: owner/name; made if it does not exist.
        private: of a new repository; an existing public one is refused.
        revision: branch, made if it does not exist; default main.
        force: log what would have been refused as a warning, and go on.

    Raises:
        PublishError: the checkpoint, its card or what is in the repository speak against it, all reasons named; or the Hub
            refuses or cannot be reached.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PublishError(f"{folder}: no such folder")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise PublishError(f"{repo}: not a Hub id of the form owner/name")
    from huggingface_hub import HfApi

    with _hub_errors(repo):
        api = HfApi()
        target = _look(api, repo, revision)
    if private and target.public:
        raise PublishError(
            f"{repo}: is public, and --private is for new repositories; make it private on the Hub first"
        )
    found = [*checkpoint_problems(folder), *card_problems(folder), *_repository_problems(folder, repo, target)]
    if found and not force:
        raise PublishError(f"{folder}: not uploaded; --force overrides: {'; '.join(found)}")
    for problem in found:
        logger.warning("overridden by --force: %s", problem)
    where: dict[str, Any] = {"repo_id": repo, "revision": revision, "commit_message": "Upload with kappaquant"}
    stale = [name for name in target.weights if not (folder / name).exists()]
    with _hub_errors(repo):
        if not target.exists:
            api.create_repo(repo, private=private)
        if revision and not target.branch:
            api.create_branch(repo, branch=revision)
        if not target.ours and (folder / MANIFEST_NAME).is_file():
            # by it a later call knows the weights that an upload in several commits left when it was cut off
            api.upload_file(path_or_fileobj=folder / MANIFEST_NAME, path_in_repo=MANIFEST_NAME, **where)
        commit = api.upload_folder(folder_path=folder, ignore_patterns=[*_IGNORED], delete_patterns=stale, **where)
    return str(commit.commit_url)


def checkpoint_problems(folder: Path) -> Iterator[str]:
    """What ``verify`` finds wrong."""
    try:
        yield from open_checkpoint(folder).verify()
    except FormatError as problem:
        yield str(problem)


def card_problems(folder: Path) -> Iterator[str]:
    """What is wrong with the card: none of ours, no evaluation, or made from other files than lie here now."""
    card, manifest, report = folder / CARD_NAME, folder / MANIFEST_NAME, folder / EVALUATION_NAME
    stamp = read_stamp(card) if card.is_file() else None
    if stamp is None:
        yield f"{card}: no card of kappaquant's; kappaquant card {folder} writes one"
        return
    if not manifest.is_file() or file_digest(manifest) != stamp.manifest:
        yield f"{card}: is of another checkpoint; kappaquant card {folder} writes it anew"
    if stamp.evaluation is None:
        yield f"{card}: has no evaluation; run kappaquant evaluate, then kappaquant card again"
    elif report.is_file() and file_digest(report) != stamp.evaluation:
        yield f"{card}: was made from another {EVALUATION_NAME} than the one beside it; run kappaquant card again"


@dataclass(frozen=True)
class _Target:
    """The repository as it is.

    Attributes:
        branch: the revision exists; weights: its weight files and their indices; ours: it holds a manifest.
    """

    exists: bool
    public: bool = False
    branch: bool = False
    weights: tuple[str, ...] = ()
    ours: bool = False


def _look(api: Any, repo: str, revision: str | None) -> _Target:
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        public = not api.model_info(repo).private
    except RepositoryNotFoundError:
        return _Target(exists=False)
    try:
        files = api.list_repo_files(repo, revision=revision)
    except RevisionNotFoundError:
        return _Target(exists=True, public=public)
    weights = tuple(f for f in files if "/" not in f and f.endswith((".safetensors", ".safetensors.index.json")))
    return _Target(True, public, True, weights, MANIFEST_NAME in files)


def _repository_problems(folder: Path, repo: str, target: _Target) -> Iterator[str]:
    """The original's repository, or weights of somebody else's making, are not to be replaced."""
    with suppress(FormatError):  # a manifest that cannot be read is among the checkpoint's problems
        source = read_json(folder / MANIFEST_NAME, FormatError).get("source")
        if isinstance(source, dict) and str(source.get("model")).lower() == repo.lower():
            yield f"{repo}: is the original's repository"
    if target.weights and not target.ours:
        yield f"{repo}: holds weights that kappaquant did not write, which would be lost, such as {target.weights[0]}"


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Turns what huggingface_hub raises into a PublishError that names the repository."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except (HTTPError, OSError, RuntimeError, ValueError) as problem:
        said = " ".join(str(problem).split()) or type(problem).__name__
        raise PublishError(
            f"{repo}: from the Hub: {said}; run again to go on, what was sent is not sent twice"
        ) from problem
