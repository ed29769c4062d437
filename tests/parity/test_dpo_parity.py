"""The same model on the same pairs: ten steps of this engine and of TRL's DPOTrainer give the same losses and rewards."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.parity.conftest import BATCH, SIZE, STEPS, engine_lines, trl_lines, write_model, write_rows

trl = pytest.importorskip("trl")

LR, BETA, MAX_LENGTH = 1e-3, 0.1, 1024
TEMPLATE = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def pairs() -> list[dict[str, Any]]:
    """Prompts of one or two turns, answers of one to sixty words."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 6))) for _ in range(200)]

    def said(role: str, most: int) -> dict[str, str]:
        return {"role": role, "content": " ".join(draw.choices(words, k=draw.randint(1, most)))}

    rows = []
    for i in range(STEPS * BATCH):
        prompt = [said("user", 8)] if i % 2 else [said("user", 8), said("assistant", 10), said("user", 8)]
        rows.append({"prompt": prompt, "chosen": [said("assistant", 60)], "rejected": [said("assistant", 60)]})
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with pairs.jsonl and model/."""
    path = tmp_path_factory.mktemp("parity")
    write_rows(path / "pairs.jsonl", pairs())
    write_model(path / "model", {**SIZE, "vocab_size": 259}, TEMPLATE, texts=[])
    return path


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge"])
def test_losses_and_rewards_equal_trls(
    loss: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's rewards are ours times β; its ipo averages over tokens in the loss and not in the rewards."""
    theirs = trl_lines(
        trl.DPOTrainer,
        trl.DPOConfig,
        folder,
        "pairs.jsonl",
        learning_rate=LR,
        loss_type=[loss],
        beta=BETA,
        max_length=MAX_LENGTH,
    )
    words = [
        "algorithm=dpo",
        "data=binary_preference",
        f"data.max_length={MAX_LENGTH}",
        f"optimizer.lr={LR}",
        f"algorithm.preference_loss={loss}",
        f"algorithm.preference_average_log_probs={str(loss == 'ipo').lower()}",
        f"algorithm.reference_policy_kl_penalty={BETA}",
    ]
    ours = engine_lines(folder, "pairs.jsonl", tmp_path / "run", words, monkeypatch)
    assert [line["train/loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-4)
    if loss == "ipo":
        return
    assert [line["train/accuracy"] for line in ours] == [line["rewards/accuracies"] for line in theirs]
    margins = [BETA * line["train/margin"] for line in ours]
    # TRL adds an answer's some 1,300 nats up in float32, whose numbers are 1.2e-4 apart there: chosen and rejected may be off by one
    floor = 2 * BETA * float(np.spacing(np.float32(1300)))
    assert margins == pytest.approx([line["rewards/margins"] for line in theirs], rel=1e-4, abs=floor)
    assert abs(margins[-1]) > 1e-3
