"""When Liger's kernels are put into a model, and that they take the place of these modules alone; they run on CUDA, or interpreted
(tests/interpreter/test_liger.py)."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama

from engine.backends import hf_model, liger
from engine.backends.torch_backend import TorchBackend
from engine.config.compose import compose
from engine.errors import UserError
from engine.ranks import Ranks

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LLAMA = LlamaConfig(num_hidden_layers=2)


@pytest.fixture
def _triton_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with CUDA, which this one need not have."""
    monkeypatch.setattr(liger, "works", lambda device: True)


def test_a_cpu_goes_without_or_refuses() -> None:
    assert liger.why_not("auto", CPU, LLAMA) == "Liger's kernels need CUDA"
    with pytest.raises(UserError, match=r"model\.liger=true: Liger's kernels need CUDA; set model\.liger=auto"):
        liger.why_not(True, CPU, LLAMA)


@pytest.mark.usefixtures("_triton_works")
def test_cuda_takes_them_for_models_that_are_known() -> None:
    assert liger.why_not("auto", CUDA, LLAMA) is None and liger.why_not(True, CUDA, LLAMA) is None
    assert liger.why_not(False, CUDA, LLAMA) == "model.liger=false"
    other = SimpleNamespace(model_type="mixtral", hidden_act="silu")
    assert "not known to be right for mixtral (gemma, " in str(liger.why_not("auto", CUDA, other))
    with pytest.raises(UserError, match="not known to be right for mixtral"):
        liger.why_not(True, CUDA, other)
    other = LlamaConfig(hidden_act="gelu")
    assert liger.why_not("auto", CUDA, other) == "Liger's kernel of llama computes silu, and this one has gelu"


@pytest.mark.usefixtures("_triton_works")
def test_cuda_goes_without_where_they_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    assert str(liger.why_not("auto", CUDA, LLAMA)).startswith("liger-kernel cannot be imported (")
    monkeypatch.setattr(liger, "works", lambda device: False)
    assert liger.why_not("auto", CUDA, LLAMA) == "Triton does not work here"


@pytest.fixture
def lm(base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A Llama without its weights, as it is before it is sharded."""
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)
    return hf_model.skeleton(compose([*base, f"run.dir={tmp_path}"]).config.model, attention="sdpa")


def test_norms_and_mlps_are_exchanged_and_nothing_else(lm: Any) -> None:
    from liger_kernel.transformers.rms_norm import LigerRMSNorm
    from liger_kernel.transformers.rope import liger_rotary_pos_emb
    from liger_kernel.transformers.swiglu import LigerSwiGLUMLP

    before, state = dict(vars(modeling_llama)), lm.state_dict().keys()
    patched = liger.Liger(lm)
    for module in lm.modules():
        kind = type(module).__name__
        expected = {"LlamaRMSNorm": LigerRMSNorm, "LlamaMLP": LigerSwiGLUMLP}.get(kind, type(module))
        assert module.forward.__func__ is expected.forward, kind
    assert len(patched.forwards) == 2 * 3 + 1
    changed = {name for name, x in vars(modeling_llama).items() if x is not before[name]}
    assert changed == {"apply_rotary_pos_emb"} and modeling_llama.apply_rotary_pos_emb is liger_rotary_pos_emb
    assert lm.state_dict().keys() == state and all(p.is_meta for p in lm.parameters())
    with patched.off():
        assert vars(modeling_llama) == before
        assert not any("forward" in module.__dict__ for module in lm.modules())
    assert modeling_llama.apply_rotary_pos_emb is liger_rotary_pos_emb
    assert set(patched.forwards) == {module for module in lm.modules() if "forward" in module.__dict__}


def test_off_is_off_for_a_second_model_too(lm: Any) -> None:
    plain = modeling_llama.apply_rotary_pos_emb
    other = copy.deepcopy(lm)
    liger.Liger(lm)
    second = liger.Liger(other)
    with second.off():
        assert modeling_llama.apply_rotary_pos_emb is plain
    assert modeling_llama.apply_rotary_pos_emb is not plain


def test_the_log_says_which_it_was() -> None:
    said = [
        TorchBackend.kernels.fget(SimpleNamespace(device=CUDA, attention="varlen", no_liger=reason))  # type: ignore[attr-defined]
        for reason in (None, "model.liger=false")
    ]
    assert said == [
        "attention by varlen; RMSNorm, RoPE and MLP by Liger",
        "attention by varlen; RMSNorm, RoPE and MLP by torch (model.liger=false)",
    ]


def test_a_run_on_a_cpu_goes_without(base: list[str], tmp_path: Path) -> None:
    overrides = [*base, f"run.dir={tmp_path}"]
    backend = TorchBackend(compose(overrides).config, Ranks())
    assert backend.liger is None and backend.kernels is None
    with pytest.raises(UserError, match=r"model\.liger=true: Liger's kernels need CUDA"):
        TorchBackend(compose([*overrides, "model.liger=true"]).config, Ranks())
    with pytest.raises(UserError, match=r"model\.liger"):
        compose([*overrides, "model.liger=yes please"])
