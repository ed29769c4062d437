"""What the suites against TRL share: a small model on disk, TRL trained on its rows, the engine on the same."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import engine
from tests.conftest import read_metrics

STEPS, BATCH = 10, 4


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_model(folder: Path, *, template: str, vocab_size: int, texts: Iterable[str]) -> None:
    """Write a byte-level tokenizer trained on the texts and a Llama of two layers, from a fixed seed.

    A vocabulary of 259 is the three special tokens and the bytes.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(t, special=True) for t in ("<|pad|>", "<|im_start|>", "<|im_end|>")],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
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
    LlamaForCausalLM(config).float().save_pretrained(folder)


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
