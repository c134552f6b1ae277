"""Evidence without text: what formats lose of the weights themselves, and κ. It says of itself that nothing was read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from kappaquant.errors import NonFiniteError
from kappaquant.formats.codebook import BITS, GroupSize, fitting
from kappaquant.formats.kinds import KINDS, USUAL
from kappaquant.formats.transposed import fitting_weight
from kappaquant.models.inventory import Inventory
from kappaquant.planning.profile import scan
from kappaquant.planning.sensitivity import Report, Sensitivities, TensorErrors, decided, units_of
from kappaquant.quantizing.calibration.written import model_of
from kappaquant.sources.source import Source


def of_weights(
    source: Source, group_size: GroupSize = "auto", jobs: int | None = None, device: str | None = None,
    report: Report = lambda done, total: None, formats: Sequence[str] = USUAL,
) -> Sensitivities:  # fmt: skip
    """Relative squared errors of all tensors that plans decide, in every width of these kinds, by ``scan``; once for each group size.

    Raises:
        PlanError: a group size that there is not.
        NonFiniteError: a tensor that no format can hold; names it.
    """
    kinds = Inventory(source.tensors, source.config).kinds
    sizes: dict[int, list[str]] = {}
    for name in filter(lambda name: decided(kinds[name]), kinds):
        width = kinds[name].inputs(source.tensors[name].shape)
        sizes.setdefault(fitting(min(BITS), width, group_size).group_size, []).append(name)
    errors: dict[str, dict[str, float]] = {}
    kurtosis, counts = {}, {}
    passes = [(size, kind) for size in sorted(sizes) for kind in formats]
    for number, (size, kind) in enumerate(passes):
        profile = scan(
            source, group_size=size, bits=KINDS[kind].bits, kind=kind, jobs=jobs, device=device,
            progress=partial(_part, report, number, len(passes)),
        )  # fmt: skip
        for name in sizes[size]:
            stats = profile.tensors[name]
            if not stats.relative_mse:
                raise NonFiniteError(
                    f"{name}: holds NaN or infinity, or values whose norms float16 does not hold; repair the source"
                )
            kurtosis[name], counts[name] = stats.kurtosis, float(stats.numel)
            crosswise = kinds[name].transposed
            for bits, error in stats.relative_mse.items():
                errors.setdefault(name, {})[fitting_weight(bits, stats.shape, size, crosswise, kind).id] = error
    tensors = {name: TensorErrors(counts[name], found) for name, found in errors.items()}
    model = model_of(source)
    units = tuple(units_of(kinds, [name for name in kinds if name in tensors], None))
    return Sensitivities(
        "weights", model.model, model.revision, model.sha256, {}, "fast", group_size, units, tensors, kurtosis
    )


def _part(report: Report, number: int, parts: int, done: int, total: int) -> None:
    report(number * total + done, parts * total)
