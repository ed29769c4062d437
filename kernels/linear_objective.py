"""Log-probabilities of target tokens from hidden states and the output matrix, and objectives of them.

The [N, V] logits never exist at once: chunks of rows are computed by the vendor's matrix product, used and overwritten in a
workspace. Two ways lead through:

* ``linear_logprobs``: log-probabilities with a gradient for whatever is done with them; the backward pass computes the
  logits again (8·N·V·H floating-point operations).
* ``linear_objective``: where whole groups of tokens fit the workspace, the objective is evaluated chunk by chunk inside the
  call and the gradients are made in the same pass (6·N·V·H).

Both compute, with z = W h + b, its softcap c and temperature τ, target y and label smoothing ε::

    z'     = c · tanh(z / c) / τ
    log p  = (1 − ε) z'_y + ε/V Σ_v z'_v − lse                      lse = log Σ_v exp z'_v
    dz     = [g ((1 − ε) onehot(y) + ε/V) + (g_lse − g) softmax(z')] · ∂z'/∂z

for the gradients g of log p and g_lse of lse. What is done to the logits of a chunk is Triton's on CUDA (``triton_softmax``) and
its eager twin's elsewhere (``reference``).

Each rank may hold some rows of the output matrix (``Shard``): a chunk's statistics, then the gradient of the hidden states, are
reduced over the ranks, which all call alike.

float16: ``linear_objective`` writes the gradient of the loss sum itself, before any loss scale, which comes in the backward pass;
``linear_logprobs`` divides the gradients that it is given by the largest of them, and multiplies by it after the matrix products.

Legend: N tokens, V vocabulary, H hidden size, C tokens of a chunk, K rows of a chunk's statistics, S parts of the vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from kernels.output_layer import (
    PLAIN,
    Head,
    LogitOptions,
    Outputs,
    Shard,
    by_triton,
    logits_grad_,
    merge,
    token_outputs,
    twin,
)

ObjectiveFn = Callable[[Tensor, int, int], tuple[Tensor, dict[str, Tensor]]]
"""(logprobs_C, start, stop) → (scalar loss sum, scalar sums to report), for the groups start:stop; C is all of their tokens."""

WITHOUT_LOGITS = False
"""Whether log-probabilities without gradients come from ``triton_logprobs``, which writes no logits, where Triton serves. It
is to be kept only where it beats matrix product and softmax, and that has not been measured on a GPU yet."""


def linear_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    *,
    workspace_mb: float,
    bias_V: Tensor | None = None,
    options: LogitOptions = PLAIN,
    shard: Shard | None = None,
) -> Tensor:
    """Return log p(label) for each row, differentiable in hidden states, output matrix and bias.

    Args:
        hidden_NH: Hidden states, float32, bfloat16, float16 or float64, [N, H].
        weight_VH: Output matrix of the same dtype, [V, H]; of this rank, with a shard.
        labels_N: Target ids, integers, [N]; ``options.ignore_index`` has 0 and no gradient, another that is in no vocabulary NaN.
        workspace_mb: Size of a chunk's logits, MiB.
        bias_V: Bias of the logits, of the same dtype; None: none.
        options: See ``LogitOptions``; ``z_loss`` is ``linear_objective``'s.
        shard: This rank's part of the vocabulary; None: all of it.

    Returns:
        Log-probabilities, float32 (float64 of float64), [N].
    """
    return linear_outputs(
        hidden_NH, weight_VH, labels_N, workspace_mb=workspace_mb, bias_V=bias_V, options=options, shard=shard
    ).logprobs_N


def linear_outputs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    *,
    workspace_mb: float,
    bias_V: Tensor | None = None,
    options: LogitOptions = PLAIN,
    shard: Shard | None = None,
) -> Outputs:
    """Return log-probabilities and log-sum-exp, both differentiable, and entropies where the options ask for them.

    Args:
        hidden_NH: See ``linear_logprobs``, as the rest.
        weight_VH: Output matrix.
        labels_N: Target ids.
        workspace_mb: Size of a chunk's logits.
        bias_V: Bias of the logits.
        options: Of the logits.
        shard: This rank's part of the vocabulary.

    Returns:
        Float32 (float64 of float64), [N] each.
    """
    head = Head(weight_VH, bias_V, options, shard)
    if _needs_gradient(hidden_NH, weight_VH, bias_V):
        found = _LinearOutputs.apply(hidden_NH, weight_VH, bias_V, labels_N, workspace_mb, options, shard)  # type: ignore[no-untyped-call]
        return Outputs(*found)
    if WITHOUT_LOGITS and by_triton(hidden_NH):
        return linear_logprobs_forward(hidden_NH, weight_VH, labels_N, bias_V=bias_V, options=options, shard=shard)
    return _forward(head, hidden_NH, labels_N, workspace_mb)[0]


def linear_logprobs_forward(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    options: LogitOptions = PLAIN,
    shard: Shard | None = None,
) -> Outputs:
    """Return log-probabilities, log-sum-exp and entropies without gradients by Triton's kernel, which writes no logits.

    Args:
        hidden_NH: Hidden states, float32, bfloat16 or float16, [N, H], where ``use_triton`` says yes; as in ``linear_logprobs``.
        weight_VH: Output matrix.
        labels_N: Target ids.
        bias_V: Bias of the logits.
        options: Of the logits.
        shard: This rank's part of the vocabulary.
    """
    from kernels.triton_logprobs import linear_logit_stats

    head = Head(weight_VH, bias_V, options, shard)
    with torch.no_grad():
        parts_KSN = linear_logit_stats(hidden_NH, weight_VH, bias_V, head.local(labels_N), **head.wanted())
        return token_outputs(head, merge(parts_KSN, head.group), labels_N)[0]


def linear_objective(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    objective: ObjectiveFn,
    *,
    group_bounds: Sequence[int] | None = None,
    workspace_mb: float,
    bias_V: Tensor | None = None,
    options: LogitOptions = PLAIN,
    shard: Shard | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return an objective of the labels' log-probabilities, summed over groups of tokens.

    Where every group fits the workspace, the gradients come out of the forward pass; otherwise the log-probabilities of all
    tokens are computed first and the logits again in the backward pass, and a warning says so once. The backward pass may run once.

    Args:
        hidden_NH: Hidden states, float32, bfloat16, float16 or float64, [N, H].
        weight_VH: Output matrix of the same dtype, [V, H]; of this rank, with a shard.
        labels_N: Target ids, integers, [N]; ``options.ignore_index`` has 0 and no gradient, another that is in no vocabulary NaN.
        objective: Called with whole groups; its sums add up over calls. With a shard, every rank has the same.
        group_bounds: Group g is the tokens group_bounds[g]:group_bounds[g + 1]; None: every token is one.
        workspace_mb: Size of a chunk's logits, MiB.
        bias_V: Bias of the logits, of the same dtype; None: none.
        options: See ``LogitOptions``.
        shard: This rank's part of the vocabulary; None: all of it.

    Returns:
        The loss sum, a float32 scalar with a gradient, and the reported sums, without; among them, where the options ask for it,
        "entropy", that of all tokens.

    Raises:
        RuntimeError: In a second backward pass.
    """
    head = Head(weight_VH, bias_V, options, shard)
    bounds = range(hidden_NH.shape[0] + 1) if group_bounds is None else group_bounds
    rows = head.rows(workspace_mb)
    edges = chunk_edges(bounds, rows)
    train = _needs_gradient(hidden_NH, weight_VH, bias_V)
    if edges is None:
        if train:
            _say_twice(rows)
        outputs = linear_outputs(
            hidden_NH, weight_VH, labels_N, workspace_mb=workspace_mb, bias_V=bias_V, options=options, shard=shard
        )
        loss, found = _objective(head, outputs, objective, 0, len(bounds) - 1)
        return loss, {name: value.detach() for name, value in found.items()}
    sums: dict[str, Tensor] = {}
    chunks = [_Chunk(bounds[a], bounds[b], a, b) for a, b in zip(edges, edges[1:], strict=False)]
    run = _Run(labels_N, chunks, objective, sums)
    if train:
        return _LinearObjective.apply(hidden_NH, weight_VH, bias_V, run, options, shard), sums  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return _through(head, hidden_NH, run, None), sums


