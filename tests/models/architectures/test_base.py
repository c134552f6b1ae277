"""The registry of architectures: found by itself, asked by config.json, never two of one model_type."""

import pkgutil
from dataclasses import replace
from importlib import import_module

import pytest

from kappaquant.errors import RegistrationError
from kappaquant.models import architectures
from kappaquant.models.architectures.base import Architecture, find, register, registered, union, unregister
from kappaquant.models.architectures.patterns import ANYWHERE, ATTENTION, STACKED
from kappaquant.models.role_defaults import Role

TOY = Architecture("toy", ("ToyForCausalLM",), in_layer={r"mixer\.w\.weight": Role.ATTENTION_Q})


@pytest.fixture
def toy():
    register(TOY)
    yield TOY
    unregister("toy")


def test_every_file_of_the_folder_is_found():
    files = {module.name for module in pkgutil.iter_modules(architectures.__path__)} - {"base", "patterns"}
    given = [
        architecture
        for file in sorted(files)
        for architecture in import_module(f"{architectures.__name__}.{file}").ARCHITECTURES
    ]
    assert list(registered().values()) == given
    assert {"llama", "mixtral", "qwen3_5_moe", "gemma3_text"} <= registered().keys()


def test_what_is_registered_can_be_looked_at_only():
    with pytest.raises(TypeError):
        registered()["llama"] = TOY  # type: ignore[index]


def test_found_by_model_type_else_by_class(toy):
    assert find({"model_type": "toy"}) is toy
    assert find({"architectures": ["Other", "ToyForCausalLM"]}) is toy
    assert find({"model_type": "other", "architectures": ["ToyForCausalLM"]}) is None
    assert find({"model_type": None, "architectures": None}) is None


def test_the_same_content_twice_is_one(toy):
    register(replace(TOY))
    assert registered()["toy"] is toy


def test_other_content_under_a_taken_model_type_is_refused(toy):
    with pytest.raises(RegistrationError, match=r"'toy' is registered already.*unregister"):
        register(replace(TOY, tied_embeddings=True))
    with pytest.raises(RegistrationError, match="'llama'"):
        register(replace(TOY, model_type="llama"))
    assert registered()["toy"] is toy
    assert "LlamaForCausalLM" in registered()["llama"].classes


def test_what_is_not_registered_cannot_be_unregistered():
    with pytest.raises(RegistrationError, match=r"'toy' is not registered; there are .*llama"):
        unregister("toy")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": ""}, "without model_type"),
        ({"classes": "ToyForCausalLM"}, "classes is 'ToyForCausalLM'; give a tuple"),
        ({"in_layer": {"q": "attention.q"}}, "'attention.q' is no Role"),
        ({"in_layer": {"(": Role.ATTENTION_Q}}, "no regular expression"),
        ({"anywhere": {"*": Role.NORM}}, "no regular expression"),
        ({"vision_linear": ("[",)}, "no regular expression"),
        ({"in_layer": {r"(a|b)\.(\d+)": Role.ROUTED_UP}}, "2 groups"),
        ({"fused": ((Role.MLP_UP, Role.MLP_GATE), (Role.MLP_UP,))}, "mlp.up is in two fused sets"),
    ],
)
def test_contradictions_are_refused(change, message):
    with pytest.raises(RegistrationError, match=message):
        replace(TOY, **change)


def test_the_union_reads_every_architectures_names_and_keeps_by_default_reasons():
    whole = union()
    for each in registered().values():
        assert each.in_layer.items() <= whole.in_layer.items()
        assert set(each.fused) <= set(whole.fused)
    assert (whole.keep, whole.stacked) == ({}, STACKED)
    assert whole.anywhere == ANYWHERE


def test_the_union_follows_the_registry_and_the_first_one_wins():
    before = union()
    q, k, v, gate = Role.ATTENTION_Q, Role.ATTENTION_K, Role.ATTENTION_V, Role.GDN_QKVZ
    rival = Architecture(
        "toy", (), in_layer={**dict.fromkeys(ATTENTION, Role.ROUTER), r"mixer\.w\.weight": q}, fused=((q, gate), (k,))
    )
    register(rival)
    try:
        assert union().in_layer == {**before.in_layer, r"mixer\.w\.weight": q}
        assert (q, k, v) in union().fused
        assert union().fused_set[gate] != union().fused_set[q]
    finally:
        unregister("toy")
    assert union() == before


def test_towers_have_the_names_that_are_given():
    plain = replace(TOY, vision=(), mtp=("draft",))
    assert not plain.vision_prefix.match("visual.blocks.0.attn.qkv.weight")
    assert TOY.vision_prefix.match("model.visual.blocks.0.attn.qkv.weight")
    assert plain.mtp_prefix.match("model.draft.layers.0.x")
    assert not plain.mtp_prefix.match("drafts.layers.0.x")
