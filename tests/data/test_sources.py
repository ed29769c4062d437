"""Reading rows: every kind of file and folder, splits and slices, tools that no schema touches, corrupt input."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config.schema import SourceSection
from engine.data import readers, rows, textfile
from engine.data.conversation import RawJson, RowError
from engine.errors import UserError
from tests.conftest import ROOT, SHARED_DATA


@pytest.fixture(scope="module", autouse=True)
def _own_folder_of_datasets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


def source_of(path: Path | str, **keys: Any) -> SourceSection:
    return SourceSection(name="x", path=str(path), **keys)


def read(path: Path | str, **keys: Any) -> list[Any]:
    """Return the rows of a source without their places."""
    return [row for _, row in rows.read(source_of(path, **keys))]


def lines(*items: Any) -> bytes:
    return b"".join(json.dumps(item, ensure_ascii=False).encode() + b"\n" for item in items)


def as_csv(items: list[dict[str, str]], delimiter: str = ",") -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(items[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(items)
    return out.getvalue().encode()


def hub_layout(
    folder: Path, splits: dict[str, list[dict[str, Any]]], subset: str = "default", suffix: str = "parquet"
) -> Path:
    """Write rows the way a data set of the hub has them: files by split, and a card that says which is which."""
    (folder / "data").mkdir(parents=True)
    for split, items in splits.items():
        file = folder / "data" / f"{split}-00000-of-00001.{suffix}"
        if suffix == "parquet":
            pq.write_table(pa.Table.from_pylist(items), file)
        elif suffix == "json":
            file.write_text(json.dumps(items, indent=1))
        else:
            file.write_bytes(gzip.compress(lines(*items)) if suffix.endswith("gz") else lines(*items))
    files = [{"split": split, "path": f"data/{split}-*"} for split in splits]
    card = yaml.safe_dump({"configs": [{"config_name": subset, "data_files": files}]})
    (folder / "README.md").write_text(f"---\n{card}---\n")
    return folder


# --- the same rows from every kind of file ---------------------------------------------------------------------------

QA = [{"question": f'é😀 {i}, "a"\n', "answer": f"中 {i:03}"} for i in range(10)]


def write_saved(path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(QA).save_to_disk(path)


def write_saved_splits(path: Path) -> None:
    import datasets

    datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(QA), "test": datasets.Dataset.from_list(QA[:1])}
    ).save_to_disk(path)


def write_arrow(path: Path) -> None:
    table = pa.Table.from_pylist(QA)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def write_hub_csv(path: Path) -> None:
    path.mkdir()
    (path / "train.csv").write_bytes(as_csv(QA))


WRITE: dict[str, Callable[[Path], Any]] = {
    "rows.jsonl": lambda path: path.write_bytes(lines(*QA)),
    "rows.ndjson": lambda path: path.write_bytes(b"\n \n" + lines(*QA)),
    "rows.json": lambda path: path.write_text(json.dumps(QA, indent=2)),
    "lines.json": lambda path: path.write_bytes(b"\xef\xbb\xbf" + lines(*QA)),
    "bom.json": lambda path: path.write_bytes(b"\xef\xbb\xbf" + json.dumps(QA, ensure_ascii=False).encode()),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines(*QA))),
    "rows.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(QA).encode())),
    "rows.csv": lambda path: path.write_bytes(as_csv(QA)),
    "rows.csv.gz": lambda path: path.write_bytes(gzip.compress(as_csv(QA))),
    "rows.tsv": lambda path: path.write_bytes(as_csv(QA, "\t")),
    "rows [1].parquet": lambda path: pq.write_table(pa.Table.from_pylist(QA), path),
    "rows.arrow": write_arrow,
    "saved": write_saved,
    "saved with splits": write_saved_splits,
    "hub layout, parquet": lambda path: hub_layout(path, {"train": QA, "test": QA[:1]}),
    "hub layout, jsonl": lambda path: hub_layout(path, {"train": QA, "test": QA[:1]}, suffix="jsonl"),
    "hub layout, jsonl.gz": lambda path: hub_layout(path, {"train": QA, "test": QA[:1]}, suffix="jsonl.gz"),
    "hub layout, json": lambda path: hub_layout(path, {"train": QA, "test": QA[:1]}, suffix="json"),
    "hub layout, csv": write_hub_csv,
}
SLICES = {
    "train": QA,
    "train[:3]": QA[:3],
    "train[7:]": QA[7:],
    "train[2:4]": QA[2:4],
    "train[-3:]": QA[-3:],
    "train[:-8]": QA[:-8],
    "train[-300:2]": QA[:2],
    "train[:10%]": QA[:1],
    "train[25%:75%]": QA[2:8],  # as datasets rounds: 2.5 to 2, 7.5 to 8
    "train[-20%:]": QA[-2:],
    "train[5:5]": [],
    "train[8:400]": QA[8:],
}


@pytest.mark.parametrize("name", WRITE)
def test_the_same_rows_and_slices_of_every_kind(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    WRITE[name](path)
    for split, expected in SLICES.items():
        assert read(path, split=split) == expected, split
    assert read(path, limit=4) == QA[:4]
    assert read(path, split="train[5:]", limit=2) == QA[5:7]
    if "." not in name.split(",")[0] and name not in ("saved", "hub layout, csv"):
        assert read(path, split="test") == QA[:1]
        assert read(path, split="train[:2] + test") == [*QA[:2], QA[0]]
        with pytest.raises(UserError) as error:
            read(path, split="validation")
        assert str(error.value) == f"{path}: no split 'validation'; there is train, test."
    elif name != "hub layout, csv":  # one split, whatever it is called
        assert read(path, split="anything[:1]") == QA[:1]
        with pytest.raises(UserError, match="has one split, and split train\\+test adds several; name one of them."):
            read(path, split="train+test")


def test_slices_are_those_of_datasets(tmp_path: Path) -> None:
    import datasets

    file = tmp_path / "rows.parquet"
    items = [{"i": i} for i in range(37)]
    pq.write_table(pa.Table.from_pylist(items), file)
    for split in ("train[:33%]", "train[33%:66%]", "train[-13%:]", "train[5%:-5%]", "train[-7:-2]", "train[1:10%]"):
        theirs = datasets.load_dataset("parquet", data_files=str(file), split=split)
        assert read(file, split=split) == theirs.to_list(), split


def test_places(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\n" + lines(*QA[:2]))
    assert [place for place, _ in rows.read(source_of(file))] == [f"{file} line 2", f"{file} line 3"]
    (tmp_path / "a.csv").write_bytes(as_csv(QA[:2]))  # each question ends with a line end
    places = [place for place, _ in rows.read(source_of(tmp_path / "a.csv"))]
    assert places == [f"{tmp_path}/a.csv line 2", f"{tmp_path}/a.csv line 4"]
    hub = hub_layout(tmp_path / "hub", {"train": QA})
    assert next(rows.read(source_of(hub, split="train[6:]")))[0] == f"{hub} split train row 7"


def test_subsets(tmp_path: Path) -> None:
    hub = hub_layout(tmp_path / "hub", {"train": QA}, subset="main", suffix="jsonl")
    (hub / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files: data/*\n- config_name: other\n  data_files: other/*\n---\n"
    )
    (hub / "other").mkdir()
    (hub / "other" / "train.jsonl").write_bytes(lines(*QA[:2]))
    assert read(hub, subset="main") == QA
    assert read(hub, subset="other") == QA[:2]
    with pytest.raises(
        UserError, match=r"cannot be loaded \(Config name is missing.*\); check path, split, subset and revision\."
    ):
        read(hub)


def test_values_of_csv_are_strings_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    for file in (tmp_path / "a.csv", tmp_path / "hub" / "train.csv"):
        file.write_text("question,answer\n007,NA\n1e3,\n")
        assert read(file) == [{"question": "007", "answer": "NA"}, {"question": "1e3", "answer": ""}]
    assert read(tmp_path / "hub") == read(tmp_path / "a.csv")


def test_a_hub_set_is_read_from_the_cache_when_the_hub_is_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub's cache made by hand: two commits, main is the second."""
    root = tmp_path / "datasets--team--chat"
    (root / "refs").mkdir(parents=True)
    commits = ["a" * 40, "b" * 40]
    (root / "refs" / "main").write_text(commits[1])
    for i, commit in enumerate(commits):
        hub_layout(root / "snapshots" / commit, {"train": [TOOL_ROWS[i]]}, suffix="jsonl")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    assert read("team/chat") == [TOOL_ROWS[1]]
    assert read("team/chat", revision=commits[0]) == [TOOL_ROWS[0]]


