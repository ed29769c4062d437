"""Ranks that the tests of this folder share."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rank_pool import RankPool

from engine.config.compose import compose
from engine.config.schema import RunConfig


@pytest.fixture(scope="module")
def two_ranks(_own_cache: None, _one_thread: None) -> Iterator[RankPool]:
    """Two processes with a process group; see ``RankPool``. Groups that a file's tests leave behind end with it: idle, they cost time."""
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def four_ranks(_own_cache: None, _one_thread: None) -> Iterator[RankPool]:
    """Four of them."""
    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def one() -> Any:
    pool = RankPool(1)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def ranks(one: RankPool, two_ranks: RankPool, four_ranks: RankPool) -> dict[int, RankPool]:
    return {1: one, 2: two_ranks, 4: four_ranks}


@pytest.fixture(scope="session")
def deep_folder(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A Mistral of four layers, whose vocabulary two ranks cannot halve."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    folder = tmp_path_factory.mktemp("deep")
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=265,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        sliding_window=None,
        bos_token_id=257,
        eos_token_id=259,
        pad_token_id=256,
    )
    MistralForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(model_folder / name, folder)
    return folder


@pytest.fixture(scope="session")
def words(
    base: list[str], deep_folder: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[str]]:
    """Return the overrides of a small run."""
    folder = tmp_path_factory.mktemp("megatron")
    pairs = ["algorithm=dpo", "data=binary_preference", f"data.train_path={pairs_file}"]

    def make(algorithm: str, *more: str) -> list[str]:
        own = [*base, f"model.path={deep_folder}", f"run.dir={folder}", f"data.cache_dir={folder / 'cache'}"]
        own += [
            "data.max_length=128",
            "optimizer.weight_decay=0.1",
            "cluster=env",
            *(pairs if algorithm == "dpo" else []),
            *more,
        ]
        return list({o.split("=", 1)[0]: o for o in own}.values())

    return make


@pytest.fixture(scope="session")
def recipes(words: Callable[..., list[str]]) -> Callable[..., RunConfig]:
    """Return the recipe of a small run: composed here, once, and not by each of its ranks."""
    return functools.cache(lambda *chosen: compose(words(*chosen)).config)
