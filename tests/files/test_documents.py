"""JSON documents: what is wrong is named, what is written is whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kappaquant.errors import FormatError, OutputError
from kappaquant.files.documents import check_file, digest, json_text, read_json, write_json, write_whole


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "a JSON list where an object belongs"),
    ],
)
def test_what_cannot_be_read_is_named(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "about.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(FormatError, match=rf"about\.json: {message}"):
        read_json(path, FormatError)


def test_a_round_trip(tmp_path: Path) -> None:
    content = {"b": [1, 2.5, None], "a": "κ"}
    write_json(tmp_path / "about.json", content)
    assert read_json(tmp_path / "about.json", FormatError) == content
    assert (tmp_path / "about.json").read_text(encoding="utf-8") == json_text(content)
    assert "κ" in json_text(content)


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    write_whole(tmp_path / "out", b"whole")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(OutputError, match="out: cannot be written"):
        write_whole(tmp_path / "absent" / "out", b"")


def test_digests_tell_order_and_content_apart() -> None:
    assert digest([1], {"a": 2}) == digest([1], {"a": 2})
    assert len({digest(1, 2), digest(2, 1), digest([1, 2]), digest("1", 2)}) == 4


def test_links_pipes_and_folders_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "true.json").write_text("{}")
    (tmp_path / "link").symlink_to("true.json")
    (tmp_path / "nowhere").symlink_to("gone.json")
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        ("link", "is a link, which would be replaced; name the file itself, true.json"),
        ("nowhere", "is a link, which would be replaced; name the file itself, gone.json"),
        ("pipe", "is a pipe or a device, which would be replaced"), (".", "is a folder; name a file"),
        ("absent/e.json", "absent is no folder; create it first"),
    ):  # fmt: skip
        with pytest.raises(OutputError, match=message):
            check_file(tmp_path / name)
    check_file(tmp_path / "true.json")
    check_file(tmp_path / "new.json")