def test_a_hub_set_that_is_nowhere() -> None:
    with pytest.raises(UserError) as error:
        read("team/nothing")
    assert str(error.value).startswith("data: team/nothing (split train) cannot be loaded (")
    with pytest.raises(UserError) as error:
        rows.hub_revision(source_of("team/nothing", revision="v1"))
    assert str(error.value) == (
        "data: team/nothing at revision v1 is neither a file here nor a data set that the hub or its cache has; check the name or "
        "the network."
    )


def test_builtin_sets() -> None:
    assert len(read("builtin:tasks/heldout")) == 400
    assert read("builtin:tasks/heldout", split="train[-1:]") == read("builtin:tasks/heldout")[-1:]
    with pytest.raises(UserError, match="builtin:tasks/other is no built-in set"):
        read("builtin:tasks/other")


def test_the_fingerprint_is_that_of_what_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines(*QA))
    (tmp_path / "b.jsonl").write_bytes(lines(*QA))
    hub = hub_layout(tmp_path / "hub", {"train": QA})
    whole = rows.fingerprint(source_of(file))
    assert whole == rows.fingerprint(source_of(tmp_path / "b.jsonl", split="anything", revision="v1", weight=2.0))
    others = [
        source_of(file, split="train[:3]"),
        source_of(file, limit=3),
        source_of(hub),
        source_of(hub, split="test"),
        source_of(hub, subset="a"),
        source_of("team/set"),
        source_of("team/set", revision="v1"),
        source_of("team/set", subset="a"),
        source_of("team/set", split="test"),
        source_of("builtin:tasks/train"),
        source_of("builtin:tasks/train", limit=2),
    ]
    assert len({whole, *map(rows.fingerprint, others)}) == len(others) + 1
    file.write_bytes(lines(*QA[1:]))
    assert rows.fingerprint(source_of(file)) != whole


