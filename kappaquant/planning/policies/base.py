"""What a policy is: from what tensors are, and what was measured of them, to a choice for each. Numbers in, numbers out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from kappaquant.errors import PlanError
from kappaquant.files.safetensors import TensorInfo
from kappaquant.formats.codebook import AUTO, GroupSize, fitting
from kappaquant.formats.entry import KEPT_BITS
from kappaquant.models.inventory import Inventory
from kappaquant.planning.plan import KEPT, Choice, check_bits_or_kept, format_of


@dataclass(frozen=True)
class Evidence:
    """What was measured of the weights.

    Attributes:
        kurtosis: tensor -> excess kurtosis κ, as ``scan`` found it; None if nothing was scanned.
    """

    kurtosis: Mapping[str, float | None] | None = None


@dataclass(frozen=True)
class Budget:
    """What a policy may spend, and what is settled before it is asked.

    Attributes:
        fixed: choices made already: what defaults keep, and overrides.
        size: bytes that all tensors may take together, fixed ones included; None sets no limit.
        group_size: of codebook formats, or "auto": what suits each tensor's input axis.
    """

    fixed: Mapping[str, Choice] = field(default_factory=dict)
    size: int | None = None
    group_size: GroupSize = AUTO

    def free(self, inventory: Inventory) -> list[str]:
        """The tensors that the policy decides."""
        return [name for name in inventory.tensors if name not in self.fixed]

    def choice(self, info: TensorInfo, bits: int, why: str) -> Choice:
        """A codebook format of so many bits, 2 to 8, in groups that suit the tensor, or 16 to keep it."""
        check_bits_or_kept(bits, info.name)
        return Choice(KEPT if bits == KEPT_BITS else fitting(bits, info.shape[-1], self.group_size).id, why)


def choice_bytes(choice: Choice, info: TensorInfo) -> int:
    """Bytes that a tensor takes once it is stored as chosen."""
    fmt = format_of(choice, info.name)
    return fmt.nbytes(info.shape) if fmt else info.nbytes


def option(default: Any, help: str, read: Callable[[str], Any] | None = None) -> Any:
    """A field of a policy that callers and the command line may set.

    Args:
        help: what the command line says of it.
        read: from the command line's text to the value; by default the type of the default value.
    """
    default_read = _flag if isinstance(default, bool) else type(default)
    return field(default=default, metadata={"help": help, "read": read or default_read})


def _flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(text)
    return text == "true"


class Policy(ABC):
    """A way to choose; subclasses are frozen dataclasses whose fields, made by ``option``, are its parameters.

    Attributes:
        name: what plans and the command line call it.
        takes_size: it keeps to ``Budget.size``; others refuse a size.
        reads_profile: it looks at ``Evidence.kurtosis``; with others the command line refuses a profile.
    """

    name: ClassVar[str]
    takes_size: ClassVar[bool] = False
    reads_profile: ClassVar[bool] = False

    @abstractmethod
    def choose(self, inventory: Inventory, evidence: Evidence, budget: Budget) -> dict[str, Choice]:
        """A choice for each of ``budget.free(inventory)``.

        Raises:
            PlanError: evidence is missing, or the budget too small; says what to do.
        """

    def inputs(self) -> dict[str, Any]:
        """Its parameters as JSON values, for the plan."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def made(cls, options: Mapping[str, Any]) -> Policy:
        """The policy with these parameters. Raises PlanError for one that it does not have."""
        known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        for name in options:
            if name not in known:
                raise PlanError(
                    f"option {name!r}: the {cls.name} policy has no such option; it has {', '.join(known) or 'none'}"
                )
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in options.items()})
