"""The same model on the same rows: ten steps of this engine and of TRL's SFTTrainer give the same losses."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

import torch  # noqa: E402

import engine  # noqa: E402

STEPS, BATCH, LR, MAX_LENGTH = 10, 4, 3e-3, 96
TEMPLATE = (
    "{%- for message in messages -%}{%- if message['role'] == 'assistant' -%}{{- '<|im_start|>assistant\\n' -}}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}{{- '\\n' -}}{%- else -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}{%- endif -%}{%- endfor -%}"
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("parity")
    rows = conversations()
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = [AddedToken(t, special=True) for t in ("<|pad|>", "<|im_start|>", "<|im_end|>")]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator([m["content"] for row in rows for m in row["messages"]], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).float().save_pretrained(path / "model")
    return path


@pytest.fixture(scope="module")
def trl_steps(folder: Path) -> list[tuple[float, int]]:
    """Loss and number of trained tokens of each of TRL's steps, one padded batch a step."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    steps: list[tuple[float, int]] = []

    class Noting(SFTTrainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            steps.append((float(loss.detach()), int((inputs["labels"][:, 1:] != -100).sum())))
            return loss

    config = SFTConfig(
        output_dir=str(folder / "trl"),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        assistant_only_loss=True,
        max_length=MAX_LENGTH,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    Noting(model=str(folder / "model"), args=config, train_dataset=Dataset.from_list(rows)).train()
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
    monkeypatch.setenv("ANNEAL_CACHE", str(folder / "cache"))
    code = engine.run(
        [
            f"model.path={folder / 'model'}",
            "data=messages",
            f"data.train_path={folder / 'rows.jsonl'}",
            "data.shuffle=false",
            f"data.max_length={MAX_LENGTH}",
            "data.overlong=truncate",
            f"train.global_batch_size={BATCH}",
            "scheduler=constant",
            "scheduler.warmup_ratio=0",
            f"optimizer.lr={LR}",
            f"algorithm.max_num_steps={STEPS}",
            "algorithm.val_at_end=false",
            f"run.dir={tmp_path / 'run'}",
            *mode,
        ]
    )
    assert code == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["train/trained_tokens"] for line in lines] == [tokens for _, tokens in trl_steps]
    losses = [line["train/loss"] for line in lines]
    assert losses == pytest.approx([loss for loss, _ in trl_steps], rel=1e-4)
    assert losses[-1] < losses[0]
