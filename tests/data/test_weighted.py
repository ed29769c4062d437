"""Turns with weights through a real model: loss and gradients by hand, and the same ones in every layout and on every number of ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config.schema import RunConfig
from engine.data.loader import Loader
from tests.data import test_empty_bins as together
from tests.test_numerics import assert_same, config_of, gradients, loader_of

WEIGHTS = (0.5, 2.0, 0.0, 1.0, 1.5, 0.1)
LAYOUTS = {
    "one micro-batch": ["data.packing.max_tokens=4096"],
    "packed": ["data.packing.max_tokens=256"],
    "one by one": ["data.packing.enabled=false", "train.micro_batch_size=1"],
    "padded": ["data.packing.enabled=false", "train.micro_batch_size=8"],
}


def answers() -> dict[str, float]:
    """Return the answers of 40 conversations of one or two turns, none the same, and their weights."""
    texts = [f"answer {i} {'because ' * (i % 5)}end" for i in range(60)]
    return {text: WEIGHTS[i * 7 % len(WEIGHTS)] for i, text in enumerate(texts)}


def write(file: Path, keys: Callable[[float], dict[str, Any]]) -> Path:
    """Write the conversations; ``keys`` says how a turn shows its weight."""
    left = iter(answers().items())
    with file.open("w") as stream:
        for i in range(40):
            turns: list[dict[str, Any]] = []
            for _ in range(1 + i % 2):
                text, weight = next(left)
                turns.append({"role": "user", "content": f"question {'why ' * (i % 7)}?"})
                turns.append({"role": "assistant", "content": text, **keys(weight)})
            if not any(turn.get("weight", 1) and turn.get("train", True) for turn in turns):
                turns[-1].update(keys(1.0))  # something to train
            stream.write(json.dumps({"messages": turns}) + "\n")
    return file


def weighted(base: list[str], tmp_path: Path, keys: Callable[[float], dict[str, Any]], *more: str) -> RunConfig:
    """Return a recipe on them."""
    file = write(tmp_path / "weighted.jsonl", keys)
    words = [word for word in base if not word.startswith("data.train_path=")]
    return config_of(words, tmp_path, f"data.train_path={file}", *more)


def by_hand(config: RunConfig, loader: Loader, step: int = 0) -> tuple[float, dict[str, torch.Tensor]]:
    """The same step one document at a time: weights found by the text that is trained, full logits, sums divided at the end."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = Path(config.data.train_path or "").read_text().splitlines()
    turns = [turn for row in rows for turn in json.loads(row)["messages"]]
    weight_of = {turn["content"]: turn["weight"] for turn in turns if turn["role"] == "assistant"}
    model: Any = AutoModelForCausalLM.from_pretrained(
        config.model.path, dtype=torch.float32, attn_implementation="eager"
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(config.model.path)
    loss, total, seen = torch.zeros(()), 0.0, set()
    for i in loader.plan.members(step).tolist():
        sample = loader.data[i]
        ids = torch.from_numpy(sample.input_ids.astype("int64"))
        logprobs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        for start, stop in sample.trained.tolist():
            weight = weight_of[tokenizer.decode(ids[start:stop], skip_special_tokens=True).strip()]
            seen.add(weight)
            for position in range(start, stop):
                loss = loss - weight * logprobs[position - 1, ids[position]]
                total += weight
    assert seen == set(WEIGHTS) - {0.0}
    (loss / total).backward()
    return float(loss.detach()) / total, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_by_hand(base: list[str], tmp_path: Path, layout: str) -> None:
    """A turn's weight multiplies its tokens' losses and counts in what the sum is divided by; packed = padded, N×1 = 1×N."""
    config = weighted(base, tmp_path, lambda w: {"weight": w}, *LAYOUTS[layout], "train.global_batch_size=16")
    loader = loader_of(config, tmp_path)
    ours = gradients(config, loader)
    assert (ours[2] == 1) == (layout == "one micro-batch")
    assert_same(ours, by_hand(config, loader))


@pytest.mark.parametrize("layout", together.LAYOUTS)
def test_weights_on_two_ranks(base: list[str], tmp_path: Path, layout: str) -> None:
    config = weighted(base, tmp_path, lambda w: {"weight": w}, *together.LAYOUTS[layout], "train.max_grad_norm=1e9")
    loader = together.loader_of(config, tmp_path)
    ranks = together.of_ranks(loader, 2)
    units = [sum(together.SFT().units(b.targets) for b in own) for own in ranks]
    assert units[0] != units[1] and min(units) > 0
    ours, expected = (together.gradients(config, b) for b in ([b for own in ranks for b in own], loader.step(0)))
    assert sum(units) == pytest.approx(sum(together.SFT().units(b.targets) for b in loader.step(0)))
    assert ours[:2] == pytest.approx(expected[:2], rel=1e-5)
    for name, grad in ours[2].items():
        assert (grad - expected[2][name]).norm() <= 1e-5 * expected[1], name


def results(base: list[str], tmp_path: Path, keys: Callable[[float], dict[str, Any]]) -> tuple[Any, ...]:
    config = weighted(base, tmp_path, keys, "data.packing.max_tokens=256")
    return gradients(config, loader_of(config, tmp_path))


def test_weight_zero_is_train_false(base: list[str], tmp_path: Path) -> None:
    weights = results(base, tmp_path, lambda w: {"weight": float(w > 0)})
    marks = results(base, tmp_path, lambda w: {"train": w > 0})
    assert weights[0] == marks[0] and all(torch.equal(grad, marks[1][name]) for name, grad in weights[1].items())
    everything = results(base, tmp_path, lambda w: {})
    assert abs(weights[0] - everything[0]) > 1e-4 * everything[0]


def test_only_the_ratio_of_weights_counts(base: list[str], tmp_path: Path) -> None:
    twos, ones, none = (results(base, tmp_path, lambda w, k=k: k) for k in ({"weight": 2.0}, {"weight": 1.0}, {}))
    assert_same(twos, ones)
    assert ones[0] == none[0] and all(torch.equal(grad, none[1][name]) for name, grad in ones[1].items())
