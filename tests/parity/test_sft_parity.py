"""The same model on the same rows: ten steps of this engine and of TRL's SFTTrainer give the same losses."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.parity.conftest import BATCH, SIZE, STEPS, engine_lines, trl_lines, write_model, write_rows

trl = pytest.importorskip("trl")

LR, MAX_LENGTH = 3e-3, 96
TEMPLATE = (
    "{%- for message in messages -%}{%- if message['role'] == 'assistant' -%}{{- '<|im_start|>assistant\\n' -}}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}{{- '\\n' -}}{%- else -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}{%- endif -%}{%- endfor -%}"
)


def conversations() -> list[dict[str, Any]]:
    """One or two turns, some with a system message, lengths from a few tokens to more than MAX_LENGTH."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 6))) for _ in range(200)]
    rows = []
    for i in range(STEPS * BATCH):
        turns = [{"role": "system", "content": " ".join(draw.choices(words, k=3))}] if i % 5 == 0 else []
        for _ in range(1 + i % 2):
            turns += [
                {"role": "user", "content": " ".join(draw.choices(words, k=draw.randint(2, 8)))},
                {"role": "assistant", "content": " ".join(draw.choices(words, k=draw.randint(1, 40 if i % 7 else 90)))},
            ]
        rows.append({"messages": turns})
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with rows.jsonl and model/."""
    path = tmp_path_factory.mktemp("parity")
    rows = conversations()
    write_rows(path / "rows.jsonl", rows)
    texts = [m["content"] for row in rows for m in row["messages"]]
    write_model(path / "model", {**SIZE, "vocab_size": 512}, TEMPLATE, texts)
    return path


@pytest.fixture(scope="module")
def trl_steps(folder: Path) -> list[tuple[float, int]]:
    """Loss and number of trained tokens of each of TRL's steps."""
    steps: list[tuple[float, int]] = []

    class Noting(trl.SFTTrainer):  # type: ignore[misc, name-defined]
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            steps.append((float(loss.detach()), int((inputs["labels"][:, 1:] != -100).sum())))
            return loss

    options = {"learning_rate": LR, "assistant_only_loss": True, "max_length": MAX_LENGTH}
    trl_lines(Noting, trl.SFTConfig, folder, "rows.jsonl", **options)
    assert len(steps) == STEPS
    return steps


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param([], id="packed"),
        pytest.param([f"data.packing.max_tokens={MAX_LENGTH}"], id="packed-several-micro-batches"),
        pytest.param(["data.packing.enabled=false", f"train.micro_batch_size={BATCH}"], id="padded"),
        pytest.param(["data.packing.enabled=false", "train.micro_batch_size=2"], id="padded-several-micro-batches"),
    ],
)
def test_losses_equal_trls(
    mode: list[str],
    folder: Path,
    trl_steps: list[tuple[float, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["data=messages", f"data.max_length={MAX_LENGTH}", "data.overlong=truncate", f"optimizer.lr={LR}"]
    words += ["algorithm.val_at_end=false", *mode]
    lines = engine_lines(folder, "rows.jsonl", tmp_path / "run", words, monkeypatch)
    assert [line["train/trained_tokens"] for line in lines] == [tokens for _, tokens in trl_steps]
    losses = [line["train/loss"] for line in lines]
    assert losses == pytest.approx([loss for loss, _ in trl_steps], rel=1e-4)
    assert losses[-1] < losses[0]
