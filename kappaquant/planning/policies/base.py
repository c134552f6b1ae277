"""What a policy is: from what tensors are, and what was measured of them, to a choice for each. Numbers in, numbers out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from fractions import Fraction
from functools import cache
from typing import Any, ClassVar

from kappaquant.errors import BudgetError, PlanError
from kappaquant.files.safetensors import TensorInfo
from kappaquant.formats.base import Format
from kappaquant.formats.codebook import AUTO, GroupSize
from kappaquant.formats.entry import KEPT_BITS
from kappaquant.formats.kinds import USUAL, usual_kind
from kappaquant.formats.transposed import fitting_weight
from kappaquant.models.inventory import Inventory
from kappaquant.planning.plan import KEPT, Choice, check_bits_or_kept, format_of
from kappaquant.planning.sensitivity import Sensitivities
from kappaquant.planning.sizes import file_bytes, most_bytes, most_header_bytes, shown


@dataclass(frozen=True)
class Evidence:
    """What was measured of the weights.

    Attributes:
        kurtosis: tensor -> excess kurtosis κ, as ``scan`` or ``calibrate`` found it; None if nothing was measured.
        sensitivity: what quantizing costs the model, as ``calibrate`` found it.
    """

    kurtosis: Mapping[str, float | None] | None = None
    sensitivity: Sensitivities | None = None


@dataclass(frozen=True)
class Decision:
    """What a policy chose, and what is to be said of it.

    Attributes:
        choices: one for each tensor that the policy decides.
        inputs: JSON values that the plan records beside the policy's parameters.
        warnings: what the maker of the plan should read.
    """

    choices: Mapping[str, Choice]
    inputs: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Budget:
    """What a policy may spend, and what is settled before it is asked.

    Attributes:
        fixed: choices made already: what defaults keep, and overrides.
        size: bytes that the checkpoint's safetensors files may take, headers and fixed tensors included; None sets no limit.
        active: bytes of weights that decoding a token may read, likewise.
        group_size: of codebook formats, or "auto": what suits each tensor's input axis.
        shards: file name -> its tensors, as the checkpoint's files will hold them.
        overridden: names of the fixed tensors that an override set.
        fuse: tensors that serving engines fuse must have one width.
        transposed: names of tensors that are stored [..., in, out].
        kinds: of formats that may be chosen, letters of ``formats.kinds``.
    """

    fixed: Mapping[str, Choice] = field(default_factory=dict)
    size: int | None = None
    active: int | None = None
    group_size: GroupSize = AUTO
    shards: Mapping[str, Mapping[str, TensorInfo]] = field(default_factory=dict)
    overridden: frozenset[str] = frozenset()
    fuse: bool = False
    transposed: frozenset[str] = frozenset()
    kinds: tuple[str, ...] = USUAL

    def free(self, inventory: Inventory) -> list[str]:
        """The tensors that the policy decides."""
        return [name for name in inventory.tensors if name not in self.fixed]

    def choice(self, info: TensorInfo, bits: int, why: str, kind: str = "") -> Choice:
        """A format of so many bits, 2 to 8, in groups that suit the tensor, or 16 to keep it.

        Args:
            kind: of the format; by default that of least error.

        Raises:
            PlanError: no kind that may be chosen has these bits.
        """
        check_bits_or_kept(bits, info.name)
        if bits == KEPT_BITS:
            return Choice(KEPT, why)
        kind = kind or usual_kind(self.kinds, bits, info.name)
        return Choice(fitting_weight(bits, info.shape, self.group_size, info.name in self.transposed, kind).id, why)

    def nbytes(self, choice: Choice, info: TensorInfo) -> int:
        """Bytes of a file that a tensor takes once it is stored as chosen, at most: its place in the header decides a few."""
        return most_bytes(info, format_of(choice, info.name), len(str(self.size)))

    def left(self, inventory: Inventory) -> int | None:
        """Bytes that ``nbytes`` of the free tensors may add up to; None where there is no limit."""
        if self.size is None:
            return None
        spent = sum(self.nbytes(choice, inventory.tensors[name]) for name, choice in self.fixed.items())
        return self.size - spent - most_header_bytes(self.shards)

    def file_bytes(self, choices: Mapping[str, Choice]) -> int:
        """Exact bytes of the checkpoint's safetensors files; ``choices`` has every tensor."""
        return file_bytes(self.shards, lambda name: format_of(choices[name], name))


def active_bytes(choices: Mapping[str, Choice], inventory: Inventory, shares: Mapping[str, Fraction]) -> int:
    """Bytes of these tensors that decoding a token reads, rounded up for each; ``shares`` as ``active_shares`` gives them."""
    return sum(math.ceil(shares[n] * choice_bytes(choice, inventory.tensors[n])) for n, choice in choices.items())


def check_limit(what: str, limit: int, smallest: int, largest: int) -> None:
    """Raise BudgetError for a budget of bytes below the smallest plan or above the largest; says both."""
    if smallest <= limit <= largest:
        return
    where = "below the smallest" if limit < smallest else "above the largest"
    raise BudgetError(
        f"{what} {limit:,} ({shown(limit)}): {where} plan; the smallest takes {smallest:,} bytes ({shown(smallest)}), the "
        f"largest, all that may be packed in 16 bits, {largest:,} ({shown(largest)}); give one between them"
    )


def choice_bytes(choice: Choice, info: TensorInfo) -> int:
    """Bytes of a tensor's data once it is stored as chosen."""
    fmt = format_of(choice, info.name)
    return _data_bytes(fmt, info.shape) if fmt else info.nbytes


@cache
def _data_bytes(fmt: Format, shape: tuple[int, ...]) -> int:
    """A large model has 36,000 experts of a few shapes, each asked for in every format."""
    return fmt.nbytes(shape)


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
        takes_active: it keeps to ``Budget.active``.
        reads_profile: it looks at ``Evidence.kurtosis``; with others the command line refuses a profile.
        reads_evidence: it looks at evidence that ``calibrate`` wrote; with others the command line refuses it.
    """

    name: ClassVar[str]
    takes_size: ClassVar[bool] = False
    takes_active: ClassVar[bool] = False
    reads_profile: ClassVar[bool] = False
    reads_evidence: ClassVar[bool] = False

    @abstractmethod
    def choose(self, inventory: Inventory, evidence: Evidence, budget: Budget) -> Mapping[str, Choice] | Decision:
        """A choice for each of ``budget.free(inventory)``, in a ``Decision`` where there is more to say.

        Raises:
            PlanError: evidence is missing, or the budget too small; says what to do.
        """

    def claims(self, inventory: Inventory, evidence: Evidence) -> Collection[str]:
        """Tensors that defaults keep and that this policy decides all the same, where they can be quantized."""
        return ()

    def kinds(self, evidence: Evidence) -> tuple[str, ...]:
        """Of formats that it chooses from unless it is told to, letters of ``formats.kinds``: codebooks, so that a rule gives the same
        bytes whatever else was measured."""
        return USUAL

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
