"""Section (a) of gpu.py, and tests/gpu: every kernel against the truth in float64 and against the eager way in its own type.

Legend: T tokens, V vocabulary, H hidden size, A query heads, K key/value heads, D size of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_section import Job, attempt
from torch import Tensor

FACTOR, EPSILON = 2.0, 1e-5
"""A kernel may err by so many times the eager way's error, and so much more, of the largest value."""
REPEATS = 3
IGNORED = -100
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Check:
    """A kernel, the same written out, and what both are given."""

    inputs: Callable[[torch.Generator, bool], Tensors]
    """Draws them on the CPU, float64 and integers; smaller ones if it is told so."""
    ours: Callable[[Tensors], Tensors]
    plain: Callable[[Tensors], Tensors]
    """The eager way in the type of its inputs; of float64 inputs, the truth."""


@dataclass(frozen=True)
class Found:
    """What a check says of one output."""

    output: str
    error: float
    """Largest difference from the truth, over the truth's largest value; so are the others."""
    eager: float
    repeats: bool
    """Whether every run gave the same bits."""

    @property
    def allowed(self) -> float:
        """Error that the kernel may have."""
        return FACTOR * self.eager + EPSILON

    @property
    def right(self) -> bool:
        """Whether it has no larger one."""
        return self.error <= self.allowed


def run(job: Job) -> None:
    """Check every kernel, and say what failed."""
    from kernels.dispatch import use_triton

    if not job.smoke and not use_triton(torch.empty(0, device=job.device)):
        job.note("Triton does not work here: all that follows is of the eager twins", broken=True)
    failed = 0
    for name, check in checks().items():
        if job.left <= 0:
            job.note(f"skipped: out of time, from {name} on")
            break
        found, reason = attempt(partial(measure, check, job.device, job.dtype, small=job.smoke))
        if found is None:
            failed += 1
            job.row("Kernels", kernel=name, note=reason)
            continue
        failed += sum(not (f.right and f.repeats) for f in found)
        for f in found:
            job.row(
                "Kernels",
                kernel=name,
                output=f.output,
                error=f.error,
                eager=f.eager,
                right=f.right,
                same_bits=f.repeats,
            )
    if failed:
        job.note(f"{failed} checks failed", broken=True)


def measure(check: Check, device: torch.device, dtype: torch.dtype, *, small: bool = False) -> list[Found]:
    """Run a check.

    Args:
        check: What is checked.
        device: Where; the truth is computed there too.
        dtype: Of the floating-point inputs, which the truth is given as rounded to it.
        small: Take few and small documents.
    """
    drawn = check.inputs(torch.Generator().manual_seed(0), small)

    def given(*types: torch.dtype) -> Tensors:
        cast = {name: x for name, x in drawn.items() if x.is_floating_point()}
        for each in types:
            cast = {name: x.to(each) for name, x in cast.items()}
        return {name: cast.get(name, x).to(device) for name, x in drawn.items()}

    truth, eager = check.plain(given(dtype, torch.float64)), check.plain(given(dtype))
    first, *others = [check.ours(given(dtype)) for _ in range(REPEATS)]
    return [
        Found(
            name,
            _error(first[name], truth[name]),
            _error(eager[name], truth[name]),
            all(torch.equal(first[name], other[name]) for other in others),
        )
        for name in truth
    ]


def checks() -> dict[str, Check]:
    """Return every check by name."""
    every = {"bias": True, "softcap": 20.0, "temperature": 0.7, "smoothing": 0.1, "z_loss": 1e-3}
    found = {}
    for title, options in (("", {}), (", all options", every)):
        given = partial(_linear_inputs, options=options)
        plain = partial(_plain_linear, options=options)
        found[f"linear objective{title}"] = Check(given, partial(_objective, options=options), plain)
        both = {**options, "z_loss": 0.0}  # is the objective's
        for way in ("two phases", "logits never written"):
            ours = partial(_logprobs, options=both, written=way == "two phases")
            found[f"log-probabilities, {way}{title}"] = Check(given, ours, partial(_plain_logprobs, options=both))
        found[f"log-probabilities, gradients{title}"] = Check(
            given, partial(_logprob_gradients, options=both), partial(_plain_linear, options=both)
        )
    for dim, title, settings in [
        *((dim, "", {}) for dim in (64, 96, 128, 256)),
        (128, ", window", {"window": 20}),
        (128, ", softcap", {"softcap": 5.0}),
        (128, ", shared prompts", {"prompts": True}),
        (64, ", all options", {"window": 20, "softcap": 5.0, "prompts": True}),
    ]:
        documents = partial(_attention_inputs, dim=dim, prompts=settings.pop("prompts", False))
        found[f"attention, heads of {dim}{title}"] = Check(
            documents, partial(_attention, **settings), partial(_plain_attention, **settings)
        )
    return found


