"""The same model on the same pairs: ten steps of this engine and of TRL's DPOTrainer give the same losses and rewards."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

import torch  # noqa: E402

import engine  # noqa: E402

STEPS, BATCH, LR, BETA = 10, 4, 1e-3, 0.1
TEMPLATE = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("parity")
    (path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs()))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *alphabet])}, []))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).float().save_pretrained(path / "model")
    return path


def trl_lines(folder: Path, loss: str) -> list[dict[str, float]]:
    """Return what TRL logs of each step, one padded batch a step."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(
        output_dir=str(folder / f"trl_{loss}"),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        loss_type=[loss],
        beta=BETA,
        max_length=1024,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        model_init_kwargs={"dtype": "float32"},
    )
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    trainer = DPOTrainer(model=str(folder / "model"), args=config, train_dataset=Dataset.from_list(rows))
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == STEPS
    return lines


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge"])
def test_losses_and_rewards_equal_trls(
    loss: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's rewards are ours times β; its ipo averages over tokens in the loss and not in the rewards."""
    monkeypatch.setenv("ANNEAL_CACHE", str(folder / "cache"))
    theirs = trl_lines(folder, loss)
    words = [
        "algorithm=dpo",
        f"model.path={folder / 'model'}",
        "data=binary_preference",
        f"data.train_path={folder / 'pairs.jsonl'}",
        "data.shuffle=false",
        "data.max_length=1024",
        f"train.global_batch_size={BATCH}",
        "scheduler=constant",
        "scheduler.warmup_ratio=0",
        f"optimizer.lr={LR}",
        f"algorithm.max_num_steps={STEPS}",
        f"algorithm.preference_loss={loss}",
        f"algorithm.preference_average_log_probs={str(loss == 'ipo').lower()}",
        f"algorithm.reference_policy_kl_penalty={BETA}",
        f"run.dir={tmp_path / 'run'}",
    ]
    assert engine.run(words) == 0
    ours = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["train/loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-4)
    if loss == "ipo":
        return
    assert [line["train/accuracy"] for line in ours] == [line["rewards/accuracies"] for line in theirs]
    margins = [BETA * line["train/margin"] for line in ours]
    assert margins == pytest.approx([line["rewards/margins"] for line in theirs], rel=1e-3, abs=1e-5)
    assert abs(margins[-1]) > 1e-3
