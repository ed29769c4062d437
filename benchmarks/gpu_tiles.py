"""Section (e) of gpu.py: what each kernel takes on the card, beside what the compiler made of its tile, and of tiles near it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from gpu_attention import both, equal, ours
from gpu_attention import inputs as attention_inputs
from gpu_checks import logits
from gpu_linear import DEFAULT_MB, OURS, sides
from gpu_linear import inputs as linear_inputs
from gpu_section import Job, Run, attempt

if TYPE_CHECKING:
    from kernels.tiles import Case, Tile

HEADS = (128, 64, 256)
RUNS = 10
EXACT = "bf16"
TABLE = "Kernels in bfloat16"
Key = tuple[str, str, int, int]


class Kernel(NamedTuple):
    """A kernel of the table, and what makes it run."""

    module: str
    case: str
    """Name among the module's cases."""
    head: int
    workload: Callable[[Job], Run]


def run(job: Job) -> None:
    """Measure the table's tiles, then their neighbours as long as there is time."""
    arch = "sm_90"
    if not job.smoke:
        from kernels.dispatch import architecture

        arch = architecture(job.device)
    chosen: dict[str, Tile] = {}
    for name, kernel in kernels().items():
        tile, reason = attempt(partial(_tile, kernel, arch))
        if tile is None or job.left <= 0:
            job.row(TABLE, kernel=name, note=reason or "skipped: out of time")
            continue
        _row(job, arch, name, kernel, tile, "table")
        chosen[name] = tile
        if job.smoke:
            return
    near = {name: neighbours(tile) for name, tile in chosen.items()}
    for turn in range(max(map(len, near.values()), default=0)):
        for name, tiles in near.items():
            if job.left <= 0:
                job.note(f"skipped: out of time, from neighbour {turn + 1} of {name} on")
                return
            if turn < len(tiles):
                _row(job, arch, name, kernels()[name], tiles[turn], "near it")


def kernels() -> dict[str, Kernel]:
    """Return every kernel of the table in bfloat16, by name."""
    found = {
        "logit_stats": Kernel("kernels.triton_softmax", f"logit_stats {EXACT}", 0, _linear),
        "logit_grad": Kernel("kernels.triton_softmax", f"logit_grad {EXACT}", 0, _linear),
        "logprobs": Kernel("kernels.triton_logprobs", f"logprobs {EXACT}", 0, _unwritten),
    }
    for head in HEADS:
        for kernel in ("attention_forward", "attention_dq", "attention_dkdv"):
            found[f"{kernel}, heads of {head}"] = Kernel(
                "kernels.triton_attention",
                f"{kernel} {EXACT} {head}",
                head,
                lambda job, head=head: _attention(job, head),
            )  # type: ignore[misc]
    return found


def neighbours(tile: Tile) -> list[Tile]:
    """Return tiles that differ in one thing by a factor of two, or in one stage."""
    found = [tile._replace(warps=w) for w in (tile.warps // 2, tile.warps * 2) if 1 <= w <= 16]
    found += [tile._replace(stages=s) for s in (tile.stages - 1, tile.stages + 1) if s >= 1]
    found += [tile._replace(n=n) for n in (tile.n // 2, tile.n * 2)]
    return found + [tile._replace(m=m) for m in (tile.m // 2, tile.m * 2) if tile.m > 1]


def _row(job: Job, arch: str, name: str, kernel: Kernel, tile: Tile, place: str) -> None:
    """Compile a kernel with a tile, and time it on the card."""
    shape = f"{tile.m}×{tile.n}, {tile.warps} warps, {tile.stages} stages"
    found, reason = attempt(partial(_measured, job, arch, name, kernel, tile))
    figures = found or {"note": reason}
    job.row(TABLE, kernel=name, tile=shape, place=place, **figures)


def _measured(job: Job, arch: str, name: str, kernel: Kernel, tile: Tile) -> dict[str, Any]:
    from kernels import aot

    with _in_table(_key(name, kernel, arch), tile):
        case = _case(kernel, arch)
        made = aot.measure(case, arch)
        if made.error:
            raise RuntimeError(made.error)
        about = {"registers": made.registers, "spilled_bytes": made.spilled, "shared_bytes": made.shared}
        if made.shared > aot.SHARED_MEMORY[arch]:
            return {**about, "ms": None, "note": "more shared memory than there is"}
        if job.smoke:
            return {**about, "ms": None, "note": "absent: the time needs a card"}
        ms, reason = attempt(lambda: _kernel_ms(kernel.workload(job), case.kernel.__name__))
        return {**about, "ms": ms, "note": reason}


def _kernel_ms(run: Run, name: str) -> float:
    """Return the milliseconds that a run spends in a kernel, as the profiler sees it."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for _ in range(RUNS):
            run()
        torch.cuda.synchronize()
    found = [event for event in seen.key_averages() if event.key == name]
    if not found:
        raise RuntimeError(f"the profiler saw no kernel {name}")
    return float(sum(event.device_time_total for event in found)) / 1e3 / RUNS


def _key(name: str, kernel: Kernel, arch: str) -> Key:
    return name.partition(",")[0], arch, 2, kernel.head


def _tile(kernel: Kernel, arch: str) -> Tile:
    return _case(kernel, arch).tile


def _case(kernel: Kernel, arch: str) -> Case:
    """Return the kernel's case, as the table is now."""
    found: list[Case] = importlib.import_module(kernel.module).cases(arch)
    return next(case for case in found if case.name == kernel.case)


@contextmanager
def _in_table(key: Key, tile: Tile) -> Iterator[None]:
    """Have the table hold another tile."""
    from kernels.tiles import TILES

    before, TILES[key] = TILES[key], tile
    try:
        yield
    finally:
        TILES[key] = before


def _linear(job: Job) -> Run:
    return sides(job, linear_inputs(job, 1.0))[OURS]()


def _unwritten(job: Job) -> Run:
    from kernels.linear_objective import linear_logprobs

    case = linear_inputs(job, 1.0)

    @torch.no_grad()
    def run() -> None:
        with logits(written=False):
            linear_logprobs(case.hidden_TH, case.weight_VH, case.labels_T, workspace_mb=DEFAULT_MB)

    return run


def _attention(job: Job, head: int) -> Run:
    case = attention_inputs(job, equal(16_384, 1024), head)
    return both(case, ours(case))