# --- tools -----------------------------------------------------------------------------------------------------------


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)[:1]}
    return {"type": "function", "function": {"name": name, "description": name, "parameters": parameters}}


def tool_row(name: str, arguments: Any, *tools: dict[str, Any]) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    asked = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    return {
        "messages": [*asked, {"role": "tool", "content": "{}"}, {"role": "assistant", "content": "."}],
        "tools": list(tools),
    }


TOOL_ROWS = [
    tool_row(
        "weather",
        {"city": "Lima", "when": {"day": 3}},
        tool("weather", city={"type": "string"}, when={"type": "object"}),
    ),
    tool_row(
        "sum", {"numbers": [1, 2.5]}, tool("sum", numbers={"type": "array", "items": {"type": "number"}}), tool("now")
    ),
]
NULLS = tool_row(
    "mail", {"to": "a", "cc": None}, tool("mail", to={"type": "string"}, cc={"type": "null", "default": None})
)


def conversations_of(path: Path, **keys: Any) -> list[Any]:
    source = source_of(path, **keys)
    found = list(rows.read(source))
    _, spec = readers.find(source, found[0][1], str(path))
    return [readers.convert(spec, row, source) for _, row in found]


@pytest.mark.parametrize("kind", ["a.jsonl", "a.json", "hub jsonl", "hub json", "hub jsonl.gz"])
def test_tools_with_different_arguments_from_json(kind: str, tmp_path: Path) -> None:
    """Nothing is filled in, and a null that is written is kept."""
    items = [*TOOL_ROWS, NULLS]
    path = tmp_path / kind
    if kind.startswith("hub"):
        hub_layout(path, {"train": items}, suffix=kind.split()[1])
    else:
        path.write_bytes(lines(*items) if kind.endswith("l") else json.dumps(items).encode())
    assert read(path) == items
    made = conversations_of(path)
    for conversation, item in zip(made, items, strict=True):
        assert conversation.tools == item["tools"]
        assert conversation.messages == item["messages"]


