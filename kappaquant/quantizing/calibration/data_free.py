"""Evidence without text: what formats lose of the weights themselves, and κ. It says of itself that nothing was read."""

from __future__ import annotations

from functools import partial

from kappaquant.errors import NonFiniteError
from kappaquant.formats.codebook import BITS, GroupSize, fitting
from kappaquant.formats.transposed import fitting_weight
from kappaquant.models.inventory import Inventory
from kappaquant.planning.profile import scan
from kappaquant.planning.sensitivity import Report, Sensitivities, TensorErrors, decided, units_of
from kappaquant.quantizing.calibration.written import model_of
from kappaquant.sources.source import Source


def of_weights(
    source: Source, group_size: GroupSize = "auto", jobs: int | None = None, device: str | None = None,
    report: Report = lambda done, total: None,
) -> Sensitivities:  # fmt: skip
    """Relative squared errors of all tensors that plans decide, in every width, by ``scan``; once for each group size they need.

    Raises:
        PlanError: a group size that there is not.
        NonFiniteError: a tensor that no format can hold; names it.
    """
    kinds = Inventory(source.tensors, source.config).kinds
    sizes: dict[int, list[str]] = {}
    for name in filter(lambda name: decided(kinds[name]), kinds):
        width = kinds[name].inputs(source.tensors[name].shape)
        sizes.setdefault(fitting(min(BITS), width, group_size).group_size, []).append(name)
    tensors, kurtosis = {}, {}
    for number, (size, names) in enumerate(sorted(sizes.items())):
        profile = scan(
            source, group_size=size, bits=BITS, jobs=jobs, device=device,
            progress=partial(_part, report, number, len(sizes)),
        )  # fmt: skip
        for name in names:
            stats = profile.tensors[name]
            if not stats.relative_mse:
                raise NonFiniteError(
                    f"{name}: holds NaN or infinity, or values whose norms float16 does not hold; repair the source"
                )
            kurtosis[name] = stats.kurtosis
            crosswise = kinds[name].transposed
            errors = {fitting_weight(b, stats.shape, size, crosswise).id: e for b, e in stats.relative_mse.items()}
            tensors[name] = TensorErrors(float(stats.numel), errors)
    model = model_of(source)
    units = tuple(units_of(kinds, [name for name in kinds if name in tensors], None))
    return Sensitivities(
        "weights", model.model, model.revision, model.sha256, {}, "fast", group_size, units, tensors, kurtosis
    )


def _part(report: Report, number: int, parts: int, done: int, total: int) -> None:
    report(number * total + done, parts * total)
