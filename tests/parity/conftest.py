"""What the suites against TRL share: a small model on disk, TRL trained on its rows, the engine on the same."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import engine
from tests.conftest import ROOT, read_metrics

sys.path.append(str(ROOT / "benchmarks"))
from trl_sides import write_model  # noqa: E402

__all__ = ["write_model"]
STEPS, BATCH = 10, 4
SIZE = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def trl_lines(trainer: type, config: type, folder: Path, rows: str, **options: Any) -> list[dict[str, float]]:
    """Train TRL on the rows in the folder, one padded batch a step, and return what it logs of each step.

    Args:
        trainer: TRL's trainer, or a class of it.
        config: Its configuration.
        folder: Holds model/ and the rows.
        rows: Name of their file.
        options: The configuration's other fields.
    """
    from datasets import Dataset

    settings = config(
        output_dir=str(folder / "trl"),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        model_init_kwargs={"dtype": "float32"},
        **options,
    )
    data = Dataset.from_list([json.loads(line) for line in (folder / rows).read_text().splitlines()])
    training = trainer(model=str(folder / "model"), args=settings, train_dataset=data)
    training.train()
    lines = [line for line in training.state.log_history if "loss" in line]
    assert len(lines) == STEPS
    return lines


def engine_lines(
    folder: Path, rows: str, run_dir: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> list[dict[str, float]]:
    """Train the engine on the same rows in the same order, and return its lines of metrics."""
    monkeypatch.setenv("ANNEAL_CACHE", str(folder / "cache"))
    same = [
        f"model.path={folder / 'model'}",
        f"data.train_path={folder / rows}",
        "data.shuffle=false",
        f"train.global_batch_size={BATCH}",
        "scheduler=constant",
        "scheduler.warmup_ratio=0",
        f"algorithm.max_num_steps={STEPS}",
        f"run.dir={run_dir}",
    ]
    assert engine.run([*same, *words]) == 0
    return read_metrics(run_dir)
