"""Loading and writing transformers causal language models."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from engine import hub
from engine.config.schema import ModelSection
from engine.data.template import template_text
from engine.errors import RunError, UserError


def compute_dtype(model: ModelSection, device: torch.device) -> torch.dtype:
    """Return the dtype of forward and backward passes."""
    name = model.dtype if model.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def load(model: ModelSection, *, seed: int, attention: str) -> Any:
    """Return the model in float32 on the CPU, with weights from its folder or fresh ones.

    Args:
        model: The recipe's model.
        seed: Of fresh weights.
        attention: Name in transformers' attention interface.

    Raises:
        UserError: For an unknown field in ``config_overrides``, or weights that do not fit the configuration.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what it warns of is refused below
    folder = hub.folder(model.path, model.revision, weights=model.init == "pretrained")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except (ValueError, OSError) as error:
        raise UserError(f"model.path={model.path}: {_one_line(error)}.") from error
    for key, value in model.config_overrides.items():
        known = config.to_dict()
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise UserError(
                f"model.config_overrides.{key}: {type(config).__name__} has no such field"
                + (f"; did you mean {near[0]}?" if near else f"; it has {', '.join(sorted(known))}.")
            )
        setattr(config, key, value)
    options = {"dtype": torch.float32, "attn_implementation": attention, "trust_remote_code": model.trust_remote_code}
    try:
        if model.init == "random":
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(config, **options)
        loaded, info = AutoModelForCausalLM.from_pretrained(
            folder, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (ValueError, TypeError, AttributeError, OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"model.path={model.path}: the model cannot be loaded ({_one_line(error)}).") from error
    lost = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    if lost:
        raise UserError(
            f"model.path={model.path}: {len(lost)} weights are missing or of another shape ({', '.join(lost[:3])}…), and would be "
            "random; complete the folder, correct model.config_overrides, or train fresh weights with model.init=random."
        )
    return loaded


def write(model: Any, weights: dict[str, Tensor], tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write weights, configuration, tokenizer and template as ``from_pretrained`` loads them.

    Args:
        model: The model.
        weights: What to write for its parameters, by name, tied ones once.
        tokenizer: With the template that was trained.
        folder: An empty folder.
        dtype: Of the written floating-point weights.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = {name: b for name, b in model.state_dict().items() if name not in parameters}
    state = {
        name: w.detach().to("cpu", dtype if w.is_floating_point() else w.dtype)
        for name, w in {**weights, **buffers}.items()
    }
    model.save_pretrained(folder, state_dict=state, max_shard_size="5GB")
    write_description(model, tokenizer, folder, dtype)


def write_description(model: Any, tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write config.json, naming ``dtype``, and the tokenizer."""
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_weights(file: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Read a safetensors file of a checkpoint.

    Raises:
        RunError: If it is missing or not whole.
    """
    try:
        return load_file(file, device)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{file.parent}: the checkpoint cannot be read ({error}); resume from another one.") from error


def trained_tokenizer(section: ModelSection) -> Any:
    """Return the tokenizer with the template that the recipe trains."""
    tokenizer = hub.load_tokenizer(section)
    text = template_text(section)
    if text != "default":
        tokenizer.chat_template = text or "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


def answer(lm: Any, tokenizer: Any, conversations: Sequence[list[dict[str, Any]]], *, max_new_tokens: int) -> list[str]:
    """Answer conversations by greedy decoding, together in one batch.

    Args:
        lm: A transformers causal language model; left as it was.
        tokenizer: Its tokenizer, with a chat template.
        conversations: Messages up to the assistant's turn.
        max_new_tokens: Longest answer in tokens.

    Returns:
        The text of each answer, without special tokens.
    """
    tokenizer.padding_side = "left"
    tokenizer.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    texts = [tokenizer.apply_chat_template(list(c), tokenize=False, add_generation_prompt=True) for c in conversations]
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt").to(lm.device)
    was_training, attention = lm.training, lm.config._attn_implementation
    try:
        lm.eval()
        lm.set_attn_implementation("sdpa")
        with torch.no_grad():
            out = lm.generate(
                **batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
    finally:
        lm.set_attn_implementation(attention)
        lm.train(was_training)
    answers: list[str] = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def named_parameters(model: Any) -> dict[str, Tensor]:
    """Return the parameters by name, tied ones once."""
    return dict(model.named_parameters(remove_duplicate=True))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")
