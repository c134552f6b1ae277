"""Tables and progress for the command line, made of what the library returns."""

from __future__ import annotations

from dataclasses import asdict
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from kappaquant.checkpoints import contents
from kappaquant.checkpoints.checkpoint import Checkpoint
from kappaquant.models.roles import Role
from kappaquant.planning.plan import Plan
from kappaquant.planning.profile import Profile
from kappaquant.planning.sensitivity import Sensitivities
from kappaquant.planning.sizes import Summary, Total, shown


class ProgressBar:
    """A bar per stage, with amount, speed and the time left; called as report(stage, done, total), in bytes or ``unit``."""

    def __init__(self, title: str, console: Console, unit: str | None = None) -> None:
        self._unit = unit
        speed = TextColumn("{task.fields[rate]}")
        self._progress = Progress(
            TextColumn(f"{title}: {{task.description}}"), BarColumn(), TextColumn("{task.fields[amount]}"), speed,
            TimeRemainingColumn(), console=console,
        )  # fmt: skip
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total, amount="", rate="")
        task = self._tasks[stage]
        speed = self._progress.tasks[task].speed
        if self._unit:
            amount, rate = f"{done:,}/{total:,}", f"{speed or 0:,.{0 if (speed or 0) > 10 else 2}f} {self._unit}/s"
        else:
            amount, rate = f"{decimal(done)} of {decimal(total)}", f"{(speed or 0) / 1e9:.2f} GB/s"
        self._progress.update(task, completed=done, total=total, amount=amount, rate=rate if speed else "")


def sensitivity_table(found: Sensitivities) -> Table:
    """Families by what all of theirs lose together, each quantized by itself."""
    tried = {unit.bits for unit in found.units if unit.bits}
    loss = f"KLD at {min(tried)} bits, nats" if tried else "relative error at 3 bits"
    text = (
        f"{found.text.get('tokens', 0):,} tokens, {found.effort}"
        if tried
        else "no text was read: errors of weights alone"
    )
    table = _table(f"sensitivity of {found.model} ({text})", ["parts", loss, "largest", "where"])
    families: dict[str, list[tuple[float, str]]] = {}
    for unit in found.units:
        lost = found.loss(unit, {name: found.format_at(name, unit.bits or 3) for name in unit.tensors})
        where = unit.role if unit.layer is None else f"{unit.role}, layer {unit.layer}"
        families.setdefault(unit.family, []).append((lost, where))
    for family, each in sorted(families.items(), key=lambda item: -sum(lost for lost, _ in item[1])):
        most, where = max(each)
        table.add_row(family, str(len(each)), f"{sum(lost for lost, _ in each):.4g}", f"{most:.3g}", where)
    return table


def profile_table(profile: Profile) -> Table:
    """Families of a profile, largest first."""
    families = profile.families()
    widths = [b for b in _SHOWN if any(b in stats.relative_mse for stats in families.values())]
    table = _table(
        f"{profile.model}: weights by family",
        ["tensors", "params", "mean κ", "max κ", "max/σ", "top 0.1%", *(f"MSE@{b}" for b in widths)],
    )
    for family, stats in families.items():
        table.add_row(
            family, f"{stats.tensors}", _count(stats.params), f"{stats.mean_kurtosis:.2f}",
            f"{stats.max_kurtosis:.2f}", f"{stats.max_absmax_over_sigma:.1f}", f"{stats.mean_top_energy:.1%}",
            *(f"{stats.relative_mse[b]:.2g}" if b in stats.relative_mse else "" for b in widths),
        )  # fmt: skip
    table.caption = (
        "max/σ: largest weight in standard deviations; top 0.1%: its share of the energy; MSE@b: relative, at b bits"
    )
    broken = [name for name, stats in profile.tensors.items() if not stats.finite]
    if broken:
        table.caption += f"\nNaN or infinity in {', '.join(broken[:5])}" + f" and {len(broken) - 5} more" * (
            len(broken) > 5
        )
    return table