@pytest.mark.parametrize("kind", ["hub", "file.parquet", "saved", "file.arrow"])
def test_tools_with_different_arguments_from_structs(kind: str, tmp_path: Path) -> None:
    """What the union of their schemas filled in is taken out, there and nowhere else."""
    import datasets

    items = [{**row, "extra": {"a": None, "b": 1}} for row in TOOL_ROWS]
    path = tmp_path / kind
    if kind == "hub":
        hub_layout(path, {"train": items})
    elif kind == "saved":
        datasets.Dataset.from_list(items).save_to_disk(path)
    elif kind == "file.parquet":
        pq.write_table(pa.Table.from_pylist(items), path)
    else:
        table = pa.Table.from_pylist(items)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    for row, item in zip(read(path), items, strict=True):
        assert row["tools"] == item["tools"]
        assert [turn.get("tool_calls") for turn in row["messages"]] == [t.get("tool_calls") for t in item["messages"]]
        assert row["extra"] == {"a": None, "b": 1}
    for conversation, item in zip(conversations_of(path), items, strict=True):
        assert (conversation.messages, conversation.tools) == (item["messages"], item["tools"])


def test_tools_as_json_strings_in_parquet(tmp_path: Path) -> None:
    """Arguments and tools that are strings keep every character and every null."""
    items = []
    for row in [*TOOL_ROWS, NULLS]:
        item = json.loads(json.dumps(row))
        function = item["messages"][1]["tool_calls"][0]["function"]
        function["arguments"] = json.dumps(function["arguments"], indent=2)
        items.append({**item, "tools": json.dumps(row["tools"])})
    hub = hub_layout(tmp_path / "hub", {"train": items})
    for conversation, item, row in zip(conversations_of(hub), items, [*TOOL_ROWS, NULLS], strict=True):
        arguments = conversation.messages[1]["tool_calls"][0]["function"]["arguments"]
        assert isinstance(arguments, RawJson)
        assert arguments.text == item["messages"][1]["tool_calls"][0]["function"]["arguments"]
        assert arguments == row["messages"][1]["tool_calls"][0]["function"]["arguments"]
        assert conversation.tools == row["tools"]


