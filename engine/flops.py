"""Floating-point operations that a training step needs, and what a device could do: the two sides of ``perf/mfu``."""

from __future__ import annotations

import re

PEAK_TFLOPS = (
    (r"A100[ -].*|A100|A800[ -].*", 312.0),
    (r"H100 PCIe", 756.5),
    (r"H100 NVL|H200 NVL", 835.5),
    (r"H100( \d+GB HBM3)?|H100 SXM.*|H800|H200( SXM)?|GH200( .*)?", 989.5),
    (r"B100", 1750.0),
    (r"B200|B300 SXM6.*", 2250.0),
    (r"GB200|GB300", 2500.0),
    (r"A30", 165.0),
    (r"A40", 149.7),
    (r"A10", 125.0),
    (r"A10G", 70.0),
    (r"L4", 121.0),
    (r"L40", 181.05),
    (r"L40S", 362.05),
    (r"RTX A6000", 154.8),
    (r"RTX 6000 Ada Generation", 364.2),
    (r"RTX 3090", 71.0),
    (r"RTX 4090", 165.2),
    (r"RTX 5090", 209.5),
)
"""Names as the driver gives them, and TFLOP/s of dense bfloat16 matrix products with float32 sums, from the data sheets."""


def train_flops(
    *,
    layer_params: int,
    frozen_layer_params: int = 0,
    frozen_output: bool = False,
    num_layers: int,
    num_heads: int,
    head_dim: int,
    hidden_size: int,
    vocab_size: int,
    num_tokens: int,
    num_trained_tokens: int,
    squared_lengths: int,
) -> float:
    """Return the model FLOPs of a step, forward and backward; what is recomputed does not count.

    A matrix of P parameters takes 2·P a token forward, and twice that backward::

        6 · P · T                        decoder layers
        6 · V · H · N                    output layer: only for the trained tokens
        6 · L · heads · head_dim · Σ l²  causal attention: forward 2 products · 2 · l²/2, and twice that backward

    Of a matrix that is not trained (LoRA's base) the backward pass makes the gradient of the input alone: 4 in place of 6.
    The embedding is a lookup and counts nothing; norms, biases and activations are negligible.

    Args:
        layer_params: Trained parameters of all decoder layers that a token passes through, P.
        frozen_layer_params: Those that are not trained.
        frozen_output: Whether the output layer is not trained.
        num_layers: Decoder layers, L.
        num_heads: Query heads.
        head_dim: Width of a head.
        hidden_size: Width of the model, H.
        vocab_size: Rows of the output layer, V.
        num_tokens: Tokens of the step that are not padding, T.
        num_trained_tokens: Trained tokens of the step, N.
        squared_lengths: The squared length of every document of the step, summed, Σ l².
    """
    layers = (6.0 * layer_params + 4.0 * frozen_layer_params) * num_tokens
    output = (4.0 if frozen_output else 6.0) * vocab_size * hidden_size * num_trained_tokens
    attention = 6.0 * num_layers * num_heads * head_dim * squared_lengths
    return layers + output + attention


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Return the dense peak of a device in FLOP/s, or None where it is not known.

    Args:
        device_name: As ``torch.cuda.get_device_name`` gives it. A slice of a device (MIG) has no known peak.
        dtype: Type of the matrix products; known for "bfloat16" alone.
    """
    if dtype.removeprefix("torch.") != "bfloat16":
        return None
    name = re.sub(r"^(NVIDIA |Tesla |GeForce )+", "", device_name.strip())
    return next(
        (tflops * 1e12 for pattern, tflops in PEAK_TFLOPS if "MIG" not in name and re.fullmatch(pattern, name)), None
    )
