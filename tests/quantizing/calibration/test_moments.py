"""Second moments: of layers that share an input, of each expert's own tokens, and drawn towards all where an expert saw few."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kappaquant.quantizing.calibration.moments import Routed, Sum, watched


class Two(nn.Module):
    """Two layers that read one input, and a third that reads what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.q(x) * self.k(x))


@torch.no_grad()
def test_layers_that_read_the_same_share_a_sum() -> None:
    model, pieces = Two(), [torch.randn(3, 5, 8), torch.randn(2, 5, 8)]
    with watched(dict(model.named_children())) as (sums, routed):
        for x in pieces:
            model(x)
    flat = torch.cat([x.reshape(-1, 8) for x in pieces])
    assert sums["q"] is sums["k"]
    assert not routed
    assert (sums["q"].count, sums["o"].count) == (25, 25)
    torch.testing.assert_close(sums["q"].gram, flat.t() @ flat)
    inner = model.q(flat) * model.k(flat)
    torch.testing.assert_close(sums["o"].gram, inner.t() @ inner)
    model(pieces[0])
    assert sums["q"].count == 25  # the hooks are gone


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(3, 12, 8)), nn.Parameter(torch.randn(3, 8, 6))
        self.act_fn = nn.functional.silu


@torch.no_grad()
def test_an_expert_sees_its_own_tokens() -> None:
    module, x = Experts(), torch.randn(6, 8)
    index = torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0], [0, 1], [0, 1]])  # expert 2 sees none
    routed = Routed(module, [x[:4], x[4:]], [index[:4], index[4:]])
    one, every = routed.sums("gate_up_proj")
    assert [one(expert).count for expert in range(3)] == [6, 6, 0]
    torch.testing.assert_close(every.gram, x.t() @ x)
    torch.testing.assert_close(one(2).towards(every), x.t() @ x / 6)  # all it has is the layer's
    gate, up = (x @ module.gate_up_proj[0].t()).chunk(2, dim=-1)
    inner = nn.functional.silu(gate) * up
    one, every = routed.sums("down_proj")
    torch.testing.assert_close(one(0).gram, inner.t() @ inner)
    assert every.count == 12


def test_few_inputs_are_drawn_towards_all() -> None:
    own, every = Sum(torch.eye(4) * 12, 12), Sum(torch.ones(4, 4) * 100, 100)
    torch.testing.assert_close(own.towards(every), 0.75 * torch.eye(4) + 0.25 * torch.ones(4, 4))