def test_json_columns_of_datasets(tmp_path: Path) -> None:
    """What datasets itself keeps as JSON comes back as it was, nulls too."""
    import datasets

    items = [*TOOL_ROWS, NULLS]
    made = datasets.Dataset.from_list(items, on_mixed_types="use_json")
    made.to_parquet(tmp_path / "a.parquet")
    made.save_to_disk(tmp_path / "saved")
    json_tools = datasets.Features(
        {"messages": datasets.List(datasets.Json()), "tools": datasets.List(datasets.Json())}
    )
    datasets.Dataset.from_list(items, features=json_tools).save_to_disk(tmp_path / "all json")
    assert read(tmp_path / "all json") == items
    for path in (tmp_path / "a.parquet", tmp_path / "saved"):
        for conversation, item in zip(conversations_of(path)[:2], items[:2], strict=True):
            assert (conversation.messages, conversation.tools) == (item["messages"], item["tools"])


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="needs ../shared/data")
def test_glaive_tool_calls_keep_every_byte() -> None:
    file = SHARED_DATA / "glaive_toolcall_en_demo.json"
    source = source_of(file)
    raw = file.read_bytes()
    found = list(rows.read(source))
    name, spec = readers.find(source, found[0][1], "glaive")
    assert (name, len(found)) == ("sharegpt", len(json.loads(raw)))
    count = 0
    for _, row in found:
        conversation = readers.convert(spec, row, source)
        assert [t["function"] for t in conversation.tools or []] == json.loads(row.get("tools") or "[]")
        values = [turn["value"] for turn in row["conversations"] if turn["from"] == "function_call"]
        turns = [turn for turn in conversation.messages if "tool_calls" in turn]
        for value, turn in zip(values, turns, strict=True):
            (call,) = turn["tool_calls"]
            arguments = call["function"]["arguments"]
            assert isinstance(arguments, RawJson) and turn["role"] == "assistant" and turn["content"] == ""
            # The whole call again, around the text of its arguments: as the file has it, escaped as JSON does.
            again = f'{{"name": {json.dumps(call["function"]["name"])}, "arguments": {arguments.text}}}'
            assert again == value
            assert json.dumps(again, ensure_ascii=False).encode() in raw or json.dumps(again).encode() in raw
            count += 1
    assert count > 100


