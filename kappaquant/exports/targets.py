"""Export targets by name: other programs' folders, written from a source or a quantized checkpoint. No torch until one is written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kappaquant.errors import PlanError, RegistrationError

if TYPE_CHECKING:
    from kappaquant.checkpoints.writer import Progress
    from kappaquant.exports.weights import Weights
    from kappaquant.planning.plan import Plan


class Target(ABC):
    """One kind of folder.

    Attributes:
        name: what the command line calls it.
        help: what it is, in half a line.
        options: the settings it takes beside a plan.
    """

    name: ClassVar[str]
    help: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def write(
        self, weights: Weights, output: Path, plan: Plan, options: Mapping[str, Any], progress: Progress
    ) -> dict[str, Any]:
        """Write the new folder ``output``; returns a report with at least its "bytes" and "bits_per_weight".

        Raises:
            PlanError, OutputError, UnsupportedError: each says what to do.
        """

    def check_options(self, given: Iterable[str]) -> None:
        """Raise PlanError for a setting that this target does not take."""
        for name in given:
            if name not in self.options:
                known = ", ".join(self.options) or "none"
                raise PlanError(f"option {name!r}: the {self.name} export has no such option; it has {known}")


class Mlx(Target):
    """See docs/mlx.md."""

    name = "mlx"
    help = "a folder for stock mlx_lm"
    options = ("rotate", "effort", "dtype", "groups", "jobs")

    def write(
        self, weights: Weights, output: Path, plan: Plan, options: Mapping[str, Any], progress: Progress
    ) -> dict[str, Any]:
        from kappaquant.exports.mlx import Options, export_mlx

        return export_mlx(weights, output, plan, Options(**options), progress)


_TARGETS: dict[str, Target] = {target.name: target for target in (Mlx(),)}


def register(target: Target) -> None:
    """Let ``export --to`` know a target, in this process. Raises RegistrationError if the name is another's already."""
    if _TARGETS.setdefault(target.name, target) is not target:
        raise RegistrationError(
            f"export target {target.name!r} is taken by {type(_TARGETS[target.name]).__name__}; give yours another name"
        )


def unregister(name: str) -> None:
    """Take a registered target back."""
    del _TARGETS[name]


def targets() -> dict[str, Target]:
    """All that are registered, by name."""
    return dict(_TARGETS)


def target_by_name(name: str) -> Target:
    """The target of this name. Raises PlanError for an unknown one."""
    if name not in _TARGETS:
        raise PlanError(f"--to {name!r}: must be one of {', '.join(_TARGETS)}")
    return _TARGETS[name]
