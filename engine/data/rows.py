"""Rows of a source, one at a time, each with the place it came from: file and line, for the sentence that may follow.

JSON and CSV are read here: what ``datasets`` makes of them is one Arrow schema, which fills nulls into tools whose arguments
differ and turns "007" into 7. Everything else goes through ``datasets``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from engine.config.checks import BUILTIN, looks_local
from engine.config.schema import SourceSection
from engine.data import tasks, textfile
from engine.data.conversation import Row as Row
from engine.errors import UserError

BUILTIN_ROWS = {
    "tasks/train": (40_000, 0),
    "tasks/heldout": (400, 2026),
    "task_pairs/train": (8_000, 1),
    "task_pairs/heldout": (400, 2026),
}
"""Number of rows and seed of each built-in set."""
KINDS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""What is in a file, by its suffix; .gz may follow JSON's, CSV's and TSV's."""
ROWS_PER_BATCH = 1000
_SPLIT = re.compile(r"(\w+(?:\.\w+)*)(?:\[(-?\d[\d_]*%?)?:(-?\d[\d_]*%?)?\])?")


@dataclass(frozen=True)
class _Part:
    """The rows of one split: from one number up to another (None: the end), and how many there are."""

    rows: Callable[[int, int | None], Iterator[Row]]
    count: Callable[[], int]


class _Slice(NamedTuple):
    """A piece of a split, ``train[10%:-5]``."""

    split: str
    start: int | None
    stop: int | None
    percent: bool

    def bounds(self, count: Callable[[], int]) -> tuple[int, int | None]:
        """Return the first row and the one behind the last (None: the end), counting rows only if that takes it."""
        if not self.percent and (self.start or 0) >= 0 and (self.stop or 0) >= 0:
            return self.start or 0, self.stop
        total = count()
        share = total / 100 if self.percent else 1
        ends = [default if x is None else round(x * share) for x, default in ((self.start, 0), (self.stop, total))]
        start, stop = (min(total, max(0, total + x if x < 0 else x)) for x in ends)
        return start, max(start, stop)


def read(source: SourceSection) -> Iterator[Row]:
    """Yield the rows of a local file or folder, a built-in set, or a hub data set through ``datasets``.

    Args:
        source: Its path, split (with a slice), subset, revision and limit count here.

    Raises:
        UserError: For a source that cannot be read as a whole: not there, empty, not UTF-8, no such split.
    """
    yield from islice(_read(source), source.limit)


def fingerprint(source: SourceSection) -> str:
    """Return a hash of a source's content (a local file, folder or built-in set) or of its name (a hub data set)."""
    digest = hashlib.sha256()
    path, split = source.path, source.split
    if path.startswith(BUILTIN):
        digest.update(
            f"{path} {BUILTIN_ROWS.get(path.removeprefix(BUILTIN))}".encode() + Path(tasks.__file__).read_bytes()
        )
        split = split.partition("[")[2]
    elif looks_local(path):
        root = Path(path).expanduser()
        for file in sorted(f for f in root.rglob("*") if f.is_file()) if root.is_dir() else [root]:
            with file.open("rb") as stream:
                name = str(file.relative_to(root)) if root.is_dir() else file.suffix
                digest.update(name.encode() + hashlib.file_digest(stream, "sha256").digest())
        split = f"{split}@{source.subset}" if root.is_dir() else split.partition("[")[2]
    else:
        split = f"{path}@{split}@{source.subset}@{source.revision}"
    digest.update(f"{split}@{source.limit}".encode())
    return digest.hexdigest()


def hub_revision(source: SourceSection) -> str | None:
    """Return the commit of a hub data set, or that of its copy in the cache when the hub is out of reach.

    Returns:
        The commit of ``source.revision``, or the newest; None for what is local.

    Raises:
        UserError: If neither has it.
    """
    path, revision = source.path, source.revision
    if path.startswith(BUILTIN) or looks_local(path):
        return None
    from huggingface_hub import CacheNotFound, HfApi, scan_cache_dir

    try:
        return str(HfApi().dataset_info(path, revision=revision).sha)
    except Exception as error:  # whatever the network, the hub or its client raises, the cache is asked next
        try:
            cached = [r for r in scan_cache_dir().repos if r.repo_id == path and r.repo_type == "dataset"]
        except CacheNotFound:
            cached = []
        commits = sorted(
            (v.last_modified, v.commit_hash)
            for r in cached
            for v in r.revisions
            if revision is None or revision in v.refs or v.commit_hash.startswith(revision)
        )
        if not commits:
            at = f" at revision {revision}" if revision else ""
            raise UserError(
                f"data: {path}{at} is neither a file here nor a data set that the hub or its cache has; check the name or the "
                "network."
            ) from error
        return str(commits[-1][1])