def _error(x: Tensor, truth: Tensor) -> float:
    return float((x.double() - truth).abs().max() / truth.abs().max())


# The output layer


def _linear_inputs(make: torch.Generator, small: bool, *, options: dict[str, Any]) -> Tensors:
    tokens, hidden, vocabulary = (37, 16, 301) if small else (517, 768, 5003)
    labels_T = torch.randint(vocabulary, (tokens,), generator=make)
    if options:
        labels_T[::5] = IGNORED
    return {
        "hidden": torch.randn(tokens, hidden, generator=make, dtype=torch.float64),
        "weight": torch.randn(vocabulary, hidden, generator=make, dtype=torch.float64) * 2 * hidden**-0.5,
        "bias": torch.randn(vocabulary, generator=make, dtype=torch.float64),
        "upstream": torch.randn(tokens, generator=make, dtype=torch.float64),
        "labels": labels_T,
    }


def _options(options: dict[str, Any], x: Tensors) -> dict[str, Any]:
    """Return the keyword arguments of our entry points; a workspace that takes several chunks."""
    from kernels.linear_objective import LogitOptions

    weight = x["weight"]
    chosen = LogitOptions(
        label_smoothing=options.get("smoothing", 0.0),
        z_loss=options.get("z_loss", 0.0),
        softcap=options.get("softcap"),
        temperature=options.get("temperature", 1.0),
        ignore_index=IGNORED,
    )
    rows = len(x["hidden"]) / 3.5
    mb = rows * weight.element_size() * len(weight) / 2**20
    return {"options": chosen, "bias_V": x["bias"] if options.get("bias") else None, "workspace_mb": mb}


def _leaves(x: Tensors, *names: str) -> Tensors:
    return {**x, **{name: x[name].detach().requires_grad_() for name in names}}


def _gradients(loss: Tensor, x: Tensors, *names: str) -> Tensors:
    grads = torch.autograd.grad(loss, [x[name] for name in names], allow_unused=True)
    return {f"d_{name}": g for name, g in zip(names, grads, strict=True) if g is not None}


def _objective(x: Tensors, *, options: dict[str, Any]) -> Tensors:
    from kernels.linear_objective import linear_objective

    x = _leaves(x, "hidden", "weight", "bias")

    def weighted(logprobs_C: Tensor, start: int, stop: int) -> tuple[Tensor, Tensors]:
        return (logprobs_C * x["upstream"][start:stop].float()).sum(), {}

    loss, _ = linear_objective(x["hidden"], x["weight"], x["labels"], weighted, **_options(options, x))
    return {"loss": loss.detach(), **_gradients(loss, x, "hidden", "weight", "bias")}


def _logprob_gradients(x: Tensors, *, options: dict[str, Any]) -> Tensors:
    from kernels.linear_objective import linear_logprobs

    x = _leaves(x, "hidden", "weight", "bias")
    logprobs_T = linear_logprobs(x["hidden"], x["weight"], x["labels"], **_options(options, x))
    loss = (logprobs_T * x["upstream"].float()).sum()
    return {"loss": loss.detach(), **_gradients(loss, x, "hidden", "weight", "bias")}


@torch.no_grad()
def _logprobs(x: Tensors, *, options: dict[str, Any], written: bool) -> Tensors:
    from kernels.linear_objective import linear_logprobs

    with logits(written=written):
        return {"logprobs": linear_logprobs(x["hidden"], x["weight"], x["labels"], **_options(options, x))}


@contextmanager
def logits(*, written: bool) -> Iterator[None]:
    """Have log-probabilities without gradients made by chunks of logits, or by the kernel that writes none."""
    from kernels import linear_objective

    before, linear_objective.WITHOUT_LOGITS = linear_objective.WITHOUT_LOGITS, not written
    try:
        yield
    finally:
        linear_objective.WITHOUT_LOGITS = before


