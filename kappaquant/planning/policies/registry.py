"""Policies by name: those of this package, and any that is registered; the command line takes its options from here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from kappaquant.errors import PlanError, RegistrationError
from kappaquant.planning.policies.base import Policy
from kappaquant.planning.policies.kurtosis import Kurtosis
from kappaquant.planning.policies.recipe import Recipe
from kappaquant.planning.policies.sensitivity import Sensitivity
from kappaquant.planning.policies.uniform import Uniform

_POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (Uniform, Recipe, Kurtosis, Sensitivity)}


def register(policy: type[Policy]) -> None:
    """Let ``make_plan`` and the command line know a policy, in this process.

    Raises:
        RegistrationError: no dataclass with a name, a field that ``option`` did not make, or the name is another policy's already.
    """
    what = f"policy {policy.__name__}"
    if not is_dataclass(policy) or not isinstance(getattr(policy, "name", None), str):
        raise RegistrationError(f"{what}: must be a frozen dataclass, and have a name")
    for parameter in fields(policy):
        if "help" not in parameter.metadata:
            raise RegistrationError(
                f"{what}: its field {parameter.name!r} is no option; make it by option(default, help)"
            )
    if _POLICIES.setdefault(policy.name, policy) is not policy:
        raise RegistrationError(
            f"policy {policy.name!r} is taken by {_POLICIES[policy.name].__name__}; give yours another name"
        )


def unregister(name: str) -> None:
    """Take a registered policy back."""
    del _POLICIES[name]


def policies() -> dict[str, type[Policy]]:
    """All that are registered, by name."""
    return dict(_POLICIES)


def policy_by_name(name: str, options: Mapping[str, Any]) -> Policy:
    """The policy of this name with these parameters. Raises PlanError for an unknown name or parameter."""
    if name not in _POLICIES:
        raise PlanError(f"policy {name!r} is unknown; the policies are {', '.join(_POLICIES)}")
    return _POLICIES[name].made(options)
