"""Tokenising a source into a folder: rows in batches, in processes of their own where there are many."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain, islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from engine.config.schema import DataSection, SourceSection
from engine.data import oasst, readers, rows
from engine.data.conversation import Conversation, Dropped, Pair, RowError, Tokens
from engine.data.encode import Encoder
from engine.data.samples import SCHEMA, Summary, trained_positions, view
from engine.errors import RunError, UserError
from engine.types import Sample

ROWS_PER_BATCH = 512
MOST_BAD = 10
"""Bad rows that are named before tokenising stops."""
BATCHES_AFTER_BAD = 64
"""Batches in which further ones are looked for."""
BAD_ROWS = "bad_rows.jsonl"
CHECKSUM_BLOCK = 1 << 20
CONTENT = ("input_ids", "length", "turn", "trained", "#trained", "weights", "#weights")
"""What makes up a data set's fingerprint: columns, and (#) how many values each document has in one."""


@dataclass(kw_only=True)
class Batch:
    """Some rows, tokenised."""

    table: pa.RecordBatch
    rows: int
    used: int = 0
    cut: int = 0
    split: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    bad: list[tuple[str, str]] = field(default_factory=list)
    """Place of each row that cannot be used, and why."""
    trained_tokens: int = 0


def build(target: Path, meta: Mapping[str, Any], source: SourceSection, encoder: Encoder, data: DataSection) -> None:
    """Tokenise a source into a new folder; everything is on disk when it returns.

    Args:
        target: The folder.
        meta: What else its meta.json is to say.
        source: The source, its revision fixed.
        encoder: From conversations to samples.
        data: ``num_workers`` and ``bad_rows``.

    Raises:
        UserError: For rows that cannot be used, naming the first, or if no sample is left.
    """
    found = rows.read(source)
    head: list[rows.Row] = []
    for item in found:
        head.append(item)
        if not isinstance(item[1], RowError) or (len(head) == MOST_BAD and data.bad_rows == "error"):
            break
    if not head:
        raise UserError(f"{source.path}: there are no rows.")
    first = head[-1][1]
    if isinstance(first, RowError):
        raise UserError(*(f"{place}: {error}." for place, error in head[:MOST_BAD]))
    summary = Summary()
    summary.format, reader = readers.find(source, first, source.path)
    every = chain(head, found)
    stream = every if reader.gather is None else reader.gather(every)
    target.mkdir()
    work = partial(encode, reader, encoder, source)
    dropped: Counter[str] = Counter()
    content = {name: hashlib.sha256() for name in CONTENT}
    with (
        (target / "samples.arrow").open("wb") as file,
        (target / BAD_ROWS).open("w", encoding="utf-8") as listed,
    ):
        with pa.ipc.new_file(file, SCHEMA) as writer:
            done = _progress(_parallel(work, stream, data.num_workers), source.path)
            for batch in _refuse_bad(done) if data.bad_rows == "error" else done:
                writer.write_batch(batch.table)
                for name, hashed in content.items():
                    hashed.update(_numbers(batch.table, name).tobytes())
                for place, reason in batch.bad:
                    listed.write(json.dumps({"row": place, "reason": reason}, ensure_ascii=False) + "\n")
                dropped.update(batch.dropped)
                _add(summary, batch)
        for stream_ in (file, listed):
            stream_.flush()
            os.fsync(stream_.fileno())
    summary.dropped = dict(dropped)
    if not summary.used:
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in [*dropped.items(), ("bad", summary.bad)] if n)
        remedy = (
            "raise data.max_length" if any(r.endswith((" tokens", " cut")) for r in dropped) else "look at its format"
        )
        raise UserError(f"{source.path}: no sample is left of {summary.read:,} rows ({reasons}); {remedy}.")
    whole = hashlib.sha256("".join(hashed.hexdigest() for hashed in content.values()).encode())
    figures = {"fingerprint": whole.hexdigest()[:24], "summary": asdict(summary)}
    text = json.dumps({**meta, **figures, "samples.arrow": checksum(target / "samples.arrow")}, indent=1)
    with (target / "meta.json").open("w") as stream_:
        stream_.write(text)
        stream_.flush()
        os.fsync(stream_.fileno())


