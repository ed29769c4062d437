"""Which packed attention serves, and how the vendors' are called."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.backends import attention
from engine.errors import UserError
from kernels.reference import packed_attention_lse
from tests.kernels.masked_attention import by_mask, edges_of, seen_by

EVERYTHING = {"sdpa", "triton", "flash_attention", "varlen"}
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("present", "deterministic", "taken"),
    [
        (EVERYTHING, False, "flash_attention"),
        (EVERYTHING - {"flash_attention"}, False, "varlen"),
        ({"sdpa", "triton"}, False, "triton"),
        (EVERYTHING, True, "triton"),
        ({"sdpa"}, False, "sdpa"),
        ({"sdpa"}, True, "sdpa"),
    ],
)
def test_auto_takes_the_fastest_that_serves(present: set[str], deterministic: bool, taken: str) -> None:
    assert attention._resolve("auto", present, deterministic=deterministic) == taken


@pytest.mark.parametrize("choice", sorted(EVERYTHING))
def test_a_choice_is_taken_or_refused(choice: str) -> None:
    assert attention._resolve(choice, EVERYTHING, deterministic=True) == choice
    with pytest.raises(UserError, match=rf"model\.attention={choice}: not available here .* set model\.attention=auto"):
        attention._resolve(choice, EVERYTHING - {choice}, deterministic=False)


def test_cpus_have_one_of_them() -> None:
    assert attention._present(CPU, torch.bfloat16) == {"sdpa"}
    assert attention.register("auto", CPU, torch.float32, deterministic=False) == "sdpa"
    with pytest.raises(UserError, match="needs CUDA"):
        attention.register("triton", CPU, torch.float32, deterministic=False)


LENGTHS, SHARED = [5, 4, 7], [0, 3, 0]
EXACT = {"rtol": 0.0, "atol": 1e-12}


def inputs() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(sum(LENGTHS), heads, 8, dtype=torch.float64) for heads in (4, 2, 2)]


def of_a_vendor(
    q: Tensor, k: Tensor, v: Tensor, edges_q: Tensor, edges_k: Tensor, longest_q: int, longest_k: int, *,
    scale: float | None, window: tuple[int, int], softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """What FlashAttention's varlen functions document: causal, the last query of a document at its last key."""
    lengths_q, lengths_k = (edges.diff().tolist() for edges in (edges_q, edges_k))
    assert (longest_q, longest_k) == (max(lengths_q), max(lengths_k)) and edges_q.dtype == edges_k.dtype == torch.int32
    assert window[0] == -1 or window[1] == 0
    outputs = []
    for i, (queries, keys) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        q_L, k_L, v_L = (x[e[i] : e[i + 1]] for x, e in ((q, edges_q), (k, edges_k), (v, edges_k)))
        q_L = torch.cat([q_L.new_zeros(keys - queries, *q_L.shape[1:]), q_L])
        seen = seen_by([keys], window=None if window[0] == -1 else window[0] + 1)
        outputs.append(by_mask(q_L, k_L, v_L, seen, scale=scale, softcap=softcap or None)[0][keys - queries :])
    return torch.cat(outputs)


@pytest.fixture
def vendors(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand-ins for packages that need a GPU, with the signatures of theirs; lists which were called."""
    called: list[str] = []

    def flash2(
        *args: Any,
        dropout_p: float,
        softmax_scale: Any,
        causal: bool,
        window_size: Any,
        deterministic: bool,
        softcap: float = 0.0,
    ) -> Tensor:
        assert causal and dropout_p == 0 and not deterministic
        called.append("flash2")
        return of_a_vendor(*args, scale=softmax_scale, window=window_size, softcap=softcap)

    def flash3(
        *args: Any, softmax_scale: Any, causal: bool, window_size: Any, deterministic: bool, softcap: float = 0.0
    ) -> tuple[Tensor, None]:
        assert causal and not deterministic
        called.append("flash3")
        return of_a_vendor(*args, scale=softmax_scale, window=window_size, softcap=softcap), None

    def varlen_attn(*args: Any, scale: Any, window_size: Any, enable_gqa: bool = False) -> Tensor:
        assert enable_gqa and window_size[1] == 0
        called.append("varlen")
        return of_a_vendor(*args, scale=scale, window=window_size)

    for package, name, function in (
        ("flash_attn", "flash_attn_varlen_func", flash2),
        ("flash_attn_interface", "flash_attn_varlen_func", flash3),
        ("torch.nn.attention.varlen", "varlen_attn", varlen_attn),
    ):
        module = ModuleType(package)
        setattr(module, name, function)
        monkeypatch.setitem(sys.modules, package, module)
    return called


@pytest.mark.parametrize("shared", [None, SHARED])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("name", ["flash2", "flash3", "varlen"])
def test_vendors_are_asked_for_the_same(
    vendors: list[str],
    name: str,
    softcap: float | None,
    window: int | None,
    shared: list[int] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        attention, "_flash_package", lambda device: {"flash3": "flash_attn_interface"}.get(name, "flash_attn")
    )
    choice = "varlen" if name == "varlen" else "flash_attention"
    options = {"scale": 0.3, "window": window, "softcap": softcap}
    attend, qkv = attention._complete(choice, CPU, auto=True), inputs()
    found = attend(*qkv, edges_of(LENGTHS), shared=shared, dropout=0.0, **options)
    exact, _ = packed_attention_lse(*qkv, edges_of(LENGTHS), shared=shared, **options)
    torch.testing.assert_close(found, exact, **EXACT)
    assert vendors == ([] if name == "varlen" and softcap else [name])  # our own serves what it lacks


def test_what_was_chosen_by_name_is_not_replaced() -> None:
    attend = attention._complete("varlen", CPU, auto=False)
    with pytest.raises(
        UserError, match="model.attention=varlen has no dropout and no softcap; set model.attention=auto"
    ):
        attend(*inputs(), edges_of(LENGTHS), shared=None, scale=None, window=None, softcap=0.7, dropout=0.1)


@pytest.mark.parametrize("batch", [1, 3])
def test_padded_rows_are_documents(batch: int) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(batch, heads, 5, 8, dtype=torch.float64) for heads in (4, 2, 2))
    interface = attention._interface(attention._complete("sdpa", CPU, auto=True))
    found, _ = interface(torch.nn.Module(), query, key, value, None, scaling=0.3, sliding_window=3, softcap=0.7)
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    exact, _ = by_mask(*rows, seen_by([5] * batch, window=3), scale=0.3, softcap=0.7)
    torch.testing.assert_close(found, exact.view(batch, 5, 4, 8), **EXACT)


def test_what_nobody_knows_is_refused() -> None:
    x = torch.zeros(1, 1, 2, 8)
    interface = attention._interface(attention._complete("sdpa", CPU, auto=True))
    with pytest.raises(UserError, match="its attention needs s_aux, which"):
        interface(torch.nn.Module(), x, x, x, None, s_aux=torch.zeros(1))
