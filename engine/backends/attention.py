"""Packed attention behind transformers' attention interface."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.errors import UserError
from kernels.dispatch import INTERPRETED, serves
from kernels.packed_attention import packed_attention, with_prompts
from kernels.reference import packed_attention_sdpa

NAME = "anneal_packed"
"""Name under which the interface knows it: ``attn_implementation``."""

PackedAttention = Callable[..., Tensor]
_IGNORED = {"is_causal", "use_cache", "cache_position", "output_attentions", "position_ids", "output_hidden_states"}


def register(choice: str, device: torch.device, dtype: torch.dtype, *, deterministic: bool) -> str:
    """Put the chosen implementation behind the interface.

    With ``auto``, a model that caps its scores or drops attention weights, which only its calls tell, is served by our own
    kernels where the chosen ones lack that.

    Args:
        choice: ``model.attention``.
        device: Where the model is; all but sdpa need CUDA.
        dtype: Compute type; the vendors' kernels need bfloat16.
        deterministic: ``run.deterministic``: with auto, take what gives the same bits every time.

    Returns:
        The implementation taken: flash_attention, varlen, triton or sdpa.

    Raises:
        UserError: If the chosen one is not installed or cannot run there.
    """
    from transformers import AttentionInterface

    name, packed = choose(choice, device, dtype, deterministic=deterministic)
    AttentionInterface.register(NAME, _interface(packed))
    return name


def choose(
    choice: str, device: torch.device, dtype: torch.dtype, *, deterministic: bool
) -> tuple[str, PackedAttention]:
    """Return the chosen implementation's name, and what attends (``packed_attention``, all options given); see ``register``."""
    name = _resolve(choice, _present(device, dtype), deterministic=deterministic)
    return name, _complete(name, device, auto=choice == "auto")


def _present(device: torch.device, dtype: torch.dtype) -> set[str]:
    """Return what can run there."""
    if device.type != "cuda":
        return {"sdpa", "triton"} if INTERPRETED else {"sdpa"}
    present = {"sdpa", "triton"} if serves(device) else {"sdpa"}
    if dtype == torch.bfloat16:
        packages = {"flash_attention": _flash_package(device), "varlen": "torch.nn.attention.varlen"}
        present |= {name for name, package in packages.items() if importlib.util.find_spec(package) is not None}
    return present


def _resolve(choice: str, present: Collection[str], *, deterministic: bool) -> str:
    """Return the implementation to take.

    Raises:
        UserError: If the chosen one is not there.
    """
    if choice == "auto":
        order = ("triton", "sdpa") if deterministic else ("flash_attention", "varlen", "triton", "sdpa")
        return next(name for name in order if name in present)
    if choice not in present:
        needs = "CUDA and a Triton that works there" if choice == "triton" else "CUDA, bfloat16 and its package"
        raise UserError(f"model.attention={choice}: not available here (it needs {needs}); set model.attention=auto.")
    return choice


def _complete(name: str, device: torch.device, *, auto: bool) -> PackedAttention:
    """Return an implementation that, if chosen by ``auto``, leaves to our own what it lacks, and else refuses it."""
    flash = _flash_package(device)
    known: dict[str, tuple[PackedAttention, set[str]]] = {
        "sdpa": (packed_attention_sdpa, set()),
        "triton": (packed_attention, {"dropout"}),
        "varlen": (_varlen, {"dropout", "softcap"}),
        "flash_attention": (_flash(flash), set() if flash == "flash_attn" else {"dropout"}),
    }
    attend, lacks = known[name]

    def attention(*qkv_edges: Any, **options: Any) -> Tensor:
        missing = [option for option in sorted(lacks) if options[option]]
        if missing and not auto:
            raise UserError(f"model.attention={name} has no {' and no '.join(missing)}; set model.attention=auto.")
        serves: PackedAttention = packed_attention if missing else attend
        return serves(*qkv_edges, **options)

    return attention


def _flash_package(device: torch.device) -> str:
    """Return the module of FlashAttention-3 where that is installed and runs, else of FlashAttention-2."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    found = hopper and importlib.util.find_spec("flash_attn_interface") is not None
    return "flash_attn_interface" if found else "flash_attn"


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
        softcap: float | None = None,
        cu_seqlens: Any = None,
        shared: Any = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """Attend; query [B, A, T, D], key and value [B, K, T, D] → [B, T, A, D]."""
        unknown = [name for name, value in others.items() if value is not None and name not in _IGNORED]
        if unknown:
            raise UserError(f"model: its attention needs {', '.join(unknown)}, which packed attention does not know.")
        batch, _, length, _ = query.shape
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        if cu_seqlens is None:  # padded on the right: causality keeps real tokens from seeing padding
            cu_seqlens = range(0, (batch + 1) * length, length)
        options = {"scale": scaling, "window": sliding_window, "softcap": softcap, "dropout": dropout}
        out = packed(q, k, v, cu_seqlens, shared=shared, **options)
        return out.view(batch, length, *out.shape[1:]), None

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
    def of(cls, k: Tensor, v: Tensor, cu_seqlens: Any, shared: Any, edges_k: Any) -> _Varlen:
        """Put shared prompts before the keys and values of their documents, and the edges on the device."""
        edges = edges_k or cu_seqlens
        if shared is not None:
            (k, edges), (v, _) = with_prompts(k, cu_seqlens, shared), with_prompts(v, cu_seqlens, shared)

        def on_device(edges: Sequence[int]) -> Tensor:
            return torch.tensor(edges, dtype=torch.int32).to(k.device, non_blocking=True)

        def longest(edges: Sequence[int]) -> int:
            return max(b - a for a, b in zip(edges, edges[1:], strict=False))

        return cls(k, v, on_device(cu_seqlens), on_device(edges), longest(cu_seqlens), longest(edges))


def _flash(package: str) -> PackedAttention:
    """Return FlashAttention-3 (``flash_attn_interface``), which drops nothing, or -2 (``flash_attn``)."""

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Any,
        *,
        shared: Any,
        dropout: float,
        edges_k: Any = None,
        **options: Any,
    ) -> Tensor:
        kernel = importlib.import_module(package).flash_attn_varlen_func
        dropped = {"dropout_p": dropout} if package == "flash_attn" else {}
        out = kernel(q, *_Varlen.of(k, v, cu_seqlens, shared, edges_k), **dropped, **_flash_options(**options))
        first: Tensor = out[0] if isinstance(out, tuple) else out  # -3's first releases return the log-sum-exp too
        return first

    return attend


def _flash_options(*, scale: float | None, window: int | None, softcap: float | None) -> dict[str, Any]:
    """Return what FlashAttention-2 and -3 call alike."""
    return {
        "softmax_scale": scale,
        "causal": True,
        "window_size": (-1, -1) if window is None else (window - 1, 0),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        **({} if softcap is None else {"softcap": softcap}),
    }


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Any,
    *,
    shared: Any,
    scale: float | None,
    window: int | None,
    edges_k: Any = None,
    **lacking: Any,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    groups, options = q.shape[1] // k.shape[1], dict[str, Any]()
    if groups > 1 and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    elif groups > 1:
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    size = (-1, 0) if window is None else (window - 1, 0)
    out = varlen_attn(q, *_Varlen.of(k, v, cu_seqlens, shared, edges_k), scale=scale, window_size=size, **options)
    assert isinstance(out, Tensor)
    return out
