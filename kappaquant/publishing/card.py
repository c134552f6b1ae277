"""The model card: README.md with Hugging Face metadata, from the manifest and the evaluation; nothing that was not measured."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kappaquant.checkpoints.checkpoint import Checkpoint
from kappaquant.checkpoints.side_files import CARD_MARK, MANIFEST_NAME
from kappaquant.errors import FormatError, OutputError
from kappaquant.evaluate.documents.evaluation import Evaluation
from kappaquant.evaluate.runs.pair import file_digest
from kappaquant.files.documents import check_file, read_json, write_whole
from kappaquant.publishing.card_text import Facts, credit, head, measured, recipe, reproduction, usage

CARD_NAME = "README.md"
# as true of a copy as of the original
_CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")
_STAMP = re.compile(
    rf"\n{CARD_MARK} manifest ([0-9a-f]{{64}}), evaluation ([0-9a-f]{{64}}|none), text ([0-9a-f]{{64}}) -->\n*\Z"
)


@dataclass(frozen=True)
class Card:
    """A card's text, and what could not be said in it, in words."""

    text: str
    notices: tuple[str, ...]


@dataclass(frozen=True)
class Stamp:
    """The last line of a card, by which it is known.

    Attributes:
        manifest, evaluation: SHA-256 of the files it was made from; evaluation is None if there was none.
        edited: somebody changed the card since.
    """

    manifest: str
    evaluation: str | None
    edited: bool


def read_stamp(path: Path) -> Stamp | None:
    """The stamp of a card, or None for a file that ``make_card`` did not make."""
    text = path.read_text(encoding="utf-8", errors="replace")
    found = _STAMP.search(text)
    if found is None:
        return None
    manifest, evaluation, digest = found.groups()
    return Stamp(manifest, None if evaluation == "none" else evaluation, _digest(text[: found.start()]) != digest)


def make_card(
    checkpoint: Checkpoint,
    report: Path | None = None,
    *,
    base_model: str | None = None,
    source_license: str | None = None,
    quantized_by: str | None = None,
    repo: str | None = None,
) -> Card:
    """The card of a checkpoint.

    Args:
        report: its evaluation, as ``kappaquant evaluate`` wrote it.
        base_model: Hub id of the original, where it was quantized from a local folder.
        source_license: identifier of the Hub, such as "apache-2.0"; by default what the README.md beside the weights says,
            which ``quantize`` copied from the original.
        repo: Hub id it will have, for the lines that load it.

    Raises:
        FormatError: a tq3_native checkpoint, which has no manifest; a malformed report, or that of another checkpoint.
    """
    if not checkpoint.container.hashed:
        raise FormatError(
            f"{checkpoint.path}: a {checkpoint.container.id} checkpoint has no {MANIFEST_NAME}, from which cards are made; "
            "quantize with --format kappaquant"
        )
    manifest_path = checkpoint.path / MANIFEST_NAME
    manifest, digest = _manifest(manifest_path), file_digest(manifest_path)
    evaluation = Evaluation.load(report) if report else None
    if evaluation and evaluation.checkpoint.manifest_sha256 != digest:
        raise FormatError(
            f"{report}: measured {evaluation.checkpoint.path}, whose {MANIFEST_NAME} is not that of {checkpoint.path}; "
            "evaluate this checkpoint"
        )
    source = manifest["source"]
    facts = Facts(
        checkpoint, manifest, evaluation, base_model or (source["model"] if source["revision"] else None), repo
    )
    carried = _carried(checkpoint.path / CARD_NAME)
    if source_license:
        carried = {k: v for k, v in carried.items() if not k.startswith("license")} | {"license": source_license}
    parts = [
        _metadata(facts.base, carried, quantized_by),
        *(section(facts) for section in (head, recipe, measured, usage, reproduction, credit)),
    ]
    text = "\n\n".join(part.strip("\n") for part in parts) + "\n"
    stamp = f"manifest {digest}, evaluation {file_digest(report) if report else 'none'}, text {_digest(text)}"
    notices = []
    if not facts.base:
        notices.append("no base_model: the original was a local folder; --base-model owner/name says which model it is")
    if not carried.get("license"):
        notices.append("no license: no card of the original says one; --source-license gives its Hub identifier")
    if not evaluation:
        notices.append(f"no evaluation: kappaquant evaluate {checkpoint.path} --against ORIGINAL measures it")
    return Card(f"{text}\n{CARD_MARK} {stamp} -->\n", tuple(notices))


def write_card(card: Card, path: Path, *, force: bool = False) -> None:
    """Write the card, whole or not at all.

    Raises:
        OutputError: there is a file that ``make_card`` did not make, or that was edited since; ``force`` replaces it.
    """
    check_file(path)
    if path.exists() and not force:
        stamp = read_stamp(path)
        if stamp is None or stamp.edited:
            kind = (
                "was edited since kappaquant card wrote it"
                if stamp
                else "no card of kappaquant's (quantize copies the original's)"
            )
            raise OutputError(f"{path}: {kind}; --force replaces it, -o writes elsewhere")
    write_whole(path, card.text.encode())


def _manifest(path: Path) -> dict[str, Any]:
    manifest = read_json(path, FormatError)
    match manifest:
        case {
            "kappaquant_version": str(),
            "source": {"model": str(), "revision": str() | None},
            "effort": str(),
            "plan": {"policy": str(), "inputs": {}, "group_size": int() | "auto"},
        }:
            match manifest.get("calibration"):
                case None | {"tokens": int(), "tokens_sha256": str(), "file": str()}:
                    return manifest
                case {"tokens": int(), "tokens_sha256": str(), "written_by": {"model": str()}}:
                    return manifest
            raise FormatError(
                f"{path}: its calibration lacks tokens, tokens_sha256, or the file or model that they are from, which a card tells"
            )
    raise FormatError(f"{path}: lacks what a card is made from: kappaquant_version, source, effort or plan")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _carried(path: Path) -> dict[str, Any]:
    """What the metadata of the original's card, or of our own, says of licence, language and task."""
    if not path.is_file():
        return {}
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        found = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, TypeError, YAMLError) as problem:
        raise FormatError(f"{path}: its metadata cannot be read ({problem}); correct or remove it") from None
    return {key: found[key] for key in _CARRIED if found.get(key)}


def _metadata(base: str | None, carried: dict[str, Any], quantized_by: str | None) -> str:
    """The YAML block, through huggingface_hub's own class."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=base,
        base_model_relation="quantized" if base else None,
        library_name="kappaquant",
        tags=["kappaquant", "quantized", "mixed-precision"],
        quantized_by=quantized_by,
        **carried,
    )
    return f"---\n{data.to_yaml()}\n---"
