"""The explorer as one file of HTML: template, style, scripts and contents in one text, which loads nothing. No torch."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from html import escape
from importlib import resources
from string import Template
from typing import Any

from kappaquant.files.safetensors import TensorInfo
from kappaquant.planning.explorer.contents import Contents, Mark
from kappaquant.planning.plan import Plan
from kappaquant.planning.sensitivity import Sensitivities

_SCRIPTS = ("solver.js", "text.js", "plan.js", "curve.js", "map.js", "explorer.js")


def page(
    plan: Plan,
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    evidence: Sensitivities,
    *,
    command: str = "kappaquant plan SOURCE --evidence evidence.json",
    source: str = "SOURCE",
    headers: int = 0,
    measured: Iterable[Mark] = (),
) -> str:
    """The page of one source: the same text for the same input.

    Args:
        plan: gives group size, kinds of formats, overrides, whether fused layers share a width and the engine it is for; the page starts
            at its size.
        tensors: every tensor of the source; config: its config.json.
        evidence: what was measured; its units are what the page chooses for.
        command: that makes such a plan, to which the page adds the size.
        source: as ``quantize`` is told of it.
        headers: bytes of the files' headers, at most, which the command's size allows for.
        measured: evaluated checkpoints, which become points beside the curve.

    Raises:
        PlanError: evidence of another model, one that lacks a tensor, or every format or a kind of formats of it.
    """
    contents = Contents(plan, tensors, config, evidence).gathered(measured)
    contents |= {"command": command, "source": source, "headers": headers}
    script = "\n".join(_read(name) for name in _SCRIPTS)
    style = _read("explorer.css")
    policy = f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; base-uri 'none'; form-action 'none'"
    return Template(_read("page.html")).substitute(
        policy=policy, title=escape(evidence.model), style=style, contents=_embedded(contents), script=script
    )


def _read(name: str) -> str:
    return resources.files("kappaquant.planning.explorer").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a content security policy names the one text that it lets run: whatever else got into the page does not."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _embedded(contents: Mapping[str, Any]) -> str:
    """JSON that cannot end the element it stands in, whatever names it holds."""
    text = json.dumps(
        contents, allow_nan=False, separators=(",", ":")
    )  # ASCII, so no separators that scripts end lines at
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
