"""Data: rows tokenised a second, memory for a million rows, the plan's time, and how full micro-batches are.

    python benchmarks/data.py --data ALPACA.json --out data

Rows are those of ``--data`` (a list in Alpaca format), over and over, each with a number of its own; without it, words drawn to
Alpaca's lengths. The tokenizer is a byte-level BPE of 8,192 tokens trained on them, the template ChatML. Tokenising runs in a
fresh process for each figure, sides taking turns; packing compares TRL's ``pack_dataset`` (strategy bfd) on the same lengths.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib import metadata
from itertools import count, islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.data.plan import Plan, assign, pack

CHATML = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
CAPACITY, PADDED = 4096, 8
"""Tokens of a packed micro-batch; samples of a padded one."""


def alpaca(file: str | None) -> Iterator[dict[str, str]]:
    """Yield rows without end, each of its own."""
    if file is not None:
        rows = json.loads(Path(file).read_text(encoding="utf-8"))
    else:
        draw = np.random.default_rng(0)
        words = ["".join(draw.choice(list("etaoinshrdlu"), size=n)) for n in draw.integers(2, 9, 3000)]

        def text(size: float) -> str:
            return " ".join(draw.choice(words, size=max(1, int(size))))

        rows = [
            {"instruction": text(draw.lognormal(2.3, 0.5)), "input": "", "output": text(draw.lognormal(4.0, 0.9))}
            for _ in range(5000)
        ]
    for number in count():
        row = rows[number % len(rows)]
        own = {key: row.get(key, "") for key in ("instruction", "input", "output")}
        yield own | {"instruction": f"{number}. {row['instruction']}"}


def short() -> Iterator[dict[str, str]]:
    """Yield short rows without end: what memory depends on is their number."""
    for number in count():
        yield {"instruction": f"What comes after {number}?", "input": "", "output": str(number + 1)}


def write_rows(target: Path, rows: Iterator[dict[str, str]], size: int) -> None:
    """Write rows as JSONL."""
    with target.open("w", encoding="utf-8") as stream:
        for row in islice(rows, size):
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_tokenizer(folder: Path, rows: Path) -> None:
    """Train a byte-level BPE on the first rows and write it as transformers loads it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8192,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with rows.open(encoding="utf-8") as stream:
        tokenizer.train_from_iterator((line for line in islice(stream, 5000)), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=CHATML
    ).save_pretrained(folder)


