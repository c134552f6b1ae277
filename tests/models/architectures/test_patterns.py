"""Shared tables: no name is read twice, and every fused role has a pattern."""

import re
from itertools import combinations

import pytest

from kappaquant.models.architectures import patterns

TABLES = ("ATTENTION", "MLP", "EXPERTS", "SHARED_EXPERT", "GATED_DELTA_NET")


def example(pattern):
    """A name that the pattern matches, for rows whose only freedom is the expert's number."""
    return pattern.replace(r"(\d+)", "17").replace("\\", "")


def test_no_name_in_a_layer_has_two_roles():
    rows = [row for table in TABLES for row in getattr(patterns, table)]
    assert all(re.fullmatch(row, example(row)) for row in rows)
    assert not [(a, b) for a, b in combinations(rows, 2) if re.fullmatch(a, example(b)) or re.fullmatch(b, example(a))]


@pytest.mark.parametrize("table", TABLES)
def test_fused_roles_are_those_of_the_table(table):
    fused = {role for roles in getattr(patterns, f"FUSED_{table}") for role in roles}
    assert fused <= set(getattr(patterns, table).values())


def test_experts_stored_one_by_one_have_their_number():
    numbered = [row for row in patterns.EXPERTS if re.compile(row).groups]
    assert [patterns.EXPERTS[row] for row in numbered] == [
        patterns.Role.ROUTED_GATE,
        patterns.Role.ROUTED_UP,
        patterns.Role.ROUTED_DOWN,
    ]
    assert {patterns.EXPERTS[row] for row in patterns.EXPERTS if row not in numbered} >= set(patterns.STACKED)