def _read(source: SourceSection) -> Iterator[Row]:
    parts = _parts(source)
    slices = [_slice(text.strip(), source.split) for text in source.split.split("+")]
    if isinstance(parts, _Part) and len(slices) > 1:
        raise UserError(f"{source.path}: has one split, and split {source.split} adds several; name one of them.")
    for piece in slices:
        if not isinstance(parts, _Part) and piece.split not in parts:
            there = ", ".join(parts) or "none"
            raise UserError(f"{source.path}: no split {piece.split!r}; there is {there}.")
        part = parts if isinstance(parts, _Part) else parts[piece.split]
        start, stop = piece.bounds(part.count)
        if stop is None or start < stop:
            yield from part.rows(start, stop)


def _slice(text: str, split: str) -> _Slice:
    found = _SPLIT.fullmatch(text)
    if found is None:
        raise UserError(f"split {split}: not of the form train, train[:100], train[50:], train[-100:] or train[:10%].")
    ends = [None if end is None else int(end.removesuffix("%")) for end in found.groups()[1:]]
    return _Slice(found[1], ends[0], ends[1], "%" in text)


def _parts(source: SourceSection) -> _Part | Mapping[str, _Part]:
    """Return the splits of a source by name, or its only one, whatever that is called."""
    if source.path.startswith(BUILTIN):
        return _made_by(partial(_builtin, source.path))
    file = Path(source.path).expanduser() if looks_local(source.path) else None
    if file is None or (file.is_dir() and not _saved(file)):
        return _hub_layout(source)
    if file.is_dir():
        return _from_disk(file, source)
    if not file.is_file():
        raise UserError(f"{source.path}: no such file or folder (the working folder is {Path.cwd()}).")
    kind = _kind(file)
    if kind in ("json", "csv", "tsv"):
        return _made_by(partial(textfile.read, str(file), file, kind))
    import datasets

    with _loading(source):
        builder = datasets.load_dataset_builder(kind, data_files=_escaped(file))
        builder.download_and_prepare()
        table = builder.as_dataset(split="train")
    return _table(table, str(file), source)


def _kind(file: Path) -> str:
    suffix = file.suffix.lower()
    if suffix == ".gz":
        kind = KINDS.get(Path(file.stem).suffix.lower(), "json")
        if kind in ("json", "csv", "tsv"):
            return kind
    if suffix not in KINDS:
        raise UserError(
            f"{file}: the suffix {suffix!r} says nothing about its format; known are {', '.join(KINDS)}, and .gz behind .json, "
            ".jsonl, .ndjson, .csv and .tsv."
        )
    return KINDS[suffix]


def _escaped(file: Path) -> str:
    """Return a path in which nothing is a wildcard."""
    return re.sub(r"([*?[])", r"[\1]", str(file.absolute()))


def _saved(folder: Path) -> bool:
    """Tell whether ``save_to_disk`` wrote a folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _made_by(make: Callable[[], Iterator[Row]]) -> _Part:
    return _Part(lambda start, stop: islice(make(), start, stop), lambda: sum(1 for _ in make()))


def _builtin(path: str) -> Iterator[Row]:
    name = path.removeprefix(BUILTIN)
    if name not in BUILTIN_ROWS:
        raise UserError(f"data: {path} is no built-in set; there is {', '.join(BUILTIN + n for n in BUILTIN_ROWS)}.")
    kind, _, split = name.partition("/")
    make = tasks.generate if kind == "tasks" else tasks.generate_pairs
    for i, row in enumerate(make(split, *BUILTIN_ROWS[name])):
        yield f"{path} row {i + 1}", row


@contextmanager
def _loading(source: SourceSection) -> Iterator[None]:
    """Turn what ``datasets`` raises, a dozen unrelated types, into a sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error.__cause__ or error).split()).rstrip(".")
        subset = f", subset {source.subset}" if source.subset else ""
        raise UserError(
            f"data: {source.path} (split {source.split}{subset}) cannot be loaded ({reason}); check path, split, subset and "
            "revision."
        ) from error


def _from_disk(folder: Path, source: SourceSection) -> _Part | Mapping[str, _Part]:
    import datasets

    with _loading(source):
        found = datasets.load_from_disk(str(folder))
    if isinstance(found, datasets.DatasetDict):
        return {name: _table(table, f"{source.path} split {name}", source) for name, table in found.items()}
    return _table(found, source.path, source)


def _hub_layout(source: SourceSection) -> Mapping[str, _Part]:
    """Return the splits of a hub data set, or of a folder in the hub's layout, as ``datasets`` makes them out."""
    builder = _builder(source)
    splits = list(builder.config.data_files or builder.info.splits or ())
    if builder.name == "json" and builder.config.field:
        raise UserError(
            f"{source.path}: its rows are under the key {builder.config.field!r} of an object; write them out as JSON lines."
        )
    if _is_text(builder):
        kind = "json" if builder.name == "json" else "tsv" if builder.config.sep == "\t" else "csv"
        return {name: _made_by(partial(_text_files, builder.config.data_files[name], kind, source)) for name in splits}
    return {name: _loaded(builder, name, source) for name in splits}


