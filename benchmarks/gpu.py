"""All that needs an NVIDIA card, in one command: the kernels' errors, their speed beside rivals, whole steps of training.

    python benchmarks/gpu.py --out FOLDER [--only a,b,c,d,e] [--minutes 8]

Writes gpu.json and gpu.md. It needs torch 2.11 or later, triton and transformers; section (d) the engine's own packages too
(``pip install -e .``); neither Ray nor a network. What is not installed, does not work or does not fit is noted and left out.

Each section runs in a process of its own, on what is left of the minutes: a kernel that hangs or ruins the CUDA context takes
its section along and no other, and what was measured until then is kept. The files are written anew after each section.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

HERE = Path(__file__).resolve().parent
GRACE_S = 5.0
"""How long a section may be over its time, and how long it may take to die."""
VERDICTS = {True: "met", False: "**missed**", None: "not measured"}
Line = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """A part of the benchmark."""

    title: str
    share: float
    """Of the minutes; what an earlier section leaves is spread over the later ones."""
    reading: str
    """How its tables are to be read."""


SECTIONS = {
    "a": Section(
        "Errors and repeatability",
        0.15,
        "Against the truth in float64: the largest difference, divided by the largest value. A kernel may err by twice what the "
        "eager way does in the same type, and 1e-5. Each runs three times; the same bits are expected.",
    ),
    "b": Section(
        "Loss of the output layer",
        0.25,
        "Loss and gradients of hidden states and output matrix. Of the limit: 6·N·V·H operations (2·N·V·H without gradients) at "
        "the rate of a large matrix product on this card, over the time; N are the trained tokens.",
    ),
    "c": Section(
        "Packed attention",
        0.15,
        "TFLOP/s count 6·heads·head_dim·Σ l² forward and backward, a third of it forward, whatever is computed again. Gap: the "
        "output's largest difference from one SDPA call a document, divided by the largest value.",
    ),
    "d": Section(
        "A training step",
        0.33,
        "A Llama of the 8B's shape, cut to the layers that fit, fresh weights, one card: forward, backward, clipping, AdamW in "
        "float32. MFU as perf/mfu (docs/metrics.md): what is recomputed does not count, nor do tokens without loss in the output "
        "layer. The reference of DPO is computed before and is not in the step.",
    ),
    "e": Section(
        "Tiles",
        0.12,
        "The table's tile of each kernel and its neighbours: registers and spilled bytes a thread as compiled, and time as the "
        "profiler saw it on the card.",
    ),
}


class Ended(BaseException):
    """A signal asks to end; what is there is written."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections and write the files.

    Returns:
        0; 1 if a section broke off or an error is too large; 143 if a signal ended it.
    """
    args = _arguments(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    started, until = datetime.now().astimezone(), time.monotonic() + 60 * args.minutes - 2 * GRACE_S
    lines: dict[str, list[Line]] = {name: [] for name in args.only}
    code = 0
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    try:
        for i, name in enumerate(args.only):
            shares = [SECTIONS[n].share for n in args.only[i:]]
            seconds = (until - time.monotonic()) * shares[0] / sum(shares)
            _section(name, seconds, lines[name], args)
            write(out, started, lines, args)
    except Ended:
        print("asked to end: writing what is there", flush=True)
        code = 143
    write(out, started, lines, args)
    broken = any(line.get("broken") for found in lines.values() for line in found)
    return code or int(broken)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", required=True, help="folder of gpu.json and gpu.md")
    parser.add_argument("--only", type=_sections, default=list(SECTIONS), help="sections, separated by commas")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all sections together")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU: only shows that the script works")
    return parser.parse_args(argv)


def _sections(text: str) -> list[str]:
    if unknown := set(text.split(",")) - set(SECTIONS):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))} unknown; there are {', '.join(SECTIONS)}")
    return sorted(set(text.split(",")))


def _end(number: int, frame: FrameType | None) -> None:
    raise Ended


def _section(name: str, seconds: float, found: list[Line], args: argparse.Namespace) -> None:
    """Run one section in a process of its own; ``found`` gets what it has written, to its end or until it was ended."""
    print(f"({name}) {SECTIONS[name].title}, at most {seconds:.0f} s", flush=True)
    if seconds <= 0:
        found.append({"kind": "note", "text": "skipped: out of time"})
        return
    ended = ""
    with tempfile.TemporaryDirectory(prefix="gpu-") as work:
        rows = Path(work, "rows.jsonl")
        rows.touch()
        command = [sys.executable, str(HERE / "gpu_section.py"), name, str(rows), f"{seconds:.1f}"]
        try:
            with _process([*command, *["--smoke"] * args.smoke]) as process:
                if code := process.wait(seconds + GRACE_S):
                    ended = f"broke off: exit code {code}, see the output"
        except subprocess.TimeoutExpired:
            ended = f"broke off: not done after {seconds:.0f} s"
        except Ended:
            ended = "broke off: asked to end"
            raise
        finally:
            found += _read(rows)
            if ended:
                print(f"({name}) {ended}", flush=True)
                found.append({"kind": "note", "text": ended, "broken": True})


@contextmanager
def _process(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in a process group of its own; the group is gone in the end."""
    path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(command, env=env, cwd=HERE, start_new_session=True)
    try:
        yield process
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)


