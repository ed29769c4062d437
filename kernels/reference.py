"""Eager, chunked log-probabilities of target tokens from hidden states and the output matrix.

The [N, V] logits never exist at once: chunks of rows are computed, used and overwritten in a workspace. Two ways lead through:

* ``linear_logprobs``: log-probabilities with a gradient for whatever is done with them; the backward pass computes the
  logits again (8·N·V·H floating-point operations).
* ``linear_objective``: where whole groups of tokens fit the workspace, the objective is evaluated chunk by chunk inside the
  call and the gradients are made in the same pass (6·N·V·H).

Both compute, for z = h Wᵀ and target y:  log p = z_y − logsumexp(z),  ∂log p/∂z = onehot(y) − softmax(z).

Legend: N trained tokens, V vocabulary, H hidden size, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

ObjectiveFn = Callable[[Tensor, int, int], tuple[Tensor, dict[str, Tensor]]]
"""(logprobs_C, start, stop) → (scalar loss sum, scalar sums to report), for the groups start:stop; C is all of their tokens."""


def rows_per_chunk(vocabulary: int, workspace_mb: float) -> int:
    """Return how many rows of float32 logits fit the workspace; at least one."""
    return max(1, int(workspace_mb * 2**20) // (4 * vocabulary))


def sums_by_group(values_N: Tensor, bounds: Sequence[int]) -> Tensor:
    """Return the sums of values over groups, differentiable; added up in float64, so that no order shows.

    Args:
        values_N: Float32 [N].
        bounds: Group g owns the values bounds[g]:bounds[g + 1], the first bound being 0; length G + 1.

    Returns:
        Float32 [G].
    """
    lengths_G = torch.tensor([b - a for a, b in zip(bounds, bounds[1:], strict=False)], dtype=torch.int64)
    lengths_G = lengths_G.to(values_N.device, non_blocking=True)
    group_N = torch.repeat_interleave(lengths_G, output_size=len(values_N))
    return values_N.new_zeros(len(lengths_G), dtype=torch.float64).index_add(0, group_N, values_N.double()).float()


def linear_logprobs(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, *, workspace_mb: float) -> Tensor:
    """Return log p(label) for each row, differentiable in both matrices.

    Args:
        hidden_NH: Hidden states, float32 or bfloat16, [N, H].
        weight_VH: Output matrix of the same dtype, [V, H].
        labels_N: Target ids, int64, [N].
        workspace_mb: Size of a chunk's float32 logits, MiB.

    Returns:
        Log-probabilities, float32, [N].
    """
    return _LinearLogprobs.apply(hidden_NH, weight_VH, labels_N, workspace_mb)  # type: ignore[no-any-return,no-untyped-call]


def linear_objective(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    objective: ObjectiveFn,
    *,
    group_bounds: Sequence[int] | None = None,
    workspace_mb: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return an objective of the labels' log-probabilities, summed over groups of tokens.

    Where every group fits the workspace, the gradients come out of the forward pass; otherwise the log-probabilities of all
    tokens are computed first and the logits again in the backward pass. The backward pass may run once.

    Args:
        hidden_NH: Hidden states, float32 or bfloat16, [N, H].
        weight_VH: Output matrix of the same dtype, [V, H].
        labels_N: Target ids, int64, [N].
        objective: Called with whole groups; its sums add up over calls.
        group_bounds: Group g is the tokens group_bounds[g]:group_bounds[g + 1]; None: every token is one.
        workspace_mb: Size of a chunk's float32 logits, MiB.

    Returns:
        The loss sum, a float32 scalar with a gradient, and the reported sums, without.
    """
    if not torch.is_grad_enabled():  # a parameter asks for its gradient all the same
        weight_VH = weight_VH.detach()
    bounds = range(hidden_NH.shape[0] + 1) if group_bounds is None else group_bounds
    edges = chunk_edges(bounds, rows_per_chunk(weight_VH.shape[0], workspace_mb))
    if edges is None:
        logprobs_N = linear_logprobs(hidden_NH, weight_VH, labels_N, workspace_mb=workspace_mb)
        loss, found = objective(logprobs_N, 0, len(bounds) - 1)
        return loss, {name: value.detach() for name, value in found.items()}
    sums: dict[str, Tensor] = {}
    chunks = [(bounds[a], bounds[b], a, b) for a, b in zip(edges, edges[1:], strict=False)]
    loss = _LinearObjective.apply(hidden_NH, weight_VH, labels_N, chunks, objective, sums)  # type: ignore[no-untyped-call]
    return loss, sums


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


