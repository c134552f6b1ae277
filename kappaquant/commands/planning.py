"""What the options of plan and quantize say of a plan: policy, evidence, and budgets of bytes."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kappaquant.commands.options import group_choice, implied_policy, kurtosis_of, policy_of
from kappaquant.errors import BudgetError, PlanError
from kappaquant.formats.kinds import CODEBOOK, KINDS, TRELLIS_CODE
from kappaquant.formats.trellis import TrellisFormat
from kappaquant.planning.policies.base import Evidence, Policy
from kappaquant.planning.policies.registry import policies

if TYPE_CHECKING:
    from kappaquant.planning.budgets import Fit
    from kappaquant.planning.plan import Plan
    from kappaquant.planning.sensitivity import Sensitivities
    from kappaquant.sources.source import Source

logger = logging.getLogger("kappaquant")

PolicyOpt = Annotated[
    str | None,
    typer.Option(
        help="{policies}; default the one that has the options given, such as uniform for --bits, else recipe, or sensitivity with --evidence."
    ),
]
EvidenceOpt = Annotated[Path | None, typer.Option(help="Sensitivities that calibrate measured of this model.")]
SizeOpt = Annotated[
    str | None,
    typer.Option(help="What the weight files may take, headers included, such as 18GB (10⁹) or 17.5GiB (2³⁰)."),
]
BitsPerWeightOpt = Annotated[
    float | None, typer.Option("--bits-per-weight", help="The size in bits per weight, of all weights, such as 3.5.")
]
ActiveOpt = Annotated[
    str | None, typer.Option(help="What decoding a token may read of weights, such as 2.2GB; with or without a size.")
]
FitOpt = Annotated[
    str | None,
    typer.Option(
        help="Memory for weights, keys and values of --context tokens, and a reserve, such as 24GiB; says the size."
    ),
]
ContextOpt = Annotated[int | None, typer.Option(help="Tokens whose keys and values --fit makes room for.")]


@dataclass(frozen=True)
class Limits:
    """Budgets, as text."""

    size: str | None = None
    bits_per_weight: float | None = None
    active: str | None = None
    fit: str | None = None
    context: int | None = None

    def bytes_of_files(self, source: Source) -> int | None:
        """The size, however it was said. Raises PlanError where it is said twice."""
        from kappaquant.planning.budgets import parse_size, size_of_bits

        said = [
            f"--{name.replace('_', '-')}"
            for name in ("size", "bits_per_weight", "fit")
            if getattr(self, name) is not None
        ]
        if len(said) > 1:
            raise PlanError(f"{said[0]} and {said[1]} both say a size; give one of them")
        if self.size is not None:
            return parse_size(self.size, "--size")
        if self.bits_per_weight is not None:
            return size_of_bits(self.bits_per_weight, source.tensors)
        shared = self.fitted(source)
        return shared.weights if shared else None

    def bytes_for_a_token(self) -> int | None:
        from kappaquant.planning.budgets import parse_size

        return None if self.active is None else parse_size(self.active, "--active")

    def fitted(self, source: Source) -> Fit | None:
        """How --fit is shared. Raises PlanError without --context, or the other way round; BudgetError where nothing is left."""
        from kappaquant.planning.budgets import fit, parse_size

        if self.fit is None and self.context is None:
            return None
        if self.fit is None or self.context is None:
            given, missing = ("--fit", "--context") if self.context is None else ("--context", "--fit")
            raise PlanError(f"{given}: is of no effect without {missing}, such as --fit 24GiB --context 32768")
        return fit(parse_size(self.fit, "--fit"), self.context, source.config)


@dataclass(frozen=True)
class PlanSettings:
    """What the options of a command say of a plan.

    Attributes:
        kinds: what --formats says; None where it was not given.
        container: id of the one that the plan is for.
    """

    policy: str | None
    policy_options: dict[str, str]
    profile: Path | None
    evidence: Path | None
    limits: Limits
    group_size: str
    overrides: list[str] | None
    kinds: str | None = None
    container: str = "kappaquant"

    def plan(self, source: Source, fuse: bool, target: str | None = None) -> Plan:
        from kappaquant.planning.make import make_plan, parse_override

        default = implied_policy(self.policy_options, "sensitivity" if self.evidence else "recipe")
        policy = policy_of(self.policy or default, self.policy_options)
        size, active = self.limits.bytes_of_files(source), self.limits.bytes_for_a_token()
        known = evidence_of(self.evidence, source, policy)
        try:
            return make_plan(
                source.tensors, source.config, policy, profile=kurtosis_of(self.profile, policy),
                sensitivity=known, size=size, active=active, shards=source.shards,
                group_size=group_choice(self.group_size), kinds=self._kinds(policy, known), overrides=[parse_override(text) for text in self.overrides or []],
                fuse=fuse, target=target,
            )  # fmt: skip
        except BudgetError as problem:
            if shared := self.limits.fitted(source):
                raise BudgetError(f"--fit: {shared}; {problem}") from None
            raise

    def _kinds(self, policy: Policy, known: Sensitivities | None) -> list[str]:
        """Letters that --formats says; without it those of the policy's that the container holds."""
        from kappaquant.checkpoints.open import container_by_id

        if self.kinds is not None:
            return self.kinds.split(",")
        held, wanted = container_by_id(self.container).kinds, policy.kinds(Evidence(sensitivity=known))
        kinds = [kind for kind in wanted if kind in held]
        if not kinds:
            has, holds = (" and ".join(f"{KINDS[kind].name} ({kind})" for kind in some) for some in (wanted, held))
            raise PlanError(
                f"{self.container} holds {holds}, the evidence has {has} alone: calibrate --formats {','.join(held)}, or write another --format"
            )
        return kinds

    def of_kinds(self, made: Plan) -> str:
        """Which kinds of formats a plan by evidence was chosen from, and why not from all; empty where --formats said so."""
        from kappaquant.checkpoints.open import container_by_id

        if self.kinds is not None or "evidence" not in made.inputs:
            return ""
        names = {kind: f"{KINDS[kind].name} ({kind})" for kind in KINDS}
        chosen = " and ".join(names[kind] for kind in made.kinds)
        missing = " and ".join(name for kind, name in names.items() if kind not in made.kinds)
        if not missing:
            return f"formats: {chosen}, all that the evidence has; --formats takes fewer"
        if set(made.kinds) == set(container_by_id(self.container).kinds):
            return f"formats: {chosen} alone: {self.container} holds no {missing}"
        return f"formats: {chosen} alone: the evidence has no {missing}; calibrate --formats {','.join(KINDS)} measures all"


