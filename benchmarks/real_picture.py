"""The picture of benchmarks/results/real_model.json: divergence against the bits of the matrices, each point with its name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    "others": Series("others without text", "s", "dimgrey"),
    "others, calibrated": Series("others, calibrated", "*", "black", "", 11),
}
#: Where a name may stand: points right of and above its marker, and how it is aligned. The first that is free is taken.
PLACES = (
    (8, 0, "left", "center"), (-8, 0, "right", "center"), (0, 8, "center", "bottom"), (0, -8, "center", "top"),
    (7, 7, "left", "bottom"), (-7, -7, "right", "top"), (7, -7, "left", "top"), (-7, 7, "right", "bottom"),
    (0, 20, "center", "bottom"), (0, -20, "center", "top"),
)  # fmt: skip


def series_of(row: Row) -> str:
    """Which of ``SERIES`` a row belongs to."""
    if row["group"] != "kappaquant":
        return "others, calibrated" if row["calibrated"] else "others"
    setting = json.loads(row["setting"])
    if row["name"].startswith("own text"):
        return "own text"
    if setting["policy"] != "uniform":
        return "calibrated, other" if row["calibrated"] else "plain, other"
    if row["calibrated"]:
        return "calibrated"
    return "plain, other" if "group_size" in setting else "plain"


def series(rows: Iterable[Row]) -> dict[str, list[tuple[float, float, str]]]:
    """Series -> (bits of the matrices, KLD, name), by bits; in the order of ``SERIES``."""
    found: dict[str, list[tuple[float, float, str]]] = {key: [] for key in SERIES}
    for row in rows:
        if "absent" not in row:
            point = row["matrix_bits_per_weight"], row["kld_nats"]["mean"], row["name"]
            found[series_of(row)].append(point)
    return {key: sorted(points) for key, points in found.items() if points}


def figure(result: dict[str, Any]) -> tuple[Figure, list[Bbox]]:
    """The picture, and where its names stand, in pixels."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(9, 6), dpi=110, layout="constrained")
    axes = made.add_subplot()
    drawn = series(result["rows"])
    for key, points in drawn.items():
        how = SERIES[key]
        bits, kld, _ = zip(*points, strict=True)
        axes.plot(
            bits, kld, marker=how.marker, ms=how.size, color=how.colour, ls=how.line or "none", lw=1.8, label=how.name
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.margins(0.08)
    axes.set(xlabel="bits per weight of the matrices", ylabel="KL divergence from float32, nats (less is better)")
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
    for key, points in reversed([*drawn.items()]):  # the longest names first
        for bits, kld, name in points:
            for right, up, across, along in PLACES:
                text = axes.annotate(
                    name, (bits, kld), (right, up), textcoords="offset points", ha=across, va=along, fontsize=7.5,
                    color=SERIES[key].colour if key in ("calibrated", "plain", "own text") else "black",
                )  # fmt: skip
                box = text.get_window_extent()
                crossed = any(line.intersects_bbox(box, filled=False) for line in lines)
                within = inside.containsx(box.x0) and inside.containsx(box.x1)
                if within and not crossed and not box.count_overlaps([*taken, *names]):
                    names.append(box)
                    break
                text.remove()
    return names


def draw(result: dict[str, Any], path: Path) -> None:
    made, _ = figure(result)
    made.savefig(path)
