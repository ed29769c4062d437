"""Parity with Liger's fused output layers, float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernels.linear_objective import linear_objective

V, H = 37, 24


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert float((ours - theirs).detach().norm()) <= 2e-6 * float(theirs.detach().norm())


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-2}], ids=["plain", "regularised"])
def test_fused_linear_cross_entropy(options: dict[str, float]) -> None:
    """Their softcap is for compiled kernels alone: it does not run in the interpreter."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    from kernels.output_layer import LogitOptions

    torch.manual_seed(0)
    leaves = [torch.randn(*size, requires_grad=True) for size in ((24, H), (V, H), (V,))]
    labels = torch.randint(V, (24,))
    labels[5] = -100
    ours, _ = linear_objective(
        leaves[0], leaves[1], labels, lambda x, a, b: (-x.sum(), {}), workspace_mb=7.5 * 4 * V / 2**20,
        bias_V=leaves[2], options=LogitOptions(**options),
    )  # fmt: skip
    own = {"lse_square_scale" if name == "z_loss" else name: value for name, value in options.items()}
    theirs = LigerFusedLinearCrossEntropyLoss(reduction="sum", **own)(leaves[1], leaves[0], labels, leaves[2])
    assert_same(ours, theirs)
    for x, y in zip(*(torch.autograd.grad(loss, leaves) for loss in (ours, theirs)), strict=True):
        assert_same(x, y)


def test_fused_linear_dpo() -> None:
    """Three pairs; theirs are padded, the chosen answers first, and the loss is a mean."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    torch.manual_seed(0)
    lengths, pairs, longest, beta = [3, 5, 1, 4, 6, 2], 3, 6, 0.3
    hidden, weight = torch.randn(sum(lengths), H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    labels, reference = torch.randint(V, (sum(lengths),)), torch.randn(V, H)
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    old = (hidden @ reference.t()).detach().log_softmax(-1).gather(1, labels[:, None])[:, 0]

    def objective(logprobs: torch.Tensor, start: int, stop: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        first = bounds[2 * start]
        ratios = torch.stack(
            [
                (logprobs[a - first : b - first] - old[a:b]).sum()
                for a, b in zip(bounds[2 * start : 2 * stop], bounds[2 * start + 1 : 2 * stop + 1], strict=True)
            ]
        )
        return -F.logsigmoid(beta * (ratios[0::2] - ratios[1::2])).sum(), {}

    ours, _ = linear_objective(
        hidden, weight, labels, objective, group_bounds=bounds[::2], workspace_mb=9.5 * 4 * V / 2**20
    )
    order = [0, 2, 4, 1, 3, 5]
    pad = longest + 1  # their tokens look at the label after them
    padded = torch.stack([F.pad(hidden[bounds[i] : bounds[i + 1]], (0, 0, 0, pad - lengths[i])) for i in order])
    targets = torch.stack([F.pad(labels[bounds[i] : bounds[i + 1]], (0, pad - lengths[i]), value=-100) for i in order])
    loss = LigerFusedLinearDPOLoss(beta=beta, compiled=False, use_ref_model=True)
    theirs, *_ = loss(weight, padded, targets, ref_input=padded.detach(), ref_weight=reference)
    assert_same(ours / pairs, theirs)
    for x, y in zip(
        torch.autograd.grad(ours / pairs, (hidden, weight)), torch.autograd.grad(theirs, (hidden, weight)), strict=True
    ):
        assert_same(x, y)
