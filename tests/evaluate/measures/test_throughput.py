"""Speed of a checkpoint and of its original: contexts that fit, and figures that agree with one another."""

from __future__ import annotations

from typing import Any

import pytest

from kappaquant.errors import UnsupportedError
from kappaquant.evaluate.measures.throughput import cases, measure
from kappaquant.planning.sizes import active_shares


@pytest.mark.slow
def test_throughput_of_both_models(pair: Any) -> None:
    with pytest.raises(UnsupportedError, match="context = 4080: must be 1 to 4059, for 32 tokens follow"):
        cases(pair, [4080])
    assert cases(pair) == [(1, 32), (1, 1024)]
    ours, theirs = measure(pair, cases(pair, [8]), "cpu", "int8", lambda *_: None)
    assert (ours.model, theirs.model, ours.context) == ("checkpoint", "original", 8)
    assert theirs.token_bytes == 2 * sum(
        info.numel * share
        for info, share in zip(
            pair.source.tensors.values(), active_shares(pair.source.tensors, pair.source.config).values(), strict=True
        )
    )
    assert ours.token_bytes < theirs.token_bytes / 2
    for row in (ours, theirs):
        assert row.roofline_share == pytest.approx(
            row.decode_tokens_per_s * row.token_bytes / row.bandwidth_gb_per_s / 1e9
        )
        assert 0 < row.roofline_share < 1
        assert row.peak_gib > 0.1
        assert row.first_token_ms == pytest.approx(8 / row.prefill_tokens_per_s * 1e3)
    assert ours.bandwidth_gb_per_s == theirs.bandwidth_gb_per_s > 0.1