def _plain(x: Tensors, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and log-sum-exp by whole logits."""
    z_TV = F.linear(x["hidden"], x["weight"], x["bias"] if options.get("bias") else None)
    z_TV = z_TV if z_TV.dtype == torch.float64 else z_TV.float()
    cap, smoothing = options.get("softcap"), options.get("smoothing", 0.0)
    z_TV = (z_TV if cap is None else cap * torch.tanh(z_TV / cap)) / options.get("temperature", 1.0)
    lse_T, counts = z_TV.logsumexp(-1), x["labels"] != IGNORED
    target_T = z_TV.gather(1, x["labels"].clamp_min(0)[:, None]).squeeze(1)
    logprobs_T = (1 - smoothing) * target_T + smoothing * z_TV.mean(-1) - lse_T
    return logprobs_T * counts, lse_T * counts


def _plain_linear(x: Tensors, *, options: dict[str, Any]) -> Tensors:
    x = _leaves(x, "hidden", "weight", "bias")
    logprobs_T, lse_T = _plain(x, options)
    loss = (logprobs_T * x["upstream"].to(logprobs_T.dtype)).sum() + options.get("z_loss", 0.0) * lse_T.square().sum()
    return {"loss": loss.detach(), **_gradients(loss, x, "hidden", "weight", "bias")}


@torch.no_grad()
def _plain_logprobs(x: Tensors, *, options: dict[str, Any]) -> Tensors:
    return {"logprobs": _plain(x, options)[0]}


# Attention


def _attention_inputs(make: torch.Generator, small: bool, *, dim: int, prompts: bool) -> Tensors:
    lengths, heads, kv_heads = ([1, 30, 14, 9], 2, 1) if small else ([1, 300, 129, 64, 17, 1], 8, 2)
    shared = [0, 0, *([n // 2 for n in lengths[1:2]] if prompts else [0]), *[0] * (len(lengths) - 3)]

    def drawn(count: int) -> Tensor:
        return torch.randn(sum(lengths), count, dim, generator=make, dtype=torch.float64)

    cu = torch.tensor([0, *lengths]).cumsum(0)
    return {"q": drawn(heads), "k": drawn(kv_heads), "v": drawn(kv_heads), "d_out": drawn(heads),
            "cu_seqlens": cu, "shared": torch.tensor(shared)}  # fmt: skip


def _attention(x: Tensors, *, window: int | None = None, softcap: float | None = None) -> Tensors:
    from kernels.packed_attention import packed_attention_outputs

    x = _leaves(x, "q", "k", "v")
    shared: Sequence[int] | None = x["shared"].tolist() if x["shared"].any() else None
    out, lse = packed_attention_outputs(
        x["q"], x["k"], x["v"], x["cu_seqlens"].tolist(), shared=shared, window=window, softcap=softcap
    )
    grads = _gradients((out.float() * x["d_out"].float()).sum(), x, "q", "k", "v")
    return {"out": out.detach(), "lse": lse.detach(), **grads}


def _plain_attention(x: Tensors, *, window: int | None = None, softcap: float | None = None) -> Tensors:
    """Attend by whole matrices of scores and a mask over all tokens."""
    x = _leaves(x, "q", "k", "v")
    exact = torch.float64 if x["q"].dtype == torch.float64 else torch.float32
    seen_TT = _seen(x["cu_seqlens"], x["shared"], window)
    group = x["q"].shape[1] // x["k"].shape[1]
    q, k, v = x["q"].transpose(0, 1), *(x[n].repeat_interleave(group, 1).transpose(0, 1) for n in ("k", "v"))
    scores_ATT = (q @ k.transpose(1, 2)).to(exact) * q.shape[-1] ** -0.5
    if softcap is not None:
        scores_ATT = softcap * torch.tanh(scores_ATT / softcap)
    scores_ATT = scores_ATT.masked_fill(~seen_TT, -torch.inf)
    out = (scores_ATT.softmax(-1).to(v.dtype) @ v).transpose(0, 1)
    grads = _gradients((out.to(exact) * x["d_out"].to(exact)).sum(), x, "q", "k", "v")
    return {"out": out.detach(), "lse": scores_ATT.detach().logsumexp(-1), **grads}


def _seen(cu_seqlens: Tensor, shared: Tensor, window: int | None) -> Tensor:
    """Return which keys (columns) each token (row) sees, [T, T]."""
    lengths = cu_seqlens.diff()
    document = torch.repeat_interleave(lengths)
    prompt = shared[document]
    position = torch.arange(len(document), device=document.device) - cu_seqlens[document] + prompt
    before = (document[:, None] - 1 == document) & (position < prompt[:, None])
    age = position[:, None] - position
    seen = ((document[:, None] == document) | before) & (age >= 0)
    return seen if window is None else seen & (age < window)
