"""The fields of config.json, as far as sizes go, of models that have to be downloaded."""

from __future__ import annotations

from engine.config.known_models import LLAMA_8B as LLAMA_8B
from engine.config.known_models import MODELS as MODELS
from engine.config.known_models import QWEN3 as QWEN3

MIXTRAL = {**LLAMA_8B, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000}
QWEN3_MOE = {
    **QWEN3,
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
