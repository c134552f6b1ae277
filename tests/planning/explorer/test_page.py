"""The page as a file: one text that loads nothing, the same for the same input, whatever names it holds."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import tomllib
from html.parser import HTMLParser
from typing import Any

import pytest
from headers import infos
from paths import ROOT
from planned import QWEN, TENSORS
from synthetic_evidence import evidence

from kappaquant.planning.explorer.contents import Contents
from kappaquant.planning.explorer.page import page
from kappaquant.planning.make import make_plan

FOLDER = ROOT / "kappaquant" / "planning" / "explorer"
NASTY = '</script><script>alert("1")</script><!-- \u2028 & \' ü 専'


def made(model: str = "someone/model", tensors: Any = TENSORS, **options: Any) -> str:
    plan = make_plan(tensors, QWEN, "uniform", group_size=128)
    return page(plan, tensors, QWEN, evidence(tensors, QWEN, model=model, group_size=128), **options)


class Elements(HTMLParser):
    """Tags with their attributes, and the text of each script and style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.inside = ""
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {"script": [], "style": [], "title": []}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in self.texts:
            self.texts[tag].append("")

        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside in self.texts:
            self.texts[self.inside][-1] += data


def test_it_loads_nothing() -> None:
    text = made()
    found = Elements(text)
    assert set(re.findall(r"\w+://[\w./]*", text)) <= {"http://www.w3.org/2000/svg"}
    assert not [tag for tag, given in found.tags if {"src", "srcset", "data", "action"} & given.keys()]
    assert not [given["href"] for _, given in found.tags if "href" in given]
    assert not {"link", "iframe", "object", "embed", "base", "img"} & {tag for tag, _ in found.tags}
    style = "".join(found.texts["style"])
    assert "url(" not in style
    assert "@import" not in style
    assert not re.search(r"\b(fetch|XMLHttpRequest|WebSocket|EventSource|import)\s*\(", text)
    assert not re.search(r"\b(eval|innerHTML|outerHTML|insertAdjacentHTML|document\.write)\b", text)


def test_only_its_own_script_and_style_may_run() -> None:
    found = Elements(made())
    policy = next(str(given["content"]) for tag, given in found.tags if given.get("http-equiv"))
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    for kind, own in (("script", found.texts["script"][1]), ("style", found.texts["style"][0])):
        digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert not [given for _, given in found.tags if any(name.startswith("on") or name == "style" for name in given)]


def test_the_same_input_gives_the_same_page() -> None:
    assert made() == made()


def test_it_embeds_its_contents() -> None:
    plan = make_plan(TENSORS, QWEN, "uniform", group_size=128)
    known = evidence(TENSORS, QWEN, group_size=128)
    embedded = json.loads(Elements(page(plan, TENSORS, QWEN, known, source="here", headers=7)).texts["script"][0])
    assert embedded.pop("source") == "here"
    assert embedded.pop("headers") == 7
    assert embedded.pop("command").startswith("kappaquant plan")
    assert embedded == json.loads(json.dumps(Contents(plan, TENSORS, QWEN, known).gathered()))


@pytest.mark.parametrize("where", ["model", "tensor", "command"])
def test_names_cannot_break_out(where: str) -> None:
    tensors = dict(TENSORS)
    if where == "tensor":
        tensors |= infos({f"model.language_model.layers.0.{NASTY}": (256, 256)})
    options = {"command": NASTY} if where == "command" else {}
    found = Elements(made(NASTY if where == "model" else "plain", tensors, **options))
    assert [tag for tag, _ in found.tags].count("script") == 2
    embedded = json.loads(found.texts["script"][0])
    if where == "model":
        assert embedded["model"] == NASTY
        assert found.texts["title"] == [f"{NASTY}: bits by sensitivity"]
    elif where == "tensor":
        assert f"model.language_model.layers.0.{NASTY}" in embedded["names"]
    else:
        assert embedded["command"] == NASTY


def test_every_part_is_package_data_and_used() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["kappaquant"]
    parts = [path for path in FOLDER.iterdir() if path.suffix in (".html", ".css", ".js")]
    assert len(parts) == 8
    text = made()
    for path in parts:
        assert any(path.relative_to(ROOT / "kappaquant").match(pattern) for pattern in patterns), path.name
        content = path.read_text(encoding="utf-8")
        assert content.count("\n") <= 350
        assert path.suffix == ".html" or content in text
