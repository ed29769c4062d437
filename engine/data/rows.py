"""Rows of a source, one at a time, each with the place it came from: file and line, for the sentence that may follow."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.config.checks import BUILTIN, looks_local
from engine.data import tasks
from engine.errors import UserError

Row = tuple[str, dict[str, Any]]
BUILTIN_ROWS = {"tasks/train": (40_000, 0), "tasks/heldout": (400, 2026)}
"""Number of rows and seed of each built-in set."""
JSON_SUFFIXES = {".json", ".jsonl", ".ndjson", ".gz"}


def read(path: str, split: str, revision: str | None = None) -> Iterator[Row]:
    """Yield (place, row) of a local JSON or JSONL file, a built-in set, or a hub data set through ``datasets``.

    Args:
        path: ``data.train_path`` or ``data.val_path``.
        split: Split of a hub data set or of a folder in the hub's layout.
        revision: Revision of a hub data set.

    Raises:
        UserError: For a file that is empty or not JSON, naming the line.
    """
    if path.startswith(BUILTIN):
        yield from _builtin(path)
    elif looks_local(path) and Path(path).expanduser().is_file() and Path(path).suffix in JSON_SUFFIXES:
        yield from _json_file(Path(path).expanduser())
    else:
        yield from _datasets(path, split, revision)


def fingerprint(path: str, split: str, revision: str | None) -> str:
    """Return a hash of a source's content (a local file, folder or built-in set) or of its name (a hub data set)."""
    digest = hashlib.sha256()
    if path.startswith(BUILTIN):
        digest.update(
            f"{path} {BUILTIN_ROWS.get(path.removeprefix(BUILTIN))}".encode() + Path(tasks.__file__).read_bytes()
        )
    elif looks_local(path):
        root = Path(path).expanduser()
        for file in sorted(f for f in root.rglob("*") if f.is_file()) if root.is_dir() else [root]:
            with file.open("rb") as stream:
                digest.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
        digest.update(split.encode() if root.is_dir() else b"")
    else:
        digest.update(f"{path}@{split}@{revision}".encode())
    return digest.hexdigest()


def _builtin(path: str) -> Iterator[Row]:
    name = path.removeprefix(BUILTIN)
    if name not in BUILTIN_ROWS:
        raise UserError(f"data: {path} is no built-in set; there is {', '.join(BUILTIN + n for n in BUILTIN_ROWS)}.")
    for i, row in enumerate(tasks.generate(name.removeprefix("tasks/"), *BUILTIN_ROWS[name])):
        yield f"{path} row {i + 1}", row


def _json_file(file: Path) -> Iterator[Row]:
    number = 0
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            first = next((line for line in stream if line.strip().strip(codecs.BOM_UTF8)), b"")
            stream.seek(0)
            if first.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
                yield from _array(file, stream.read().decode("utf-8-sig"))
                return
            for number, line in enumerate(stream, 1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield _line(f"{file} line {number}", text)
    except UnicodeDecodeError as error:
        where = f" line {number}" if number else ""
        raise UserError(
            f"{file}{where}: not UTF-8 text ({error.reason} at byte {error.start}); convert it to UTF-8."
        ) from error
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{file}: not a whole gzip file ({error}).") from error
    if not first:
        raise UserError(f"{file}: the file has no rows.")


def _line(place: str, text: str) -> Row:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise UserError(f"{place}: not JSON ({error}); each line holds one JSON object.") from error
    if not isinstance(row, dict):
        raise UserError(f"{place}: a row must be a JSON object, got {text.strip():.60}.")
    return place, row


def _array(file: Path, text: str) -> Iterator[Row]:
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise UserError(
            f"{file}: not JSON ({error}); the file holds an array of objects, or one object a line."
        ) from error
    if not rows:
        raise UserError(f"{file}: the array has no rows.")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{file} row {number}: a row must be a JSON object, got {json.dumps(row):.60}.")
        yield f"{file} row {number}", row


def _datasets(path: str, split: str, revision: str | None) -> Iterator[Row]:
    import datasets

    try:
        rows = datasets.load_dataset(
            str(Path(path).expanduser()) if looks_local(path) else path, split=split, revision=revision
        )
    except Exception as error:  # datasets raises a dozen unrelated types here; each ends the run with its own sentence
        raise UserError(f"data: {path} (split {split}) cannot be loaded: {' '.join(str(error).split())}") from error
    for number, row in enumerate(rows, 1):
        yield f"{path} split {split} row {number}", row


def hub_revision(path: str) -> str | None:
    """Return the commit of a hub data set, or its newest cached one when the hub is out of reach; None for what is local.

    Raises:
        UserError: If neither has it.
    """
    if path.startswith(BUILTIN) or looks_local(path):
        return None
    from huggingface_hub import CacheNotFound, HfApi, scan_cache_dir

    try:
        return str(HfApi().dataset_info(path).sha)
    except Exception as error:  # whatever the network, the hub or its client raises, the cache is asked next
        try:
            cached = [r for r in scan_cache_dir().repos if r.repo_id == path and r.repo_type == "dataset"]
        except CacheNotFound:
            cached = []
        commits = sorted(((v.last_modified, v.commit_hash) for r in cached for v in r.revisions), reverse=True)
        if not commits:
            raise UserError(
                f"data: {path} is neither a file here nor a data set that the hub or its cache has; check the name or the network."
            ) from error
        return str(commits[0][1])