def evidence_of(path: Path | None, source: Source, policy: Policy) -> Sensitivities | None:
    """The evidence in a file, for a policy that reads it.

    Raises:
        PlanError: the policy reads none, the file is none, or it is of another model or revision.
    """
    from kappaquant.planning.sensitivity import Sensitivities

    if path is None:
        return None
    if not policy.reads_evidence:
        readers = " or ".join(name for name, other in policies().items() if other.reads_evidence)
        raise PlanError(
            f"--evidence {path}: the {policy.name} policy reads no evidence; take --policy {readers}, or leave it out"
        )
    known = Sensitivities.load(path)
    check_model(path, known, source)
    return known


def check_model(path: Path, known: Sensitivities, source: Source) -> None:
    """Raise PlanError for evidence of another model. Of a source that streams only the revision is known without its weights."""
    from kappaquant.quantizing.calibration.written import model_of

    revisions = known.revision, source.revision
    own = f"{source.name} (revision {source.revision or 'unknown'})"
    same = None in revisions or revisions[0] == revisions[1]
    if same and source.folder is not None:
        model = model_of(source)
        own, same = str(model), model.sha256 == known.sha256
    if not same:
        raise PlanError(
            f"{path}: evidence of another model or revision: of {known.model} (revision {known.revision or 'unknown'}, "
            f"{known.sha256[:12]}), to be planned is {own}; calibrate this very model"
        )
    if source.folder is None and known.revision is None:
        logger.warning("%s: was measured in a folder; whether %s is the same model is not known", path, own)


def check_files(plan: Plan, source: Source, container: str) -> None:
    """Raise BudgetError where another container than plans are made for takes more bytes than the plan's size."""
    from kappaquant.checkpoints.open import container_by_id

    size = plan.inputs.get("size")
    if size is not None and (taken := container_by_id(container).output_bytes(source.shards, plan.format_of)) > size:
        raise BudgetError(
            f"--format {container}: the weight files take {taken:,} bytes in this format, more than the {size:,} allowed; give a "
            "smaller size, or the kappaquant format"
        )


def warn_of_prediction(plan: Plan) -> None:
    """Say so where a plan's divergence was predicted of calibrated rounding, and is not what will be written."""
    match plan.inputs:
        case {"evidence": {"effort": "calibrated"}, "predicted_kld": predicted}:
            logger.warning(
                "the plan's %.3g nats are predicted of calibrated rounding; without --effort calibrated, or --calibration, "
                "expect several times as much",
                predicted,
            )


def warn_of_slow_rounding(plan: Plan, device: str | None) -> None:
    """Say so where a plan has trellis codes and torch would have to search for them."""
    from kappaquant.files.processes import choose_device
    from kappaquant.quantizing.calibration.trials import kinds_by_kernels

    formats = filter(None, map(plan.format_of, plan.choices))
    if not any(isinstance(fmt.rowwise, TrellisFormat) for fmt in formats):
        return
    where = choose_device(device)
    if TRELLIS_CODE not in kinds_by_kernels(where):
        logger.warning(
            "the plan has trellis codes, which no kernel rounds on %s: torch takes tens of times as long; use --device cpu where the native "
            "core is built, or plan with --formats %s",
            where, CODEBOOK,
        )  # fmt: skip
