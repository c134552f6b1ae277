"""What was computed of each sequence, kept on disk: a run that was cut off goes on, and an original is read once."""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kappaquant.errors import FormatError, OutputError
from kappaquant.files.documents import write_whole

_ABOUT = "about.json"


class Kept:
    """A folder of tensors by sequence, bound to what they were computed of.

    Args:
        folder: made if it is not there.
        about: what must be the same for the content to be of use, by name.
        notes: what is only recorded, by the run that began the folder.

    Raises:
        FormatError: the folder holds what was computed of something else; the first difference is named.
        OutputError: it cannot be made.
    """

    def __init__(self, folder: Path, about: Mapping[str, str | int | None], notes: Mapping[str, str]) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise OutputError(f"{folder}: cannot be made ({problem.strerror})") from None
        path = folder / _ABOUT
        if not path.exists():
            text = json.dumps({"about": dict(about), "notes": dict(notes)}, indent=1, ensure_ascii=False)
            write_whole(path, f"{text}\n".encode())
        self.notes = self._check(path, about)

    def _check(self, path: Path, about: Mapping[str, str | int | None]) -> dict[str, str]:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            there, notes = dict(content["about"]), dict(content["notes"])
        except (OSError, ValueError, KeyError, TypeError):
            raise FormatError(f"{path}: cannot be read; delete {self.folder} to compute it again") from None
        for key in [*about, *there]:
            if there.get(key) != about.get(key):
                raise FormatError(
                    f"{self.folder}: was computed of {notes.get('source')} on {notes.get('text')} with {key} "
                    f"{there.get(key)!r}, asked for is {about.get(key)!r}; give another folder with --logits, or delete this one"
                )
        return notes

    def has(self, index: int) -> bool:
        return self._path(index).exists()

    def lacks(self, count: int) -> bool:
        """Whether anything of so many sequences is still to be computed."""
        return not all(map(self.has, range(count)))

    def write(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        packed = io.BytesIO()
        arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
        np.savez_compressed(packed, **arrays)  # type: ignore[arg-type]
        write_whole(self._path(index), packed.getvalue())

    def read(self, index: int) -> dict[str, Tensor]:
        """Every tensor of one sequence."""
        return {name: torch.from_numpy(values) for name, values in self._load(index).items()}

    def column(self, name: str, count: int) -> list[np.ndarray]:
        """One tensor of each of the first ``count`` sequences."""
        return [self._load(index, name)[name] for index in range(count)]

    def _load(self, index: int, *names: str) -> dict[str, np.ndarray]:
        path = self._path(index)
        try:
            with np.load(path) as content:
                return {name: content[name] for name in names or content.files}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as problem:
            raise FormatError(f"{path}: cannot be read ({problem}); delete it and run again") from None

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:06}.npz"
