"""The kernel that writes no logits, against float64 and against matrix product and softmax.

The rule: its error against the float64 truth is at most twice that of eager PyTorch in the same type, plus a few units in the last
place of float32.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import linear_objective as module
from kernels import triton_logprobs
from kernels.linear_objective import linear_logprobs_forward, linear_outputs
from kernels.output_layer import LogitOptions

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPSILON = 2e-6
ALL = {"label_smoothing": 0.1, "softcap": 4.0, "temperature": 1.5, "entropy": True}


def inputs(n: int, v: int, h: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + v + h)
    hidden, weight, bias = (torch.randn(*size, generator=generator).to(dtype) for size in ((n, h), (v, h), (v,)))
    return hidden, weight, bias, torch.randint(v, (n,), generator=generator)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "all"])
@pytest.mark.parametrize(
    ("n", "v", "h"), [(1, 1, 1), (15, 17, 16), (16, 16, 15), (17, 15, 17), (40, 37, 40), (3, 130, 8)]
)
def test_it_says_what_logits_say(n: int, v: int, h: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    hidden, weight, bias, labels = inputs(n, v, h, dtype)
    labels[n // 2] = -100 if n > 1 else labels[0]
    chosen: dict[str, Any] = {"bias_V": bias if options else None, "options": LogitOptions(**options)}
    ours = linear_logprobs_forward(hidden, weight, labels, **chosen)
    exact = {**chosen, "bias_V": bias.double() if options else None}
    truth = linear_outputs(hidden.double(), weight.double(), labels, workspace_mb=1, **exact)
    eager = linear_outputs(hidden, weight, labels, workspace_mb=1, **chosen)
    for x, y, right in zip(ours, eager, truth, strict=True):
        if right is None:
            assert x is None
            continue
        size = right.abs().amax().clamp_min(1.0)
        error, eager_error = (float(((found.double() - right).abs() / size).amax()) for found in (x, y))
        assert error <= 2 * eager_error + EPSILON


@pytest.mark.parametrize("programs", [1, 3, 1000])
def test_any_number_of_splits_says_the_same(monkeypatch: pytest.MonkeyPatch, programs: int) -> None:
    hidden, weight, bias, labels = inputs(20, 100, 24, torch.float32)
    whole = linear_logprobs_forward(hidden, weight, labels, bias_V=bias, options=LogitOptions(**ALL))
    monkeypatch.setattr(triton_logprobs, "PROGRAMS", programs)
    wanted: dict[str, Any] = {"softcap": None, "temperature": 1.0, "total": False, "weighted": False}
    parts = triton_logprobs.linear_logit_stats(hidden, weight, bias, labels, **wanted)
    assert parts.shape == (5, {1: 1, 3: 2, 1000: 7}[programs], 20)
    found = linear_logprobs_forward(hidden, weight, labels, bias_V=bias, options=LogitOptions(**ALL))
    for x, y in zip(found, whole, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_strides_and_no_tokens() -> None:
    hidden, weight, _, labels = inputs(9, 37, 24, torch.float32)
    right = linear_logprobs_forward(hidden, weight, labels).logprobs_N
    odd = linear_logprobs_forward(
        hidden.t().contiguous().t(), torch.cat([weight, weight], 1)[:, :24], labels
    ).logprobs_N
    torch.testing.assert_close(odd, right)
    assert linear_logprobs_forward(hidden[:0], weight, labels[:0]).logprobs_N.shape == (0,)


def test_it_serves_where_it_is_chosen_and_no_gradient_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    plain = triton_logprobs.linear_logit_stats
    monkeypatch.setattr(triton_logprobs, "linear_logit_stats", lambda *x, **y: calls.append(1) or plain(*x, **y))
    hidden, weight, _, labels = inputs(9, 37, 24, torch.float32)
    before = linear_outputs(hidden, weight, labels, workspace_mb=1)
    assert not calls
    monkeypatch.setattr(module, "WITHOUT_LOGITS", True)
    after = linear_outputs(hidden, weight, labels, workspace_mb=1)
    assert calls == [1]
    torch.testing.assert_close(after.logprobs_N, before.logprobs_N)
    linear_outputs(hidden.requires_grad_(), weight, labels, workspace_mb=1)
    assert calls == [1]
