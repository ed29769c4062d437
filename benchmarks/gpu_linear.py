"""Section (b) of gpu.py: loss and gradients of the output layer, beside everything else that computes them.

Legend: T tokens, N trained tokens, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from gpu_checks import logits
from gpu_section import Job, Run, Timing, compare, matmul_tflops
from torch import Tensor

WORKSPACES_MB = (128, 256, 512, 1024, 2048)
DEFAULT_MB = 512
PAIR = 512
"""Trained tokens of a pair on the fast path of DPO."""
IGNORED = -100
GOAL_MS, GOAL_SHARE = 42.0, 0.75
OURS = f"ours, {DEFAULT_MB} MB"
"""The side that the goals are about."""


@dataclass(frozen=True)
class Case:
    """The tensors of a comparison."""

    hidden_TH: Tensor
    weight_VH: Tensor
    labels_T: Tensor
    """IGNORED where a token is not trained."""
    index_N: Tensor
    """The trained tokens."""

    @property
    def count(self) -> int:
        """Trained tokens, N."""
        return len(self.index_N)

    def flops(self, products: int) -> float:
        """Return the operations of so many products of [N, H] and [V, H]."""
        return 2.0 * products * self.count * self.weight_VH.numel()


def run(job: Job) -> None:
    """Measure what shares of the tokens are trained with, and log-probabilities without gradients."""
    limit = matmul_tflops(job)
    job.row("Limit", side="torch.mm, random values", TFLOP_per_s=limit)
    for share in (1.0, 0.5, 0.0):
        case = inputs(job, share)
        found = compare(job, sides(job, case))
        for name, timing in found.items():
            _row(job, f"Loss and gradients, {share:.0%} of the tokens trained", name, timing, case.flops(3) / limit)
        if share == 1.0:
            _goals(job, found[OURS], case.flops(3) / limit)
    case = inputs(job, 1.0)
    for name, timing in compare(job, without_gradients(case)).items():
        _row(job, "Log-probabilities without gradients", name, timing, case.flops(1) / limit)


def inputs(job: Job, share: float) -> Case:
    """Return random tensors of which a share of the tokens is trained."""
    tokens, hidden, vocabulary = job.sizes((8192, 4096, 128_256), (64, 32, 512))
    make = torch.Generator(job.device).manual_seed(0)
    hidden_TH = torch.randn(tokens, hidden, generator=make, device=job.device, dtype=job.dtype)
    weight_VH = torch.randn(vocabulary, hidden, generator=make, device=job.device, dtype=job.dtype) * hidden**-0.5
    labels_T = torch.randint(vocabulary, (tokens,), generator=make, device=job.device)
    chosen_T = torch.rand(tokens, generator=make, device=job.device).argsort() < round(share * tokens)
    labels_T = torch.where(chosen_T, labels_T, IGNORED)
    return Case(hidden_TH.requires_grad_(), weight_VH.requires_grad_(), labels_T, chosen_T.nonzero().squeeze(1))


def sides(job: Job, case: Case) -> dict[str, Callable[[], Run]]:
    """Return what computes the mean loss of the trained tokens and both gradients."""
    found: dict[str, Callable[[], Run]] = {
        **{f"ours, {mb} MB": lambda mb=mb: _step(case, _ours(case, mb)) for mb in WORKSPACES_MB},  # type: ignore[misc]
        "ours, two phases": lambda: _step(case, _two_phases(case)),
        "ours, two phases, output matrix frozen": lambda: _step(case, _frozen(case)),
        "naive": lambda: _step(case, lambda: _naive(case.hidden_TH, case.weight_VH, case.labels_T)),
        "torch.compile of naive": lambda: _step(case, _compiled(job, case)),
        "Liger": lambda: _step(case, _liger(job, case)),
        "cut-cross-entropy": lambda: _step(case, _cut(job, case)),
        "torch's linear_cross_entropy": lambda: _step(case, _torchs(case)),
    }
    if case.count % PAIR == 0 and case.count:
        found[f"ours, pairs of {PAIR} tokens"] = lambda: _step(case, _pairs(case))
    return found


def without_gradients(case: Case) -> dict[str, Callable[[], Run]]:
    """Return what computes log-probabilities alone."""
    from kernels.linear_objective import linear_logprobs

    def ours(*, written: bool) -> Run:
        def run() -> None:
            with logits(written=written):
                linear_logprobs(case.hidden_TH, case.weight_VH, case.labels_T, workspace_mb=DEFAULT_MB)

        return run

    def naive() -> Run:
        return lambda: _naive(case.hidden_TH, case.weight_VH, case.labels_T)

    wanted = {
        "ours, logits by chunks": lambda: ours(written=True),
        "ours, logits never written": lambda: ours(written=False),
        "naive": naive,
    }
    return {name: lambda prepare=prepare: torch.no_grad()(prepare()) for name, prepare in wanted.items()}  # type: ignore[misc]


def _row(job: Job, table: str, side: str, timing: Timing, least: float) -> None:
    """Add a row; ``least`` is what the limit would need, in 10⁻¹² s."""
    share = least / 1e9 / timing.ms if timing.ms and least else None
    job.row(table, side=side, ms=timing.ms, of_the_limit=share, peak_GB=timing.peak_gb, note=timing.state)


def _goals(job: Job, timing: Timing, least: float) -> None:
    if timing.ms is None or job.smoke:
        job.goal(f"(b) at least {GOAL_SHARE:.0%} of the limit", "–", None)
        job.goal(f"(b) at most {GOAL_MS:.0f} ms on an H200", "–", None)
        return
    share, card = least / 1e9 / timing.ms, torch.cuda.get_device_name()
    job.goal(f"(b) at least {GOAL_SHARE:.0%} of the limit", f"{share:.0%}", share >= GOAL_SHARE)
    met = timing.ms <= GOAL_MS if "H200" in card else None
    job.goal(f"(b) at most {GOAL_MS:.0f} ms on an H200", f"{timing.ms:.1f} ms on {card}", met)


def _step(case: Case, loss: Callable[[], Tensor]) -> Run:
    """Return a call that computes a loss and its gradients, and drops them."""

    def step() -> None:
        (loss() / max(1, case.count)).backward()
        case.hidden_TH.grad = case.weight_VH.grad = None

    return step


def _ours(case: Case, workspace_mb: float) -> Callable[[], Tensor]:
    from kernels.linear_objective import linear_objective

    labels_N = case.labels_T[case.index_N]

    def negative(logprobs_C: Tensor, start: int, stop: int) -> tuple[Tensor, dict[str, Tensor]]:
        return -logprobs_C.sum(), {}

    def loss() -> Tensor:
        hidden_NH = case.hidden_TH.index_select(0, case.index_N)
        return linear_objective(hidden_NH, case.weight_VH, labels_N, negative, workspace_mb=workspace_mb)[0]

    return loss


def _pairs(case: Case) -> Callable[[], Tensor]:
    from kernels.linear_objective import linear_objective

    labels_N, bounds = case.labels_T[case.index_N], list(range(0, case.count + 1, PAIR))

    def preference(logprobs_C: Tensor, start: int, stop: int) -> tuple[Tensor, dict[str, Tensor]]:
        chosen, rejected = logprobs_C.view(stop - start, 2, -1).sum(-1).unbind(1)
        return -F.logsigmoid(0.1 * (chosen - rejected)).sum(), {}

    def loss() -> Tensor:
        hidden_NH = case.hidden_TH.index_select(0, case.index_N)
        return linear_objective(
            hidden_NH, case.weight_VH, labels_N, preference, group_bounds=bounds, workspace_mb=DEFAULT_MB
        )[0]

    return loss


def _two_phases(case: Case) -> Callable[[], Tensor]:
    from kernels.linear_objective import linear_logprobs

    labels_N = case.labels_T[case.index_N]

    def loss() -> Tensor:
        hidden_NH = case.hidden_TH.index_select(0, case.index_N)
        return -linear_logprobs(hidden_NH, case.weight_VH, labels_N, workspace_mb=DEFAULT_MB).sum()

    return loss


def _frozen(case: Case) -> Callable[[], Tensor]:
    fixed = Case(case.hidden_TH, case.weight_VH.detach(), case.labels_T, case.index_N)
    return _two_phases(fixed)


def _naive(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden_TH, weight_VH).float(), labels_T, ignore_index=IGNORED, reduction="sum")


def _needs_card(job: Job, what: str) -> None:
    if job.smoke:
        raise ImportError(f"{what} needs a card")


def _compiled(job: Job, case: Case) -> Callable[[], Tensor]:
    _needs_card(job, "torch.compile")
    compiled = torch.compile(_naive, dynamic=False)
    return lambda: compiled(case.hidden_TH, case.weight_VH, case.labels_T)


def _liger(job: Job, case: Case) -> Callable[[], Tensor]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    _needs_card(job, "Liger")
    loss: Any = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED, reduction="sum")
    return lambda: loss(case.weight_VH, case.hidden_TH, case.labels_T)


def _cut(job: Job, case: Case) -> Callable[[], Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    _needs_card(job, "cut-cross-entropy")
    options: dict[str, Any] = {"ignore_index": IGNORED, "reduction": "sum"}
    return lambda: linear_cross_entropy(case.hidden_TH, case.weight_VH, case.labels_T, **options)


def _torchs(case: Case) -> Callable[[], Tensor]:
    chunked: Any = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if chunked is None:
        raise ImportError("this torch has no linear_cross_entropy by chunks")
    options: dict[str, Any] = {"ignore_index": IGNORED, "reduction": "sum", "options": chunked()}
    return lambda: F.linear_cross_entropy(case.hidden_TH, case.weight_VH, case.labels_T, **options)
