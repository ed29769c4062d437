"""Liger's kernels in whole models, values and gradients, against the models' own code.

Replaced, for what the interpreter lacks: CUDA's own rsqrt and tanh by Triton's arithmetic, and numbers among a kernel's arguments,
which it passes on as Python's, by float32 scalars as a GPU has them.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import liger_kernel.ops.geglu
import liger_kernel.ops.rms_norm
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama import modeling_llama
from triton.runtime import interpreter

from engine.backends import liger
from engine.backends.torch_backend import TorchBackend
from engine.config.compose import compose
from engine.data.batch import collate_packed
from engine.errors import UserError
from engine.objectives.sft import SFT
from engine.ranks import Ranks
from engine.types import Sample

TOKENS = 17


@triton.jit
def _rsqrt(x):
    return tl.rsqrt(x)


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = interpreter._implicit_cvt

    def converted(argument: Any) -> Any:
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)
        return plain(argument)

    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)
    monkeypatch.setattr(liger_kernel.ops.rms_norm, "rsqrt", _rsqrt)
    monkeypatch.setattr(liger_kernel.ops.geglu, "tanh", _tanh)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make a random model of a type, and put its module's functions back in the end."""

    def make(kind: str) -> Any:
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            kind,
            vocab_size=64,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=64,
            sliding_window=8,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        lm = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
        for p in lm.parameters():
            nn.init.normal_(p, mean=float(p.mean().round()) if p.ndim == 1 else 0.0, std=0.3)
        modeling = sys.modules[type(lm).__module__]
        monkeypatch.setattr(modeling, "apply_rotary_pos_emb", modeling.apply_rotary_pos_emb)
        return lm

    return make


def outcome(lm: Any) -> tuple[Tensor, list[Tensor]]:
    """Return log-probabilities of a few tokens, and their gradient by each parameter."""
    ids = torch.arange(TOKENS)[None] * 7 % 64
    logprobs_TV = lm(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    logprobs_T = logprobs_TV[:-1].gather(1, ids[0, 1:, None]).squeeze(1)
    weights_T = torch.linspace(-1, 1, TOKENS - 1, dtype=logprobs_T.dtype)
    parameters = [p for p in lm.parameters() if p.requires_grad]
    return logprobs_T.detach(), list(torch.autograd.grad(logprobs_T @ weights_T, parameters))


def assert_as_good(lm: Any) -> None:
    """Hold the errors against float64 to three times those of the model's own float32, plus 1e-6 of the tensor's largest value."""
    patched = liger.Liger(theirs := copy.deepcopy(lm))
    with patched.off():
        plain, off, truth = outcome(lm), outcome(theirs), outcome(copy.deepcopy(lm).double())
    ours = outcome(theirs)
    assert all(map(torch.equal, (off[0], *off[1]), (plain[0], *plain[1])))
    assert not torch.equal(ours[0], plain[0])
    for x, y, z in zip((plain[0], *plain[1]), (truth[0], *truth[1]), (ours[0], *ours[1]), strict=True):
        assert (z - y).abs().max() <= 3 * (x - y).abs().max() + 1e-6 * y.abs().max()


@pytest.mark.parametrize("kind", liger.ACTIVATIONS)
def test_values_and_gradients_are_the_models_own(tiny: Any, kind: str) -> None:
    assert_as_good(tiny(kind))


def test_with_adapters_too(tiny: Any) -> None:
    lm = tiny("llama")
    inject_adapter_in_model(LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), lm)
    assert_as_good(lm)


@pytest.fixture
def backend(base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make a backend with Liger's kernels, as on CUDA, or without."""
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)
    plain = liger.why_not

    def make(choice: str) -> TorchBackend:
        monkeypatch.setattr(liger, "why_not", plain if choice == "false" else lambda *_: None)
        return TorchBackend(compose([*base, f"run.dir={tmp_path}", f"model.liger={choice}"]).config, Ranks())

    return make


def samples() -> list[Sample]:
    return [Sample(np.arange(40, 40 + n, dtype=np.int32), np.array([[1, n]], np.int32)) for n in (9, 5)]


def test_a_step_is_the_one_without_them(backend: Any) -> None:
    batch = collate_packed(samples())
    losses, norms = [], []
    for choice in ("false", "true"):
        made = backend(choice)
        assert (made.liger is not None) == (choice == "true")
        step = made.train_step([batch], SFT(), SFT().units(batch.targets), 1e-3)
        losses.append(step.loss.item())
        norms.append(step.grad_norm.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_the_probe_holds_them_against_the_models_own_code(backend: Any) -> None:
    made = backend("true")
    made.probe(samples())
    made.lm.model.norm.offset = 0.5  # weights one half larger, for Liger's kernel alone
    with pytest.raises(UserError, match="differ from the model's own logits .* try model.liger=false"):
        made.probe(samples())