def encode(reader: readers.ReaderSpec, encoder: Encoder, source: SourceSection, batch: Sequence[rows.Row]) -> Batch:
    """Tokenise some rows."""
    out = Batch(table=None, rows=len(batch))
    samples: list[Sample] = []
    turns: list[int] = []
    hashes: list[int] = []
    for place, row in batch:
        try:
            if isinstance(row, RowError):
                raise row
            item = readers.convert(reader, row, source)
            encoded = encoder(item)
        except Dropped as dropped:
            out.dropped[str(dropped)] += 1
            continue
        except RowError as error:
            out.bad.append((place, str(error)))
            continue
        out.used += 1
        out.cut += encoded.cut
        out.split += encoded.split
        out.dropped.update(f"one turn: {reason}" for reason in encoded.dropped)
        samples += encoded.samples
        turns += range(len(encoded.samples))
        group = row.get(oasst.TREE) if reader.gather is not None else None
        hashes += [_hash(group or _content(item))] * len(encoded.samples)
    columns: Mapping[str, Any] = {
        "input_ids": [s.input_ids for s in samples],
        "trained": [s.trained.reshape(-1) for s in samples],
        "weights": [() if s.weights is None else s.weights for s in samples],
        "length": [len(s.input_ids) for s in samples],
        "shared": [s.shared for s in samples],
        "turn": turns,
        "row": hashes,
    }
    out.trained_tokens = sum(len(trained_positions(s)) for s in samples)
    out.table = pa.RecordBatch.from_pydict(columns, SCHEMA)
    return out


def checksum(file: Path) -> dict[str, int]:
    """Return the size of a file and its CRC-32."""
    crc = 0
    with file.open("rb") as stream:
        while block := stream.read(CHECKSUM_BLOCK):
            crc = zlib.crc32(block, crc)
    return {"bytes": file.stat().st_size, "crc32": crc}


def _numbers(table: pa.RecordBatch, name: str) -> NDArray[Any]:
    """Return the numbers of a column, lists one behind the other; or (#) the lists' lengths."""
    column = table[name.removeprefix("#")]
    if name.startswith("#"):
        return view(column.value_lengths())
    values = column.flatten() if pa.types.is_list(column.type) else column
    return view(values, np.dtype(values.type.to_pandas_dtype()).type)


def _content(item: Conversation | Pair | Tokens) -> Any:
    """Return what a row's hash is of: of a pair its prompt, so that none is both trained on and validated on."""
    if isinstance(item, Pair):
        return [item.chosen.messages[:-1], item.chosen.tools]
    return vars(item) if isinstance(item, Conversation) else item


def _hash(content: Any) -> int:
    """Return 64 bits of a hash of a row's content."""
    text = json.dumps(content, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _add(summary: Summary, batch: Batch) -> None:
    lengths = view(batch.table["length"])
    summary.read += batch.rows
    summary.used += batch.used
    summary.documents += len(lengths)
    summary.cut += batch.cut
    summary.split += batch.split
    summary.bad += len(batch.bad)
    summary.tokens += int(np.sum(lengths))
    summary.trained_tokens += batch.trained_tokens
    summary.longest = max(summary.longest, int(np.max(lengths, initial=0)))


def _refuse_bad(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Pass batches on; raise UserError for the first bad rows, a few at once."""
    bad: list[tuple[str, str]] = []
    after = 0
    for batch in batches:
        bad += batch.bad
        if not bad:
            yield batch
        after += bool(bad)
        if len(bad) >= MOST_BAD or after > BATCHES_AFTER_BAD:
            break
    if bad:
        raise UserError(*(f"{place}: {reason}." for place, reason in bad[:MOST_BAD]))


def _parallel(work: Callable[[Any], Batch], source: Iterator[rows.Row], num_workers: int | None) -> Iterator[Batch]:
    """Map batches of rows in order, in processes of their own where there are many."""
    global _work
    batches = iter(lambda: tuple(islice(source, ROWS_PER_BATCH)), ())
    head = list(islice(batches, 2))
    workers = num_workers or min(
        8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    if len(head) < 2 or workers == 1:
        yield from map(work, chain(head, batches))
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _work = work  # inherited by fork: neither tokenizer nor template is pickled
    waiting: deque[Future[Batch]] = deque()
    pool = ProcessPoolExecutor(workers, mp_context=get_context("fork"), initializer=_end_with_parent)
    try:
        for batch in chain(head, batches):
            waiting.append(pool.submit(_do_work, batch))
            if len(waiting) > 3 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise RunError("a process that tokenises was killed (out of memory?); lower data.num_workers.") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        _work = None


_work: Callable[[Any], Batch] | None = None


def _end_with_parent() -> None:
    """End this process when the one that started it is killed: the pool itself would wait for work for ever."""

    def watch() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def _do_work(batch: Any) -> Batch:
    assert _work is not None
    return _work(batch)


def _progress(batches: Iterator[Batch], path: str) -> Iterator[Batch]:
    """Show rows as they are done, on a terminal."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("tokenizing {task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,} rows"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(Path(path).name, total=None)
        for batch in batches:
            progress.advance(task, batch.rows)
            yield batch
