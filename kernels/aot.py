"""Compiles every entry of the table of tiles for its architecture, with no GPU, and reads what the compiler made of it.

``python -m kernels.aot [--arch sm_90] [--kernel NAME]`` prints registers, spills and shared memory, and fails where an entry does
not compile, takes more shared memory than there is, spills without being listed in ``KNOWN_SPILLS``, or is compiled by no case.
"""

from __future__ import annotations

import argparse
import importlib
import io
import multiprocessing
import pkgutil
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from typing import Any, NamedTuple

import kernels
from kernels import tiles
from kernels.dispatch import INTERPRETED
from kernels.tiles import SHARED_MEMORY, Case, Tile

BY_36 = "by triton 3.6 alone; later ones compile the tile without any"
KNOWN_SPILLS: dict[tuple[str, str], tuple[int, str]] = {
    ("attention_forward bf16 256", "sm_80"): (44, BY_36),
    ("attention_forward fp16 256", "sm_80"): (44, BY_36),
    ("attention_forward fp32 64", "sm_80"): (4, BY_36),
    ("attention_forward bf16 128 window softcap lse", "sm_80"): (32, BY_36),
    ("attention_forward bf16 256 window softcap lse", "sm_80"): (32, BY_36),
    ("attention_dkdv bf16 64", "sm_80"): (20, BY_36),
    ("attention_dkdv fp16 64", "sm_80"): (20, BY_36),
    ("attention_dkdv fp32 96", "sm_80"): (8, BY_36),
    ("attention_dkdv fp32 128", "sm_80"): (8, BY_36),
    ("attention_dkdv bf16 64 window softcap lse", "sm_80"): (28, BY_36),
    ("attention_dkdv bf16 128 window softcap lse", "sm_80"): (4, BY_36),
    ("attention_dq fp32 128", "sm_90"): (12, BY_36),
    ("attention_dkdv bf16 64 window softcap lse", "sm_90"): (28, BY_36),
    ("attention_dkdv bf16 128 window softcap lse", "sm_90"): (12, BY_36),
    ("logprobs fp32 all options", "sm_90"): (8, BY_36),
}
"""(name of a case, architecture) → (bytes at most, of all tritons that are supported; why the tile is kept all the same)."""
PROCESSES = 2

Key = tuple[str, str, int, int]
"""Of ``tiles.TILES``."""


class Job(NamedTuple):
    """A case by where it is found, which another process finds again."""

    module: str
    arch: str
    number: int


class Row(NamedTuple):
    """What became of a case."""

    name: str
    arch: str
    tile: Tile
    registers: int = 0
    """Of a thread."""
    spilled: int = 0
    """Bytes that a thread keeps in memory for want of registers: ptxas's spill stores."""
    shared: int = 0
    """Shared memory of a program, bytes."""
    seconds: float = 0.0
    """For compiling; hardly any where Triton's cache has it."""
    error: str = ""
    """Why it does not compile."""


def modules() -> list[str]:
    """Return the modules of kernels that have cases to compile."""
    names = [f"kernels.{m.name}" for m in pkgutil.iter_modules(kernels.__path__) if m.name.startswith("triton_")]
    return [name for name in names if hasattr(importlib.import_module(name), "cases")]


def collect(names: Iterable[str], archs: Iterable[str]) -> tuple[dict[Job, Case], list[str]]:
    """Return the cases of some modules, and where they and the table do not match."""
    jobs: dict[Job, Case] = {}
    wanted, problems = list(archs), []
    with _lookups() as asked:
        for name in names:
            for arch in wanted:
                before = len(asked)
                found = importlib.import_module(name).cases(arch)
                jobs |= {Job(name, arch, i): case for i, case in enumerate(found)}
                problems += _strays(found, arch, asked[before:])
    missing = [key for key in tiles.TILES if key[1] in wanted and key not in asked]
    problems += [f"{_shown(key)} is in the table, and no case compiles it." for key in missing]
    return jobs, problems


def measure(case: Case, arch: str) -> Row:
    """Compile a case and read the assembler's account of it."""
    from triton.backends.compiler import GPUTarget, Language
    from triton.compiler import ASTSource, compile, make_backend

    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    names = case.kernel.arg_names
    source = ASTSource(
        fn=case.kernel,
        signature={name: case.signature.get(name, "constexpr") for name in names},
        constexprs=case.constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible},
    )
    options = {"num_warps": case.tile.warps, "num_stages": case.tile.stages, "enable_fp_fusion": True}
    began = time.perf_counter()
    with _assembler_log() as log:
        try:
            compiled = compile(source, target=target, options=options)
            if not log.getvalue():  # it came from Triton's cache: only the last stage is done again
                backend, stages = make_backend(target), dict[str, Any]()
                backend.add_stages(stages, backend.parse_options(options), Language.TRITON)
                stages["cubin"](compiled.asm["ptx"], {})
        except Exception as error:  # whatever Triton or its assembler may raise
            reason = " ".join(str(error).split())[:300] or repr(error)
            return Row(case.name, arch, case.tile, seconds=time.perf_counter() - began, error=reason)
    registers, spilled = _account(log.getvalue())
    return Row(case.name, arch, case.tile, registers, spilled, compiled.metadata.shared, time.perf_counter() - began)


