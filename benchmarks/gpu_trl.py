"""TRL's side of section (d) of gpu.py: the same model, documents and AdamW in its own trainer, in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_step import LR, MICRO_BATCHES, Shape, micro_batches

TOKENIZER = Path(__file__).resolve().parent.parent / "engine" / "assets" / "tiny_llama"
WARM_UP, STEPS = 2, 10


def main() -> int:
    """Train a few steps of what the command line asks for, and write the figures."""
    asked, result = json.loads(sys.argv[1]), Path(sys.argv[2])
    shape, smoke = Shape(**asked["shape"]), asked["smoke"]
    train = _sft if asked["algorithm"] == "sft" else _dpo
    ends: list[float] = []
    options = {
        "output_dir": "trl",
        "max_steps": 3 if smoke else WARM_UP + STEPS,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "bf16": not smoke,
        "use_cpu": smoke,
        "optim": "adamw_torch_fused",
        "gradient_checkpointing": asked["recompute"] == "full",
        "use_liger_kernel": not smoke and importlib.util.find_spec("liger_kernel") is not None,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "max_length": shape.tokens,
    }
    flash = not smoke and importlib.util.find_spec("flash_attn") is not None
    model = _model(shape, "flash_attention_2" if flash else "sdpa", smoke)
    note = train(model, shape, options, _clock(ends), flash)
    seconds = median(
        b - a for a, b in zip(ends[1 if smoke else WARM_UP :], ends[2 if smoke else WARM_UP + 1 :], strict=False)
    )
    batches = micro_batches(shape, asked["algorithm"])
    tokens = sum(batch.num_tokens for batch in batches)
    trained = sum(batch.targets.num_tokens for batch in batches)
    pairs = sum(len(batch.targets.bounds) - 1 for batch in batches) / 2
    found = {
        "step_s": seconds,
        "tokens_per_s": tokens / seconds,
        "units_per_s": (trained if asked["algorithm"] == "sft" else pairs) / seconds,
        "peak_GB": None if smoke else torch.cuda.max_memory_allocated() / 1e9,
        "steps": len(ends) - 1,
        "MFU": _mfu(model, batches, tokens, trained, seconds),
        "note": note + (", Liger's kernels" if options["use_liger_kernel"] else ""),
    }
    result.write_text(json.dumps(found))
    return 0


def _mfu(model: Any, batches: list[Any], tokens: int, trained: int, seconds: float) -> float | None:
    """Return what the engine would say of these documents: the same useful work, whatever the trainer computes."""
    from engine import flops

    config = model.config
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    peak = flops.peak_flops(card, "bfloat16")
    if peak is None:
        return None
    needed = flops.train_flops(
        layer_params=sum(p.numel() for p in model.model.layers.parameters()),
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        num_tokens=tokens,
        num_trained_tokens=trained,
        squared_lengths=sum(batch.squared_lengths() for batch in batches),
    )
    return needed / seconds / peak


def _model(shape: Shape, attention: str, smoke: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("cpu" if smoke else "cuda"):
        return LlamaForCausalLM._from_config(LlamaConfig(**shape.fields()), attn_implementation=attention)


def _clock(ends: list[float]) -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.on_step_end()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                if len(ends) == WARM_UP:
                    torch.cuda.reset_peak_memory_stats()
            ends.append(time.perf_counter())

    return Clock()


def _documents(shape: Shape, algorithm: str, steps: int) -> list[dict[str, Any]]:
    """Return rows of the same lengths as our micro-batches have, enough for the steps."""
    half = shape.document // 2
    make = torch.Generator().manual_seed(0)

    def drawn() -> list[int]:
        found: list[int] = torch.randint(shape.vocab_size, (half,), generator=make).tolist()
        return found

    if algorithm == "sft":
        count = shape.tokens // shape.document * MICRO_BATCHES * steps
        return [{"input_ids": drawn() + drawn(), "completion_mask": [0] * half + [1] * half} for _ in range(count)]
    count = shape.tokens // (3 * half) * MICRO_BATCHES * steps
    return [{"prompt_ids": drawn(), "chosen_ids": drawn(), "rejected_ids": drawn()} for _ in range(count)]


def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TOKENIZER)


def _sft(model: Any, shape: Shape, options: dict[str, Any], clock: Any, flash: bool) -> str:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    documents = shape.tokens // shape.document
    config = SFTConfig(**options, per_device_train_batch_size=documents, padding_free=flash)
    rows = Dataset.from_list(_documents(shape, "sft", options["max_steps"]))
    SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=_tokenizer(), callbacks=[clock]).train()
    return "padding-free FlashAttention-2" if flash else "SDPA, documents of one length: nothing is padded"


def _dpo(model: Any, shape: Shape, options: dict[str, Any], clock: Any, flash: bool) -> str:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Tokenised(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    pairs = shape.tokens // (3 * (shape.document // 2))
    config = DPOConfig(**options, per_device_train_batch_size=pairs, precompute_ref_log_probs=True)
    rows = Dataset.from_list(_documents(shape, "dpo", options["max_steps"]))
    Tokenised(model=model, args=config, train_dataset=rows, processing_class=_tokenizer(), callbacks=[clock]).train()
    return "reference precomputed, each answer with its prompt" + (", FlashAttention-2" if flash else ", SDPA")


if __name__ == "__main__":
    sys.exit(main())