def _read(rows: Path) -> list[Line]:
    """Return the whole lines of a section's file; the last may be cut off."""
    found = []
    for line in rows.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def write(out: Path, started: datetime, lines: dict[str, list[Line]], args: argparse.Namespace) -> None:
    """Write what is there as gpu.json and gpu.md."""
    every = [line for found in lines.values() for line in found]
    about = next((line["about"] for line in every if line["kind"] == "machine"), {})
    head = {"date": started.isoformat(timespec="seconds"), "smoke": args.smoke, "minutes": args.minutes, **about}
    (out / "gpu.json").write_text(json.dumps({**head, "sections": lines}, indent=1) + "\n", encoding="utf-8")
    (out / "gpu.md").write_text("\n".join(_markdown(head, lines)) + "\n", encoding="utf-8")


def _markdown(head: Line, lines: dict[str, list[Line]]) -> list[str]:
    text = ["# Kernels and training on a card", ""]
    if head["smoke"]:
        text += [
            "**A smoke run: tiny sizes on the CPU. It shows that the script works; no figure below means anything.**",
            "",
        ]
    text += [
        " · ".join(f"{value}" if key == "date" else f"{key} {value}" for key, value in head.items() if key != "smoke")
    ]
    text += [
        "",
        "Times: CUDA events, medians of at least ten runs after a warm-up, sides taking turns; the L2 cache is not flushed between "
        "runs. Peak memory: what a run allocates at most beside what was there before.",
    ]
    goals = [line for found in lines.values() for line in found if line["kind"] == "goal"]
    if goals:
        text += ["", "## Goals", "", *_table([_goal(line) for line in goals])]
    for name, found in lines.items():
        text += ["", f"## ({name}) {SECTIONS[name].title}", "", SECTIONS[name].reading]
        tables: dict[str, list[Line]] = {}
        for line in found:
            if line["kind"] == "row":
                tables.setdefault(line["table"], []).append(line["row"])
        for title, rows in tables.items():
            text += ["", f"### {title}", "", *_table(rows)]
        notes = [f"- {line['text']}" for line in found if line["kind"] == "note"]
        text += ["", *notes] if notes else []
    return text


def _goal(line: Line) -> Line:
    return {"goal": line["goal"], "measured": line["measured"], "verdict": VERDICTS[line["met"]]}


def _table(rows: Sequence[Line]) -> list[str]:
    """Return rows as a Markdown table, columns in the order in which they first appear."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[_cell(row.get(column, "")) for column in columns] for row in rows]
    return [
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
        *(f"| {' | '.join(line)} |" for line in cells),
    ]


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