# --- corrupt input ---------------------------------------------------------------------------------------------------

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
BAD_ROWS: dict[str, tuple[str, bytes, int, str]] = {
    # name: (file name, its bytes, the number of rows with the bad one, its place and sentence)
    "not json": (
        "a.jsonl",
        lines(GOOD) + b'{"messages": [}\n' + lines(GOOD),
        3,
        "{file} line 2: not JSON (Expecting value: line 1 column 15 (char 14)); each line holds one JSON object",
    ),
    "cut line": (
        "a.jsonl",
        lines(GOOD) + b'{"a": "b',
        2,
        "{file} line 2: not JSON (Unterminated string starting at: line 1 column 7 (char 6)); each line holds one JSON object",
    ),
    "two on a line": (
        "a.jsonl",
        b'{"a": 1} {"a": 2}\n',
        1,
        "{file} line 1: not JSON (Extra data: line 1 column 10 (char 9)); each line holds one JSON object",
    ),
    "line no object": (
        "a.jsonl",
        lines(GOOD) + b' "hello"\n',
        2,
        '{file} line 2: a row must be a JSON object, got "hello"',
    ),
    "null line": ("a.jsonl", b"null\n" + lines(GOOD), 2, "{file} line 1: a row must be a JSON object, got null"),
    "element no object": (
        "a.json",
        b'[{"a": 1}, [1, 2], {"a": 3}]',
        3,
        "{file} row 2: a row must be a JSON object, got [1, 2]",
    ),
    "too many fields": (
        "a.csv",
        b"q,a\n1,2\n1,2,3\n",
        2,
        "{file} line 3: 3 fields, and the first line names 2 columns",
    ),
    "too few fields": ("a.tsv", b"q\ta\n1\n\n2\t3\n", 2, "{file} line 2: 1 fields, and the first line names 2 columns"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_told_and_the_others_are_read(name: str, tmp_path: Path) -> None:
    file_name, content, count, sentence = BAD_ROWS[name]
    file = tmp_path / file_name
    file.write_bytes(content)
    found = list(rows.read(source_of(file)))
    assert len(found) == count
    bad = [f"{place}: {row}" for place, row in found if isinstance(row, RowError)]
    assert bad == [sentence.format(file=file)]


def test_a_row_nested_beyond_reason(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n" + lines(GOOD))
    (_, bad), (_, good) = rows.read(source_of(file))
    assert isinstance(bad, RowError) and "maximum recursion depth" in str(bad) and good == GOOD


BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    # name: (file name, its bytes, the sentence; … stands for what is left out at its end)
    "array not json": (
        "a.json",
        b'[{"a": 1},\n {"b": 2},\n oops]',
        "{file} row 3: not JSON (Expecting value: line 3 column 2 (char 23)); the file holds an array of objects, or one object a line.",
    ),
    "array cut between rows": (
        "a.json",
        b' [{"a": 1}',
        "{file} row 1: not JSON (Expecting ',' delimiter: line 1 column 11 (char 10)); the file holds an array of objects, or one "
        "object a line.",
    ),
    "array cut inside a row": (
        "a.json",
        b'[{"a": 1}, {"a": [1, 2',
        "{file} row 2: not JSON (Expecting ',' delimiter: line 1 column 23 (char 22)); the file holds an array of objects, or one "
        "object a line.",
    ),
    "array cut inside a string": (
        "a.json",
        b'[{"a": 1}, {"a": "bc',
        "{file} row 2: not JSON (Unterminated string starting at: line 1 column 18 (char 17)); the file holds an array of objects, "
        "or one object a line.",
    ),
    "array without comma": (
        "a.json",
        b'[{"a": 1} {"a": 2}]',
        "{file} row 1: not JSON (Expecting ',' delimiter: line 1 column 11 (char 10)); the file holds an array of objects, or one "
        "object a line.",
    ),
    "two arrays": (
        "a.json",
        b'[{"a": 1}]\n[{"a": 2}]',
        "{file} row 1: not JSON (Extra data: line 2 column 1 (char 11)); the file holds an array of objects, or one object a line.",
    ),
    "array without rows": ("a.json", b"[\n]\n", "{file}: the array has no rows."),
    "empty": ("a.jsonl", b"", "{file}: the file has no rows."),
    "white space": ("a.json", b"\xef\xbb\xbf \n\t\n \n", "{file}: the file has no rows."),
    "only a header": ("a.csv", b"question,answer\n", "{file}: the file has no rows."),
    "latin-1 lines": (
        "a.jsonl",
        lines(GOOD) + b'{"messages": "\xe9"}\n',
        "{file} line 2: not UTF-8 text (invalid continuation byte at byte 14); convert it to UTF-8.",
    ),
    "latin-1 array": (
        "a.json",
        b'[{"a": 1}, {"a": "\xe9"}]',
        "{file} row 2: not UTF-8 text (invalid continuation byte at byte 18); convert it to UTF-8.",
    ),
    "latin-1 csv": (
        "a.csv",
        b"q,a\n1,\xe9\n",
        "{file} line 2: not UTF-8 text (invalid continuation byte at byte 2); convert it to UTF-8.",
    ),
    "open quote": (
        "a.csv",
        b'q,a\n1,"2\n3,4\n',
        "{file} line 2: not CSV (unexpected end of data); quote fields that hold quotes, separators or line ends.",
    ),
    "column twice": ("a.csv", b"q,a,q\n1,2,3\n", "{file} line 1: a column is there twice (q, a, q); rename it."),
    "gzip cut short": (
        "a.jsonl.gz",
        gzip.compress(lines(*[GOOD] * 500), mtime=0)[:-30],
        "{file}: not a whole gzip file (Compressed file ended before the end-of-stream marker was reached); copy or make it again.",
    ),
    "gzip of something else": (
        "a.csv.gz",
        b"q,a\n",
        "{file}: not a whole gzip file (Not a gzipped file (b'q,')); copy or make it again.",
    ),
    "parquet of something else": (
        "a.parquet",
        b"nothing",
        "data: {file} (split train) cannot be loaded (Parquet file size is 7 bytes, smaller than the minimum file footer (8 bytes)); "
        "check path, split, subset and revision.",
    ),
    "unknown suffix": (
        "a.docx",
        b"PK",
        "{file}: the suffix '.docx' says nothing about its format; known are .json, .jsonl, .ndjson, .csv, .tsv, .parquet, .arrow, "
        "and .gz behind .json, .jsonl, .ndjson, .csv and .tsv.",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_read_ends_in_a_sentence(name: str, tmp_path: Path) -> None:
    file_name, content, sentence = BAD_FILES[name]
    file = tmp_path / file_name
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        read(file)
    assert str(error.value) == sentence.format(file=file)


def test_a_split_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines(GOOD))
    with pytest.raises(UserError) as error:
        read(file, split="train[:x]")
    assert (
        str(error.value)
        == "split train[:x]: not of the form train, train[:100], train[50:], train[-100:] or train[:10%]."
    )
    with pytest.raises(UserError, match="no such file or folder"):
        read(tmp_path / "nothing.jsonl")


# --- a stream --------------------------------------------------------------------------------------------------------


def test_an_array_is_not_held(tmp_path: Path) -> None:
    file, count = tmp_path / "a.json", 200_000
    row = json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello" * 10}]})
    with file.open("w") as stream:
        stream.write("[" + row)
        for _ in range(count - 1):
            stream.write(",\n" + row)
        stream.write("]")
    assert file.stat().st_size > 20_000_000
    tracemalloc.start()
    try:
        number = sum(1 for _ in rows.read(source_of(file)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert number == count
    assert peak < 50e6


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.dictionaries(st.text(max_size=6), JSON_VALUES, max_size=4), min_size=1, max_size=6),
    st.integers(1, 9),
    st.sampled_from([None, 0, 3]),
    st.booleans(),
)
def test_an_array_cut_into_small_chunks_is_the_same(
    items: Any, chunk: int, indent: int | None, ascii_only: bool
) -> None:
    content = json.dumps(items, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "replace")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(textfile, "CHUNK", chunk)
        found = [row for _, row in textfile._json_rows("a", io.BytesIO(content))]
    assert found == json.loads(content)


@settings(max_examples=200, deadline=None)
@given(st.text('[]{},:"\\u0 \n1e-é', min_size=1, max_size=5), st.integers(0, 60), st.integers(1, 9))
def test_a_damaged_array_ends_in_the_sentence_of_the_whole_text(damage: str, at: int, chunk: int) -> None:
    """The place is the one that a parser with the whole text names."""
    whole = b'[{"a": [1, 2.5e3, true, null], "\\u00e9": "x\\ny"},\n {"b": {}},\n {"c": -1}]'
    content = whole[: 1 + at] + damage.encode() + whole[1 + at :]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(textfile, "CHUNK", chunk)
        try:
            found = [row for _, row in textfile._json_rows("a", io.BytesIO(content)) if not isinstance(row, RowError)]
        except UserError as error:
            if "no rows" in str(error):
                assert json.loads(content) == []
                return
            with pytest.raises(ValueError) as theirs:
                json.loads(content.decode())
            assert f"not JSON ({theirs.value})" in str(error)
            return
    assert found == [row for row in json.loads(content) if isinstance(row, dict)]


def test_every_data_choice_is_a_source() -> None:
    """Nothing in a choice is left unread: its keys are those of the data section."""
    from engine.config.schema import DataSection

    for file in (ROOT / "conf" / "data").glob("*.yaml"):
        keys = yaml.safe_load(file.read_text())
        if "defaults" not in keys and "data" not in keys:
            assert set(keys) <= set(DataSection.model_fields), file
            assert keys["reader"] in readers.READERS, file


def test_folders_of_one_name_and_one_card_are_not_taken_for_each_other(tmp_path: Path) -> None:
    """``datasets`` would return the first one's rows for both, and the old ones for the changed folder."""
    for name, items in (("a", QA), ("b", QA[:3])):
        hub = hub_layout(tmp_path / name / "hub", {"train": items})
        assert read(hub) == items
    file = hub / "data" / "train-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist(QA[:5]), file)
    assert read(hub) == QA[:5]