def tokenise(work: Path, rows: Path, processes: int) -> dict[str, float]:
    """Tokenise a file in a fresh process; seconds without imports, and peak memory in MiB of it and of its largest child."""
    command = [sys.executable, __file__, "--one", str(work), "--rows-file", str(rows), "--processes", str(processes)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def one(work: str, rows: str, processes: int) -> None:
    """Do what ``tokenise`` measures."""
    import pyarrow  # noqa: F401
    import transformers

    from engine.config.compose import compose
    from engine.data.assemble import assemble

    transformers.AutoTokenizer  # noqa: B018  # the lazy import is no part of the figure
    words = [
        "model=tiny",
        f"model.tokenizer={work}/tokenizer",
        "data=alpaca",
        f"data.train_path={rows}",
        "data.max_length=1024",
    ]
    words += [f"data.cache_dir={work}/cache", "data.cache=rebuild", f"data.num_workers={processes}"]
    config = compose(words).config
    started = time.perf_counter()
    data = assemble(config, Path(work), lambda text: None)
    seconds = time.perf_counter() - started
    own, child = (resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    summary = data.sources["train"].summary
    print(json.dumps({"seconds": seconds, "rows": summary.read, "tokens": summary.tokens, "own": own, "child": child}))


def tokenising(work: Path, file: str | None, size: int, rounds: int) -> list[str]:
    """Measure rows a second with one and with two processes."""
    rows = work / "rows.jsonl"
    write_rows(rows, alpaca(file), size)
    write_tokenizer(work / "tokenizer", rows)
    found: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    for number in range(rounds):
        for processes in (1, 2)[:: -1 if number % 2 else 1]:
            found[processes].append(tokenise(work, rows, processes))
    gains = [a["seconds"] / b["seconds"] for a, b in zip(found[1], found[2], strict=True)]
    lines = ["| processes | rows/s | tokens/s | times one process |", "|---|---|---|---|"]
    for processes, runs in found.items():
        gain = f"{median(gains):.2f} ({min(gains):.2f} to {max(gains):.2f})" if processes == 2 else "1"
        rate = [run["rows"] / run["seconds"] for run in runs]
        tokens = median(run["tokens"] / run["seconds"] for run in runs)
        lines.append(
            f"| {processes} | {median(rate):,.0f} ({min(rate):,.0f} to {max(rate):,.0f}) | {tokens:,.0f} | {gain} |"
        )
    return ["## Tokenising", "", f"{size:,} rows, {rounds} rounds.", "", *lines, ""]


def memory(work: Path, size: int) -> list[str]:
    """Measure the memory that many rows need, as lines and as one JSON array."""
    lines = [
        "| rows | file | GB | s | peak MiB, main process | peak MiB, largest worker |",
        "|---|---|---|---|---|---|",
    ]
    as_lines, as_array = work / "many.jsonl", work / "many.json"
    write_rows(as_lines, short(), size)
    with as_lines.open(encoding="utf-8") as stream, as_array.open("w", encoding="utf-8") as out:
        for number, line in enumerate(stream):
            out.write(("[" if not number else ",\n") + line.rstrip("\n"))
        out.write("]")
    for rows in (as_lines, as_array):
        run = tokenise(work, rows, 2)
        size_gb = rows.stat().st_size / 1e9
        lines.append(
            f"| {size:,} | {rows.suffix} | {size_gb:.2f} | {run['seconds']:.0f} | {run['own']:,.0f} | {run['child']:,.0f} |"
        )
    return [
        "## Memory",
        "",
        "Short rows, two processes. Libraries alone are about 600 MiB of the main process.",
        "",
        *lines,
        "",
    ]


def milliseconds(work: Callable[[int], object]) -> float:
    """Return the median time of a call over some rounds."""
    taken = []
    for i in range(50):
        started = time.perf_counter()
        work(i)
        taken.append(1e3 * (time.perf_counter() - started))
    return median(taken)


def planning(lengths: NDArray[np.int64]) -> list[str]:
    """Measure the time to know a step's conversations and to pack them."""
    lines = ["| conversations | sources | members of a step, ms | packing them, ms |", "|---|---|---|---|"]
    draw = np.random.default_rng(0)
    for size, sources in ((1_000_000, 1), (10_000_000, 1), (10_000_000, 8)):
        names = [f"source{i}" for i in range(sources)] if sources > 1 else [""]
        weights = [float(i + 1) for i in range(sources)] if sources > 1 else None
        plan = Plan(sizes=[size // sources] * sources, weights=weights, names=names, batch_size=512)
        steps = plan.steps_per_epoch
        members_ms = milliseconds(lambda i, p=plan, n=steps: p.members(i * 977 % n))
        own = draw.choice(lengths, 512)
        lines.append(
            f"| {size:,} | {sources} | {members_ms:.2f} | {milliseconds(lambda i, o=own: pack(o, CAPACITY)):.2f} |"
        )
    return ["## Plan", "", "512 conversations a step.", "", *lines, ""]


def packing(lengths: NDArray[np.int64]) -> list[str]:
    """Compare how full packed and padded micro-batches are, and how many there are."""
    from datasets import Dataset
    from trl.data_utils import pack_dataset

    total = int(lengths.sum())
    lines = ["| way | micro-batches | full |", "|---|---|---|"]

    def row(way: str, batches: int, places: int) -> None:
        lines.append(f"| {way} | {batches:,} | {total / places:.1%} |")

    for batch in (64, 512):
        plan = Plan(sizes=[len(lengths)], batch_size=batch, drop_last=False)
        steps = [lengths[plan.members(s)] for s in range(plan.steps_per_epoch)]
        bins = sum(len(assign(s, capacity=CAPACITY, ranks=1, attention_length=np.inf)[0]) for s in steps)
        row(f"ours, within each step of {batch}", bins, bins * CAPACITY)
    table = Dataset.from_dict({"input_ids": [[0] * int(n) for n in lengths]})
    packed = pack_dataset(table, CAPACITY, "bfd", {"batch_size": len(lengths)})
    row("TRL bfd, over all rows at once", len(packed), len(packed) * CAPACITY)
    packed = pack_dataset(table, CAPACITY, "bfd")
    row("TRL bfd, its default (1,000 rows at a time)", len(packed), len(packed) * CAPACITY)
    order = np.random.default_rng(0).permutation(len(lengths))
    groups = [lengths[order[a : a + PADDED]] for a in range(0, len(order), PADDED)]
    row(f"padded batches of {PADDED}, random order", len(groups), sum(len(g) * int(g.max()) for g in groups))
    what = f"{len(lengths):,} rows, {total:,} tokens, micro-batches of {CAPACITY:,} tokens."
    return ["## Packing", "", what, "", *lines, ""]


def measured_lengths(work: Path) -> NDArray[np.int64]:
    """Return the lengths that tokenising has found."""
    from engine.data.samples import Samples

    newest = max((f for f in (work / "cache" / "tokenized").iterdir() if f.is_dir()), key=lambda f: f.stat().st_mtime)
    return np.asarray(Samples(newest).lengths, np.int64)


def main() -> None:
    """Measure, print and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", help="rows in Alpaca format, a JSON list")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--many", type=int, default=1_000_000, help="rows of the memory test; 0: leave it out")
    parser.add_argument("--out", help="name of the file in results/")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--rows-file", help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, help=argparse.SUPPRESS)
    args: Any = parser.parse_args()
    if args.one:
        one(args.one, args.rows_file, args.processes)
        return
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="data-") as folder:
        work = Path(folder)
        text = tokenising(work, args.data, args.rows, args.rounds)
        lengths = measured_lengths(work)
        text += planning(lengths) + packing(lengths)
        if args.many:
            text += memory(work, args.many)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    cpu = next((s.split(":", 1)[1].strip() for s in lines if s.startswith("model name")), platform.machine())
    python = platform.python_version()
    versions = ", ".join(
        f"{n} {metadata.version(n)}" for n in ("anneal", "tokenizers", "transformers", "datasets", "trl")
    )
    source = f"rows of {Path(args.data).name}, numbered" if args.data else "generated rows"
    head = [
        "# Data",
        "",
        f"{date.today().isoformat()} · {cpu}, {os.cpu_count()} cores · load before {load:.1f} · Python {python}, {versions} · "
        f"{source}",
        "",
    ]
    print("\n".join(head + text))
    if args.out:
        file = Path(__file__).parent / "results" / f"{args.out}.md"
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(head + text), encoding="utf-8")


if __name__ == "__main__":
    main()
