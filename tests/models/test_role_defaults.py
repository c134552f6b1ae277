"""The defaults of roles: each has its facts, and what is never packed says why it is kept."""

from kappaquant.models.role_defaults import ROLES, Role


def test_every_role_has_a_family():
    assert ROLES.keys() == set(Role)
    assert all(facts.family for facts in ROLES.values())


def test_what_cannot_be_packed_has_a_reason():
    assert all(facts.keep for facts in ROLES.values() if not facts.packable)
