"""Where a model lies: in a folder, or on the Hub as ``owner/name`` or ``owner/name@revision``. The same for sources and checkpoints."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from kappaquant.errors import KappaquantError, SourceError

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Location:
    """A model's place; a folder of the Hub's cache is both.

    Attributes:
        folder: where it lies here, None where only the Hub has it.
        repo: Hub id, None for a folder of the user's.
        revision: on the Hub: of a cached folder its commit, else the branch, tag or commit that is asked for, None for the default.
    """

    folder: Path | None
    repo: str | None
    revision: str | None


def locate(location: str | Path, revision: str | None = None, error: type[KappaquantError] = SourceError) -> Location:
    """What a folder or Hub id given by the user means; nothing is fetched.

    Args:
        revision: on the Hub; the same as ``@revision``.

    Raises:
        KappaquantError: as ``error``: it is neither, or the revision is that of a folder or given twice.
    """
    folder = Path(location)
    if folder.is_dir():
        if revision is not None:
            raise error(f"{folder}: --revision {revision} applies to a Hub id, not to a local folder")
        repo, commit = cached(folder) or (None, None)
        return Location(folder, repo, commit)
    if folder.exists():
        raise error(f"{folder}: is a file; give the folder that holds config.json and the safetensors shards")
    match = _HUB_ID.fullmatch(str(location))
    if match is None:
        raise error(f"{location}: no such folder, and not a Hub id of the form owner/name or owner/name@revision")
    if match[2] and revision not in (None, match[2]):
        raise error(f"{location}: names the revision {match[2]}, --revision {revision}; give one of them")
    return Location(None, match[1], match[2] or revision)


def is_hub_id(location: str | Path) -> bool:
    """Whether this names a repository of the Hub, and nothing that is here."""
    return not Path(location).exists() and _HUB_ID.fullmatch(str(location)) is not None


def cached(folder: Path) -> tuple[str, str] | None:
    """Hub id and commit of a snapshot in the Hub's cache, ``models--owner--name/snapshots/COMMIT``; None for another folder."""
    *_, repo, snapshots, commit = ("", "", *folder.resolve().parts)
    match = _CACHED.fullmatch(repo)
    if match is None or snapshots != "snapshots" or not _COMMIT.fullmatch(commit):
        return None
    return f"{match[1]}/{match[2]}", commit


def local_folder(location: str | Path, revision: str | None = None, error: type[KappaquantError] = SourceError) -> Path:
    """The folder itself, or the whole snapshot of a Hub repository in the cache, fetched if need be.

    Raises:
        KappaquantError: as ``error``: there is none.
    """
    place = locate(location, revision, error)
    if place.folder is not None:
        return place.folder
    from kappaquant.sources.hub import snapshot

    assert place.repo is not None
    return snapshot(place.repo, place.revision, error=error)


def local_file(location: str | Path, name: str, error: type[KappaquantError] = SourceError) -> Path:
    """One file of a folder or Hub repository, of which no other file is fetched. It need not exist in a folder."""
    place = locate(location, None, error)
    if place.folder is not None:
        return place.folder / name
    from kappaquant.sources.hub import snapshot

    assert place.repo is not None
    return snapshot(place.repo, place.revision, only=(name,), error=error) / name
