"""Pictures of benchmarks/results/real_model.json: divergence against the bits of the matrices, and against the size of the model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

Row = dict[str, Any]


@dataclass(frozen=True)
class Series:
    """How rows of one kind are drawn: name in the legend, marker, colour, line style ("" joins nothing), points a marker is wide."""

    name: str
    marker: str
    colour: str
    line: str = ""
    size: float = 7


#: Ours are joined where one width follows another by the same rule. Diamonds and stars are calibrated.
SERIES = {
    "plain": Series("kappaquant without text", "o", "tab:blue", "-"),
    "plain, other": Series("kappaquant without text: recipes, κ, groups of 64", "o", "lightskyblue"),
    "calibrated": Series("kappaquant, calibrated", "D", "tab:red", "-", 9),
    "own text": Series("kappaquant, calibrated on text of the model's own", "d", "tab:orange", "--", 9),
    "calibrated, other": Series("kappaquant, calibrated: recipes, κ", "D", "lightcoral", "", 6),
    "trellis": Series("kappaquant, calibrated, trellis codes", "P", "tab:brown", "-", 9),
    "embedding 8": Series("kappaquant, calibrated, embedding in 8 bits", "D", "tab:purple", "-", 8),
    "measured": Series("kappaquant, calibrated, bits by measured sensitivity", "D", "tab:green", "-", 9),
    "measured in both kinds": Series("the same, and kinds: codebooks and trellis codes", "d", "black", "-", 9),
    "others": Series("others without text", "s", "dimgrey"),
    "others, calibrated": Series("others, calibrated", "*", "black", "", 11),
}
UNNAMED = ("measured", "measured in both kinds")  # their line says it


@dataclass(frozen=True)
class Picture:
    """What is drawn against what.

    Attributes:
        label: of the horizontal axis; value: of a row on it.
        shows: whether a row belongs there.
    """

    label: str
    value: Callable[[Row], float]
    shows: Callable[[Row], bool]


#: The embedding counts in the size alone, so what differs in it is in the second; "types" are no whole models.
BITS = Picture(
    "bits per weight of the matrices", lambda row: float(row["matrix_bits_per_weight"]),
    lambda row: series_of(row) not in (*UNNAMED, "embedding 8"),
)  # fmt: skip
SIZE = Picture(
    "MB of the model", lambda row: row["model_bytes"] / 1e6,
    lambda row: row["group"] != "llama.cpp type" and row["kld_nats"]["mean"] < 1,
)  # fmt: skip
NEAR = 8  # points between a marker and a name beside it; one further away is joined to its marker


def _places() -> list[tuple[float, float, str, str]]:
    """Where a name may stand: points right of and above its marker, and how it is aligned. The first that is free is taken."""
    places: list[tuple[float, float, str, str]] = [
        (NEAR, 0, "left", "center"), (-NEAR, 0, "right", "center"), (0, NEAR, "center", "bottom"), (0, -NEAR, "center", "top"),
        (6, 5, "left", "bottom"), (-6, -5, "right", "top"), (6, -5, "left", "top"), (-6, 5, "right", "bottom"),
    ]  # fmt: skip
    for distance in range(18, 127, 12):
        for degrees in (30, -30, 150, -150, 60, -60, 120, -120, 15, -15, 165, -165, 0, 180):
            right, up = distance * math.cos(math.radians(degrees)), distance * math.sin(math.radians(degrees))
            places.append((right, up, "left" if right > 0 else "right", "center"))
    return places


def series_of(row: Row) -> str:
    """Which of ``SERIES`` a row belongs to."""
    if row["group"] != "kappaquant":
        return "others, calibrated" if row["calibrated"] else "others"
    if row["name"].startswith("measured"):
        return row["name"].partition(",")[0]
    setting = json.loads(row["setting"])
    if row["name"].startswith("own text"):
        return "own text"
    if setting["policy"] != "uniform":
        return "calibrated, other" if row["calibrated"] else "plain, other"
    if "kinds" in setting:
        return "trellis"
    if row["calibrated"]:
        return "embedding 8" if "overrides" in setting else "calibrated"
    return "plain, other" if "group_size" in setting else "plain"


def series(rows: Iterable[Row], picture: Picture = BITS) -> dict[str, list[tuple[float, float, str]]]:
    """Series -> (place on the axis, KLD, name), by place; in the order of ``SERIES``."""
    found: dict[str, list[tuple[float, float, str]]] = {key: [] for key in SERIES}
    for row in rows:
        if "absent" not in row and picture.shows(row):
            point = picture.value(row), row["kld_nats"]["mean"], row["name"]
            found[series_of(row)].append(point)
    return {key: sorted(points) for key, points in found.items() if points}


def figure(result: dict[str, Any], picture: Picture = BITS) -> tuple[Figure, list[Bbox]]:
    """The picture, and where its names stand, in pixels."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(11, 8), dpi=110, layout="constrained")
    axes = made.add_subplot()
    drawn = series(result["rows"], picture)
    for key, points in drawn.items():
        how = SERIES[key]
        bits, kld, _ = zip(*points, strict=True)
        axes.plot(
            bits, kld, marker=how.marker, ms=how.size, color=how.colour, ls=how.line or "none", lw=1.8, label=how.name
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.margins(0.08)
    axes.set(xlabel=picture.label, ylabel="KL divergence from float32, nats (less is better)")
    axes.set_title("SmolLM2-135M-Instruct", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    return made, _names(made, axes, drawn)


def _names(made: Figure, axes: Axes, drawn: Mapping[str, Sequence[tuple[float, float, str]]]) -> list[Bbox]:
    """Write names beside their points, each where nothing else is; one that has no such place is left to the table."""
    from matplotlib.path import Path as Line
    from matplotlib.transforms import Bbox

    made.draw_without_rendering()  # layout and legend come to their places
    scale = made.dpi / 72
    inside, legend = axes.get_window_extent(), axes.get_legend()
    taken: list[Bbox] = [legend.get_window_extent()] if legend else []
    lines: list[Line] = []
    for key, points in drawn.items():
        half = SERIES[key].size / 2 * scale
        at = axes.transData.transform([(bits, kld) for bits, kld, _ in points])
        taken += [Bbox.from_extents(x - half, y - half, x + half, y + half) for x, y in at]
        if SERIES[key].line:
            lines.append(Line(at))
    names: list[Bbox] = []
    named = [(key, points) for key, points in drawn.items() if key not in UNNAMED]
    for key, points in reversed(named):  # the longest names first
        for bits, kld, name in points:
            colour = SERIES[key].colour if key in ("calibrated", "plain", "own text") else "black"
            text = axes.annotate(name, (bits, kld), (0, 0), textcoords="offset points", fontsize=7.5, color=colour)
            at = axes.transData.transform((bits, kld))
            for right, up, across, along in _places():
                text.set(position=(right, up), ha=across, va=along)
                box, away = text.get_window_extent(), math.hypot(right, up)
                leader = Line([at + np.array([right, up]) * scale * part for part in (NEAR / away, 1)])
                crossed = any(line.intersects_bbox(box, filled=False) for line in lines)
                hidden = any(leader.intersects_bbox(other, filled=False) for other in (*taken, *names)) and away > NEAR
                within = all(inside.contains(x, y) for x, y in (box.min, box.max))
                if within and not crossed and not hidden and not box.count_overlaps([*taken, *names]):
                    names.append(box)
                    if away > NEAR:
                        lines.append(leader)
                        how = {"arrowstyle": "-", "lw": 0.5, "color": "grey", "shrinkA": 0, "shrinkB": 4}
                        axes.annotate("", (bits, kld), (right, up), textcoords="offset points", arrowprops=how)
                    break
            else:
                text.remove()
    return names


def draw(result: dict[str, Any], path: Path, picture: Picture = BITS) -> None:
    made, _ = figure(result, picture)
    made.savefig(path)
