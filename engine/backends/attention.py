"""Packed attention behind transformers' attention interface."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.errors import UserError
from kernels.packed_attention import packed_attention_sdpa, with_prompts

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
        shared: Any = None,
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
        out = packed(q, k, v, cu_seqlens, shared=shared, scale=scaling, window=sliding_window, dropout=dropout)
        return out.unsqueeze(0), None

    return attention  # type: ignore[no-any-return]


class _Varlen(NamedTuple):
    """What the vendors' kernels take: queries aligned with the last keys of their document."""

    k: Tensor
    v: Tensor
    edges_q: Tensor
    edges_k: Tensor
    longest_q: int
    longest_k: int

    @classmethod
    def of(cls, k: Tensor, v: Tensor, cu_seqlens: Any, shared: Any) -> _Varlen:
        """Put shared prompts before the keys and values of their documents, and the edges on the device."""
        edges = cu_seqlens
        if shared is not None:
            (k, edges), (v, _) = with_prompts(k, cu_seqlens, shared), with_prompts(v, cu_seqlens, shared)

        def on_device(edges: Sequence[int]) -> Tensor:
            return torch.tensor(edges, dtype=torch.int32).to(k.device, non_blocking=True)

        def longest(edges: Sequence[int]) -> int:
            return max(b - a for a, b in zip(edges, edges[1:], strict=False))

        return cls(k, v, on_device(cu_seqlens), on_device(edges), longest(cu_seqlens), longest(edges))


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Any,
    *,
    shared: Any,
    scale: float | None,
    window: int | None,
    dropout: float,
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    size = (-1, -1) if window is None else (window - 1, 0)
    out: Tensor = flash_attn_varlen_func(
        q,
        *_Varlen.of(k, v, cu_seqlens, shared),
        dropout_p=dropout,
        softmax_scale=scale,
        causal=True,
        window_size=size,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return out


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Any,
    *,
    shared: Any,
    scale: float | None,
    window: int | None,
    dropout: float,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if dropout:
        raise UserError("model.attention=varlen has no dropout; set model.attention=sdpa, or attention_dropout to 0.")
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    size = (-1, 0) if window is None else (window - 1, 0)
    out = varlen_attn(q, *_Varlen.of(k, v, cu_seqlens, shared), scale=scale, window_size=size)
    assert isinstance(out, Tensor)
    return out
