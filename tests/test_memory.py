"""The memory of a device: its terms against real modules, and the figures of the docs against the function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config.layout import Layout
from engine.memory import Memory, Sizes, device_memory, layer_bytes
from tests.conftest import ROOT
from tests.models import LLAMA_8B, MIXTRAL, MODELS, QWEN3_MOE

LLAMA_70B = MODELS["meta-llama/Llama-3.1-70B-Instruct"]
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize("fields", [*MODELS.values(), MIXTRAL, QWEN3_MOE], ids=[*MODELS, "mixtral", "qwen3_moe"])
def test_parameters_are_those_of_the_model(fields: dict[str, Any]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**{**fields, "num_hidden_layers": 2})
    config.tie_word_embeddings = fields.get("tie_word_embeddings", False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    two = Sizes.of({**fields, "num_hidden_layers": 2})
    assert two.parameters == sum(p.numel() for p in model.parameters())
    whole = Sizes.of(fields)
    assert whole.parameters - two.parameters == (whole.layers - 2) * (whole.layer + whole.experts)


def test_a_layer_keeps_what_the_formula_says() -> None:
    """A layer in plain torch, one head wide, and all that its backward pass has saved but for weights and figures of a row."""
    tokens, (qkv, out, fc1, down) = 48, _weights((192, 64), (64, 64), (320, 64), (64, 160))
    first, second = _weights((64,), (64,))
    own = {w.data_ptr() for w in (qkv, out, fc1, down, first, second)}
    saved: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        if x.numel() > tokens and x.untyped_storage().data_ptr() not in own:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        x_TH = torch.randn(tokens, 64, requires_grad=True) * 1.0
        q, k, v = (part[None, None] for part in F.linear(_norm(x_TH, first), qkv).split(64, -1))
        attended = F.scaled_dot_product_attention(q * 1.5, k * 1.5, v, is_causal=True)  # rotated, say
        x_TH = x_TH + F.linear(attended[0, 0], out)
        gate, up = F.linear(_norm(x_TH, second), fc1).chunk(2, -1)
        x_TH = x_TH + F.linear(F.silu(gate) * (up + 0.0), down)
    fields = {**SMALL, "num_attention_heads": 1}
    rows = 4 * tokens  # attention's float32 a head and token
    assert sum(saved.values()) == 2 * (layer_bytes(Sizes.of(fields), Layout()) * tokens - rows)


def _weights(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def _norm(x_TH: Tensor, weight_H: Tensor) -> Tensor:
    return F.layer_norm(x_TH, (64,), weight_H)


def layout_of(ranks: int, tensor: int = 1, pipeline: int = 1, context: int = 1, virtual: int = 1) -> Layout:
    data = ranks // (tensor * pipeline * context)
    return Layout(tensor=tensor, pipeline=pipeline, virtual=virtual, context=context, data=data, sequence=tensor > 1)


def test_what_splits_what() -> None:
    def memory(recompute: bool = False, **split: int) -> Memory:
        return device_memory(SMALL, layout_of(8, **split), tokens=1024, recompute=recompute)

    one = memory()
    assert one.gradients == 2 * one.weights and one.optimizer == 6 * one.weights / 8
    two = memory(tensor=2)
    assert two.weights == one.weights / 2 and two.optimizer == one.optimizer
    assert two.activations == one.activations / 2  # sequence parallelism leaves nothing whole
    assert memory(context=2).optimizer == one.optimizer and memory(context=2).weights == one.weights
    assert one.activations / 4 < memory(context=4).activations < one.activations  # keys and values are gathered
    # A stage holds half of the layers, the first one for two micro-batches.
    long = {"tokens": 2**20, "recompute": False}
    whole, staged, chunked = (
        device_memory(SMALL, layout_of(8, **split), **long).activations  # type: ignore[arg-type]
        for split in ({}, {"pipeline": 2}, {"pipeline": 2, "virtual": 2})
    )
    assert staged == whole and chunked == whole * (1 + 1 / 4)
    assert memory(recompute=True).activations < one.activations / 2


def test_whichever_end_of_the_pipeline_needs_more() -> None:
    wide = {**SMALL, "vocab_size": 1_000_000}
    assert device_memory(wide, layout_of(2, pipeline=2), tokens=8, recompute=False).output
    assert not device_memory(
        SMALL | {"num_hidden_layers": 4000}, layout_of(2, pipeline=2), tokens=2**16, recompute=False
    ).output


def test_experts_are_split_over_their_own_ranks() -> None:
    one, split = (device_memory(MIXTRAL, layout_of(8)._replace(expert=n), tokens=4096, recompute=True) for n in (1, 8))
    experts = Sizes.of(MIXTRAL).layers * Sizes.of(MIXTRAL).experts
    assert one.weights - split.weights == 2 * experts * 7 / 8
    assert one.optimizer == split.optimizer == pytest.approx(12 * (one.weights / 2) / 8)


def test_the_figures_of_the_docs() -> None:
    """The rows of the table in docs/megatron.md: model, layout, tokens, recompute, and GB of each term."""
    lines = (ROOT / "docs" / "megatron.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| model | ranks |"))
    heading = [word.strip() for word in lines[start].strip("|").split("|")]
    terms = [*Memory._fields, "total"]
    assert heading == ["model", "ranks", "tensor", "pipeline", "context", "tokens", "recompute", *terms]
    models, rows = {"8B": LLAMA_8B, "70B": LLAMA_70B}, 0
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        name, ranks, tensor, pipeline, context, tokens, recompute, *figures = (
            w.strip() for w in line.strip("|").split("|")
        )
        layout = layout_of(int(ranks), int(tensor), int(pipeline), int(context))
        held = device_memory(
            models[name],
            layout,
            tokens=int(tokens.replace(",", "")),
            recompute={"full": True, "none": False}[recompute],
        )
        assert figures == [f"{x / 1e9:.1f}" for x in (*held, held.total)], line
        rows += 1
    assert rows >= 6