def plan_table(plan: Plan, sizes: Summary, shard_bytes: int) -> Group:
    """The dry run: families, formats with their groups, and the exact bytes of the weight files."""
    by_family = _table(f"plan: {plan.policy}", [*_COLUMNS, "formats"])
    stored: dict[str, dict[str, None]] = {}
    for row in sorted(sizes.per_tensor, key=lambda row: (row.bits, row.format)):
        stored.setdefault(row.family, {})[row.format] = None
    for family, total in sizes.families.items():
        by_family.add_row(family, *_cells(total), ", ".join(stored[family]))
    by_family.add_section()
    by_family.add_row("all", *_cells(sizes.total), "")
    by_format = _table("by format", list(_COLUMNS), "stored as")
    by_format.caption = "tq4g64: 4 bits a code, one norm for each group of 64 weights"
    for format_id, total in sizes.by_format.items():
        by_format.add_row(format_id, *_cells(total))
    lines = [f"weight files: {shard_bytes:,} bytes ({shown(shard_bytes)}), exactly{_of(plan, 'size', shard_bytes)}"]
    reads = sizes.active_bytes_per_token
    lines.append(f"a decoded token reads {shown(reads)} of weights{_of(plan, 'active', reads)}")
    for kind, unit in (("kld", " nats from the original"), ("error", ", an error of weights relative to them")):
        if (predicted := plan.inputs.get(f"predicted_{kind}")) is not None:
            gap = (predicted - plan.inputs[f"relaxed_{kind}"]) / predicted if predicted else 0.0
            lines.append(f"predicted: {predicted:.4g}{unit}; no plan in these bytes can be more than {gap:.3%} better")
    if sizes.mtp.tensors:
        lines.append(mtp_line(sizes))
    return Group(by_family, by_format, *(Text(line) for line in lines))


def mtp_line(sizes: Summary) -> str:
    """What the multi-token-prediction head costs under a plan, and who pays for it."""
    mtp = sizes.mtp
    packed = [row for row in sizes.per_tensor if row.role is Role.MTP and row.format != "kept"]
    how = f"{len(packed)} of {mtp.tensors} tensors packed" if packed else "kept"
    return (
        f"the MTP head ({how}) takes {mtp.output_bytes:,} bytes ({decimal(mtp.output_bytes)}), "
        f"{mtp.output_bytes / sizes.output_bytes:.1%} of the weights; only speculative decoding reads it"
    )


def _of(plan: Plan, budget: str, taken: int) -> str:
    """Which share of a plan's budget is taken, if it has this one."""
    limit = plan.inputs.get(budget)
    return f": {taken / limit:.2%} of {limit:,} bytes ({shown(limit)})" if limit else ""


_COLUMNS = ("tensors", "params", "before", "after", "bits/weight", "per token")
_SHOWN = (3, 4, 5)  # the widths of the published recipes; the JSON has all that were measured


def _count(params: int) -> str:
    return f"{params / 1e9:.3f} B" if params >= 1e9 else f"{params / 1e6:.3f} M"


def _cells(total: Total) -> list[str]:
    return [
        f"{total.tensors}", _count(total.params), decimal(total.source_bytes),
        decimal(total.output_bytes), f"{total.bits_per_weight:.3f}", decimal(total.active_bytes),
    ]  # fmt: skip


def checkpoint_json(checkpoint: Checkpoint) -> dict[str, Any]:
    """What ``inspect --json`` prints."""
    tensors = {
        name: {
            "shape": list(checkpoint.shape(name)),
            "bits": checkpoint.bits(name),
            "format": fmt.id if (fmt := checkpoint.format_of(name)) else checkpoint.dtype(name),
            "bytes": checkpoint.nbytes(name),
        }
        for name in checkpoint.keys()
    }
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.container.id,
        "notices": checkpoint.notices,
        "families": {
            family: asdict(contents.total(checkpoint, names)) for family, names in contents.families(checkpoint).items()
        },
        "tensors": tensors,
    }


def checkpoint_table(checkpoint: Checkpoint) -> Group:
    """Families of a checkpoint, largest first."""
    table = _table(
        f"{checkpoint.path.name}: {checkpoint.container.id}", ["tensors", "params", "size", "bits/weight", "widths"]
    )
    for family, names in contents.families(checkpoint).items():
        sums = contents.total(checkpoint, names)
        table.add_row(
            family, f"{sums.tensors}", _count(sums.params), decimal(sums.output_bytes),
            f"{sums.bits_per_weight:.3f}", ", ".join(map(str, contents.widths(checkpoint, names))),
        )  # fmt: skip
    return Group(table, *(Text(f"note: {notice}") for notice in checkpoint.notices))


def _table(title: str, columns: list[str], first: str = "family") -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table
