"""Evidence without text: what formats lose of the weights themselves, and κ. It says of itself that nothing was read."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kappaquant.errors import NonFiniteError
from kappaquant.formats.codebook import BITS, GroupSize, fitting
from kappaquant.formats.kinds import KINDS, USUAL, check_kinds
from kappaquant.formats.transposed import Transposed
from kappaquant.models.inventory import Inventory
from kappaquant.planning.profile import measured
from kappaquant.planning.sensitivity import Report, Sensitivities, TensorErrors, decided, units_of
from kappaquant.quantizing.calibration.written import model_of
from kappaquant.sources.source import Source


def of_weights(
    source: Source, group_size: GroupSize = "auto", jobs: int | None = None, device: str | None = None,
    report: Report = lambda done, total: None, formats: Sequence[str] = USUAL,
) -> Sensitivities:  # fmt: skip
    """Relative squared errors of all tensors that plans decide, in every width of these kinds, as ``scan`` measures them; others are
    not read.

    Raises:
        PlanError: a group size or a kind that there is not.
        NonFiniteError: a tensor that no format can hold; names it.
    """
    check_kinds(formats)
    kinds = Inventory(source.tensors, source.config).kinds
    wanted = {}
    for name in filter(lambda name: decided(kinds[name]), kinds):
        inputs = kinds[name].inputs(source.tensors[name].shape)
        size = fitting(min(BITS), inputs, group_size).group_size
        wanted[name] = [KINDS[kind].make(bits, size) for kind in formats for bits in KINDS[kind].bits]
    tensors, kurtosis = {}, {}
    for name, part in measured(source, wanted, jobs, device, report).items():
        if not part.squared_errors:
            raise NonFiniteError(
                f"{name}: holds NaN or infinity, or values whose norms float16 does not hold; repair the source"
            )
        crosswise = kinds[name].transposed
        errors = {(Transposed(fmt) if crosswise else fmt).id: part.relative_mse(fmt) for fmt in wanted[name]}
        tensors[name] = TensorErrors(float(source.tensors[name].numel), errors)
        kurtosis[name] = part.moments.kurtosis if math.isfinite(part.moments.kurtosis) else None
    model = model_of(source)
    units = tuple(units_of(kinds, tensors, None, formats[0]))
    return Sensitivities(
        "weights", model.model, model.revision, model.sha256, {}, "fast", group_size, units, tensors, kurtosis
    )
