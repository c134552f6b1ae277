"""Divergence of kept logits: that of torch.distributions, a lower bound for a top k, exact to the last digits; never of NaN."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from kappaquant.errors import UnsupportedError
from kappaquant.evaluate.measures.logits import diverge, keep_top


def test_divergence_against_torch_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    here, there = (torch.randn(9, 200, generator=generator) * scale for scale in (1.0, 6.0))
    predicted = torch.randint(200, (9,), generator=generator)
    exact = kl_divergence(Categorical(logits=there.double()), Categorical(logits=here.double()))
    found = diverge(keep_top(there, predicted, 200), here, predicted)
    assert found["kld"].double().numpy() == pytest.approx(exact.numpy(), rel=1e-5)
    assert found["loss"].numpy() == pytest.approx(-Categorical(logits=here).log_prob(predicted).numpy(), rel=1e-5)
    assert found["agreed"].tolist() == (here.argmax(-1) == there.argmax(-1)).byte().tolist()
    assert diverge(keep_top(there, predicted, 1000), here, predicted)["kld"].equal(found["kld"])


def test_a_top_k_is_a_lower_bound_and_one_outcome_more() -> None:
    generator = torch.Generator().manual_seed(1)
    here, there = (torch.randn(9, 200, generator=generator) * 3 for _ in range(2))
    predicted, before = torch.zeros(9, dtype=torch.int64), torch.zeros(9)
    for k in (1, 10, 100, 199, 200):
        top = keep_top(there, predicted, k)
        kld = diverge(top, here, predicted)["kld"]
        assert bool((kld >= before - 1e-5).all())
        before = kld
        merged = []
        for logits in (there, here):
            p, ids = logits.double().softmax(-1), top["ids"].long()
            rest = p.scatter(-1, ids, 0).sum(-1, keepdim=True)
            merged.append(Categorical(probs=torch.cat([p.gather(-1, ids), rest], -1)))
        assert kld.double().numpy() == pytest.approx(kl_divergence(*merged).numpy(), rel=1e-4)


def test_a_certain_model_loses_no_digits_in_the_rest() -> None:
    there, here = torch.tensor([[60.0, 0, 0, 0]]), torch.tensor([[60.0, 1, 1, 1]])
    predicted = torch.tensor([0])
    top = keep_top(there, predicted, 1)
    assert top["log_rest"].item() == pytest.approx(math.log(3) - 60, rel=1e-6)
    assert diverge(top, there, predicted)["kld"].item() == 0
    assert abs(diverge(top, here, predicted)["kld"].item()) < 1e-12


def test_logits_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="NaN or infinity"):
        keep_top(torch.tensor([[1.0, math.nan]]), torch.tensor([0]), 2)
    top = keep_top(torch.tensor([[1.0, 2.0]]), torch.tensor([0]), 2)
    with pytest.raises(UnsupportedError, match="KL divergence is infinite"):
        diverge(top, torch.tensor([[-math.inf, 1.0]]), torch.tensor([1]))
    never = torch.tensor([[1.0, 2.0, -math.inf]])  # impossible for both: no difference
    assert diverge(keep_top(never, torch.tensor([0]), 3), never, torch.tensor([0]))["kld"].item() == 0
    assert diverge(keep_top(never, torch.tensor([0]), 2), never, torch.tensor([0]))["kld"].item() == 0
