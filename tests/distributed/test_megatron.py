"""The Megatron backend in every layout against the torch backend on one rank: the same losses, norms, weights and checkpoints."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import megatron_ranks
import pytest
from megatron_ranks import LAYOUTS, close, in_layout
from rank_pool import RankPool

from engine.config.schema import RunConfig

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

OPTIONS: dict[str, list[str]] = {
    "several micro-batches": ["data.packing.max_tokens=256"],
    "padded": ["data.packing.enabled=false", "train.micro_batch_size=2"],
    "decayed and clipped": ["optimizer.weight_decay=0.5", "train.max_grad_norm=0.5"],
    "recomputed": ["model.recompute=full"],
    "tied": ["model.init=random", "model.config_overrides.tie_word_embeddings=true"],
    "window": ["model.config_overrides.sliding_window=7"],
    "an empty bin": ["train.global_batch_size=3", "data.packing.max_tokens=256"],
    "prompts not shared": ["data.packing.share_prompts=false"],
}
ALL_OPTIONS_IN = ("tp+sp", "pp+virtual", "cp")
"""Layouts that are tried with every option."""
Trained = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def trained(recipes: Callable[..., RunConfig], ranks: dict[int, RankPool]) -> Trained:
    """Return what each rank of a layout says of a recipe, or, without one, what the torch backend says on one rank; each once."""

    def of(layout: str | None, *recipe: str) -> list[dict[str, Any]]:
        if layout is None:
            return ranks[1](megatron_ranks.train, recipes(*recipe))
        return ranks[LAYOUTS[layout][0]](megatron_ranks.train, recipes(*recipe, *in_layout(layout)))

    return functools.cache(of)


CASES = [(layout, algorithm, "several micro-batches") for layout in LAYOUTS for algorithm in ("sft", "dpo")]
CASES += [(layout, "sft", option) for layout in ALL_OPTIONS_IN for option in [*OPTIONS][1:-1]]
CASES += [(layout, "dpo", option) for layout in ALL_OPTIONS_IN for option in ("padded", "prompts not shared")]


@pytest.mark.parametrize(("layout", "algorithm", "option"), CASES)
def test_four_steps_equal_those_of_the_torch_backend(
    layout: str, algorithm: str, option: str, trained: Trained
) -> None:
    recipe = (algorithm, *OPTIONS[option])
    (expected,) = trained(None, *recipe)
    for found in trained(layout, *recipe):
        assert close(found["losses"], expected["losses"]), (found["losses"], expected["losses"])
        assert close(found["norms"], expected["norms"]), (found["norms"], expected["norms"])
        assert found["sums"][-1] == pytest.approx(expected["sums"][-1], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("layout", ["tp+sp", "cp", "pp+virtual", "dp"])
def test_packed_is_padded(layout: str, trained: Trained) -> None:
    packed, padded = (trained(layout, "dpo", *OPTIONS[option])[0] for option in ("several micro-batches", "padded"))
    assert close(packed["losses"], padded["losses"])
    assert close(packed["norms"], padded["norms"])


@pytest.mark.parametrize("layout", ["tp·pp", "cp", "dp", "pp+virtual"])
def test_evaluation_is_that_of_the_torch_backend(
    layout: str, recipes: Callable[..., RunConfig], ranks: dict[int, RankPool]
) -> None:
    expected = ranks[1](megatron_ranks.evaluate, recipes("sft"))[0]
    for found in ranks[LAYOUTS[layout][0]](megatron_ranks.evaluate, recipes("sft", *in_layout(layout))):
        assert found["units"] == expected["units"]
        assert close([found["loss"]], [expected["loss"]])


@pytest.mark.parametrize("layout", ["tp·pp", "cp", "dp"])
def test_answers_are_those_of_transformers(
    layout: str, recipes: Callable[..., RunConfig], ranks: dict[int, RankPool]
) -> None:
    texts = ("hello", "question 3 why why ?", "x", "answer 4 because", "and then, what came of it?", "why")
    asked = [[{"role": "user", "content": text}] for text in texts], list(range(0, 256, 3))
    expected = ranks[1](megatron_ranks.answers, recipes("sft"), *asked)[0]
    assert len({len(answer) for answer in expected}) > 2  # some end long before others
    found = ranks[LAYOUTS[layout][0]](megatron_ranks.answers, recipes("sft", *in_layout(layout)), *asked)
    assert found == [expected] * LAYOUTS[layout][0]


BF16_TOLERANCE = 2**-8
"""Half a unit in the last place of bfloat16's eight bits, of a loss that averages hundreds of rounded figures."""


@pytest.mark.parametrize("layout", ["one rank", "tp·pp", "dp"])
def test_bfloat16_computes_with_float32_masters(layout: str, trained: Trained) -> None:
    recipe = ("sft", *OPTIONS["several micro-batches"])
    (expected,) = trained(None, *recipe)
    for found in trained(layout, *recipe, "model.dtype=bfloat16"):
        assert close(found["losses"], expected["losses"], BF16_TOLERANCE)
        assert found["masters"] == {"torch.float32"} and found["parameters"] == {"torch.bfloat16"}
        assert found["rounded_masters"] == 0  # those of a float32 file keep its bits


def test_a_loss_that_is_not_finite_changes_nothing(
    recipes: Callable[..., RunConfig], ranks: dict[int, RankPool]
) -> None:
    for found in ranks[2](megatron_ranks.train_with_a_bad_step, recipes("sft", *in_layout("pp"))):
        assert found["skipped"] == [0, 1, 0]
        assert found["unchanged"]