def judge(rows: Sequence[Row], known: Mapping[tuple[str, str], tuple[int, str]]) -> tuple[list[str], list[str]]:
    """Return what is wrong, and which known spills there are no more.

    Args:
        rows: What was measured.
        known: ``KNOWN_SPILLS``.
    """
    problems, notes = [], []
    for row in rows:
        what, (most, _) = f"{row.name} on {row.arch}", known.get((row.name, row.arch), (0, ""))
        if row.error:
            problems.append(f"{what} does not compile: {row.error}")
            continue
        if row.shared > SHARED_MEMORY[row.arch]:
            problems.append(
                f"{what} takes {row.shared:,} bytes of shared memory of {SHARED_MEMORY[row.arch]:,}; shrink its tile."
            )
        if row.spilled > most:
            listed = f"{most} are known" if most else "it is not in KNOWN_SPILLS"
            problems.append(
                f"{what} spills {row.spilled} bytes, and {listed}; change its tile, or list it with the reason."
            )
        elif most and not row.spilled:
            notes.append(f"{what} does not spill any more; take it out of KNOWN_SPILLS if no supported triton does.")
    return problems, notes


def table(rows: Iterable[Row]) -> str:
    """Return rows as lines of a table."""
    head = ("kernel", "arch", "tile", "registers", "spilled", "shared", "of", "s")
    cells = [head, *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print the table, and return 1 where something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m kernels.aot", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arch", choices=tiles.ARCHITECTURES, help="only this architecture")
    parser.add_argument("--kernel", help="only kernels whose name contains this")
    chosen = parser.parse_args(arguments)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET=1 leaves nothing to compile; unset it.")
    jobs, problems = collect(modules(), [chosen.arch] if chosen.arch else tiles.ARCHITECTURES)
    twice = {
        (c.name, j.arch)
        for j, c in jobs.items()
        if sum((c.name, j.arch) == (d.name, k.arch) for k, d in jobs.items()) > 1
    }
    problems += [f"{name} on {arch}: several cases have this name." for name, arch in sorted(twice)]
    if chosen.kernel:
        jobs = {job: case for job, case in jobs.items() if chosen.kernel in case.name}
    elif not chosen.arch:
        present = {(case.name, job.arch) for job, case in jobs.items()}
        problems += [
            f"KNOWN_SPILLS has {name} on {arch}, which is no case." for name, arch in KNOWN_SPILLS.keys() - present
        ]
    rows = _measured(list(jobs))
    found, notes = judge(rows, KNOWN_SPILLS)
    print(table(rows))
    print("\n".join(["", *notes, *problems, *found, f"{len(rows)} compiled, {len(problems + found)} problems"]))
    return 1 if problems or found else 0


def _measured(jobs: Sequence[Job]) -> list[Row]:
    rows: list[Row] = []
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        for row in pool.map(_one, jobs):
            rows.append(row)
            if sys.stderr.isatty():
                print(f"\r{len(rows)} of {len(jobs)} compiled", end="", file=sys.stderr)
    return rows


def _one(job: Job) -> Row:
    return measure(importlib.import_module(job.module).cases(job.arch)[job.number], job.arch)


@contextmanager
def _lookups() -> Iterator[list[Key]]:
    """Note which entries of the table are looked up."""
    asked: list[Key] = []

    class Noted(dict[Key, Tile]):
        def __getitem__(self, key: Key) -> Tile:
            asked.append(key)
            return super().__getitem__(key)

    whole = tiles.TILES
    tiles.TILES = Noted(whole)
    try:
        yield asked
    finally:
        tiles.TILES = whole


def _strays(cases: Sequence[Case], arch: str, asked: Sequence[Key]) -> list[str]:
    """Return which cases have a tile that is not of the table, and which tiles were looked up for no case."""
    entries = {key: tiles.TILES[key] for key in asked if key[1] == arch}
    problems = [
        f"{c.name} on {arch} has {c.tile}, which it did not look up." for c in cases if c.tile not in entries.values()
    ]
    unused = [key for key, tile in entries.items() if tile not in [c.tile for c in cases]]
    return problems + [f"{_shown(key)} was looked up, and no case compiles it." for key in unused]


@contextmanager
def _assembler_log() -> Iterator[io.StringIO]:
    """Have Triton print what its assembler says, and catch it."""
    from triton import knobs

    log = io.StringIO()
    with knobs.nvidia.scope(), redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        yield log


def _account(log: str) -> tuple[int, int]:
    """Return registers and bytes of spill stores that ptxas tells of."""
    registers, spilled = re.search(r"Used (\d+) registers", log), re.search(r"(\d+) bytes spill stores", log)
    if registers is None or spilled is None:
        raise RuntimeError(f"ptxas says neither registers nor spills: {log[-300:]}")
    return int(registers[1]), int(spilled[1])


def _cells(row: Row) -> tuple[str, ...]:
    tile = f"{row.tile.m}×{row.tile.n}, {row.tile.warps} warps, {row.tile.stages} stages"
    if row.error:
        return row.name, row.arch, tile, "", "", "", "", "failed"
    numbers = (f"{n:,}" for n in (row.registers, row.spilled, row.shared, SHARED_MEMORY[row.arch]))
    return row.name, row.arch, tile, *numbers, f"{row.seconds:.1f}"


def _shown(key: Key) -> str:
    kernel, arch, itemsize, head = key
    return f"{kernel} on {arch}, {itemsize} bytes" + (f", head {head}" if head else "")


if __name__ == "__main__":
    sys.exit(main())
