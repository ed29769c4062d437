"""Every kernel on the card: no further from the truth in float64 than twice the eager way, and the same bits each time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gpu_checks import checks, measure
from torch import Tensor

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CUDA = torch.device("cuda")


def negative(logprobs_C: Tensor, start: int, stop: int) -> tuple[Tensor, dict[str, Tensor]]:
    return -logprobs_C.sum(), {}


def waited(step: Callable[[], object]) -> str | None:
    """Call a step, which compiles and may wait, then again; return what torch says of a wait for the card, None: none."""
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", checks())
def test_error_and_repeatability(name: str, dtype: str) -> None:
    for found in measure(checks()[name], CUDA, DTYPES[dtype]):
        assert found.right, f"{found.output}: error {found.error:.3g}, allowed {found.allowed:.3g}"
        assert found.repeats, f"{found.output}: other bits in another run"


def test_triton_serves() -> None:
    """Else the tests above would hold the eager twins against themselves."""
    from kernels.dispatch import use_triton

    assert use_triton(torch.ones(1, device=CUDA))


def test_peak_memory_stays_at_the_workspace() -> None:
    """Loss and gradients at V 128,256: gradients, one chunk and no more, where whole logits would take five times that."""
    from kernels.linear_objective import linear_objective

    tokens, hidden, vocabulary, workspace_mb = 4096, 512, 128_256, 128
    hidden_NH = torch.randn(tokens, hidden, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    weight_VH = torch.randn(vocabulary, hidden, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    labels_N = torch.randint(vocabulary, (tokens,), device=CUDA)

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss, _ = linear_objective(hidden_NH, weight_VH, labels_N, negative, workspace_mb=workspace_mb)
    (loss / tokens).backward()
    torch.cuda.synchronize()
    peak_mb = (torch.cuda.max_memory_allocated() - before) / 2**20
    gradients_mb = (vocabulary * hidden * (4 + 2) + tokens * hidden * 2) / 2**20
    assert peak_mb < gradients_mb + 2.5 * workspace_mb + 64


def test_the_loss_does_not_wait_for_the_card() -> None:
    from kernels.linear_objective import linear_objective

    hidden_NH = torch.randn(300, 64, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    weight_VH = torch.randn(1000, 64, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    labels_N = torch.randint(1000, (300,), device=CUDA)
    assert waited(lambda: labels_N.sum().item()) is not None  # one that does
    step = lambda: linear_objective(hidden_NH, weight_VH, labels_N, negative, workspace_mb=0.25)[0].backward()  # noqa: E731
    assert waited(step) is None


def test_attention_does_not_wait_for_the_card() -> None:
    from kernels.packed_attention import packed_attention

    q, k, v = (torch.randn(300, n, 64, device=CUDA, dtype=torch.bfloat16, requires_grad=True) for n in (4, 2, 2))
    assert waited(lambda: packed_attention(q, k, v, [0, 100, 300]).sum().backward()) is None