def _softmax_parts(hidden_CH: Tensor, weight_VH: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (log-probabilities [C], exp(z − max z) [C, V], its row sums [C]), all float32; one [C, V] buffer for float32 input."""
    z_CV = (hidden_CH @ weight_VH.t()).float()
    target_C = z_CV.gather(1, labels_C[:, None]).squeeze(1)
    max_C = z_CV.amax(1)
    e_CV = z_CV.sub_(max_C[:, None]).exp_()
    sum_C = e_CV.sum(1)
    return target_C - max_C - sum_C.log(), e_CV, sum_C


def _logits_grad(e_CV: Tensor, sum_C: Tensor, labels_C: Tensor, grad_C: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn exp(z − max z) in place into grad · (onehot − softmax), the gradient of the logits."""
    e_CV.mul_((-grad_C / sum_C)[:, None])
    e_CV.scatter_add_(1, labels_C[:, None], grad_C[:, None])
    return e_CV.to(dtype)


def _add_weight_grad(out_VH: Tensor, dz_CV: Tensor, hidden_CH: Tensor, *, first: bool) -> None:
    """Accumulate dzᵀ h into float32."""
    if hidden_CH.dtype == torch.float32:
        out_VH.addmm_(dz_CV.t(), hidden_CH, beta=0.0 if first else 1.0)
    elif first:
        out_VH.copy_(dz_CV.t() @ hidden_CH)
    else:
        out_VH.add_(dz_CV.t() @ hidden_CH)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, workspace_mb: float
    ) -> Tensor:
        rows = rows_per_chunk(weight_VH.shape[0], workspace_mb)
        logprobs_N = torch.empty(hidden_NH.shape[0], dtype=torch.float32, device=hidden_NH.device)
        for a in range(0, hidden_NH.shape[0], rows):
            c = slice(a, a + rows)
            logprobs_N[c] = _softmax_parts(hidden_NH[c], weight_VH, labels_N[c])[0]
        ctx.save_for_backward(hidden_NH, weight_VH, labels_N)
        ctx.rows = rows  # type: ignore[attr-defined]
        return logprobs_N

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, labels_N = ctx.saved_tensors  # type: ignore[attr-defined]
        need_hidden, need_weight = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        d_hidden_NH = torch.empty_like(hidden_NH) if need_hidden else None
        d_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if need_weight else None
        for a in range(0, hidden_NH.shape[0], ctx.rows):  # type: ignore[attr-defined]
            c = slice(a, a + ctx.rows)  # type: ignore[attr-defined]
            _, e_CV, sum_C = _softmax_parts(hidden_NH[c], weight_VH, labels_N[c])
            dz_CV = _logits_grad(e_CV, sum_C, labels_N[c], grad_N[c], hidden_NH.dtype)
            if d_hidden_NH is not None:
                torch.mm(dz_CV, weight_VH, out=d_hidden_NH[c])
            if d_weight_VH is not None:
                _add_weight_grad(d_weight_VH, dz_CV, hidden_NH[c], first=False)
        return d_hidden_NH, None if d_weight_VH is None else d_weight_VH.to(weight_VH.dtype), None, None


class _LinearObjective(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        labels_N: Tensor,
        chunks: list[tuple[int, int, int, int]],
        objective: ObjectiveFn,
        sums: dict[str, Tensor],
    ) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        d_hidden_NH = torch.empty_like(hidden_NH) if need_hidden else None
        d_weight_VH = torch.empty_like(weight_VH, dtype=torch.float32) if need_weight else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_NH.device)
        for a, b, first_group, last_group in chunks:
            logprobs_C, e_CV, sum_C = _softmax_parts(hidden_NH[a:b], weight_VH, labels_N[a:b])
            with torch.enable_grad():
                leaf_C = logprobs_C.detach().requires_grad_()
                loss, found = objective(leaf_C, first_group, last_group)
            for name, value in found.items():
                sums[name] = sums[name] + value.detach() if name in sums else value.detach()
            total += loss.detach()
            if not (need_hidden or need_weight):
                continue
            (grad_C,) = torch.autograd.grad(loss, leaf_C)
            dz_CV = _logits_grad(e_CV, sum_C, labels_N[a:b], grad_C, hidden_NH.dtype)
            if d_hidden_NH is not None:
                torch.mm(dz_CV, weight_VH, out=d_hidden_NH[a:b])
            if d_weight_VH is not None:
                _add_weight_grad(d_weight_VH, dz_CV, hidden_NH[a:b], first=a == 0)
        if d_weight_VH is not None and not chunks:
            d_weight_VH.zero_()
        ctx.grads = d_hidden_NH, d_weight_VH  # type: ignore[attr-defined]
        ctx.weight_dtype = weight_VH.dtype  # type: ignore[attr-defined]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, scale: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden_NH, d_weight_VH = ctx.grads  # type: ignore[attr-defined]
        del ctx.grads  # type: ignore[attr-defined]  # scaled in place: a second backward would scale twice
        if d_hidden_NH is not None:
            d_hidden_NH.mul_(scale)
        if d_weight_VH is not None:
            d_weight_VH = d_weight_VH.mul_(scale).to(ctx.weight_dtype)  # type: ignore[attr-defined]
        return d_hidden_NH, d_weight_VH, None, None, None, None
