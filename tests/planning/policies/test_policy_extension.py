"""A new policy that keeps to a byte budget, from this file alone: the API and the command line have it, with its options."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_models
from typer.testing import CliRunner

import kappaquant
from kappaquant import cli
from kappaquant.commands.options import policy_of
from kappaquant.errors import PlanError, RegistrationError
from kappaquant.models.inventory import Inventory
from kappaquant.planning.plan import Choice
from kappaquant.planning.policies.base import Budget, Evidence, Policy, option
from kappaquant.planning.policies.registry import register, unregister
from kappaquant.planning.sizes import file_bytes


@dataclass(frozen=True)
class Filling(Policy):
    """``floor`` bits for all, then one more for one tensor after the other, as long as the budget lasts."""

    name = "filling"
    takes_size = True
    floor: int = option(2, "bits that each tensor has at least.")

    def choose(self, inventory: Inventory, evidence: Evidence, budget: Budget) -> dict[str, Choice]:
        def bits_for(name: str, bits: int) -> Choice:
            return budget.choice(inventory.tensors[name], bits, f"{bits} bits fit")

        choices = {name: bits_for(name, self.floor) for name in budget.free(inventory)}
        tensors, left = inventory.tensors, budget.left(inventory)
        used = sum(budget.nbytes(choice, tensors[name]) for name, choice in choices.items())
        if left is None or used > left:
            raise PlanError(f"the filling policy needs {used:,} bytes, and has {left} of {budget.size}; give --size")
        for bits in range(self.floor + 1, 9):
            for name in choices:
                more = bits_for(name, bits)
                cost = budget.nbytes(more, tensors[name]) - budget.nbytes(choices[name], tensors[name])
                if used + cost <= left:
                    choices[name], used = more, used + cost
        return choices


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register(Filling)
    yield
    unregister("filling")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_tiny("qwen3_moe", tmp_path_factory.mktemp("policy") / "source")


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(cli.build(), [str(argument) for argument in arguments])
    return done.exit_code, done.output + (str(done.exception) if done.exception else "")


def test_it_keeps_to_its_budget(source: Path) -> None:
    opened = kappaquant.open_source(source)
    sizes = [300_000, 350_000, 400_000]
    plans = [kappaquant.make_plan(opened.tensors, opened.config, "filling", size=size, floor=3) for size in sizes]
    for size, plan in zip(sizes, plans, strict=True):
        used = file_bytes(opened.shards, plan.format_of)
        assert 0.97 * size < used <= size
        assert plan.inputs == {"floor": 3, "size": size, "overrides": [], "fuse": False}
    with pytest.raises(PlanError, match=r"needs .* bytes, and has -.* of 1000; give --size"):
        kappaquant.make_plan(opened.tensors, opened.config, "filling", size=1000)


def test_what_overspends_is_refused(source: Path) -> None:
    opened = kappaquant.open_source(source)
    with pytest.raises(PlanError, match=r"the filling policy's plan takes .* bytes, more than the 280,000 allowed"):
        kappaquant.make_plan(
            opened.tensors, opened.config, "filling", size=280_000, fuse=True, overrides=[("*.v_proj.weight", 8)]
        )


def test_the_command_line_has_it_and_its_options(source: Path, tmp_path: Path) -> None:
    code, text = run("plan", "--help")
    assert code == 0
    assert "filling" in text
    assert "--floor" in text
    code, text = run("plan", source, "--policy", "filling", "--size", "0.3MB", "--floor", 3, "-o", tmp_path / "p.json")
    assert code == 0, text
    plan = json.loads((tmp_path / "p.json").read_text())
    assert (plan["policy"], plan["inputs"]["floor"], plan["inputs"]["size"]) == ("filling", 3, 300_000)
    code, text = run("quantize", source, "-o", tmp_path / "out", "--policy", "filling", "--size", "280KiB")
    assert code == 0, text
    stored = kappaquant.open_checkpoint(tmp_path / "out")
    assert sum(stored.nbytes(name) for name in stored.keys()) <= 280 * 1024


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--policy", "filling", "--size", "much"), "--size 'much': write a number and a unit"),
        (("--policy", "filling", "--size", "1MB", "--floor", "x"), "--floor 'x': cannot be read; write it like 2"),
        (("--policy", "uniform", "--floor", "3"), "option 'floor': the uniform policy has no such option; it has bits"),
        (("--policy", "uniform", "--size", "1MB"), "the uniform policy keeps to no size"),
    ],
)
def test_bad_options(source: Path, options: tuple[str, ...], message: str) -> None:
    code, text = run("plan", source, *options)
    assert code == 1  # main() makes one line and exit code 2 of it
    assert message in text


def test_a_name_is_given_once() -> None:
    @dataclass(frozen=True)
    class Other(Filling):
        name = "uniform"

    with pytest.raises(RegistrationError, match="policy 'uniform' is taken by Uniform"):
        register(Other)


def test_what_is_no_policy_is_refused() -> None:
    class Nameless(Filling):
        name = None  # type: ignore[assignment]

    class Bare(Policy):
        name = "bare"

    @dataclass(frozen=True)
    class Loose(Filling):
        name = "loose"
        more: int = 3

    for policy, message in ((Nameless, "have a name"), (Bare, "frozen dataclass"), (Loose, "'more' is no option")):
        with pytest.raises(RegistrationError, match=message):
            register(policy)


def test_options_of_a_policy_are_read_as_what_they_are_and_are_not_the_commands_own() -> None:
    @dataclass(frozen=True)
    class Flagged(Filling):
        name = "flagged"
        loud: bool = option(False, "says more.")

    @dataclass(frozen=True)
    class Clashing(Filling):
        name = "clashing"
        size: int = option(3, "is the command's.")

    register(Flagged)
    try:
        assert policy_of("flagged", {"loud": "false"}).inputs()["loud"] is False
        assert policy_of("flagged", {"loud": "true"}).inputs()["loud"] is True
        with pytest.raises(PlanError, match="--loud 'yes': cannot be read"):
            policy_of("flagged", {"loud": "yes"})
    finally:
        unregister("flagged")
    register(Clashing)
    try:
        with pytest.raises(RegistrationError, match="option 'size' is one of the command's own"):
            cli.build()
    finally:
        unregister("clashing")