def _is_text(builder: Any) -> bool:
    """Tell whether a builder's files are read here: JSON, or CSV of the usual kind."""
    if builder.name == "csv":
        usual = type(builder.config)()
        keys = ("names", "header", "quotechar", "quoting", "escapechar", "comment", "skiprows", "usecols", "index_col")
        return builder.config.sep in (",", "\t") and all(getattr(builder.config, k) == getattr(usual, k) for k in keys)
    return bool(builder.name == "json")


def _builder(source: SourceSection) -> Any:
    """Return the builder of ``datasets``; offline, one on the files of the hub's cache where that is possible."""
    import datasets

    if looks_local(source.path):
        with _loading(source):
            return _folder_builder(Path(source.path).expanduser().absolute(), source)
    snapshot = _snapshot(source)
    with _loading(source):
        try:
            builder = datasets.load_dataset_builder(source.path, name=source.subset, revision=source.revision)
        except Exception:  # the hub is out of reach, say
            if snapshot is None:
                raise
            return _folder_builder(snapshot, source)
        if (
            builder.name == "cache" and snapshot is not None
        ):  # the hub is out of reach, and a schema was forced on its rows
            files = _folder_builder(snapshot, source)
            return files if _is_text(files) else builder
    return builder


def _folder_builder(folder: Path, source: SourceSection) -> Any:
    """Return the builder of a folder.

    ``datasets`` keeps what it made of a folder under the folder's own name and its card: another folder of that name, or the
    same one with other files, would get the old rows. So the cache is told the path and the state of every file.
    """
    import datasets

    state = [str(folder)]
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        about = file.stat()
        state.append(f"{file.relative_to(folder)} {about.st_size} {about.st_mtime_ns}")
    own = hashlib.sha256("\n".join(state).encode("utf-8", "surrogateescape")).hexdigest()[:24]
    return datasets.load_dataset_builder(
        str(folder), name=source.subset, cache_dir=str(Path(datasets.config.HF_DATASETS_CACHE) / "anneal" / own)
    )


def _snapshot(source: SourceSection) -> Path | None:
    """Return the folder of a hub data set in the hub's cache, or None if it is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(source.path, repo_type="dataset", revision=source.revision, local_files_only=True)
        )
    except LocalEntryNotFoundError:
        return None


def _loaded(builder: Any, split: str, source: SourceSection) -> _Part:
    """Return a split that ``datasets`` reads, once it is asked for."""

    def load() -> _Part:
        with _loading(source):
            builder.download_and_prepare()
            return _table(builder.as_dataset(split=split), f"{source.path} split {split}", source)

    return _Part(lambda start, stop: load().rows(start, stop), lambda: load().count())


def _table(table: Any, where: str, source: SourceSection) -> _Part:
    """Return the rows of a data set of ``datasets``; nulls that its schema put into tools are taken out."""
    features = table.features
    columns = [c for c in features if c == source.tool_key or "tool_calls" in str(features[c])]

    def rows(start: int, stop: int | None) -> Iterator[Row]:
        chosen = table.select(range(start, len(table) if stop is None else min(stop, len(table))))
        number = start
        for batch in chosen.iter(ROWS_PER_BATCH):
            for values in zip(*batch.values(), strict=True):
                number += 1
                row = dict(zip(batch, values, strict=True))
                for column in columns:
                    row[column] = _without_nulls(row[column], features[column], column == source.tool_key)
                yield f"{where} row {number}", row

    return _Part(rows, lambda: len(table))


def _without_nulls(value: Any, feature: Any, inside: bool) -> Any:
    """Return a value without the keys that are None in its tools; what is JSON text on disk stays as it is.

    Args:
        value: A column's value or part of one.
        feature: Its feature in ``datasets``.
        inside: Whether it belongs to a tool or a tool call.
    """
    item = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    if isinstance(value, list) and item is not None:
        return [_without_nulls(part, item, inside) for part in value]
    if isinstance(value, dict) and isinstance(feature, dict):
        return {
            key: _without_nulls(part, feature[key], inside or key == "tool_calls")
            for key, part in value.items()
            if part is not None or not inside
        }
    return value


def _text_files(files: list[str], kind: str, source: SourceSection) -> Iterator[Row]:
    """Yield the rows of files that ``datasets`` found, one after the other."""
    import datasets

    manager = datasets.DownloadManager()
    for name in files:
        with _loading(source):
            local = [manager.download(name)]
            if not name.endswith(".gz"):  # some other archive, or none
                local = list(manager.iter_files(manager.extract(local[0])))
        for file in local:
            yield from textfile.read(name, Path(file), kind)
