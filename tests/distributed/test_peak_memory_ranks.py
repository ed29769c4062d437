"""The plan's memory against what a step of a model of 105 million parameters holds at most, spread over two ranks, on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from megatron_ranks import in_a_layout_of_its_own
from rank_pool import RankPool

from engine.ranks import Ranks
from tests.peak import held, measure, planned

BFLOAT16 = "model.dtype=bfloat16"
SPREAD = {
    "sharded": ["backend=torch"],
    "sharded, bfloat16": ["backend=torch", BFLOAT16],
    "sharded, LoRA": ["backend=torch", "model.lora.enabled=true"],
    "tensor, bfloat16": ["backend=megatron", "backend.tensor_parallel=2", BFLOAT16],
    "pipeline, bfloat16": ["backend=megatron", "backend.pipeline_parallel=2", BFLOAT16],
    "optimizer, bfloat16": ["backend=megatron", BFLOAT16],
}


@in_a_layout_of_its_own
def measured(ranks: Ranks, words: Sequence[str]) -> dict[str, Any]:
    return measure(list(words), ranks)


@pytest.mark.parametrize("words", SPREAD.values(), ids=SPREAD)
def test_the_formulas_say_what_the_rank_that_needs_most_holds(two_ranks: RankPool, words: list[str]) -> None:
    found = max(two_ranks(measured, words), key=lambda rank: rank["peak"])
    assert planned(found) == held(found)
    assert found["kept"] == pytest.approx(found["state"], rel=1e-3)