def chunk_edges(bounds: Sequence[int], rows: int) -> list[int] | None:
    """Return the edges, as group indices, of chunks of at most ``rows`` tokens; None if a group is longer than that.

    Args:
        bounds: Group g is the tokens bounds[g]:bounds[g + 1].
        rows: Most tokens in a chunk.
    """
    if isinstance(bounds, range):  # every token is a group
        return [*range(0, max(1, len(bounds) - 1), rows), len(bounds) - 1]
    edges = [0]
    for group, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if stop - start > rows:
            return None
        if stop - bounds[edges[-1]] > rows:
            edges.append(group)
    return [*edges, len(bounds) - 1]


class _Chunk(NamedTuple):
    """Tokens start:stop, which are the groups first:last."""

    start: int
    stop: int
    first: int
    last: int


class _Run(NamedTuple):
    """What is done chunk by chunk."""

    labels_N: Tensor
    chunks: Sequence[_Chunk]
    objective: ObjectiveFn
    sums: dict[str, Tensor]
    """Filled with what the objective reports."""


class _Gradients:
    """Gradients of the output layer, summed over chunks; of the matrix and the bias in float32."""

    def __init__(self, hidden_NH: Tensor, head: Head, needed: Sequence[bool]) -> None:
        kind = torch.promote_types(hidden_NH.dtype, torch.float32)
        self.head = head
        self.hidden_NH = torch.empty_like(hidden_NH) if needed[0] else None
        self.weight_VH = torch.empty_like(head.weight_VH, dtype=kind) if needed[1] else None
        self.bias_V = head.weight_VH.new_zeros(len(head.weight_VH), dtype=kind) if needed[2] else None
        self.first = True

    def add(self, dz_CV: Tensor, hidden_CH: Tensor, start: int) -> None:
        """Take the gradient of the logits of the tokens from ``start`` on."""
        if self.hidden_NH is not None:
            torch.mm(dz_CV, self.head.weight_VH, out=self.hidden_NH[start : start + len(hidden_CH)])
        if self.weight_VH is not None:
            _add_weight_grad(self.weight_VH, dz_CV, hidden_CH, first=self.first)
        if self.bias_V is not None:
            self.bias_V += dz_CV.sum(0, dtype=self.bias_V.dtype)
        self.first = False

    def summed(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return them, those of the hidden states over all parts of the vocabulary."""
        if self.first and self.weight_VH is not None:
            self.weight_VH.zero_()
        if self.hidden_NH is not None and self.head.group is not None:
            dist.all_reduce(self.hidden_NH, group=self.head.group)
        return self.hidden_NH, self.weight_VH, self.bias_V


class _LinearOutputs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        workspace_mb: float,
        options: LogitOptions,
        shard: Shard | None,
    ) -> tuple[Tensor | None, ...]:
        outputs, lse_N = _forward(Head(weight_VH, bias_V, options, shard), hidden_NH, labels_N, workspace_mb)
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, labels_N, lse_N)  # type: ignore[arg-type]  # None is one too
        ctx.options = workspace_mb, options, shard  # type: ignore[attr-defined]
        ctx.set_materialize_grads(False)
        if outputs.entropy_N is not None:
            ctx.mark_non_differentiable(outputs.entropy_N)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, bias_V, labels_N, lse_N = ctx.saved_tensors  # type: ignore[attr-defined]
        workspace_mb, options, shard = ctx.options  # type: ignore[attr-defined]
        head = Head(weight_VH, bias_V, options, shard)
        given = [torch.zeros_like(lse_N) if grad is None else grad for grad in grads[:2]]
        scale = _largest(given) if hidden_NH.dtype == torch.float16 and len(lse_N) else None
        grad_N, grad_lse_N = given if scale is None else [grad / scale for grad in given]
        gradients = _Gradients(hidden_NH, head, ctx.needs_input_grad[:3])  # type: ignore[attr-defined]
        rows = head.rows(workspace_mb)
        for a in range(0, len(hidden_NH), rows):
            c = slice(a, a + rows)
            z_CV = head.logits(hidden_NH[c])
            gradients.add(logits_grad_(head, z_CV, labels_N[c], lse_N[c], grad_N[c], grad_lse_N[c]), hidden_NH[c], a)
            del z_CV  # before the next ones are made
        return *_finished(gradients.summed(), scale, weight_VH.dtype), None, None, None, None


class _LinearObjective(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        run: _Run,
        options: LogitOptions,
        shard: Shard | None,
    ) -> Tensor:
        head = Head(weight_VH, bias_V, options, shard)
        gradients = _Gradients(hidden_NH, head, ctx.needs_input_grad[:3])  # type: ignore[attr-defined]
        total = _through(head, hidden_NH, run, gradients)
        ctx.gradients = gradients.summed()  # type: ignore[attr-defined]
        ctx.dtype = weight_VH.dtype  # type: ignore[attr-defined]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, scale: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:  # type: ignore[attr-defined]
            raise RuntimeError(
                "linear_objective: its backward pass scales gradients in place and runs once; call it again."
            )
        gradients, ctx.gradients = ctx.gradients, None  # type: ignore[attr-defined]
        return *_finished(gradients, scale, ctx.dtype), None, None, None  # type: ignore[attr-defined]


def _needs_gradient(*inputs: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


@cache
def _say_twice(rows: int) -> None:
    warnings.warn(
        f"A group of tokens is longer than the {rows} that fit the workspace of the output layer: its logits are computed twice, "
        "a third more work there. A larger workspace avoids it.",
        RuntimeWarning,
        stacklevel=3,
    )


def _forward(head: Head, hidden_NH: Tensor, labels_N: Tensor, workspace_mb: float) -> tuple[Outputs, Tensor]:
    """Return outputs, and lse of ignored tokens too, without gradients."""
    kind, rows = torch.promote_types(hidden_NH.dtype, torch.float32), head.rows(workspace_mb)
    stats_KN = torch.empty(5, len(hidden_NH), dtype=kind, device=hidden_NH.device)
    with torch.no_grad():
        for a in range(0, len(hidden_NH), rows):
            c = slice(a, a + rows)
            z_CV = head.logits(hidden_NH[c])
            stats_KN[:, c] = twin(z_CV).logit_stats(z_CV, head.local(labels_N[c]), **head.wanted())
            del z_CV  # before the next ones are made
        return token_outputs(head, merge(stats_KN[:, None], head.group), labels_N)


def _through(head: Head, hidden_NH: Tensor, run: _Run, gradients: _Gradients | None) -> Tensor:
    """Return the loss sum of all chunks, and add to sums and gradients."""
    total = torch.zeros((), dtype=torch.promote_types(hidden_NH.dtype, torch.float32), device=hidden_NH.device)
    for chunk in run.chunks:
        hidden_CH, labels_C = hidden_NH[chunk.start : chunk.stop], run.labels_N[chunk.start : chunk.stop]
        z_CV = head.logits(hidden_CH)
        parts_KC = twin(z_CV).logit_stats(z_CV, head.local(labels_C), **head.wanted())
        outputs, lse_C = token_outputs(head, merge(parts_KC[:, None], head.group), labels_C)
        leaves = [x.requires_grad_(gradients is not None) for x in outputs[:2]]
        with torch.set_grad_enabled(gradients is not None):
            loss, found = _objective(head, outputs, run.objective, chunk.first, chunk.last)
        for name, value in found.items():
            run.sums[name] = run.sums[name] + value.detach() if name in run.sums else value.detach()
        total += loss.detach()
        if gradients is not None:
            grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
            gradients.add(logits_grad_(head, z_CV, labels_C, lse_C, *grads), hidden_CH, chunk.start)
        del z_CV  # before the next ones are made
    return total


def _objective(
    head: Head, outputs: Outputs, objective: ObjectiveFn, first: int, last: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return loss and sums of some groups, with what the options add to them."""
    loss, found = objective(outputs.logprobs_N, first, last)
    if head.options.z_loss:
        loss = loss + head.options.z_loss * outputs.lse_N.square().sum()
    if outputs.entropy_N is not None:
        found = {**found, "entropy": outputs.entropy_N.sum()}
    return loss, found


def _add_weight_grad(out_VH: Tensor, dz_CV: Tensor, hidden_CH: Tensor, *, first: bool) -> None:
    """Accumulate dzᵀ h into float32 (float64 of float64)."""
    if hidden_CH.dtype == out_VH.dtype:
        out_VH.addmm_(dz_CV.t(), hidden_CH, beta=0.0 if first else 1.0)
    elif hidden_CH.is_cuda and _sums_in_float32(hidden_CH.device, hidden_CH.dtype):
        torch.addmm(out_VH, dz_CV.t(), hidden_CH, beta=0 if first else 1, out_dtype=torch.float32, out=out_VH)
    elif first:
        out_VH.copy_(dz_CV.t() @ hidden_CH)
    else:
        out_VH.add_(dz_CV.t() @ hidden_CH)


@cache
def _sums_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether torch adds a product of such matrices to a float32 one in place, which no version of it promises."""
    one, out = torch.ones(16, 16, dtype=dtype, device=device), torch.ones(16, 16, device=device)
    try:
        torch.addmm(out, one.t(), one, beta=1, out_dtype=torch.float32, out=out)
    except (RuntimeError, TypeError):
        return False
    return bool((out == 17).all())


def _largest(values: Sequence[Tensor]) -> Tensor:
    """Return the largest magnitude among all, never 0."""
    return torch.stack([x.abs().amax() for x in values]).amax().clamp_min(torch.finfo(torch.float32).tiny)


def _finished(
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None], scale: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, ...]:
    """Return gradients scaled, in place, and in the dtype of the weights."""
    return tuple(g if g is None else (g if scale is None else g.mul_(scale)).to(dtype) for g in gradients)
