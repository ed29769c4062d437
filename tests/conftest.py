"""Fixtures that several suites share: a small model on disk, rows, and a run of the engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"
TASKS = ["data=tasks", "data.max_length=256"]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["ANNEAL_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as save_pretrained writes it: a Llama of 60,000 parameters, byte-level tokenizer, ChatML template."""
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=257,
        eos_token_id=259,
        pad_token_id=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ROOT / "engine" / "assets" / "tiny_llama" / name, folder)
    return folder


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty conversations of one or two turns and many lengths."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with file.open("w") as stream:
        for i in range(40):
            turns: list[dict[str, str]] = []
            for turn in range(1 + i % 2):
                turns.append({"role": "user", "content": f"question {i} {'why ' * (i % 7)}?"})
                turns.append({"role": "assistant", "content": f"answer {i * 7 % 10} {'because ' * (i % 5 + turn)}"})
            stream.write(json.dumps({"messages": turns}) + "\n")
    return file


@pytest.fixture(scope="session")
def base(model_folder: Path, rows_file: Path) -> list[str]:
    """Overrides of a small run; add run.dir."""
    return [
        f"model.path={model_folder}",
        "data=messages",
        f"data.train_path={rows_file}",
        "data.max_length=256",
        "train.global_batch_size=8",
        "algorithm.max_num_epochs=null",
        "algorithm.max_num_steps=4",
        "algorithm.val_at_end=false",
        "optimizer.lr=1e-3",
        "checkpoint.period=1",
        "logger.backends=[]",
    ]


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pairs of many lengths, some of several turns."""
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    with file.open("w") as stream:
        for i in range(40):
            prompt = [{"role": "user", "content": f"question {i} {'why ' * (i % 6)}?"}]
            if i % 3 == 0:
                prompt += [{"role": "assistant", "content": "what?"}, {"role": "user", "content": f"this {i}"}]
            good, bad = (f"{word} {i * 7 % 10} {'because ' * n}" for word, n in (("yes", i % 5), ("no", (i + 2) % 4)))
            turns = {
                "chosen": [{"role": "assistant", "content": good}],
                "rejected": [{"role": "assistant", "content": bad}],
            }
            stream.write(json.dumps({"prompt": prompt, **turns}) + "\n")
    return file


@pytest.fixture
def dpo(base: list[str], pairs_file: Path, tmp_path: Path) -> list[str]:
    """A small DPO run of six steps with a cache of its own; add run.dir."""
    kept = [
        o for o in base if not o.startswith(("data=", "data.train_path", "optimizer.lr", "algorithm.max_num_steps"))
    ]
    return [
        "algorithm=dpo",
        "data=binary_preference",
        f"data.train_path={pairs_file}",
        f"data.cache_dir={tmp_path / 'cache'}",
        *kept,
        "algorithm.max_num_steps=6",
        "algorithm.reference_policy_kl_penalty=0.1",
        "optimizer.lr=1e-3",
    ]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The documents of each forward pass for the reference."""
    from engine.backends.torch_backend import TorchBackend

    seen: list[int] = []
    plain = TorchBackend.sequence_logprobs

    def counted(self: Any, batch: Any) -> Any:
        seen.append(len(batch.targets.bounds) - 1)
        return plain(self, batch)

    monkeypatch.setattr(TorchBackend, "sequence_logprobs", counted)
    return seen


def read_metrics(run_dir: Path, key: str = "train/loss") -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl that have a metric: by default, those of training steps."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if key in line]


@pytest.fixture(scope="session")
def engine_process() -> Callable[..., subprocess.Popen[str]]:
    """Start ``python -m engine`` with overrides, in a process of its own."""

    def start(overrides: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
        return subprocess.Popen(
            [sys.executable, "-m", "engine", *overrides],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            **options,
        )

    return start
