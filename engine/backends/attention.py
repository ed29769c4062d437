"""Packed attention behind transformers' attention interface."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import UserError
from kernels.packed_attention import packed_attention_sdpa

NAME = "anneal_packed"
"""Name under which the interface knows it: ``attn_implementation``."""

PackedAttention = Callable[..., Tensor]
_IGNORED = {"is_causal", "use_cache", "cache_position", "output_attentions", "position_ids", "output_hidden_states"}


def register(choice: str, device: torch.device, dtype: torch.dtype) -> str:
    """Put the chosen implementation behind the interface.

    Args:
        choice: ``model.attention``.
        device: Where the model is; the vendor kernels need CUDA.
        dtype: Compute type; the vendor kernels need bfloat16.

    Returns:
        The implementation taken: flash_attention, varlen or sdpa.

    Raises:
        UserError: If the chosen one is not installed or cannot run there.
    """
    from transformers import AttentionInterface

    name = _resolve(choice, device, dtype)
    AttentionInterface.register(
        NAME, _interface({"sdpa": packed_attention_sdpa, "varlen": _varlen, "flash_attention": _flash}[name])
    )
    return name


def _resolve(choice: str, device: torch.device, dtype: torch.dtype) -> str:
    present = {"sdpa": True, "flash_attention": False, "varlen": False}
    if device.type == "cuda" and dtype == torch.bfloat16:
        present["flash_attention"] = importlib.util.find_spec("flash_attn") is not None
        present["varlen"] = importlib.util.find_spec("torch.nn.attention.varlen") is not None
    if choice == "auto":
        return next(name for name in ("flash_attention", "varlen", "sdpa") if present[name])
    if not present[choice]:
        raise UserError(
            f"model.attention={choice}: not available here (it needs CUDA, bfloat16 and its package); set model.attention=auto."
        )
    return choice


def _interface(packed: PackedAttention) -> Callable[..., tuple[Tensor, None]]:
    """Wrap a packed attention in the signature that transformers calls."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        cu_seqlens: Any = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """Attend; query [B, A, T, D], key and value [B, K, T, D] → [B, T, A, D]."""
        unknown = [name for name, value in others.items() if value is not None and name not in _IGNORED]
        if unknown:
            raise UserError(f"model: its attention needs {', '.join(unknown)}, which packed attention does not know.")
        if cu_seqlens is None:  # padded on the right: causality keeps real tokens from seeing padding
            batch, length = query.shape[0], query.shape[2]
            q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
            edges = range(0, (batch + 1) * length, length)
            out = packed_attention_sdpa(q, k, v, edges, scale=scaling, window=sliding_window, dropout=dropout)
            return out.view(batch, length, *out.shape[1:]), None
        q, k, v = (x.transpose(1, 2).squeeze(0) for x in (query, key, value))
        return packed(q, k, v, cu_seqlens, scale=scaling, window=sliding_window, dropout=dropout).unsqueeze(0), None

    return attention  # type: ignore[no-any-return]


def _device_edges(cu_seqlens: Any, device: torch.device) -> tuple[Tensor, int]:
    """Return the document edges as int32 on the device, and the longest document."""
    edges = torch.tensor(cu_seqlens, dtype=torch.int32).to(device, non_blocking=True)
    return edges, max(b - a for a, b in zip(cu_seqlens, cu_seqlens[1:], strict=False))


def _flash(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Any, *, scale: float | None, window: int | None, dropout: float
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    edges, longest = _device_edges(cu_seqlens, q.device)
    size = (-1, -1) if window is None else (window - 1, 0)
    out: Tensor = flash_attn_varlen_func(
        q,
        k,
        v,
        edges,
        edges,
        longest,
        longest,
        dropout_p=dropout,
        softmax_scale=scale,
        causal=True,
        window_size=size,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return out


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Any, *, scale: float | None, window: int | None, dropout: float
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if dropout:
        raise UserError("model.attention=varlen has no dropout; set model.attention=sdpa, or attention_dropout to 0.")
    edges, longest = _device_edges(cu_seqlens, q.device)
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    size = (-1, 0) if window is None else (window - 1, 0)
    out = varlen_attn(q, k, v, edges, edges, longest, longest, scale=scale, window_size=size)
    assert isinstance(out, Tensor)
    return out
