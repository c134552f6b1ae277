"""How much worse a model gets by each of its parts: every layer and role quantized by itself, all in one pass through the layers.

A variant is the model with one unit quantized and the rest original. It begins at its layer with the original's hidden states and is
carried through those above, so one layer is in memory at a time. What other formats than the one tried would do follows from the errors
of a unit's outputs, which are measured for each.

A unit is rounded by most of the text and judged by the rest of it: error feedback fits what it reads, and a variant read on that
alone would seem up to twice as good as it is (SmolLM2-135M, 3 bits by 8 windows: 0.121 nats on them, 0.237 on other text).

All of it is in float32: one unit of a few hundred changes a model by less than bfloat16 does (a thousandth of a nat in a model of 135
million weights, of which its 211 units together would have made a third of their sum at 3 bits).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from kappaquant.errors import NonFiniteError, UnsupportedError
from kappaquant.files.processes import choose_device, choose_jobs, in_order, pool
from kappaquant.files.tensors import SLICE_ELEMENTS
from kappaquant.formats.codebook import check_group_choice
from kappaquant.models.inventory import Inventory
from kappaquant.models.roles import Role
from kappaquant.planning.moments import Moments
from kappaquant.planning.sensitivity import Report, Sensitivities, TensorErrors, Unit, decided, units_of
from kappaquant.quantizing.calibration.layers import Calls, Layers
from kappaquant.quantizing.calibration.moments import Routed, Sum, watched
from kappaquant.quantizing.calibration.stacks import matrices_at_once
from kappaquant.quantizing.calibration.tasks import Seen, Task, moments_of, packable, tasks_of
from kappaquant.quantizing.calibration.text import Calibration
from kappaquant.quantizing.calibration.trials import Piece, Trial, Tried, digits, errors_of, tried
from kappaquant.quantizing.calibration.written import Model, model_of
from kappaquant.sources.source import Source

TOKENS = 32 * 1024
"""How many tokens are read unless more or fewer are asked for."""
JUDGED_TOKENS = 8 * 1024
"""How many tokens judge at most."""
_SHARE = 4  # of so many windows one judges
_BLOCK = 256  # tokens whose mean divergence is one sample for an interval
_LOGITS = 1 << 26  # at once


@dataclass
class Variant:
    """The model with one unit quantized.

    Attributes:
        states: hidden states [rows, tokens, width] before the layer that comes next, a piece for each forward.
        calls: what layers are called with beside them.
        head: weights in place of the head's; None for the head's own.
        kld: [rows, tokens] of each piece, once it is known.
    """

    unit: Unit
    states: list[Tensor]
    calls: Calls
    head: Tensor | None = None
    kld: list[Tensor] = field(default_factory=list)


def sensitivities(
    source: Source, calibration: Calibration, trial: Trial, device: str | None = None, jobs: int | None = None,
    report: Report = lambda done, total: None,
) -> Sensitivities:  # fmt: skip
    """Measure every layer and role of a source on a text.

    Args:
        device: None takes CUDA if there is one.
        jobs: processes that round on a CPU; one a core by default.
        report: told of layers done, and of how many there are.

    Raises:
        UnsupportedError: an architecture that the pass does not know how to go through.
        NonFiniteError: weights, activations or logits that are NaN or infinite; names the tensor or module.
        PlanError: a group size that there is not, or text that another model wrote.
    """
    check_group_choice(trial.group_size)
    model = model_of(source)
    if writer := calibration.record.get("written_by"):
        model.check(Model(**writer), calibration.record.get("file", "calibration"))
    where = choose_device(device)
    count = choose_jobs(jobs, sum(info.nbytes for info in source.tensors.values()))
    with pool(count if where == "cpu" else 1) as workers:
        found = _Pass(source, calibration, trial, where, workers, count)
        units = found.run(report)
    record = calibration.record | {"judged_by": found.judging.numel()}
    return Sensitivities(
        "calibration", model.model, model.revision, model.sha256, record, trial.effort, trial.group_size, units,
        found.errors, found.kurtosis,
    )  # fmt: skip


class _Pass:
    """One pass, whose stacks are rounded by ``workers``, some ``jobs``, beside a CPU's forward passes; without them in this process.

    Attributes:
        rounding, judging: windows [n, tokens] that units are rounded by, and those that tell the divergence; a single window is both.
        errors: tensor -> what its outputs lose in each format.
        kurtosis: tensor -> κ.
    """

    def __init__(
        self, source: Source, calibration: Calibration, trial: Trial, device: str, workers: ProcessPoolExecutor | None,
        jobs: int,
    ) -> None:  # fmt: skip
        self._source, self._trial = source, trial
        self.rounding, self.judging = split(calibration.windows)
        self._layers = Layers(source, device, torch.float32)
        self._workers, self._ahead = workers, jobs + 1
        self._kinds = Inventory(source.tensors, source.config).kinds
        if crosswise := next((n for n, kind in self._kinds.items() if kind.transposed and decided(kind)), None):
            raise UnsupportedError(
                f"{crosswise}: is stored [..., in, out], and such weights are not calibrated; measure with --data-free"
            )
        widths = {name: info.shape[-1] for name, info in source.tensors.items() if decided(self._kinds[name])}
        self._formats = {name: trial.format(width) for name, width in widths.items()}
        self._kept_on = self._place_of_states()
        self.errors: dict[str, TensorErrors] = {}
        self.kurtosis: dict[str, float | None] = {}
        self._fewest: dict[str, int] = {}

    @torch.no_grad()
    def run(self, report: Report) -> tuple[Unit, ...]:
        """Carry the original and all variants through the layers; ``report`` is told of layers done, and how many there are."""
        layers = self._layers
        variants = [self._of_embedding(name) for name in self._outside(Role.EMBEDDING)]
        seen_states, seen_calls = layers.embed(self.rounding)
        states, calls = layers.embed(self.judging)
        for number in range(len(layers)):
            report(number, len(layers))
            layers.load(number)
            packed = packable(layers, self._formats, number)
            with watched({path: layers.model.get_submodule(path) for path in set(packed.values())}) as seen:
                seen_states = list(layers.forward(number, seen_states, seen_calls))
            after = list(layers.forward(number, states, calls))
            for variant in variants:
                variant.states = self._forward(number, variant.states, variant.calls)
            quantized = self._quantized(packed, *seen)
            for unit in self._units(list(packed)):
                originals = {name: layers.target(layers.places[name]).clone() for name in unit.tensors}
                for name in unit.tensors:
                    layers.put(name, quantized[name])
                variants.append(Variant(unit, self._forward(number, states, calls), calls))
                for name, weight in originals.items():
                    layers.put(name, weight)
            states = after
            layers.unload(number)
        head = layers.load_head()
        variants += [self._of_head(name, seen_states, states, calls) for name in self._outside(Role.LM_HEAD)]
        report(len(layers), len(layers))
        self._compare(head, states, variants)
        return tuple(map(_measured, variants))

    def _place_of_states(self) -> torch.device:
        """The GPU where the hidden states of all variants take no more than half of what it has free, else the host's memory."""
        device = self._layers.device
        if device.type == "cuda":
            variants = 1 + len(units_of(self._kinds, self._formats, None))
            free, _ = torch.cuda.mem_get_info(device)
            if 2 * variants * self.judging.numel() * self._layers.width * 4 <= free:
                return device
        return torch.device("cpu")

    def _outside(self, role: Role) -> list[str]:
        return [name for name in self._formats if self._kinds[name].role is role]

    def _units(self, names: Sequence[str]) -> list[Unit]:
        """What these tensors are measured as, and how few tokens an expert of it saw."""
        made = units_of(self._kinds, names, self._trial.bits, self._trial.kind)
        fewest = [[self._fewest[name] for name in unit.tensors if name in self._fewest] for unit in made]
        return [replace(unit, tokens=min(few, default=None)) for unit, few in zip(made, fewest, strict=True)]

    def _forward(self, number: int, states: Sequence[Tensor], calls: Calls) -> list[Tensor]:
        moved = [state.to(self._layers.device) for state in states]
        return [state.to(self._kept_on) for state in self._layers.forward(number, moved, calls)]

    def _of_embedding(self, name: str) -> Variant:
        """A variant that begins before the first layer; with the head, where that is the embedding."""
        layers, weight = self._layers, self._read(name)
        decoded = self._encoded(name, weight, None)
        layers.put(name, decoded)
        states, calls = layers.embed(self.judging)
        layers.put(name, weight)
        tied = not self._outside(Role.LM_HEAD) and not any(kind.role is Role.LM_HEAD for kind in self._kinds.values())
        kept = [state.to(self._kept_on) for state in states]
        return Variant(self._units([name])[0], kept, calls, decoded if tied else None)

    def _of_head(self, name: str, seen_states: Sequence[Tensor], states: Sequence[Tensor], calls: Calls) -> Variant:
        weight = self._read(name)
        seen = Sum.empty(weight.shape[-1], self._layers.device)
        for state in seen_states:
            seen.add(self._layers.norm(state))
        kept = [state.to(self._kept_on) for state in states]
        return Variant(self._units([name])[0], kept, calls, self._encoded(name, weight, seen))

    def _encoded(self, name: str, weight: Tensor, seen: Sum | None) -> Tensor:
        """A tensor outside of layers as ``quantize`` stores it, decoded; its errors are noted."""
        own = None if seen is None else seen.gram[None]
        step = max(1, SLICE_ELEMENTS // weight.shape[1])
        pieces = (Piece(rows[None].clone(), None, own, [name], self._trial) for rows in weight.split(step))
        found = list(in_order(tried, pieces, self._workers, self._ahead))
        (self.errors[name],) = errors_of(found, [len(weight)])
        return torch.cat([part.decoded for part in found])

    def _read(self, name: str) -> Tensor:
        weight = self._source.read(name).view(self._source.tensors[name].shape).to(self._layers.device)
        kurtosis = Moments.of(weight).kurtosis
        self.kurtosis[name] = digits(kurtosis) if math.isfinite(kurtosis) else None
        return weight

    def _quantized(
        self, packed: Mapping[str, str], sums: Mapping[str, Sum], routed: Mapping[str, Routed]
    ) -> dict[str, Tensor]:
        """A layer's tensors as they come back from their formats; their errors are noted."""
        tasks = tasks_of(self._layers, self._formats, packed, sums)
        owners: list[int] = []

        def pieces() -> Iterator[Piece]:
            for number, task in enumerate(tasks):
                weight = torch.cat([self._read(name).flatten(0, -2) for name in task.names])
                weight = weight.view(len(task.experts or [0]), -1, weight.shape[-1])
                moments = moments_of(task, sums, routed)
                step = matrices_at_once(weight.shape[1], weight.shape[2], self._layers.device)
                for start in range(0, len(weight), step):
                    some = weight[start : start + step].clone()  # a view would travel with all it views
                    seen = [moments(start + at) for at in range(len(some))]
                    self._count(task, seen)
                    owners.append(number)
                    drawn = torch.stack([one.drawn for one in seen]) if self._trial.effort == "calibrated" else None
                    names = [task.label(start + at) for at in range(len(some))]
                    yield Piece(some, drawn, torch.stack([one.own.gram for one in seen]), names, self._trial)

        parts: list[list[Tried]] = [[] for _ in tasks]
        for at, part in enumerate(in_order(tried, pieces(), self._workers, self._ahead)):
            parts[owners[at]].append(part)
        found: dict[str, Tensor] = {}
        for task, of_task in zip(tasks, parts, strict=True):
            rows = [math.prod(self._source.tensors[name].shape[:-1]) for name in task.names]
            self.errors |= dict(zip(task.names, errors_of(of_task, rows), strict=True))
            decoded = torch.cat([part.decoded for part in of_task]).split(rows)
            found |= {n: part.view(self._source.tensors[n].shape) for n, part in zip(task.names, decoded, strict=True)}
        return found

    def _count(self, task: Task, seen: Sequence[Seen]) -> None:
        """Remember how few tokens an expert of these tensors saw."""
        if task.experts is not None:
            fewest = min(one.own.count for one in seen)
            self._fewest |= {name: min(fewest, self._fewest.get(name, fewest)) for name in task.names}

    def _compare(self, head: nn.Linear, states: Sequence[Tensor], variants: Sequence[Variant]) -> None:
        """Every variant's divergence from the original, token by token."""
        own = head.weight
        others = {id(v): nn.Parameter(v.head.to(own), requires_grad=False) for v in variants if v.head is not None}
        for at, state in enumerate(states):
            kld: list[list[Tensor]] = [[] for _ in variants]
            step = max(1, _LOGITS // (len(state) * own.shape[0]))
            for start in range(0, state.shape[1], step):
                some = slice(start, start + step)
                original = self._log_probabilities(state[:, some])
                probabilities = original.exp()
                for number, variant in enumerate(variants):
                    head.weight = others.get(id(variant), own)
                    found = self._log_probabilities(variant.states[at][:, some])
                    kld[number].append((probabilities * (original - found)).sum(-1).cpu())
                    head.weight = own
            for variant, parts in zip(variants, kld, strict=True):
                variant.kld.append(torch.cat(parts, 1))

    def _log_probabilities(self, state: Tensor) -> Tensor:
        return self._layers.logits(state.to(self._layers.device)).float().log_softmax(-1)


def split(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Windows [n, tokens]: those to round by, and the last quarter, ``JUDGED_TOKENS`` at most, to judge by; a single one is both."""
    if len(windows) == 1:
        return windows, windows
    judging = max(1, min(len(windows) // _SHARE, JUDGED_TOKENS // windows.shape[1]))
    return windows[:-judging], windows[-judging:]


def _measured(variant: Variant) -> Unit:
    """The unit with its mean divergence over tokens, and the normal interval of the mean by blocks of them; none for a single block."""
    kld = torch.cat(variant.kld)
    blocks = torch.cat([block.mean(1) for block in kld.split(_BLOCK, 1)])
    if not bool(kld.isfinite().all()):
        raise NonFiniteError(
            f"{variant.unit.tensors[0]}: the model's logits are NaN or infinite where it is quantized to {variant.unit.bits} bits; "
            "calibrate with more --bits, or other text"
        )
    mean = kld.mean().item()
    reach = 1.96 * blocks.std().item() / len(blocks) ** 0.5 if len(blocks) > 1 else math.nan
    interval = (digits(max(mean - reach, 0.0)), digits(mean + reach)) if math.isfinite(reach) else None
    return replace(variant.unit, kld=digits(max(mean, 0.0)), interval_95=interval)
