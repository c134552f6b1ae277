"""An architecture of its own, from this one file: registered, planned, levelled, quantized and opened, nothing else changed."""

import builders
import pytest
import torch
from headers import infos

import kappaquant
from kappaquant.models.architectures.base import Architecture, register, unregister
from kappaquant.models.inventory import Inventory
from kappaquant.models.roles import Role, fused_groups, kind_of, known_architecture, role_of, tied_embeddings
from kappaquant.planning.sizes import summary

CONFIG = {"model_type": "toy_mixer", "architectures": ["ToyMixerForCausalLM"], "dtype": "bfloat16"}
BLOCK = "model.layers.0.mixer."
WIDE, NARROW, OUT, DOWN = (BLOCK + f"{name}.weight" for name in ("read_a", "read_b", "write", "squeeze"))
STACK = "model.layers.0.mixer.bank"
EYE, DRAFT = "model.eye.blocks.0.lens.weight", "draft.layers.0.mixer.write.weight"
SHAPES = {
    "model.embed_tokens.weight": (64, 256),
    WIDE: (128, 256),
    NARROW: (128, 256),
    OUT: (256, 128),
    DOWN: (256, 128),
    STACK: (4, 128, 256),
    EYE: (128, 128),
    DRAFT: (256, 128),
    BLOCK + "norm.weight": (256,),
    "lm_head.weight": (64, 256),
}
REASON = "squeeze: everything passes through it"
TOY = Architecture(
    "toy_mixer",
    ("ToyMixerForCausalLM",),
    in_layer={
        r"mixer\.read_a\.weight": Role.ATTENTION_Q,
        r"mixer\.read_b\.weight": Role.ATTENTION_K,
        r"mixer\.write\.weight": Role.ATTENTION_O,
        r"mixer\.squeeze\.weight": Role.MLP_DOWN,
        r"mixer\.bank": Role.ROUTED_UP,
    },
    fused=((Role.ATTENTION_Q, Role.ATTENTION_K),),
    stacked=(Role.ROUTED_UP,),
    keep={Role.MLP_DOWN: REASON, Role.MTP: ""},
    tied_embeddings=True,
    vision=("eye",),
    vision_linear=(r".*\.lens\.weight",),
    mtp=("draft",),
)


@pytest.fixture
def toy():
    register(TOY)
    yield TOY
    unregister("toy_mixer")


def test_without_it_the_architecture_is_unknown_and_its_names_say_nothing():
    tensors = infos(SHAPES)
    assert not known_architecture(CONFIG)
    assert not tied_embeddings(CONFIG)
    assert {role_of(name, tensors[name], CONFIG) for name in (WIDE, NARROW, OUT, DOWN, STACK)} == {Role.UNKNOWN}
    plan = kappaquant.make_plan(tensors, CONFIG, "uniform")
    assert "unknown architecture 'toy_mixer'" in plan.warnings[0]


def test_roles_reasons_towers_and_fused_sets(toy):
    inventory = Inventory(infos(SHAPES), CONFIG)
    kinds = inventory.kinds
    assert [kinds[name].role for name in (WIDE, NARROW, OUT, DOWN)] == [
        Role.ATTENTION_Q, Role.ATTENTION_K, Role.ATTENTION_O, Role.MLP_DOWN,
    ]  # fmt: skip
    assert [name for name, kind in kinds.items() if not kind.keep] == [WIDE, NARROW, OUT, STACK, DRAFT]
    assert (kinds[DOWN].keep, kinds[DOWN].refuse) == (REASON, "")
    assert (kinds[STACK].role, kinds[STACK].expert, kinds[STACK].layer) == (Role.ROUTED_UP, None, 0)
    assert (kinds[EYE].role, kinds[EYE].refuse) == (Role.VISION, "")
    assert (kinds[DRAFT].role, kinds[DRAFT].part) == (Role.MTP, Role.ATTENTION_O)
    assert kinds["lm_head.weight"].refuse.startswith("lm_head is tied")
    assert inventory.fused == fused_groups(inventory.tensors, CONFIG) == [(WIDE, NARROW)]
    assert inventory.architecture is toy


def test_another_architecture_does_not_see_its_names(toy):
    info = infos(SHAPES)[WIDE]
    assert kind_of(WIDE, info, {"model_type": "llama"}).role is Role.UNKNOWN
    assert not tied_embeddings({"model_type": "llama"})


def test_the_plan_keeps_what_it_keeps_and_levels_what_it_fuses(toy):
    tensors = infos(SHAPES)
    plan = kappaquant.make_plan(tensors, CONFIG, "uniform", bits=3, overrides=[("*.read_b.weight", 5)])
    assert plan.warnings == ()
    assert (plan.bits(DOWN), plan.choices[DOWN].why) == (16, REASON)
    assert [plan.bits(name) for name in (WIDE, NARROW, OUT, STACK)] == [3, 5, 3, 3]
    fused = kappaquant.make_plan(tensors, CONFIG, "uniform", bits=3, overrides=[("*.read_b.weight", 5)], fuse=True)
    assert [fused.bits(name) for name in (WIDE, NARROW, OUT, STACK)] == [5, 5, 3, 3]
    assert NARROW in fused.choices[WIDE].why
    with pytest.raises(kappaquant.PlanError, match="tied to the embedding"):
        kappaquant.make_plan(tensors, CONFIG, "uniform", overrides=[("lm_head.weight", 4)])
    sizes = {row.name: row for row in summary(plan, tensors, CONFIG).per_tensor}
    assert sizes["model.embed_tokens.weight"].active == 1  # the head reads all of it
    assert sizes[EYE].active == sizes[DRAFT].active == 0


def test_quantized_and_opened(toy, tmp_path):
    generator = torch.Generator().manual_seed(0)
    content = {name: torch.randn(*shape, generator=generator).bfloat16() for name, shape in SHAPES.items()}
    folder = builders.write_source(tmp_path / "source", content, config=CONFIG)
    checkpoint = builders.quantize(folder, tmp_path / "output")
    packed = {name for name in checkpoint.keys() if checkpoint.format_of(name) is not None}
    assert packed == {WIDE, NARROW, OUT, STACK, DRAFT}
    assert checkpoint.entry(STACK).info.shape == SHAPES[STACK]
    assert REASON in (tmp_path / "output" / "kappaquant.json").read_text()
