"""Pictures as PNG: κ by layer, bits by layer and family, divergence against size. They need matplotlib, the plot extra."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kappaquant.checkpoints.checkpoint import Checkpoint
from kappaquant.checkpoints.contents import families
from kappaquant.errors import UnsupportedError
from kappaquant.evaluate.documents.compare import Comparison
from kappaquant.files.documents import check_file, write_whole
from kappaquant.models.roles import layer_of
from kappaquant.planning.profile import Profile

_NOTED = 64  # more columns than this leave no room for numbers


def bits_map(checkpoint: Checkpoint, path: str | Path) -> None:
    """Draw the bits of every family in every layer; what belongs to no layer stands in the first column.

    A cell of several widths shows their mean over weights. Raises UnsupportedError without matplotlib.
    """
    figure = png_figure(path)
    from matplotlib.colors import LogNorm

    rows = families(checkpoint)
    cells: dict[tuple[int, int], list[str]] = {}
    numbers = {n: -1 if (layer := layer_of(n)) is None else layer for n in checkpoint.keys()}
    columns = sorted(set(numbers.values()))
    for row, names in enumerate(rows.values()):
        for name in names:
            cells.setdefault((row, columns.index(numbers[name])), []).append(name)
    bits = [[math.nan] * len(columns) for _ in rows]
    for (row, column), names in cells.items():
        bits[row][column] = _mean_bits(checkpoint, names)
    figure.set_size_inches(4.5 + max(2.5, 0.26 * len(columns)), max(3, 1.2 + 0.3 * len(rows)))
    axes = figure.add_subplot()
    image = axes.imshow(bits, norm=LogNorm(2, 16), cmap="YlGnBu", aspect="auto")
    if len(columns) <= _NOTED:
        for (row, column), _ in cells.items():
            value = bits[row][column]
            axes.text(column, row, f"{value:.3g}", ha="center", va="center", fontsize=8,
                      color="white" if value > 7 else "black")  # fmt: skip
    step = len(columns) // _NOTED + 1
    shown = [i for i, layer in enumerate(columns) if layer < 0 or layer % step == 0]
    axes.set_xticks(shown, ["–" if columns[i] < 0 else str(columns[i]) for i in shown])
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_xlabel("layer (–: none)" if -1 in columns else "layer")
    axes.set_title(f"{checkpoint.path.resolve().name}: bits, 16 where kept")
    bar = figure.colorbar(image, ticks=[2, 3, 4, 5, 6, 8, 16], format="%d")
    bar.minorticks_off()
    _save(figure, path)


def _mean_bits(checkpoint: Checkpoint, names: Sequence[str]) -> float:
    weights = [max(1, checkpoint.entry(name).info.numel) for name in names]
    return sum(checkpoint.bits(n) * w for n, w in zip(names, weights, strict=True)) / sum(weights)


def pareto(comparison: Comparison, path: str | Path) -> None:
    """Draw mean divergence with its interval against size; the checkpoints that none beats in both are joined by a line.

    Raises UnsupportedError without matplotlib, and if no divergence is above 0, which a logarithm needs.
    """
    figure = png_figure(path)
    shown = [row for row in comparison.rows if row.divergence.value > 0]
    if not shown:
        raise UnsupportedError(f"{path}: no checkpoint has a divergence above 0, and the plot's axis is logarithmic")
    figure.set_size_inches(8, 5)
    axes = figure.add_subplot()
    unit, name = (1e9, "GB") if shown[0].nbytes >= 1e8 else (1e6, "MB")
    for row in shown:
        x, y, color = row.nbytes / unit, row.divergence.value, "C0" if row.pareto else "C7"
        low, high = row.divergence.interval_95 or (y, y)
        error = [[max(0.0, y - low)], [max(0.0, high - y)]]
        axes.errorbar(x, y, yerr=error, fmt="o" if row.pareto else "x", capsize=3, color=color)
        # below the front on its near side there is room; above it are those that it beats
        place = {"xytext": (-6, -4), "ha": "right", "va": "top"} if row.pareto else {"xytext": (6, 4)}
        axes.annotate(row.name, (x, y), textcoords="offset points", fontsize=8, **place)
    front = [row for row in shown if row.pareto]
    line = [row.nbytes / unit for row in front], [row.divergence.value for row in front]
    axes.plot(*line, color="C0", linewidth=1, label="Pareto front")
    if comparison.noise_floor:
        axes.axhline(comparison.noise_floor, color="C7", linestyle=":", label="noise floor of the original")
    axes.set_yscale("log", nonpositive="clip")
    axes.margins(x=0.15)
    axes.set_xlabel(f"weight files, {name}")
    axes.set_ylabel("mean KL divergence from the original, nats (95 %)")
    axes.grid(True, linewidth=0.3)
    axes.legend(fontsize=8)
    _save(figure, path)


def kurtosis_by_layer(profile: Profile, path: str | Path, highlight: Mapping[str, float] | None = None) -> None:
    """Draw κ by layer, one line a family.

    Args:
        highlight: label -> κ of horizontal lines, such as a policy's thresholds.

    Raises UnsupportedError without matplotlib.
    """
    figure = png_figure(path)
    figure.set_size_inches(10, 5)
    axes = figure.add_subplot()
    families: dict[str, dict[int, list[float]]] = {}
    for stats in profile.tensors.values():
        if stats.kurtosis is not None and stats.layer is not None and len(stats.shape) >= 2:
            families.setdefault(stats.family, {}).setdefault(stats.layer, []).append(stats.kurtosis)
    for index, (family, layers) in enumerate(sorted(families.items())):
        values = [max(layers[layer]) for layer in sorted(layers)]
        axes.plot(sorted(layers), values, marker="os^Dvp*"[index // 10 % 7], label=family, linewidth=1, markersize=4)
    for label, level in (highlight or {}).items():
        axes.axhline(level, color="grey", linestyle=":", linewidth=1)
        axes.annotate(label, (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_xlabel("layer")
    axes.set_ylabel("excess kurtosis κ (largest of the layer's tensors)")
    axes.set_title(profile.model)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    _save(figure, path)


def png_figure(path: str | Path) -> Any:
    """An empty figure for ``path``; asked for before the work that is to be drawn, it tells in time what is missing.

    Raises UnsupportedError without matplotlib, OutputError for a path that cannot be written.
    """
    check_file(Path(path))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedError(
            f"{path}: plots need matplotlib; pip install 'kappaquant[plot]', or leave --plot out"
        ) from None
    return Figure(layout="constrained")


def _save(figure: Any, path: str | Path) -> None:
    """PNG, whatever the name's ending."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format="png")
    write_whole(Path(path), picture.getvalue())
