"""Answers to keys that are not ours: near misses, and names that users bring from other trainers."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

FOREIGN_NAMES = {
    "learning_rate": "optimizer.lr",
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "adam_epsilon": "optimizer.eps",
    "per_device_train_batch_size": "train.global_batch_size (all devices together; train.micro_batch_size when padded)",
    "per_device_eval_batch_size": "algorithm.val_global_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size (micro-batches follow from it)",
    "train_global_batch_size": "train.global_batch_size",
    "train_micro_batch_size": "train.micro_batch_size",
    "micro_train_batch_size_per_gpu": "train.micro_batch_size",
    "micro_batch_size_per_gpu": "train.micro_batch_size",
    "batch_size": "train.global_batch_size",
    "gradient_clip_val": "train.max_grad_norm",
    "clip_grad": "train.max_grad_norm",
    "num_train_epochs": "algorithm.max_num_epochs",
    "num_epochs": "algorithm.max_num_epochs",
    "epochs": "algorithm.max_num_epochs",
    "max_steps": "algorithm.max_num_steps",
    "num_steps": "algorithm.max_num_steps",
    "eval_steps": "algorithm.val_period",
    "eval_strategy": "algorithm.val_period",
    "save_steps": "checkpoint.period",
    "save_period": "checkpoint.period",
    "save_total_limit": "checkpoint.keep_last",
    "metric_name": "checkpoint.metric",
    "load_best_model_at_end": "checkpoint.keep_best",
    "output_dir": "run.dir",
    "checkpoint_dir": "run.dir",
    "run_name": "run.name",
    "resume_from_checkpoint": "run.resume",
    "full_determinism": "run.deterministic",
    "model_name": "model.path",
    "model_name_or_path": "model.path",
    "base_model": "model.path",
    "pretrained_model_name_or_path": "model.path",
    "tokenizer_name": "model.tokenizer",
    "attn_implementation": "model.attention",
    "use_liger": "model.liger",
    "use_liger_kernel": "model.liger",
    "enable_liger_kernel": "model.liger",
    "liger_kernel_config": "model.liger",
    "torch_dtype": "model.dtype",
    "precision": "model.dtype",
    "bf16": "model.dtype=bfloat16",
    "fp32": "model.dtype=float32",
    "torch_compile": "model.compile",
    "gradient_checkpointing": "model.recompute=full",
    "activation_checkpointing": "model.recompute=full",
    "use_peft": "model.lora.enabled",
    "use_lora": "model.lora.enabled",
    "finetuning_type": "model.lora.enabled",
    "adapter": "model.lora.enabled",
    "peft": "model.lora",
    "peft_config": "model.lora",
    "lora": "model.lora",
    "lora_cfg": "model.lora",
    "lora_r": "model.lora.rank",
    "lora_rank": "model.lora.rank",
    "lora_dim": "model.lora.rank",
    "r": "model.lora.rank",
    "lora_alpha": "model.lora.alpha",
    "lora_dropout": "model.lora.dropout",
    "lora_target": "model.lora.target_modules",
    "lora_target_modules": "model.lora.target_modules",
    "lora_target_linear": "model.lora.target_modules=null",
    "match_all_linear": "model.lora.target_modules=null",
    "merge_lora": "model.lora.merge",
    "hf_config_overrides": "model.config_overrides",
    "tensor_model_parallel_size": "backend.tensor_parallel",
    "tensor_parallel_size": "backend.tensor_parallel",
    "pipeline_model_parallel_size": "backend.pipeline_parallel",
    "pipeline_parallel_size": "backend.pipeline_parallel",
    "virtual_pipeline_model_parallel_size": "backend.virtual_pipeline",
    "context_parallel_size": "backend.context_parallel",
    "ulysses_sequence_parallel_size": "backend.context_parallel",
    "sp_size": "backend.context_parallel",
    "expert_model_parallel_size": "backend.expert_parallel",
    "expert_parallel_size": "backend.expert_parallel",
    "overlap_grad_reduce": "backend.overlap",
    "overlap_param_gather": "backend.overlap",
    "megatron_cfg": "backend (backend=megatron)",
    "chat_template_kwargs": "model.template_args",
    "dataset": "data",
    "datasets": "data",
    "dataset_name": "data=NAME or data.train_path",
    "train_data_path": "data.train_path",
    "train_file": "data.train_path",
    "val_data_path": "data.val_path",
    "eval_dataset": "data.val_path",
    "dataset_mixer": "data.train (a list of sources with weights)",
    "dataset_mixture": "data.train (a list of sources with weights)",
    "split_validation_size": "data.val_fraction",
    "val_set_size": "data.val_fraction",
    "test_size": "data.val_fraction",
    "eval_split_ratio": "data.val_fraction",
    "messages_key": "data.chat_key",
    "dataset_text_field": "data.chat_key, or data.input_key and data.output_key",
    "prompt_key": "data.input_key",
    "completion_key": "data.output_key",
    "dataset_config": "data.subset",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "max_input_seq_length": "data.max_length",
    "max_total_sequence_length": "data.max_length",
    "sequence_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "sequence_packing": "data.packing.enabled",
    "sample_packing": "data.packing.enabled",
    "assistant_only_loss": "data.train_on=all_assistant",
    "completion_only_loss": "data.train_on=last_assistant",
    "train_on_inputs": "data.train_on=all",
    "roles_to_train": "data.train_on",
    "lr_scheduler_type": "scheduler=NAME",
    "lr_scheduler": "scheduler=NAME",
    "lr_warmup_steps": "scheduler.warmup_steps",
    "num_warmup_steps": "scheduler.warmup_steps",
    "report_to": "logger.backends",
    "beta": "algorithm.reference_policy_kl_penalty",
    "loss_type": "algorithm.preference_loss",
    "rpo_alpha": "algorithm.sft_loss_weight",
    "simpo_gamma": "algorithm.preference_margin",
    "ref_model": "algorithm.reference",
    "reference_free": "algorithm.reference=none",
    "policy": "model, train and optimizer",
    "sft": "algorithm=sft",
    "dpo": "algorithm=dpo",
    "trainer": "run, train and algorithm",
    "checkpointing": "checkpoint",
}
"""Key elsewhere (a leaf or a group) → the key here."""

PREFERENCE_LOSSES = {"sigmoid": True, "ipo": True, "hinge": True, "robust": True, "simpo": False, "orpo": False}
"""The losses of ``engine.objectives.preference_losses`` → whether each needs a reference."""


def suggestion(key: str, known: Iterable[str]) -> str:
    """Return the end of a sentence that points from an unknown dotted key to a known one; empty if nothing is near.

    Args:
        key: Dotted key as the user wrote it.
        known: Every dotted key, groups and leaves.
    """
    known = list(known)
    leaf = key.rsplit(".", 1)[-1]
    same_leaf = [k for k in known if k.rsplit(".", 1)[-1] == leaf]
    if leaf in FOREIGN_NAMES:
        return f"here it is {FOREIGN_NAMES[leaf]}"
    if same_leaf:
        return f"did you mean {' or '.join(same_leaf[:3])}?"
    parts = key.split(".")
    for i in reversed(range(len(parts) - 1)):
        if parts[i] in FOREIGN_NAMES and ".".join(parts[: i + 1]) not in known:  # model.lora is ours too
            return f"here it is {FOREIGN_NAMES[parts[i]]}"
    near = difflib.get_close_matches(key, known, 1, 0.75)
    if not near:
        leaves: dict[str, str] = {}
        for k in known:
            leaves.setdefault(k.rsplit(".", 1)[-1], k)
        near = [leaves[n] for n in difflib.get_close_matches(leaf, leaves, 1, 0.75)]
    return f"did you mean {near[0]}?" if near else "python -m engine --help lists every key"


def stop(sentence: str) -> str:
    """Return the sentence with the full stop that it may lack."""
    return sentence if sentence.endswith((".", "?", "!")) else sentence + "."
